#!/bin/sh
# make check: facts that must hold of the sources. Silence is good; the last line is "check: ok".
bad=0
say() { echo "check: $*"; bad=1; }
cc=${CC:-cc} cxx=${CXX:-g++}
tracked() { git ls-files "$@" 2>/dev/null; }

# the trainer is C11 and, as half of it is the .cu too, C++17
warn="-Wall -Wextra -Wno-unknown-pragmas -fsyntax-only"
$cc -std=c11 $warn -Werror train_litespark.c || say "train_litespark.c does not compile as C11"
if command -v "$cxx" >/dev/null; then
    $cxx -x c++ -std=c++17 $warn -Werror train_litespark.c || say "train_litespark.c does not compile as C++17"
else
    echo "skipped: check as C++ (apt-get install g++)"
fi

# the text: shared regions, same functions in both, width of lines
if python3 -c '' 2>/dev/null; then
    python3 dev/story.py check || say "the trainers' texts, see above"
else
    echo "skipped: check of the trainers' texts (python3)"
fi

# kernels in dev/ are the shipped ones
if python3 -c '' 2>/dev/null; then
    python3 dev/kernels.py check || say "kernels of train_litespark.cu and dev/ differ"
else
    echo "skipped: check of the kernels in dev/ (python3)"
fi

# the planner's counts are those of dev/results/kernel_counts.json
if python3 -c '' 2>/dev/null; then
    python3 dev/speed_model.py --planner check || say "the planner of train_litespark.c and dev/speed_model.py differ"
else
    echo "skipped: check of the planner's counts (python3)"
fi

# no data in the repository but the fixture
binaries=$(tracked '*.bin' | grep -v '^dev/fixture/')
[ -z "$binaries" ] || say "tracked data: $binaries"

# every target is in the README
for t in $(sed -n 's/^\.PHONY: *//p' Makefile); do
    [ $t = help ] && continue                       # that is `make` alone
    grep -Eq "(make |\\|)$t\b" README.md 2>/dev/null || say "README.md does not name 'make $t'"
done

[ $bad = 0 ] && echo "check: ok"
exit $bad
