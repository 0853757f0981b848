"""Draw litespark logs: training loss, validation loss and the floor of the data over the tokens trained on.

    pip install matplotlib
    python3 dev/plot_log.py out/log.jsonl -o loss.svg                       the suffix chooses: .svg, .png or .pdf
    python3 dev/plot_log.py baseline/log.jsonl wide/log.jsonl -o both.png   several runs in one picture
    python3 dev/plot_log.py out/log.jsonl --all -o run.png                  also speed, gradient norm, and energy where it was measured

A log that a kill cut short is fine, and so is one that was resumed: where a step was logged twice the later record wins.
"""
import argparse
import bisect
import json
import math
import os
import sys

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

FLOOR = "floor: what a perfect model would reach, the entropy of the data"


def read_log(path):
    """{"header": first record, "step": {step: record}, "val": {step: record}}; lines that are not JSON are counted and skipped."""
    log, bad = {"header": {}, "step": {}, "val": {}}, 0
    with open(path, errors="replace") as f:
        for line in filter(str.strip, f):
            try:
                r = json.loads(line)
            except ValueError:
                bad += 1
                continue
            if not isinstance(r, dict):
                bad += 1
            elif r.get("type") == "header":
                log["header"] = log["header"] or r
            elif r.get("type") in ("step", "val") and "step" in r:
                log[r["type"]][r["step"]] = r
    if bad:
        print(f"{path}: skipped {bad} broken line{'s' if bad > 1 else ''}", file=sys.stderr)
    return log


def number(r, key):
    return isinstance(r.get(key), (int, float)) and math.isfinite(r[key])


def series(log, kind, key):
    """Tokens so far and values of `key`, in order; null and non-finite values are left out. Without step records: steps for tokens."""
    steps = sorted(s for s, r in log["step"].items() if number(r, "tokens"))
    def tokens(step):                      # those of the last logged step up to this one
        i = bisect.bisect_right(steps, step) - 1
        return log["step"][steps[i]]["tokens"] if i >= 0 else 0
    points = [(tokens(s) if steps else s, r[key]) for s, r in sorted(log[kind].items()) if number(r, key)]
    return [p[0] for p in points], [p[1] for p in points]


def wheres(key):
    """Where a metric stands: in step records, and in those of evaluations, there perhaps with val_ before its name."""
    return ("step", key), ("val", key if "accuracy" in key and "/" not in key else "val_" + key)


def smoothed(values, n):
    """Mean of the n values around each point, fewer at the ends."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    ends = [(max(0, i - (n - 1) // 2), min(len(values), i + n // 2 + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def thinned(x, y, n):
    """At most n points of a line, the first and the last among them: a picture has no more columns, and an SVG stays small."""
    if len(x) <= n:
        return x, y
    keep = [round(i * (len(x) - 1) / (n - 1)) for i in range(n)]
    return [x[i] for i in keep], [y[i] for i in keep]


def label(path):
    """out/log.jsonl -> out; other names stay."""
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if path.endswith("log.jsonl") else path


def short(n, _=None):
    """1500000 -> 1.5 M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:.3g}"


def draw_loss(ax, logs, args):
    one, lowest, highest = len(logs) == 1, math.inf, -math.inf
    for i, (name, log) in enumerate(logs):
        color, prefix = f"C{i % 10}", "" if one else name + ": "
        x, y = series(log, "step", "loss")
        if y:
            n = args.smooth or max(1, len(y) // 100)
            ax.plot(*thinned(x, y, args.points), color=color, lw=0.6, alpha=0.45)
            ax.plot(*thinned(x, smoothed(y, n), args.points), color=color, lw=1.3,
                    label=prefix + "training loss" + (f", mean of {n} steps" if n > 1 else ""))
        vx, vy = series(log, "val", "val_loss")
        if vy:
            ax.plot(vx, vy, color="C1" if one else color, ls="", marker="o", ms=5.5, mec="black", mew=0.7, zorder=3,
                    label=prefix + "validation loss" + (f", {vy[-1]:.4f} at the end" if one else ""))
        lowest, highest = min([lowest] + y + vy), max([highest] + y + vy)
    floors = sorted({f for _, log in logs for f in series(log, "val", "floor")[1]})
    for f in floors:
        ax.axhline(f, color="black", ls="--", lw=1.2)
        lowest = min(lowest, f)
    if lowest > 0:                         # on a logarithmic scale the last tenth above the floor is seen as well as the first
        ax.set_yscale("log")
        low, high = lowest * (0.84 if floors else 0.95), highest * 1.05
        ticks = [m * 10 ** e for e in range(-4, 4) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        ticks = [t for t in ticks if low <= t <= high]
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for f in floors:                       # below its line, at the left end
        ax.annotate(f"{f:.4f}  {FLOOR}" if one else f"{f:.4f}  {FLOOR.split(',')[0]}", (0.012, f), xycoords=("axes fraction", "data"),
                    xytext=(0, -4), textcoords="offset points", va="top", fontsize=9)
    ax.set_ylabel("loss, nats per token" + (" (log scale)" if lowest > 0 else ""))
    ax.legend(fontsize=9, loc="upper right", framealpha=1)


def main():
    ap = argparse.ArgumentParser(description="plot litespark logs")
    ap.add_argument("logs", nargs="+")
    ap.add_argument("-o", "--out", default="plot.png", help="picture to write: .svg, .png or .pdf")
    ap.add_argument("--smooth", type=int, default=0, help="training loss: mean of N steps, 1 = none, 0 = a hundredth of the run")
    ap.add_argument("--points", type=int, default=400, help="most points of a line")
    ap.add_argument("--title", help="headline; default: parameters and tokens")
    ap.add_argument("--all", action="store_true", help="also speed, gradient norm and energy")
    ap.add_argument("--keys", help="in place of the loss: these metrics, each in a panel, of step and val records (lines and dots), "
                                   "such as answer_accuracy,rewards/margins,rewards/accuracies")
    args = ap.parse_args()
    args.points = max(2, args.points)
    try:
        logs = [(label(path), read_log(path)) for path in args.logs]
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}")
    if not any(log["step"] or log["val"] for _, log in logs):
        sys.exit(f"error: no step or val record in {' '.join(args.logs)}")

    panels = [("loss", "loss")]
    if args.keys:
        panels = [(key, key) for key in args.keys.split(",")]
        none = [key for key, _ in panels if not any(series(log, *where)[1] for _, log in logs for where in wheres(key))]
        if none:
            sys.exit(f"error: no record has {', '.join(none)}")
    elif args.all:
        panels += [(key, title) for key, title in (("tokens_per_sec", "tokens per second"), ("grad_norm", "gradient norm"),
                                                   ("joules_per_token", "joules per token"))
                   if any(series(log, "step", key)[1] for _, log in logs)]
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "litespark", "font.size": 10,   # same log, same bytes
                         "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]})
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(8.5 * columns if columns == 1 else 14, 4.6 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    for ax, (key, title) in zip(axes.flat, panels):
        if key == "loss" and not args.keys:
            draw_loss(ax, logs, args)
        elif args.keys:
            for i, (name, log) in enumerate(logs):
                (x, y), (vx, vy) = (series(log, *where) for where in wheres(key))
                if y:
                    ax.plot(*thinned(x, y, args.points), color=f"C{i % 10}", lw=0.8, alpha=0.7, label=f"{name}: training")
                if vy:
                    ax.plot(vx, vy, color=f"C{i % 10}", ls="-" if not y else "", lw=1.0, marker="o", ms=5, mec="black", mew=0.6,
                            label=f"{name}: held-out data, {vy[-1]:.4g} at the end")
            ax.set_title(title, fontsize=11, loc="left")
            ax.legend(fontsize=9)
        else:
            for i, (name, log) in enumerate(logs):
                ax.plot(*thinned(*series(log, "step", key), args.points), color=f"C{i % 10}", lw=0.8, label=name)
            ax.set(title=title, ylim=(0, None))
        by_tokens = any(number(r, "tokens") for _, log in logs for r in log["step"].values())
        ax.set_xlabel("tokens trained on" if by_tokens else "step")
        ax.xaxis.set_major_formatter(FuncFormatter(short))
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    title = args.title
    if title is None and len(logs) == 1:
        name, log = logs[0]
        x = series(log, "step", "loss")[0]
        facts = ([f"{short(log['header']['parameters'])} parameters"] if number(log["header"], "parameters") else []) + \
                ([f"{short(x[-1])} tokens"] if x and by_tokens else [])
        title = name + (": " + ", ".join(facts) if facts else "")
    if title:
        axes.flat[0].set_title(title, fontsize=11, loc="left")
    svg = os.path.splitext(args.out)[1].lower() == ".svg"
    try:
        fig.savefig(args.out, dpi=130, **({"metadata": {"Date": None}} if svg else {}))
    except (OSError, ValueError) as e:     # a folder that is not there, a suffix that is no picture
        sys.exit(f"error: {args.out}: {e}")
    print(args.out)


if __name__ == "__main__":
    main()
