#!/bin/sh
# make bench K=op [V='numbers']: checks the variants of dev/op.cu, then measures them (a GPU) or counts them (nvcc, ptxcpu).
# make bench K=all: checks every bench over dev/emu. The Makefile has built what this runs.
if [ "$K" = all ]; then
    failed=0 logs=
    for k in $BENCHES; do
        log=build/dev/$k/check.txt logs="$logs build/dev/$k/check.txt"
        EMU_CC=9.0 build/dev/$k/emu --quiet "$@" >$log 2>&1 || failed=1
        grep -q ' passed, [0-9]* failed$' $log || echo "$k: 0 passed, 1 failed" >>$log      # it broke off
        cat $log
    done
    awk '/: [0-9]+ passed, [0-9]+ failed$/ { p += $2; f += $4 } END { print p " passed, " f " failed" }' $logs
    exit $failed
fi
d=build/dev/$K
case $BINARIES in *gpu*) exec $d/gpu --time "$@" ;; esac

EMU_CC=9.0 $d/emu "$@" >$d/check.txt 2>&1
status=$?
cat $d/check.txt
printf '\nmodelled, not measured: no GPU answers\n'
case $BINARIES in *ptx*) ;; *) echo 'skipped: no nvcc on PATH (CUDA Toolkit 12 or newer)'; exit $status ;; esac
hopper=$(grep -q "for 'sm_90a'" $d/ptx.log && echo sm_90a=$d/ptx.log)
python3 dev/ptxas.py sm_80=$d/ptx.log $hopper
[ -f build/ptxcpu/made ] && [ -n "$PTXCPU" ] || { echo 'skipped: counts: no ptxcpu (PTXCPU=path)'; exit $status; }

# row after row of the tables, each alone in a process, so that a report holds the kernels of one variant
pairs= row=0
while rm -f $d/$row.json; do
    build/ptxcpu/ptxcpu --cache build/ptxcache --device h100 --unique --report $d/$row.json -- $d/ptx --model $row \
        >$d/$row.txt 2>&1
    grep -q '^model|' $d/$row.txt || break
    pairs="$pairs $d/$row.txt=$d/$row.json"
    row=$((row + 1))
done
[ $row -gt 0 ] || { tail -3 $d/0.txt; status=1; }
printf '\ncounted by ptxcpu; us is a model of an H100: the largest of DRAM, tensor, fp32, issue ... time; it knows no latency\n'
python3 dev/kernels.py counts $pairs || status=1
exit $status
