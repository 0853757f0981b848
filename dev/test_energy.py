#!/usr/bin/env python3
"""`make test-energy`: the energy of a run, with counters that this test makes: RAPL's files in a folder of its own for the CPU trainer
(LITESPARK_SYS), a stand-in for NVML for the emulated CUDA trainer. And dev/power_sweep.py, with stand-ins for nvidia-smi and the trainer.
Words choose tests by name.

    dev/test_energy.py build/train_litespark build/train_litespark_emu [word ...]
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import harness
from harness import Absent, check as expect, top as TOP

DEV = os.path.dirname(os.path.abspath(__file__))
FIXTURE = f"{DEV}/fixture/llama"


def near(x, want, share, what):
    expect(isinstance(x, (int, float)) and abs(x - want) <= share * abs(want), f"{what}: {x}, not {want} +- {100 * share:.0f}%")


class Power:
    """Watts over time: idle first, busy once the run has written the header of its log, which follows the measurement of idle."""

    def __init__(self, out, idle, busy):
        self.out, self.idle, self.busy, self.begin, self.since, self.stop = out, idle, busy, time.monotonic(), None, False

    def joules(self):
        now = time.monotonic()
        if self.since is None and os.path.exists(f"{self.out}/log.jsonl") and os.path.getsize(f"{self.out}/log.jsonl"):
            self.since = now
        return self.idle * (now - self.begin) + (self.busy - self.idle) * (now - self.since if self.since else 0)


class Sysfs:
    """class/powercap with a package and its memory, whose counters are written every 10 ms. wrap: joules at which they begin anew."""

    def __init__(self, name, package, memory=None, wrap=1000.0, limit=None):
        self.root, self.stop = f"{TOP}/{name}", False
        for i, (power, kind) in enumerate(((package, "package-0"), (memory, "dram"))):
            if not power:
                continue
            folder = f"{self.root}/class/powercap/intel-rapl:0" + (":0" if i else "")
            texts = {"name": kind, "max_energy_range_uj": str(int(wrap * 1e6)), "energy_uj": str(int(0.7 * wrap * 1e6))}
            if limit and not i:
                texts["constraint_0_power_limit_uw"] = str(int(limit * 1e6))
            for file, text in texts.items():
                write(f"{folder}/{file}", text + "\n")
            threading.Thread(target=self.serve, args=(f"{folder}/energy_uj", power, wrap), daemon=True).start()

    def serve(self, path, power, wrap):
        while not self.stop:
            write(path + ".part", f"{int((power.joules() + 0.7 * wrap) % wrap * 1e6)}\n")      # the first wrap comes soon
            os.replace(path + ".part", path)
            time.sleep(0.01)


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(text)


def content(path):
    with open(path) as f:
        return f.read()


def nvml(idle, busy, limit):
    """A folder with libnvidia-ml.so.1: 2 s of idle from the first reading on, then busy."""
    folder = tempfile.mkdtemp(dir=TOP)
    write(f"{folder}/nvml.cpp", f"""#include <time.h>
        static double now() {{ timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }}
        extern "C" int nvmlInit_v2() {{ return 0; }}
        extern "C" int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **d) {{ *d = 0; return 0; }}
        extern "C" int nvmlDeviceGetTotalEnergyConsumption(void *, unsigned long long *mj) {{
            static double first = now();
            const double t = now() - first;
            *mj = 1e3 * (t < 2 ? {idle} * t : {idle} * 2 + {busy} * (t - 2));
            return 0;
        }}
        extern "C" int nvmlDeviceGetEnforcedPowerLimit(void *, unsigned *mw) {{ *mw = {limit}000; return 0; }}
        extern "C" int nvmlDeviceGetClockInfo(void *, int of, unsigned *mhz) {{ *mhz = of == 1 ? 1980 : 1; return 0; }}
        extern "C" int nvmlDeviceGetTemperature(void *, int of, unsigned *c) {{ *c = of == 0 ? 66 : 1; return 0; }}
        """)
    r = subprocess.run([os.environ.get("CXX") or "g++", "-shared", "-fPIC", f"{folder}/nvml.cpp", "-o", f"{folder}/libnvidia-ml.so.1"], capture_output=True, text=True)
    expect(r.returncode == 0, r.stderr)
    return folder


def is_cuda(trainer):
    return "emu" in os.path.basename(trainer)


def coarse(trainer):
    """How far W may be off: the stand-in for NVML counts when it is asked, RAPL's files are as old as this busy machine lets them be."""
    return 0.1 if is_cuda(trainer) else 0.4


def train(trainer, out, more="", seconds=8, until=(), **env):
    """Trains for so many seconds and until the log (with that of --power-log) has these patterns, then stops it as a user would: a
    signal. (records by type, what it printed)"""
    words = [trainer, "--config", f"{FIXTURE}/config.json", "--train-data", f"{FIXTURE}/tokens.bin", "--val-data", f"{FIXTURE}/tokens.bin",
             *"--seq-len 16 --batch-size 2 --threads 1 --sample-tokens 4 --steps 100000000 --log-every 100 --out".split(), out, *more.split()]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env})
    begin = time.time()
    while process.poll() is None:
        time.sleep(0.1)
        if time.time() - begin > seconds and os.path.exists(f"{out}/log.jsonl"):
            text = content(f"{out}/log.jsonl")
            if "--power-log" in words:
                text += content(words[words.index("--power-log") + 1])
            if all(re.search(pattern, text, re.S) for pattern in until):
                break
        expect(time.time() - begin < 300, "it does not begin")
    process.terminate()
    text = process.communicate()[0]
    expect(process.returncode == 0, text)
    return records(f"{out}/log.jsonl"), text


def records(path):
    of = {}
    with open(path) as f:
        for r in map(json.loads, f):
            of.setdefault(r.get("type"), []).append(r)
    return of


def with_counters(trainer, out, idle, busy, limit, name, more="", seconds=8, until=()):
    """A run on a machine that takes so many W: (records, text, W of updates that are to be seen)"""
    if is_cuda(trainer):
        folder = nvml(idle, busy, limit)
        return *train(trainer, out, more, seconds, until, LD_LIBRARY_PATH=f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"), busy
    sysfs = Sysfs(name, Power(out, idle, busy), Power(out, 10, 10), limit=limit)
    try:
        return *train(trainer, out, more, seconds, until, LITESPARK_SYS=sysfs.root), busy + 10
    finally:
        sysfs.stop = True


def test_energy_of_a_run(trainer, out):
    looks = "--val-every 4 --checkpoint-every 6 --sample-every 5" if is_cuda(trainer) else \
            "--val-every 40 --checkpoint-every 90 --sample-every 70 --total-batch-tokens 3200"
    log, text, watts = with_counters(trainer, out, 40, 110, 300, "run", looks, 9, ("evaluation_", "checkpoint_", "sample_"))
    head, end, steps = log["header"][0], log["end"][-1], log["step"]
    extra = 0 if is_cuda(trainer) else 10                                               # the memory's
    near(head["idle_watts"], 40 + extra, 1.5 * coarse(trainer), "idle")         # two seconds alone
    near(head["power_limit_watts"], 300 + 2 * extra, 0.07, "limit")         # the memory has none: what it took so far
    expect("energy counters found" in text and "energy | idle " in text and "energy | updates " in text, text)
    near(end["watts"], watts, coarse(trainer), "W of updates")
    near(end["joules"], end["updates_joules"], 1e-9, "J of the run")
    near(end["updates_joules"] / end["updates_seconds"], watts, coarse(trainer), "J by s")
    near(end["joules_per_token"], end["joules"] / end["tokens"], 1e-6, "J/token")
    near(end["joules_per_update"], end["joules"] / end["step"], 1e-6, "J/update")
    near(end["tokens_per_joule"] * end["joules_per_token"], 1, 1e-9, "tokens/J")
    near(end["kwh"], end["joules"] / 3.6e6, 1e-9, "kWh")
    near(end["updates_joules_above_idle"], end["joules"] - end["idle_watts"] * end["updates_seconds"], 1e-6, "above idle")
    flops = 6 * (2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 16) + 32 * 53) + 12 * 2 * 32 * 16        # per token of the fixture's model
    near(end["gflop_per_joule"], flops * 1e-9 / end["joules_per_token"], 1e-6, "GFLOP/J")
    for kind in ("evaluation", "checkpoint", "sample"):
        looks = [r for r in log.get("look", []) if f"{kind}_joules" in r]
        expect(looks, f"no {kind}")
        near(sum(r[f"{kind}_seconds"] for r in looks), end[f"{kind}_seconds"], 1e-6, f"s of {kind}")
        near(sum(r[f"{kind}_joules"] for r in looks), end[f"{kind}_joules"], 1e-6, f"J of {kind}")
        expect(f"| {kind} " in text.split("energy | updates")[1], f"{kind} is not on the screen")
    joules = [r["joules"] for r in steps]
    expect(joules[0] is None and joules == sorted(joules, key=lambda x: x or 0) and 0 not in joules, joules[:9])
    seen = [r["watts"] for r in steps if r["watts"]]
    expect(seen or is_cuda(trainer), "no window of 2 s has ended")
    for x in set(seen):
        near(x, watts, coarse(trainer), "W of a window")
    expect("warning: updates took" not in text, text)


def test_power_above_its_limit_or_below_idle_is_named(trainer, out):
    for idle, busy, limit, what in ((40, 110, 60, "more than the limit of"), (110, 40, 300, "less than idle")):
        _, text, _ = with_counters(trainer, out + str(busy), idle, busy, limit, f"limit{busy}", "--val-every 0 --sample-every 0 --checkpoint-every 0", 7,
                                   [r'"watts": \d'])               # of a window of two seconds
        expect("warning: updates took" in text and what in text, text)


def test_without_counters_nothing_is_zero_and_nothing_waits(trainer, out):
    begin = time.time()
    log, text = train(trainer, out, "--steps 3 --val-every 2 --sample-every 0 --checkpoint-every 2".replace("--steps 3", ""), 1, ("evaluation_", "checkpoint_"), LITESPARK_SYS=f"{TOP}/none")
    expect("energy |" not in text and "energy counters unavailable" in text, text)
    for kind, keys in (("step", ("joules", "watts", "joules_per_token")), ("end", ("joules", "kwh", "watts", "gflop_per_joule", "idle_watts", "evaluation_joules")),
                       ("look", ("evaluation_joules", "checkpoint_joules")), ("header", ("idle_watts", "power_limit_watts"))):
        for r in log[kind]:
            expect(all(r.get(k) is None for k in keys), r)
    expect(all(any(k in r for r in log["look"]) for k in ("evaluation_seconds", "checkpoint_seconds")), log["look"])


def test_resumed_run_adds_up(trainer, out):
    if is_cuda(trainer):
        raise Absent("the text is shared: tested on the CPU trainer")
    first, _, _ = with_counters(trainer, out, 40, 110, 300, "first", "--val-every 0 --sample-every 0", 6)
    sysfs = Sysfs("second", Power(out, 110, 110), limit=300)
    log, text = train(trainer, out, "--val-every 0 --sample-every 0 --resume auto", 6, LITESPARK_SYS=sysfs.root)
    sysfs.stop = True
    a, b = log["end"]
    near(b["joules"], a["joules"] + b["updates_joules"], 1e-6, "J of both starts")
    near(b["joules_per_token"], b["updates_joules"] / (b["tokens"] - a["tokens"]), 1e-6, "J/token since the second start")


def test_power_log(trainer, out):
    log = f"{TOP}/{os.path.basename(trainer)}.power.jsonl"
    more = f"--val-every 0 --sample-every 0 --checkpoint-every 0 --power-log {log}"
    samples = [r'("celsius".*){5}']
    if is_cuda(trainer):
        with_counters(trainer, out, 50, 50, 300, "power", more, 6, samples)
        watts, mhz, celsius = 50, 1980, 66
    else:
        sysfs = Sysfs("power", Power(out, 50, 50))
        for i, khz in enumerate((2000000, 3000000)):
            write(f"{sysfs.root}/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq", f"{khz}\n")
            write(f"{sysfs.root}/class/thermal/thermal_zone{i}/temp", f"{(41 + i) * 1000}\n")
        train(trainer, out, more, 6, samples, LITESPARK_SYS=sysfs.root)
        sysfs.stop = True
        watts, mhz, celsius = 50, 2500, 42
    rows = records(log)[None]
    expect(len(rows) >= 4 and all(set(r) == {"time", "watts", "mhz", "celsius"} for r in rows), rows)
    span = rows[-1]["time"] - rows[0]["time"]
    near(span / (len(rows) - 1), 1, 0.25, "s between samples")
    near(sum(r["watts"] for r in rows) / len(rows), watts, coarse(trainer), "W")
    expect(all(r["mhz"] == mhz and r["celsius"] == celsius for r in rows), rows)
    train(trainer, out + "2", more, 3, [r'"celsius": null'], LITESPARK_SYS=f"{TOP}/none")
    more_rows = records(log)[None][len(rows):]
    expect(more_rows and all(r[k] is None for r in more_rows for k in ("watts", "mhz", "celsius")), more_rows)
    # after half a line of before; and a full disk, which is said once
    half, some = '{"time": 1, "wat', [trainer, "--config", f"{FIXTURE}/config.json", "--train-data", f"{FIXTURE}/tokens.bin", *(
        "--seq-len 16 --batch-size 2 --threads 1 --steps 100000000 --log-every 1000 --checkpoint-every 0 --out").split()]
    write(f"{TOP}/half.jsonl", half)
    for path, said in ((f"{TOP}/half.jsonl", 0), ("/dev/full", 1)):
        p = subprocess.Popen([*some, f"{out}-{said}", "--power-log", path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not (os.path.exists(f"{out}-{said}/log.jsonl") and content(f"{TOP}/half.jsonl").count("\n") > 1):
            time.sleep(0.1)
        time.sleep(4)
        p.terminate()
        text = p.communicate()[1]
        expect(p.returncode == 0 and text.count("warning: cannot write") == said, text)
    lines = content(f"{TOP}/half.jsonl").splitlines()
    expect(len(lines) > 1 and lines[0] == half and all(json.loads(line) for line in lines[1:]), lines)
    r = subprocess.run([trainer, "--config", f"{FIXTURE}/config.json", "--train-data", f"{FIXTURE}/tokens.bin", "--seq-len", "16", "--batch-size", "2", "--steps", "2",
                        "--power-log", f"{TOP}/none/x", "--out", out + "3"], capture_output=True, text=True)
    expect(r.returncode == 1 and r.stderr.startswith("error: --power-log: cannot write ") and not os.path.exists(f"{out}3/log.jsonl"), r.stderr)


# ---- the sweep: a trainer whose speed grows with the root of the power limit, which it reads where it is set
FAKE_TRAINER = """#!/usr/bin/env python3
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out)
if "--hang" in sys.argv:
    open(out + "/started", "w").close()
    time.sleep(60)
if "--fail" in sys.argv:
    sys.exit("error: a fault of the trainer")
limit = float(open(os.environ["FAKE_LIMIT"]).read()) / float(os.environ.get("FAKE_UNIT", "1"))
seconds = 1.0 if "--short" in sys.argv else 10.0
with open(out + "/log.jsonl", "w") as f:
    for i in range(8):
        f.write(json.dumps({"type": "step", "tokens_per_sec": 1.0 if i == 0 else 100 * limit ** 0.5}) + "\\n")
    joules = None if "--blind" in sys.argv else limit / (100 * limit ** 0.5)
    f.write(json.dumps({"type": "end", "joules_per_token": joules, "watts": limit, "updates_seconds": seconds}) + "\\n")
"""
FAKE_SMI = """#!/bin/sh
state=$(dirname "$0")/state
case "$*" in
    -L) ;;
    *power.limit*) cat "$state" ;;
    *power.min_limit*) echo 100.00 ;;
    *power.max_limit*) echo 700.00 ;;
    *-pl*) [ -z "$FAKE_DENY" ] || { echo 'Insufficient Permissions'; exit 4; }; for x; do :; done; echo "$x.00" >"$state"; echo "set $x" >>"$state.log" ;;
    *-lgc*) for x; do :; done; echo "lock $x" >>"$state.log" ;;
    *-rgc*) echo reset >>"$state.log" ;;
esac
"""


def sweep(folder, *words, wait=True, **env):
    for name, text in (("trainer", FAKE_TRAINER), ("bin/nvidia-smi", FAKE_SMI)):
        write(f"{folder}/{name}", text)
        os.chmod(f"{folder}/{name}", 0o755)
    env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "FAKE_LIMIT": f"{folder}/bin/state", **env}
    p = subprocess.Popen([sys.executable, f"{DEV}/power_sweep.py", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (p.communicate(timeout=120)[0], p.returncode) if wait else p


def test_sweep_of_a_gpu(trainer, out):
    if is_cuda(trainer):
        raise Absent("it runs no trainer: tested once")
    state = f"{out}/bin/state"
    write(state, "650.00\n")
    job = ["--", f"{out}/trainer"]
    text, status = sweep(out, "--watts", "400,225,50", "--out", f"{out}/a", *job)
    rows = [json.loads(x) for x in content(f"{out}/a/results.jsonl").split("\n")[:-1]]
    expect(status == 0 and [r["point"] for r in rows] == [400, 225], text)
    near(rows[0]["tokens_per_sec"], 2000, 1e-9, "tok/s at 400 W")
    near(rows[1]["joules_per_token"], 0.15, 1e-9, "J/token at 225 W")
    expect("not permitted: 50 W: GPU 0 takes limits of 100 to 700 W" in text and "least energy at 225 W: 0.15 J/token" in text, text)
    expect(os.path.exists(f"{out}/a/sweep.svg") or "skipped: " in text, text)
    expect(content(state) == "650.00\n" and content(state + ".log").split("\n")[-2] == "set 650", "the limit is not as it was")
    text, status = sweep(out, "--watts", "400", "--out", f"{out}/b", *job, FAKE_DENY="1")
    lines = text.strip().split("\n")
    expect(status == 1 and len(lines) == 1 and lines[0].startswith("not permitted: 400 W: ") and "Insufficient Permissions" in lines[0], text)
    text, status = sweep(out, "--mhz", "1200", "--out", f"{out}/c", *job)
    expect(status == 0 and content(state + ".log").split("\n")[-3:] == ["lock 1200,1200", "reset", ""], content(state + ".log"))
    for more, what in (("--fail", "at 400 W: error: a fault of the trainer"), ("--blind", "no counter of energy"), ("--short", "too few"), ("--out", "leave it out")):
        text, status = sweep(out, "--watts", "400", "--out", f"{out}/{more}", *job, more)
        expect(status == 1 and what in text and "Traceback" not in text and content(state) == "650.00\n", text)
    for number in (signal.SIGTERM, signal.SIGINT):
        p = sweep(out, "--watts", "400", "--out", f"{out}/{number}", *job, "--hang", wait=False)
        while not os.path.exists(f"{out}/{number}/400W/started"):
            time.sleep(0.05)
        expect(content(state) == "400.00\n", "the limit is not set")
        p.send_signal(number)
        text = p.communicate(timeout=90)[0]
        expect(p.returncode == 1 and "as they were" in text and "Traceback" not in text and content(state) == "650.00\n", text)


def test_sweep_of_a_processor(trainer, out):
    if is_cuda(trainer):
        raise Absent("it runs no trainer: tested once")
    caps = f"{out}/sys/class/powercap"
    for i in (0, 1):
        write(f"{caps}/intel-rapl:{i}/name", f"package-{i}\n")
        write(f"{caps}/intel-rapl:{i}/constraint_0_power_limit_uw", "150000000\n")
        write(f"{out}/sys/devices/system/cpu/cpu{i}/cpufreq/scaling_max_freq", "3000000\n")
    limits = [f"{caps}/intel-rapl:{i}/constraint_0_power_limit_uw" for i in (0, 1)]
    env = {"LITESPARK_SYS": f"{out}/sys", "FAKE_LIMIT": limits[1], "FAKE_UNIT": "1e6"}
    text, status = sweep(out, "--cpu", "--watts", "200,100", "--out", f"{out}/a", "--", f"{out}/trainer", **env)
    expect(status == 0 and "100 W | 707 tok/s | 0.07071 J/token" in text, text)         # 50 W for each package
    expect([content(x).strip() for x in limits] == ["150000000"] * 2, "the limits are not as they were")
    clock = f"{out}/sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq"
    text, status = sweep(out, "--cpu", "--mhz", "1600", "--out", f"{out}/b", "--", f"{out}/trainer", **env | {"FAKE_LIMIT": clock, "FAKE_UNIT": "1e5"})
    expect(status == 0 and "1600 MHz | 400 tok/s" in text and content(clock).strip() == "3000000", text)
    os.remove(limits[0])
    os.symlink("/proc/sys/kernel/ngroups_max", limits[0])                               # a number that nobody may change
    text, status = sweep(out, "--cpu", "--watts", "100", "--out", f"{out}/c", "--", f"{out}/trainer", **env)
    lines = text.strip().split("\n")
    expect(status == 1 and len(lines) == 1 and lines[0].startswith("not permitted: 100 W: ") and limits[0] in lines[0], text)
    text, status = sweep(out, "--cpu", "--watts", "100", "--out", f"{out}/d", "--", f"{out}/trainer", **env | {"LITESPARK_SYS": f"{out}/none"})
    expect(status == 1 and text.strip() == "not permitted: 100 W: this machine shows no RAPL limit (class/powercap)", text)


def run(test):
    return lambda trainer, folder: test(trainer[0], f"{folder}/out")


harness.main({name: run(test) for name, test in list(globals().items()) if name.startswith("test_")}, __doc__)
