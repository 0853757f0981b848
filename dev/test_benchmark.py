#!/usr/bin/env python3
"""`make test-benchmark`: dev/benchmark.py on a tiny model. Losses of litespark and of both baselines coincide, on one rank
and on two, over more than an epoch of two shards; a baseline with another learning rate or shifted data fails it.

    PYTHON_WITH_TORCH dev/test_benchmark.py [build/train_litespark]
"""
import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BINARY = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "build/train_litespark")
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=300, num_hidden_layers=2, hidden_size=48,
              num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=104, rms_norm_eps=1e-6,
              rope_theta=500.0, max_position_embeddings=128, tie_word_embeddings=True, hidden_act="silu")
counts = {"ok": 0, "FAIL": 0}


def check(name, ok, what=""):
    counts["ok" if ok else "FAIL"] += 1
    print(f"{'ok  ' if ok else 'FAIL'}  {name}" + ("" if ok else f": {str(what)[:1500]}"), flush=True)


def run(out, *options):
    """(exit status, what it printed, the report or None)"""
    command = [sys.executable, f"{HERE}/benchmark.py", "--binary", BINARY, "--device", "cpu", "--threads", "2",
               "--batch", "4", "--rounds", "1", "--steps", "3", "--warmup", "1", "--out", out, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    if not os.path.exists(out + ".json"): return done.returncode, done.stdout, None
    with open(out + ".json") as f: return done.returncode, done.stdout, json.load(f)


if not importlib.util.find_spec("torch"):
    print("skipped: test-benchmark: no torch (pip install torch transformers)")
    sys.exit(0)
TOP = tempfile.mkdtemp()
try:
    os.mkdir(f"{TOP}/tiny")
    config = f"{TOP}/tiny/config.json"
    with open(config, "w") as f: json.dump(CONFIG, f)
    for name, n in ("a", 5 * 24 + 20), ("b", 6 * 24 + 1):       # 11 windows of 24: four updates take 16, more than an epoch
        ids = [random.Random(name).randrange(300) for _ in range(n)]
        with open(f"{TOP}/{name}.bin", "wb") as f:
            f.write(struct.pack("<256i", 20240520, 1, n, 300, *[0] * 252) + struct.pack(f"<{n}H", *ids))
    data = ("--train-data", f"{TOP}/*.bin", "--seq-len", "24")

    status, text, report = run(f"{TOP}/one", "--cases", f"{config}:fp32", "--only", "hf|eager", *data)
    check("fp32, one rank, both baselines", status == 0 and report, text)
    case = report["cases"][0] if report else {}
    f = case.get("figures", {})
    check("a row for each", list(f) == ["litespark", "hf", "pytorch"], list(f))
    check("losses coincide, far inside another seed's", f and case["noise"] > 1e-4
          and all(f[n]["loss_apart"] <= 1e-5 for n in ("hf", "pytorch")), case)
    check("speed, memory, MFU", f and all(r["tokens_per_sec"] > 0 and r["tflops"] > 0 and r["memory"] > 1 for r in f.values())
          and abs(f["hf"]["speed_up"] - f["litespark"]["tokens_per_sec"] / f["hf"]["tokens_per_sec"]) < 1e-6, f)
    wanted = ["| litespark | 4 |", "| hf (eager) | 4 |", "| pytorch (eager) | 4 |", "| litespark, another seed |",
              "Published by the Litespark report"]
    check("the table", not [x for x in wanted if x not in text], text)
    counters = f and f["pytorch"]["joules"] is not None
    check("energy is measured or unavailable", counters or "| unavailable | unavailable |" in text, text)

    ranks = "2" if shutil.which("mpirun") and b"MPI_Init" in open(BINARY, "rb").read() else "1"
    status, text, report = run(f"{TOP}/two", "--cases", f"{config}:bf16", "--ranks", ranks, "--micro", "1",
                               "--only", "pytorch eager", *data)
    check(f"bf16, {ranks} rank(s), micro-steps", status == 0 and report
          and report["cases"][0]["figures"]["pytorch"]["loss_apart"] < 1e-3, text)

    for plant, what in ("lr", "another learning rate"), ("data", "shifted data"):
        status, text, report = run(f"{TOP}/{plant}", "--cases", f"{config}:fp32", "--only", "pytorch eager", "--plant", plant,
                                   *data)
        check(f"{what} is found", status == 1 and report is None and " of pytorch (eager) " in text
              and "FAIL  tiny, fp32, 1 rank: update " in text, text)
    status, text, _ = run(f"{TOP}/bad", "--cases", "15N:fp32")
    check("an unknown model is refused in one line", status == 1 and text.startswith("error: --cases: no model '15N'")
          and text.count("\n") == 1, text)
finally:
    shutil.rmtree(TOP, ignore_errors=True)
print(f"{counts['ok']} passed, {counts['FAIL']} failed")
sys.exit(counts["FAIL"] > 0)
