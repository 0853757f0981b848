#!/bin/sh
# Minutes on a machine with one Hopper GPU: proof and measurements, prepared beforehand. It has not met one yet.
#
#   make gpu-quick-build                                    here: builds all that is run, into build/gpu-quick (nvcc; no MPI)
#   OUT=folder dev/gpu_quick.sh                             there: no nvcc, make, git or MPI; python3 for all but facts and proof
#   PARTS='facts proof' DEADLINE=120 OUT=folder dev/gpu_quick.sh       some parts, in this many seconds; 360 are enough for all but benchmark
#
# It writes OUT/results.jsonl (a line per result, as it comes), OUT/summary.md (again after each part) and OUT/log.txt (what the
# programs said). A part that reaches its limit is killed, its rows stay, and the next goes on. Seconds that a part leaves go to those
# after it; what no longer fits before the deadline is skipped, and said so. LIMITS='proof=20 kernels=9' sets other limits.
#
#   part        s   what
TABLE='
    facts      10   name, driver, clocks, power (nvidia-smi)
    proof      75   build/test_cuda on this GPU, quick; and the gradients with the other form of the MLP
    vocabulary 15   two updates with V = 151,936 against the twin
    sanitizer  35   compute-sanitizer memcheck and racecheck on one small bf16 case with documents
    training  115   tokens/s, MFU, J/token: layers of llama3.2-1B and 3B, the whole 3B, presets; medians after warm-up
    kernels    25   time of each kernel of one update (ncu) beside the modelled one
    attention  45   the attention benches, beside PyTorch SDPA and torch.matmul
    hf         35   Hugging Face Llama + SDPA, eager and compiled, on the same layers
    benchmark 480   dev/benchmark.py: the whole 3B and what else fits beside Hugging Face and compiled PyTorch, losses checked
'
# In an emulation: CUDA_TRAINER=build/train_litespark_emu TINY=1 (small shapes), see dev/test_gpu_quick.py.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-out/gpu-quick} BIN=${BIN:-build/gpu-quick} DEADLINE=${DEADLINE:-840} LIMITS=${LIMITS:-} GRACE=${GRACE:-5}
CUDA_TRAINER=${CUDA_TRAINER:-$BIN/train_litespark_cuda}
export OUT BIN CUDA_TRAINER

# ---- rows ------------------------------------------------------------------------------------------------------------------
quoted() { printf '"%s"' "$(printf '%s' "$1" | tr '\n\t' '  ' | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"; }
# row key value key value ...: a line of results.jsonl, and of the screen
row() {
    line=
    while [ $# -gt 1 ]; do
        line="$line${line:+, }$(quoted "$1"): $(quoted "$2")"
        shift 2
    done
    printf '{%s}\n' "$line" >>"$OUT/results.jsonl"
    printf '{%s}\n' "$line" >&3
}

# ---- the parts that need no python ------------------------------------------------------------------------------------------
facts() {
    row part facts name commit value "$(cat "$BIN/commit" 2>/dev/null || echo unknown)"
    row part facts name machine value "$(grep -c ^processor /proc/cpuinfo) CPUs, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r)"
    row part facts name libcublasLt value "${CUBLAS:-on the usual path}"
    fields=name,driver_version,compute_cap,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu,ecc.mode.current,mig.mode.current
    values=$(nvidia-smi --query-gpu=$fields --format=csv,noheader | head -n 1)
    [ -n "$values" ] || { echo "skipped: nvidia-smi does not answer"; exit 3; }
    echo "$values" | tr ',' '\n' | sed 's/^ *//' | {
        for field in $(echo $fields | tr ',' ' '); do
            IFS= read -r value && row part facts name "$field" value "$value"
        done
    }
    nvidia-smi -q -d CLOCK,POWER,PERFORMANCE,TEMPERATURE
}

# one run of build/test_cuda; its lines become rows as they come
prove() {
    form=$1 seconds=$2 command=$3
    shift 3
    timeout -k 2 "$seconds" "$BIN/test_cuda" --twin "$BIN/train_litespark" --double "$BIN/train_litespark_double" --cuda "$command" \
        --level quick --timeout 60 "$@" 2>&1 | while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in
            'ok  '*) row part proof mlp "$form" says ok check "${line#ok    }" ;;
            'FAIL  '*) row part proof mlp "$form" says FAIL check "${line#FAIL  }" ;;
            'skipped: '*) row part proof mlp "$form" says skipped check "${line#skipped: }" ;;
            [0-9]*' passed, '*) row part proof mlp "$form" says end check "$line" ;;
            'error: '*) row part proof mlp "$form" says FAIL check "$line" ;;
        esac
    done
}
proof() {       # of sm_90a products are the default, so the quick level leaves the passes to the second run
    # shellcheck disable=SC2086
    prove auto $(($1 * 2 / 3)) "$CUDA_TRAINER" $PROOF_WORDS
    set --
    for c in ${PROOF_CASES:-llama mistral qwen2 qwen3 d104 d128 documents wide}; do set -- "$@" "gradients $c bf16"; done
    prove passes $((ENDS - $(date +%s))) "$CUDA_TRAINER --mlp passes" "$@"
}

case ${1:-} in
    facts | proof) "$@"; exit ;;
    '') ;;
    *) echo "usage: [OUT=folder] [PARTS='facts proof ...'] [DEADLINE=seconds] [LIMITS='part=seconds ...'] $0"; exit 2 ;;
esac

# ---- the run -----------------------------------------------------------------------------------------------------------------
START=$(date +%s)
left() { echo $((START + DEADLINE - GRACE - $(date +%s))); }
ALL=$(echo "$TABLE" | awk 'NF { print $1 }' | tr '\n' ' ')
PARTS=${PARTS:-$ALL}
for part in $PARTS; do
    case " $ALL" in *" $part "*) ;; *) echo "error: PARTS: no part '$part': choose of $ALL"; exit 2 ;; esac
done
mkdir -p "$OUT" || exit 1
for name in results.jsonl log.txt; do       # of runs before, all of them
    [ ! -s "$OUT/$name" ] || cat "$OUT/$name" >>"$OUT/before_$name" || exit 1
done
: >"$OUT/results.jsonl"
: >"$OUT/log.txt"
WORK=$(mktemp -d) STARTED=
export WORK
exec 3>&1

# Ends what a part left running: every process of its session. timeout kills its own process group only.
sweep() {
    [ -n "$1" ] || return
    for stat in /proc/[0-9]*/stat; do
        { IFS= read -r line <"$stat"; } 2>/dev/null || continue
        # shellcheck disable=SC2086
        set -- "$1" ${line##*) }
        [ "$5" != "$1" ] || { pid=${stat#/proc/}; kill -KILL "${pid%/stat}" 2>/dev/null; }
    done
}
summary() {
    if [ -n "$PYTHON" ]; then timeout 20 python3 dev/gpu_quick.py summary >>"$OUT/log.txt" 2>&1 && return; fi
    { printf '# gpu-quick\n\nWithout python3: the rows as they are.\n\n'; sed 's/^/    /' "$OUT/results.jsonl"; } >"$OUT/summary.md"
}
trap 'sweep "$STARTED"; rm -rf "$WORK"' EXIT
trap 'echo "gpu-quick: interrupted"; sweep "$STARTED"; summary; exit 130' INT TERM

# libcublasLt, which the trainer is linked with, in the usual places
lib=$(ldd "${CUDA_TRAINER##* }" 2>/dev/null | sed -n 's/^[^a-z]*\(libcublasLt[^ ]*\) => not found.*/\1/p')
PYTHON=$(command -v python3) CUBLAS='' LACKS=''
if [ -n "$lib" ]; then
    for folder in /usr/local/cuda*/lib64 /usr/local/cuda*/targets/x86_64-linux/lib /opt/cuda*/lib64 /usr/lib/x86_64-linux-gnu \
        $([ -z "$PYTHON" ] || python3 -c 'import glob, sys; print(*[f for p in sys.path if p for f in glob.glob(p + "/nvidia/*/lib")])') \
        /opt/*/.venv/lib/python3*/site-packages/nvidia/*/lib /usr/lib/python3*/*-packages/nvidia/*/lib \
        /usr/local/lib/python3*/*-packages/nvidia/*/lib; do
        [ ! -e "$folder/$lib" ] || { CUBLAS=$folder; break; }
    done
    [ -n "$CUBLAS" ] || CUBLAS=$(timeout 5 find / -xdev -name "$lib" 2>/dev/null | sed -n '1s,/[^/]*$,,p')
    if [ -n "$CUBLAS" ]; then export LD_LIBRARY_PATH="$CUBLAS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    else LACKS="no $lib in the usual places"; echo "gpu-quick: $LACKS: going on with what needs none"; fi
fi
[ -x "${CUDA_TRAINER##* }" ] || LACKS="no ${CUDA_TRAINER##* } (make gpu-quick-build)"
[ -n "$PYTHON" ] || echo "gpu-quick: no python3: facts and proof only"
export CUBLAS

# why a part cannot run here; nothing when it can
lacking() {
    case $1 in facts) command -v nvidia-smi >/dev/null || echo "no nvidia-smi"; return ;; esac
    case $1 in proof) ;; *) [ -n "$PYTHON" ] || { echo "no python3"; return; } ;; esac
    case $1 in attention | hf) ;; *) [ -z "$LACKS" ] || { echo "$LACKS"; return; } ;; esac
    case $1 in proof) [ -x "$BIN/test_cuda" ] || echo "no $BIN/test_cuda (make gpu-quick-build)" ;; esac
}

spare=0
for part in $PARTS; do
    limit=$(echo "$LIMITS" | tr ' ' '\n' | sed -n "s/^$part=//p" | head -n 1)
    if [ -z "$limit" ]; then limit=$(($(echo "$TABLE" | awk -v p="$part" '$1 == p { print $2 }') + spare)); fi
    room=$(left) why=$(lacking "$part")
    [ "$limit" -le "$room" ] || limit=$room
    [ -n "$why" ] || [ "$limit" -ge 3 ] || why="the deadline of $DEADLINE s"
    if [ -n "$why" ]; then
        end="skipped: $why" took=0
    else
        begin=$(date +%s)
        ENDS=$((begin + limit)) && export ENDS
        case $part in
            facts | proof) set -- sh dev/gpu_quick.sh "$part" "$limit" ;;
            *) set -- python3 dev/gpu_quick.py "$part" ;;
        esac
        echo "==== $part" >>"$OUT/log.txt"
        setsid timeout -k "$GRACE" "$limit" "$@" >>"$OUT/log.txt" 2>&1 </dev/null &
        STARTED=$!
        wait "$STARTED"
        status=$?
        sweep "$STARTED"
        STARTED=
        took=$(($(date +%s) - begin))
        case $status in
            0) end='done' ;;
            3) end="skipped: $(tail -n 1 "$OUT/log.txt" | sed 's/^skipped: //')" ;;
            124 | 137) end="killed at its limit of $limit s" ;;
            *) end="exit status $status: $(tail -n 1 "$OUT/log.txt")" ;;
        esac
    fi
    case $end in skipped:*) echo "skipped: $part: ${end#skipped: }" ;; esac
    row part "$part" end "$end" seconds "$took"
    spare=$((limit > took ? limit - took : 0))
    summary
done
echo "gpu-quick: $(($(date +%s) - START)) s; $OUT/summary.md, results.jsonl, log.txt"
cat "$OUT/summary.md"
! grep -q '"FAIL"' "$OUT/results.jsonl"
