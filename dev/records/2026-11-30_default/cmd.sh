#!/bin/sh
# From the project's folder: the default run (four to eight minutes on two idle cores), its log, every 100th step of it, and pictures.
# PYTHON: one with matplotlib. ARGS: more options
set -e
here=$(dirname "$0")
make run OUT=build/record_default ARGS="$ARGS" >build/record_default.txt
sed -n '/^step [0-9]*\//!p; /^step 1\//p; /^step [0-9]*00\//p' build/record_default.txt >"$here/log.txt"
PYTHON=${PYTHON:-python3}
$PYTHON dev/plot_log.py build/record_default/log.jsonl --title "the default run" -o "$here/loss.svg"
$PYTHON dev/plot_log.py build/record_default/log.jsonl --all --title "loss" -o "$here/metrics.svg"
tail -n 12 "$here/log.txt"
