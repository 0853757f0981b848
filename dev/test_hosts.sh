#!/bin/bash
# make test-hosts: the CPU trainer on three "hosts", network namespaces with an address and a host name of their own, under Open
# MPI's mpirun: the same bits as on one host; a link that is cut and a host that dies end the job with a message, no process stays,
# and --resume auto goes on to the same bits. Needs root (ip, unshare) and Open MPI; "skipped" otherwise.
set -u
cd "$(dirname "$0")/.." || exit 1
trainer=$PWD/build/train_litespark passed=0 failed=0 limit=60
top=$(mktemp -d)
hosts="10.99.7.1 10.99.7.2 10.99.7.3"
skip() { echo "skipped: test-hosts: $*"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
for tool in ip unshare sysctl mpirun python3; do
    command -v $tool >/dev/null || skip "no $tool (apt-get install iproute2 procps openmpi-bin python3)"
done
ip netns add litespark-probe 2>/dev/null && ip netns del litespark-probe || skip "this machine lets nobody make network namespaces"

# in HOST COMMAND...: runs it on that host
in_host() { local host=$1; shift; ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$host" "$@"; }
clean() {
    for host in $hosts; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9
        ip netns del "$host" 2>/dev/null
    done
    ip netns del litespark-switch 2>/dev/null
    rm -rf "$top"
}
trap clean EXIT
ip netns add litespark-switch
ip -n litespark-switch link add switch type bridge
ip -n litespark-switch link set switch up
for host in $hosts; do
    port=port${host##*.}
    ip netns add "$host"
    ip -n litespark-switch link add "$port" type veth peer name net netns "$host"
    ip -n litespark-switch link set "$port" master switch up
    ip -n "$host" addr add "$host/24" dev net
    ip -n "$host" link set net up
    ip -n "$host" link set lo up
    ip netns exec "$host" sysctl -qw net.ipv4.tcp_retries2=5        # until TCP gives up: 13 s, by default 15 minutes
    echo "$host slots=1" >>"$top/hosts"
done
# what mpirun starts its daemons by, instead of ssh: AGENT HOST COMMAND...
cat >"$top/agent" <<'END'
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
END
chmod +x "$top/agent"

python3 - "$top" <<'END'
import json, random, struct, sys
json.dump({'model_type': 'llama', 'vocab_size': 53, 'num_hidden_layers': 2, 'hidden_size': 32, 'num_attention_heads': 4,
           'num_key_value_heads': 2, 'intermediate_size': 24, 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5,
           'hidden_act': 'silu', 'tie_word_embeddings': False, 'architectures': ['LlamaForCausalLM']},
          open(sys.argv[1] + '/config.json', 'w'))
tokens = [random.Random(i).randrange(53) for i in range(4000)]
open(sys.argv[1] + '/train_0.bin', 'wb').write(struct.pack('<256i', 20240520, 1, 4000, *[0] * 253) + struct.pack('<4000H', *tokens))
END

options() {
    echo --config "$top/config.json" --train-data "$top/train_0.bin" --seq-len 16 --batch-size 1 --total-batch-tokens 96 --threads 1 \
        --sample-every 0 --val-every 0 --log-every 100 --checkpoint-every 20 --schedule constant --warmup-steps 10 --zero 1 --timeout 8 --resume auto "$@"
}
net="--mca btl_tcp_if_include 10.99.7.0/24 --mca oob_tcp_if_include 10.99.7.0/24 --mca btl tcp,self"
start() {       # OUT STEPS: three ranks, one on each host, in the background
    # shellcheck disable=SC2046,SC2086
    in_host 10.99.7.1 dev/run.sh -np 3 --hostfile "$top/hosts" --map-by node --mca plm_rsh_agent "$top/agent" --mca plm_rsh_no_tree_spawn 1 \
        $net "$trainer" $(options --out "$top/$1" --steps "$2") >"$top/said" 2>&1 &
    job=$!
    began=$SECONDS
}
wait_job() {    # its exit status; 124 after $limit seconds
    while kill -0 $job 2>/dev/null; do
        [ $((SECONDS - began)) -lt $limit ] || return 124
        sleep .1
    done
    wait $job
}
wait_step() {   # until the log of OUT has a record of step N
    for _ in $(seq 300); do
        grep -qs "\"type\": \"step\", \"step\": $2," "$top/$1/log.jsonl" && return 0
        sleep .1
    done
    return 1
}
left() { for host in $hosts; do ip netns pids "$host"; done | wc -l; }
gone() { for _ in $(seq 300); do [ "$(left)" = 0 ] && return 0; sleep .1; done; return 1; }
check() {       # TEXT COMMAND...
    local text=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "failed: $text"; sed 's/^/    /' "$top/said"; fi
}
same() {        # the last checkpoint of OUT is that of the run on one host, but for times
    local sums
    sums=$(grep -v trainer_state "$top/whole/step_00000400/checksums.txt" | sed '$d')
    [ "$sums" = "$(grep -v trainer_state "$top/$1/step_00000400/checksums.txt" | sed '$d')" ]
}

# shellcheck disable=SC2046
dev/run.sh -np 3 --oversubscribe "$trainer" $(options --out "$top/whole" --steps 400) >"$top/said" 2>&1
check "three ranks on one host" [ $? = 0 ]
start spread 400
wait_job
check "three ranks on three hosts" [ $? = 0 ]
check "three hosts give other bits than one" same spread

for fault in "link cut" "host lost"; do
    out=${fault%% *}
    start $out 1000000
    check "$fault: the run does not begin" wait_step $out 50
    began=$SECONDS
    if [ $out = link ]; then ip -n litespark-switch link set port2 down
    else ip netns pids 10.99.7.2 | xargs kill -9; fi
    wait_job
    status=$?
    echo "$fault: exit status $status after $((SECONDS - began)) s: $(grep -m 1 -E '^error: |ORTE has lost|lost connection|exited on signal' "$top/said")"
    check "$fault: exit status $status" [ $status != 0 ] && [ $status != 124 ]
    check "$fault: no message" grep -q -E '^error: rank .*waited [0-9]+ s for the other ranks|ORTE has lost|exited on signal' "$top/said"
    check "$fault: $(left) processes stay" gone
    ip -n litespark-switch link set port2 up
    for host in $hosts; do ip netns pids "$host" | xargs -r kill -9; done
    start $out 400
    wait_job
    check "$fault: cannot go on" [ $? = 0 ]
    check "$fault: goes on to other bits" same $out
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
