#!/usr/bin/env python3
"""Around the step: random weights, saves, and resume (verify and load), of two builds of the trainer in turns.

    dev/bench_io.py --old OLD/build/train_litespark --new build/train_litespark [--millions 400 | --preset 100M]
                    [--rounds 3] [--folders /dev/shm /tmp] [--ranks 1] [--threads 2] [--start 'chrt -f 10']

Saves: two while training goes on (how long it is held up, and until the checkpoint is whole), one at the end.
With --sources OLD.c NEW.c (the trainers' texts) also the numbers alone: ns per weight and GB/s of CRC-32 in
the cache, of one thread. Each time is of the whole process less that of --dry-run, so that the first touch of
the memory counts; but for saving, where the trainer says it. Medians; MB/s are those of the files. Memory: 52
bytes per parameter with a folder in memory.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import tempfile
import time

p = argparse.ArgumentParser()
p.add_argument("--old", required=True)
p.add_argument("--new", required=True)
p.add_argument("--millions", type=int, default=400)
p.add_argument("--preset")
p.add_argument("--ranks", type=int, default=1)
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--threads", type=int, default=2)
p.add_argument("--folders", nargs="+", default=["/dev/shm", "/tmp"])
p.add_argument("--sources", nargs=2)
p.add_argument("--start", default="", help="a command before the trainer's, such as 'chrt -f 10'")
a = p.parse_args()


def run(binary, *options):
    begin = time.perf_counter()
    ranks = [os.path.dirname(os.path.abspath(__file__)) + "/run.sh", "-np", str(a.ranks)] if a.ranks > 1 else []
    command = shlex.split(a.start) + [*ranks, binary, "--threads", str(a.threads), *options]
    text = subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                          capture_output=True, text=True).stdout
    return time.perf_counter() - begin, text


ALONE = r"""
#define LITESPARK_NO_MAIN
#include "SOURCE"
int main(void) {
    enum { N = 1 << 18 };
    static float x[N];
    volatile uint64_t seed = 1;
    double best[2] = {1e9, 1e9};
    for (int i = 0; i < 20; i++) {
        double start = now_seconds();
        FILL;
        best[0] = fmin(best[0], now_seconds() - start);
        start = now_seconds();
        volatile uint32_t crc = crc32_update(0, x, sizeof x);
        (void)crc;
        best[1] = fmin(best[1], now_seconds() - start);
    }
    printf("%.2f %.2f", best[0] / N * 1e9, sizeof x / best[1] * 1e-9);
}
"""
for name, source in zip(("old", "new"), a.sources or []):
    with tempfile.TemporaryDirectory() as folder, open(source, encoding="utf-8") as f:
        fill = "random_normals(x, 0.02, seed, 2, 0, N)" if "random_normals(" in f.read() else \
               "for (uint64_t j = 0; j < N; j++) x[j] = (float)(0.02 * random_normal(seed, 2, j))"
        with open(folder + "/alone.c", "w", encoding="utf-8") as f:
            f.write(ALONE.replace("SOURCE", os.path.abspath(source)).replace("FILL", fill))
        flags = ["-std=gnu11", "-w", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
                 "-fopenmp"]
        subprocess.run(["gcc", *flags, folder + "/alone.c", "-o", folder + "/alone", "-lm"], check=True)
        weight, crc = subprocess.run(shlex.split(a.start) + [folder + "/alone"], check=True,
                                     capture_output=True, text=True).stdout.split()
        print(f"{name}: {weight} ns per random weight, {crc} GB/s of CRC-32, one thread")

times = {}
for place in a.folders:
    with tempfile.TemporaryDirectory(prefix="bench_io.", dir=place) as folder:
        config, data, out = folder + "/config.json", folder + "/data.bin", folder + "/out"
        with open(config, "w", encoding="utf-8") as f:
            json.dump({"model_type": "llama", "vocab_size": 64, "hidden_size": 1024, "num_attention_heads": 8,
                       "num_key_value_heads": 8, "intermediate_size": 2816, "max_position_embeddings": 64,
                       "num_hidden_layers": max(1, round(a.millions / 12.85)), "tie_word_embeddings": True},
                      f)
        with open(data, "wb") as f:
            f.write(struct.pack("<256i", 20240520, 1, 9999, *[0] * 253))
            f.write(struct.pack("<9999H", *[i % 64 for i in range(9999)]))
        model = [*(["--preset", a.preset] if a.preset else ["--config", config]), "--train-data", data, "--seq-len", "8",
                 "--batch-size", "1", "--total-batch-tokens", str(8 * a.ranks), "--sample-every", "0"]
        for turn in range(a.rounds + 1):                 # the first warms memory and disk
            for name, binary in (("old", a.old), ("new", a.new)):
                start = run(binary, *model, "--dry-run")[0]
                none = ["--steps", "0", "--checkpoint-every", "0", "--out", out]
                init = run(binary, *model, *none)[0] - start
                text = run(binary, *model, "--steps", "18", "--checkpoint-every", "6", "--keep", "1", "--out", out)[1]
                whole = held = [float(x) for x in re.findall(r"saved .* in ([0-9.]+) s", text)]
                with open(out + "/log.jsonl", encoding="utf-8") as f:       # to the digit, where it says so
                    log = [r for r in map(json.loads, f) if r["type"] == "save"]
                if log:
                    held = [r["seconds_held_up"] for r in log]
                    whole = [r["seconds_held_up"] + r["seconds_in_background"] for r in log]
                size = sum(f.stat().st_size for f in os.scandir(out + "/step_00000018"))
                resume = run(binary, "--resume", "auto", "--steps", "18", "--out", out)[0] - start
                shutil.rmtree(out)
                for what, seconds in (("start with random weights", [init]), ("save: training is held up", held[:2]),
                                      ("save: until it is whole", whole[:2]), ("save at the end", whole[2:]),
                                      ("start with verify and load", [resume])):
                    if turn:
                        times.setdefault((place, what), {}).setdefault(name, []).extend(seconds)
print("| where | what | old s | new s | old MB/s | new MB/s | old / new |\n|---|---|---|---|---|---|---|")
for (place, what), by in times.items():
    old, new = statistics.median(by["old"]), statistics.median(by["new"])
    speeds = ["", ""] if "random" in what else [f"{size / t / 1e6:.0f}" for t in (old, new)]
    ratio = statistics.median(o / n for o, n in zip(by["old"], by["new"]))
    print(f"| {place} | {what} | {old:.3g} | {new:.3g} | {speeds[0]} | {speeds[1]} | {ratio:.2f}x |")
