#!/usr/bin/env python3
"""Train the same job at several power limits or clocks: tokens per second against joules per token.

    sudo python3 dev/power_sweep.py --watts 250,350,500,700 --out sweep -- ./train_litespark --preset 100M --steps 200 ...
    sudo python3 dev/power_sweep.py --mhz 1200,1500,1980 --out sweep -- ./train_litespark ...

GPUs (nvidia-smi answers) by nvidia-smi -pl and -lgc, all of --gpus alike; else the processor by its RAPL limit (packages
share --watts evenly) and cpufreq. The command gets --out sweep/POINT. Each point must train for 4 seconds or more: the counters
are coarse. At the end, also after Ctrl-C or an error, limits and clocks are as they were. Writes sweep/results.jsonl, and
sweep/sweep.svg (pip install matplotlib).
"""
import argparse
import glob
import json
import os
import shutil
import signal
import subprocess
import sys


class NotPermitted(Exception):
    pass


class Gpus:
    """Limits and clocks by nvidia-smi."""

    def __init__(self, numbers):
        self.numbers, self.locked = numbers, False
        self.before = {n: self.ask(n, "power.limit") for n in numbers}

    def smi(self, number, *words):
        r = subprocess.run(["nvidia-smi", "-i", number, *words], capture_output=True, text=True)
        if r.returncode:
            said = " ".join((r.stdout + r.stderr).split())
            raise NotPermitted(f"nvidia-smi -i {number} {' '.join(words)}: {said[:200]}")
        return r.stdout.strip()

    def ask(self, number, key):
        try:
            return float(self.smi(number, f"--query-gpu={key}", "--format=csv,noheader,nounits"))
        except ValueError:
            raise NotPermitted(f"GPU {number} does not say its {key}")

    def set(self, kind, x):
        for n in self.numbers:
            if kind == "mhz":
                self.locked = True
                self.smi(n, "-lgc", f"{x:g},{x:g}")
                continue
            low, high = self.ask(n, "power.min_limit"), self.ask(n, "power.max_limit")
            if not low <= x <= high:
                raise NotPermitted(f"GPU {n} takes limits of {low:g} to {high:g} W")
            self.smi(n, "-pl", f"{x:g}")
            if abs(self.ask(n, "power.limit") - x) > 1:
                raise NotPermitted(f"GPU {n} kept its limit of {self.ask(n, 'power.limit'):g} W")

    def restore(self):
        for n in self.numbers:
            if self.locked:
                self.smi(n, "-rgc")
            if abs(self.ask(n, "power.limit") - self.before[n]) > 1:
                self.smi(n, "-pl", f"{self.before[n]:g}")


class Processor:
    """RAPL's limit of the packages over long times, and the highest clock of all cores."""

    def __init__(self):
        sys_ = os.environ.get("LITESPARK_SYS", "/sys")
        self.files = {"watts": [], "mhz": sorted(glob.glob(f"{sys_}/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_max_freq"))}
        for folder in sorted(glob.glob(f"{sys_}/class/powercap/intel-rapl:*")):
            try:
                with open(f"{folder}/name") as f:
                    if f.read().startswith("package"):
                        self.files["watts"].append(f"{folder}/constraint_0_power_limit_uw")
            except OSError:
                pass
        self.before = {}

    def set(self, kind, x):
        files = self.files[kind]
        if not files:
            raise NotPermitted("this machine shows no " + ("RAPL limit (class/powercap)" if kind == "watts" else "cpufreq"))
        value = int(x * 1e6 / len(files)) if kind == "watts" else int(x * 1e3)
        for path in files:
            try:
                with open(path) as f:
                    self.before.setdefault(path, f.read().strip())
                self.write(path, value)
                with open(path) as f:
                    now = int(f.read())
            except (OSError, ValueError) as e:
                raise NotPermitted(f"{path}: {e.strerror if isinstance(e, OSError) else e}")
            if abs(now - value) > 0.02 * value:
                raise NotPermitted(f"{path} became {now}, not {value}")

    def write(self, path, value):
        with open(path, "w") as f:
            f.write(str(value))

    def restore(self):
        for path, value in self.before.items():
            try:
                self.write(path, value)
            except OSError:         # then it could not be changed before, either
                pass


def measured(log):
    """tokens/s, J/token and W of the updates of a run, of its record "end"."""
    try:
        with open(log) as f:
            rows = [json.loads(line) for line in f]
    except (OSError, ValueError) as e:
        return None, f"no log: {e}"
    ends, steps = [r for r in rows if r.get("type") == "end"], [r for r in rows if r.get("type") == "step"]
    if not ends or not steps:
        return None, "it did not end"
    end = ends[-1]
    if end.get("joules_per_token") is None:
        return None, "no counter of energy is readable (RAPL: as root)"
    if end["updates_seconds"] < 4:
        return None, f"{end['updates_seconds']:.1f} s of updates are too few: more --steps"
    speeds = sorted(r["tokens_per_sec"] for r in steps[len(steps) // 4:])       # the clocks need a while
    return {"tokens_per_sec": speeds[len(speeds) // 2], "joules_per_token": end["joules_per_token"], "watts": end["watts"],
            "idle_watts": end.get("idle_watts"), "gflop_per_joule": end.get("gflop_per_joule")}, ""


def draw(rows, unit, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"skipped: {path} (pip install matplotlib)")
        return
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "litespark"})
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot([r["tokens_per_sec"] for r in rows], [r["joules_per_token"] for r in rows], marker="o")
    for r in rows:
        place = r["tokens_per_sec"], r["joules_per_token"]
        ax.annotate(f"{r['point']:g} {unit}", place, xytext=(5, 5), textcoords="offset points")
    ax.set(xlabel="tokens per second", ylabel="joules per token", xlim=(0, None), ylim=(0, None))
    ax.grid(alpha=0.3)
    fig.savefig(path, metadata={"Date": None})
    print(path)


def numbers(text):
    values = [float(x) for x in text.split(",")]
    if not values or not all(0 < x < 1e6 for x in values):
        raise ValueError(text)
    return values


def main():
    ap = argparse.ArgumentParser(description="train at several power limits or clocks",
                                 usage="%(prog)s --watts W,W,... | --mhz M,M,... [--gpus 0,1] [--cpu] [--out DIR] -- COMMAND")
    points = ap.add_mutually_exclusive_group(required=True)
    points.add_argument("--watts", type=numbers, help="power limits: of each GPU, or of all packages of the processor")
    points.add_argument("--mhz", type=numbers, help="clocks")
    ap.add_argument("--gpus", default="0", help="GPUs that the command uses, as nvidia-smi numbers them (default 0)")
    ap.add_argument("--cpu", action="store_true", help="the processor, although there are GPUs")
    ap.add_argument("--out", default="sweep", help="folder of the runs and results (default sweep)")
    ap.add_argument("command", nargs="+", help="the trainer and its options, without --out")
    args = ap.parse_args()
    kind, unit, wanted = ("watts", "W", args.watts) if args.watts else ("mhz", "MHz", args.mhz)
    if "--out" in args.command:
        sys.exit("error: the command's --out is the sweep's: leave it out")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("error: stopped by a signal; limits and clocks are as they were"))
    smi = not args.cpu and shutil.which("nvidia-smi")
    try:
        answers = smi and subprocess.run([smi, "-L"], capture_output=True).returncode == 0
        device = Gpus(args.gpus.split(",")) if answers else Processor()
    except NotPermitted as e:
        sys.exit(f"error: {e}")
    os.makedirs(args.out, exist_ok=True)
    rows = []
    try:
        for x in wanted:
            try:
                device.set(kind, x)
            except NotPermitted as e:
                print(f"not permitted: {x:g} {unit}: {e}", flush=True)
                continue
            out = os.path.join(args.out, f"{x:g}{unit}")
            if os.path.exists(f"{out}/log.jsonl"):
                sys.exit(f"error: {out} holds a run already; choose another --out")
            r = subprocess.run([*args.command, "--out", out], capture_output=True, text=True)
            row, why = None, (r.stderr.strip() or r.stdout).split("\n")[-1]
            if r.returncode == 0:
                row, why = measured(f"{out}/log.jsonl")
            if not row:
                sys.exit(f"error: at {x:g} {unit}: {why}")
            rows.append({"kind": kind, "point": x} | row)
            print(f"{x:g} {unit} | {row['tokens_per_sec']:.0f} tok/s | {row['joules_per_token']:.4g} J/token | "
                  f"{row['watts']:.1f} W", flush=True)
            with open(f"{args.out}/results.jsonl", "a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; limits and clocks are as they were")
    finally:
        try:
            device.restore()
        except NotPermitted as e:
            print(f"warning: limits or clocks are not as they were: {e}")
    if not rows:
        sys.exit(1)
    best = min(rows, key=lambda r: r["joules_per_token"])
    print(f"least energy at {best['point']:g} {unit}: {best['joules_per_token']:.4g} J/token")
    draw(rows, unit, f"{args.out}/sweep.svg")


if __name__ == "__main__":
    main()
