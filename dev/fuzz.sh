#!/bin/sh
# make fuzz: each parser for SECONDS_EACH seconds, from small valid inputs; a crash is kept as build/fuzz-NAME-crash-*.
# The last line is "N passed, N failed".
mkdir -p build
if ! echo 'int LLVMFuzzerTestOneInput(const void *d, unsigned long n) { return !d && n; }' |
    ${CLANG:-clang} -x c - -fsanitize=fuzzer,address -o build/fuzz_probe 2>/dev/null; then
    echo "skipped: fuzz: no clang with libFuzzer (apt-get install clang libclang-rt-14-dev)"
    echo "0 passed, 0 failed, $# skipped"
    exit 0
fi
rm -f build/fuzz_probe
make -s build/fuzz || exit 1
passed=0 failed=0
for t in "$@"; do
    mkdir -p build/corpus/$t
    FUZZ_TARGET=$t FUZZ_SEEDS=1 build/fuzz build/corpus/$t
    if FUZZ_TARGET=$t build/fuzz -max_total_time=${SECONDS_EACH:-60} -max_len=4096 -rss_limit_mb=3000 -timeout=20 -print_funcs=0 \
        -print_final_stats=1 -artifact_prefix=build/fuzz-$t- build/corpus/$t >build/fuzz-$t.log 2>&1; then
        passed=$((passed + 1))
        echo "ok    fuzz $t ($(sed -n 's/^stat::number_of_executed_units: *//p' build/fuzz-$t.log) inputs)"
    else
        failed=$((failed + 1))
        echo "FAIL  fuzz $t"
        grep -E 'ERROR|SUMMARY|runtime error|Test unit written|    #[0-9] ' build/fuzz-$t.log | head -15 | sed 's/^/    /'
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
