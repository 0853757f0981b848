#!/bin/sh
# make test: runs each command given, shows what it says, and ends with the sum of their last "N passed, N failed[, N skipped]".
# Exit status 1 if a command fails; one that ends without such a line counts as one failure.
log=build/test.log bad=0 counts=
mkdir -p build
for command in "$@"; do
    { sh -c "$command" 2>&1; echo $? >build/test.status; } | tee "$log"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ "$(cat build/test.status)" != 0 ]; then
        bad=1
        case $line in '' | *' 0 failed'*) line='0 passed, 1 failed' ;; esac
    fi
    counts="$counts
$line"
done
echo "$counts" | awk '/passed/ { gsub(/,/, ""); p += $1; f += $3; s += $5 } END { printf s ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", p, f, s }'
exit $bad
