#!/usr/bin/env python3
"""`make test-split`: where the time of an update goes (log.jsonl, the line "split"), and the ranges of --profile. Words choose tests by name.

    dev/test_split.py build/train_litespark build/train_litespark_emu [word ...]
"""
import os
import re
import shutil
import subprocess

import harness
from harness import Absent, Run, check as expect, log_of

DEV = os.path.dirname(os.path.abspath(__file__))
FIXTURE = f"{DEV}/fixture/llama"
PARTS = ["data", "forward", "backward", "optimizer", "communication", "other"]
SLOW = 0.05                                         # seconds that a read takes where the test makes it slow


def is_cuda(trainer):
    return "emu" in os.path.basename(trainer[-1])


def options(out, batch="--batch-size 2", more="--steps 8", config=f"{FIXTURE}/config.json"):
    return ["--config", config, "--train-data", f"{harness.top}/train_000.bin", "--out", out, *batch.split(), *more.split(),
            *"--seq-len 16 --val-every 0 --sample-every 0 --checkpoint-every 0".split()]


def slow_reader(rank=0):
    """Environment in which each read of training data takes SLOW seconds in this rank: dev/faults.c, preloaded."""
    so = f"{harness.top}/faults.so"
    if not os.path.exists(so):
        r = subprocess.run([os.environ.get("CC") or "cc", "-O2", "-shared", "-fPIC", f"{DEV}/faults.c", "-o", so, "-ldl", "-lpthread"], capture_output=True, text=True)
        expect(r.returncode == 0, r.stderr)
    folder = f"{harness.top}/strikes"
    os.makedirs(folder, exist_ok=True)
    return {"LD_PRELOAD": so, "FAULT_DIR": folder, "FAULT": f"{rank} train 0 {round(SLOW * 1e6)} 0 0"}


def run(trainer, *args, ranks=1, **env):
    """What the trainer printed; env is that of the trainer alone, not of mpirun."""
    shutil.copy(f"{FIXTURE}/tokens.bin", f"{harness.top}/train_000.bin")        # by its name it is training data
    words = ["env", *(f"{k}={v}" for k, v in env.items())]
    return Run([*words, *trainer], *args, ranks=ranks).text


def split_of(out):
    """Step records; their sums of seconds by part. Of one update `other` may be below 0: a GPU's work is read when it is complete."""
    steps = log_of(out)
    for r in steps:
        parts = [r[f"{p}_seconds"] for p in PARTS]
        harness.near("the sum of the parts", sum(parts), r["time_per_iteration"], 1e-9)
        expect(all(x >= 0 for x in parts[:-1]) and parts[-1] > -0.2 * r["time_per_iteration"], f"step {r['step']}: {parts}")
    sums = {p: sum(r[f"{p}_seconds"] for r in steps) for p in PARTS}
    expect(sums["other"] > -0.02 * sum(sums.values()), sums)
    return steps, sums


def usual_of(steps):
    """The median share of each part: what another program takes of the machine for a moment hits few steps."""
    return {p: sorted(r[f"{p}_seconds"] / r["time_per_iteration"] for r in steps)[len(steps) // 2] for p in PARTS}


def test_parts_add_up(trainer, out):
    n = 12 if is_cuda(trainer) else 60
    large = {} if is_cuda(trainer) else {"config": harness.model(out + "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)}
    text = run(trainer, *options(out, more=f"--steps {n} --total-batch-tokens 64", **large))
    steps, sums = split_of(out)
    total = sum(sums.values())
    usual = usual_of(steps)
    expect(len(steps) == n and usual["forward"] > 0.05 and usual["backward"] > usual["forward"] and usual["optimizer"] > 0, usual)
    expect(usual["data"] < 0.2 and usual["communication"] < 0.1 and usual["other"] < 0.2, usual)
    said = re.search(r"^split \| (.*) \| of (\S+) ms per step \| modelled speed unavailable$", text, re.M)
    expect(said, text)
    for part, share in zip(PARTS, said[1].split(" | ")):
        expect(share.split()[0] == part and abs(float(share.split()[1][:-1]) - 100 * sums[part] / total) < 0.06, f"{share}: {sums}")
    expect(abs(float(said[2]) - 1e3 * total / n) < 0.06, f"{said[2]} ms, not {1e3 * total / n}")
    expect(all(r["of_modelled_speed"] is None for r in steps), "a modelled speed of a device that no model is of")


def test_slow_reading_is_data(trainer, out):
    run(trainer, *options(out + "fast"))
    _, fast = split_of(out + "fast")
    run(trainer, *options(out), **slow_reader())
    steps, slow = split_of(out)
    reads = 2 * 8                                       # two windows of each update; the last update reads nothing, the first reads twice
    expect(slow["data"] > reads * SLOW > 2 * fast["data"], f"{slow}, without delay {fast}")
    expect(steps[-1]["data_seconds"] < SLOW < steps[-2]["data_seconds"], [r["data_seconds"] for r in steps])


def test_waiting_for_a_rank_is_communication(trainer, out):
    if not shutil.which("mpirun"):
        raise Absent("apt-get install openmpi-bin libopenmpi-dev")
    if "this build has no MPI" in Run(trainer, *options(out), ranks=2, ok=False).text:
        raise Absent("this build has no MPI")
    for zero in (0, 3):
        batch = f"--batch-size 1 --zero {zero}"
        text = run(trainer, *options(f"{out}{zero}", batch), ranks=2, **slow_reader(rank=1))
        _, sums = split_of(f"{out}{zero}")
        waited = 7 * SLOW                               # after its first update rank 1 reads a window in each but the last
        expect(sums["communication"] > waited and sums["data"] < 0.5 * SLOW, f"zero {zero}: {sums}")
        expect("ms per step of rank 0 |" in text, text)


def test_queued_work_of_a_gpu_is_counted(trainer, out):
    """Streams that run later than the host's calls: what an update leaves to do counts in the next, and nothing twice or never."""
    if not is_cuda(trainer):
        raise Absent("of the CUDA trainer")
    for seed in (1, 2, 3):
        run(trainer, *options(f"{out}{seed}"), EMU_ASYNC=seed)
        steps, _ = split_of(f"{out}{seed}")
        usual = usual_of(steps)
        expect(usual["forward"] > 0.05 and usual["backward"] > usual["forward"] and usual["other"] < 0.25, usual)


def test_profile_marks_steps(trainer, out):
    expect("write FIRST:LAST" in Run(trainer, *options(out), "--profile", "3:2", ok=False).text or not is_cuda(trainer), "3:2 is accepted")
    if not is_cuda(trainer):
        r = Run(trainer, *options(out), "--profile", "2:3", ok=False)
        expect(r.rc == 1 and "error: --profile is for the CUDA trainer" in r.text and not os.path.exists(out), r.text)
        return
    for bad in ("3", "0:2", "1:2:3", "1:2x", "a:b"):
        r = Run(trainer, *options(out), "--profile", bad, ok=False)
        expect(r.rc == 1 and f"error: --profile {bad}: write FIRST:LAST" in r.text and not os.path.exists(out), r.text)
    ranges = f"{harness.top}/ranges"
    run(trainer, *options(out, more="--steps 5 --total-batch-tokens 64"), "--profile", "2:3", EMU_NVTX=ranges)
    run(trainer, *options(out + "2", more="--steps 5 --total-batch-tokens 64"), EMU_NVTX=ranges + "2")
    expect([r["loss"] for r in log_of(out)] == [r["loss"] for r in log_of(out + "2")], "--profile changes the losses")
    with open(ranges + "2") as f:
        expect(f.read() == "", "ranges without --profile")
    with open(ranges) as f:
        lines = f.read().split("\n")[:-1]
    outer = [line for line in lines if line[0] != " "]
    expect(outer == ["push step 2", "pop", "push step 3", "pop"], outer)        # "pop of nothing" and "left open" would stand here, too
    inner = [line for line in lines if line[0] == " "]
    expect(all(line == " pop" for line in inner[1::2]) and all(line[:6] == " push " for line in inner[::2]), inner)
    expect({line[6:] for line in inner[::2]} == set(PARTS) - {"communication"}, inner)
    forward, backward = (inner.count(f" push {p}") for p in ("forward", "backward"))
    expect(forward == backward == 4, f"{forward} forward, {backward} backward of 2 steps of 2 micro-steps")


def test_modelled_speed_is_the_planners(trainer, out):
    if not is_cuda(trainer):
        raise Absent("the model is of GPUs")
    words = options(out, "--batch-size 2", "--steps 3 --precision bf16")
    text = run(trainer, *words, EMU_NAME="NVIDIA A100-SXM4-80GB")
    plan = Run(trainer, *words, "--dry-run", "--device", "a100", "--gpus", "1").text
    speed = float(re.search(r"\| (\d+) tokens/s per GPU,", plan)[1])
    steps, sums = split_of(out)
    for r in steps:
        harness.near("the modelled speed", r["of_modelled_speed"] * speed, r["tokens_per_sec"], 1e-3)
    said = re.search(r"\| (\S+)% of the modelled speed$", text, re.M)
    mean = 100 * 3 * 32 / sum(sums.values()) / speed
    expect(said and abs(float(said[1]) - mean) < 0.06, f"{mean}: {text}")


def with_out(test):
    return lambda trainer, folder: test(trainer, f"{folder}/out")


harness.main({name: with_out(test) for name, test in list(globals().items()) if name.startswith("test_")}, __doc__)
