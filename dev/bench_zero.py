#!/usr/bin/env python3
"""Seconds per update and memory of the stages of ZeRO, of one or two builds of the trainer, in turns.

    dev/bench_zero.py [--old OLD/build/train_litespark] [--new build/train_litespark] [--preset 100M] [--ranks 2]
                      [--tokens 1024] [--rounds 3] [--stages 0 1 2 3] [--start 'chrt -f 10']

Each rank has one thread and a micro-step of --tokens tokens, one per update: the least work over which weights and
gradients can be spread. Medians of the updates after the first, over all rounds; memory as the run plans it.
"""
import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import tempfile

p = argparse.ArgumentParser()
p.add_argument("--old", help="another build, whose stage 0 is the unit")
p.add_argument("--new", default="build/train_litespark")
p.add_argument("--preset", default="100M")
p.add_argument("--ranks", type=int, default=2)
p.add_argument("--tokens", type=int, default=1024)
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
p.add_argument("--start", default="", help="a command before the trainer's, such as 'chrt -f 10'")
a = p.parse_args()


def run(binary, stage, folder):
    """Seconds of each update but the first, and the line on memory."""
    data = os.path.join(folder, "data.bin")
    if not os.path.exists(data):
        tokens = bytearray(4 * 256)
        tokens[:12] = b"".join(x.to_bytes(4, "little") for x in (20240520, 1, 2 * a.ranks * a.tokens + 1))
        with open(data, "wb") as f:
            f.write(tokens + bytes(b for x in os.urandom(2 * a.ranks * a.tokens + 1) for b in (x, x % 120)))
    out = os.path.join(folder, "out")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(a.ranks),
               *shlex.split(a.start), binary, "--preset", a.preset, "--train-data", data, "--seq-len", str(a.tokens),
               "--batch-size", "1", "--total-batch-tokens", str(a.ranks * a.tokens), "--steps", "4", "--threads", "1",
               "--checkpoint-every", "0", "--sample-every", "0", "--zero", str(stage), "--out", out]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    log = os.path.join(out, "log.jsonl")
    with open(log, encoding="utf-8") as f:
        seconds = [r["time_per_iteration"] for r in map(json.loads, f) if r["type"] == "step"]
    os.remove(log)
    return seconds[1:], re.search(r"memory \| (.*?total [\d.]+ MiB)", text).group(1)


runs = ([("old", a.old, 0)] if a.old else []) + [("new", a.new, s) for s in a.stages]
times, memory = {r: [] for r in runs}, {}
with tempfile.TemporaryDirectory() as folder:
    for _ in range(a.rounds):
        for r in runs:
            seconds, memory[r] = run(r[1], r[2], folder)
            times[r] += seconds
unit = statistics.median(times[runs[0]])
print(f"{a.preset}, {a.ranks} ranks of one thread, {a.tokens} tokens each")
for r in runs:
    seconds = statistics.median(times[r])
    print(f"{r[0]} --zero {r[2]}  {seconds:7.3f} s  {seconds / unit:.3f}  ({min(times[r]):.3f} - {max(times[r]):.3f})  {memory[r]}")
