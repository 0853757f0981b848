#!/usr/bin/env python3
"""The whole proof and the benchmarks on a machine with a GPU: `make gpu-report` writes dev/results/NAME.json and NAME.md, NAME that of the GPU.

    dev/gpu_report.py [--trainer build/train_litespark_cuda] [--presets '15M 100M ...'] [--seconds 20] [--out dev/results] [--parts 'proof kernels training']

proof     build/test_cuda against the twin on this GPU: the checks that `make test-cuda` makes over dev/emu
kernels   make bench K=op of every op: each variant checked, then timed
training  tokens/s, MFU, J/token and W of presets on random tokens: the median of the steps after warm-up, of at least --seconds; with the
          MLP in both forms, at each --recompute for the largest preset that fits. What does not fit the GPU is said, not skipped in silence.
Every figure here is measured on the device that the report names.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def run(command, seconds, **more):
    """(exit status, output); 124 after `seconds`"""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, **more)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        return 124, ((e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout or "") + f"\nno end after {seconds} s"


def gpu_facts():
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_cap,ecc.mode.current"
    status, text = run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 60) if shutil.which("nvidia-smi") else (1, "")
    if status or not text.strip(): return None
    facts = dict(zip(fields.split(","), [x.strip() for x in text.strip().splitlines()[0].split(",")]))
    facts["gpus"] = len(text.strip().splitlines())
    facts["nvcc"] = (re.findall(r"release ([0-9.]+)", run(["nvcc", "--version"], 60)[1]) or ["unknown"])[0]
    facts["commit"] = run(["git", "rev-parse", "--short", "HEAD"], 60)[1].strip()
    return facts


def counts(text):
    found = re.findall(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?", text, re.M)
    return {"passed": int(found[-1][0]), "failed": int(found[-1][1]), "skipped": int(found[-1][2] or 0)} if found else None


def proof(trainer):
    status, text = run(["build/test_cuda", "--cuda", trainer, "--level", "quick", "--timeout", "300"], 3000)
    return {"status": status, "counts": counts(text), "failures": [x for x in text.splitlines() if x.startswith("FAIL")][:50]}


def kernels():
    ops = sorted(f[:-3] for f in os.listdir(HERE) if f.endswith(".cu"))
    out = {}
    for op in ops:
        status, text = run(["make", "-s", "bench", f"K={op}"], 1500)
        out[op] = {"status": status, "table": [x for x in text.splitlines() if x.strip() and not x.startswith("g++")]}
        print(f"gpu-report: bench {op}: exit status {status}", flush=True)
    return out


def write_tokens(path, n, V):
    x, ids = 1, []
    for _ in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        ids.append(min(V - 1, int(V ** ((x >> 11) / (1 << 53))) - 1))
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240520, 1, n, *[0] * 253) + struct.pack(f"<{n}H", *ids))


def train(trainer, preset, seconds, tmp, more, form="auto"):
    """One run: medians of its steps, or what it said instead."""
    out = os.path.join(tmp, "out")
    shutil.rmtree(out, ignore_errors=True)
    base = [trainer, "--preset", preset, "--train-data", f"{tmp}/tokens.bin", "--precision", "bf16", "--checkpoint-every", "0", "--val-every", "0",
            "--sample-every", "0", "--lr", "1e-4", "--mlp", form, "--out", out, *more]
    row = {"preset": preset, "options": list(more), "mlp": form}
    steps = 4
    for _ in range(4):                                      # more steps until they take long enough for the energy counter and the medians
        shutil.rmtree(out, ignore_errors=True)
        status, text = run(base + ["--steps", str(steps)], 900)
        if status:
            return row | {"says": (re.findall(r"error: .*", text) or [text[-300:]])[0]}
        with open(f"{out}/log.jsonl") as f:
            records = [json.loads(x) for x in f]
        log = [r for r in records if r["type"] == "step"][1:]       # the first step warms up
        if sum(r["time_per_iteration"] for r in log) >= seconds or steps >= 2000: break
        per = statistics.median(r["time_per_iteration"] for r in log)
        steps = min(2000, max(steps + 2, int(1.3 * seconds / max(per, 1e-4)) + 2))
    median = lambda key: (lambda x: statistics.median(x) if x else None)([r[key] for r in log if r[key] is not None])
    row |= {key: median(key) for key in ("tokens_per_sec", "mfu", "mfu_causal", "time_per_iteration", "joules_per_token", "watts")}
    row |= {"steps": len(log), "tokens_per_update": int(records[0]["options"]["total-batch-tokens"]), "batch_size": records[0]["options"]["batch-size"],
            "seq_len": records[0]["options"]["seq-len"], "memory": (re.findall(r"^memory \|.*", text, re.M) or [""])[0]}
    return row


def training(trainer, presets, seconds, options):
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        write_tokens(f"{tmp}/tokens.bin", 4_000_000, 32000)     # a shard of unknown vocabulary: any preset of 32000 and more takes it
        for preset in presets:
            for form in ("passes", "products"):
                rows.append(train(trainer, preset, seconds, tmp, options, form))
                print(f"gpu-report: {json.dumps(rows[-1])[:300]}", flush=True)
        largest = next((r["preset"] for r in reversed(rows) if "says" not in r), None)
        for recompute in ("mlp", "block") if largest else ():
            rows.append(train(trainer, largest, seconds, tmp, [*options, "--recompute", recompute]))
            print(f"gpu-report: {json.dumps(rows[-1])[:300]}", flush=True)
    return rows


def markdown(report):
    g = report["gpu"]
    text = [f"# {g['name']}", "", f"Measured, not modelled: driver {g['driver_version']}, {g['memory.total']}, SM clock up to {g['clocks.max.sm']}, power limit {g['power.limit']}, "
            f"nvcc {g['nvcc']}, commit {g['commit']}. `make gpu-report`.", ""]
    if "proof" in report:
        p = report["proof"]
        text += ["## Proof", "", f"`build/test_cuda`: {p['counts']}, exit status {p['status']}", ""] + [f"    {x}" for x in p["failures"]] + [""]
    if "training" in report:
        show = lambda x, f: "unavailable" if x is None else f.format(x)
        text += ["## Training", "", "| preset | MLP | options | B x T | tokens/s | MFU (report) | MFU (causal) | ms per update | tokens per update | J/token | W |",
                 "|---|---|---|---|---|---|---|---|---|---|---|"]
        for r in report["training"]:
            if "says" in r: text.append(f"| {r['preset']} | {r['mlp']} | {' '.join(r['options'])} | {r['says']} |" + " |" * 7)
            else:
                pct = lambda x: show(None if x is None else 100 * x, "{:.1f}%")
                text.append(f"| {r['preset']} | {r['mlp']} | {' '.join(r['options'])} | {r['batch_size']} x {r['seq_len']} | {r['tokens_per_sec']:.0f} | {pct(r['mfu'])} | {pct(r['mfu_causal'])} | "
                            f"{1e3 * r['time_per_iteration']:.2f} | {r['tokens_per_update']} | {show(r['joules_per_token'], '{:.3g}')} | {show(r['watts'], '{:.0f}')} |")
        text.append("")
    for op, r in report.get("kernels", {}).items():
        text += [f"## {op}", "", f"exit status {r['status']}", ""] + [f"    {x}" for x in r["table"]] + [""]
    return "\n".join(text)


def main():
    p = argparse.ArgumentParser(description="Proof and benchmarks on a GPU; see the head of this file.")
    p.add_argument("--trainer", default="build/train_litespark_cuda")
    p.add_argument("--presets", default="15M smollm2-135M 100M llama3.2-1B 3B")
    p.add_argument("--seconds", type=float, default=20)
    p.add_argument("--out", default=os.path.join(HERE, "results"))
    p.add_argument("--parts", default="proof kernels training")
    p.add_argument("--options", default="", help="more options of the trainer, such as '--batch-size 8'")
    p.add_argument("--pretend", metavar="NAME", help="to test this script where no GPU answers: the name written into the report")
    o = p.parse_args()
    facts = gpu_facts()
    if o.pretend and not facts:
        facts = {k: "none" for k in ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit", "nvcc", "commit")} | {"name": o.pretend}
    if not facts:
        print("skipped: gpu-report: no GPU answers (nvidia-smi)")
        return 0
    report = {"gpu": facts}
    name = os.path.join(o.out, re.sub(r"[^A-Za-z0-9]+", "_", facts["name"]).strip("_"))
    for part, make in (("proof", lambda: proof(o.trainer)), ("training", lambda: training(o.trainer, o.presets.split(), o.seconds, o.options.split())), ("kernels", kernels)):
        if part not in o.parts.split(): continue
        report[part] = make()
        with open(name + ".json", "w") as f: json.dump(report, f, indent=1)         # after each part: a machine may be lost
        with open(name + ".md", "w") as f: f.write(markdown(report))
    print(f"gpu-report: {name}.json and {name}.md")
    bad = report.get("proof", {}).get("status") or any(r["status"] for r in report.get("kernels", {}).values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
