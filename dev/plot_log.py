"""Draw one or several litespark logs into one PNG: loss, speed, gradient norm, and energy where it was measured.

    pip install matplotlib
    python3 dev/plot_log.py out/log.jsonl -o plot.png
    python3 dev/plot_log.py baseline/log.jsonl wide/log.jsonl --smooth 20 -o compare.png

A log that a kill cut short is fine, and so is one that was resumed: where a step was logged twice the later record wins.
"""
import argparse, json, math, os, sys

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


def read_log(path):
    """{"step": {step: record}, "val": {step: record}}; lines that are not JSON are counted and skipped."""
    records, bad = {"step": {}, "val": {}}, 0
    with open(path, errors="replace") as f:
        for line in filter(str.strip, f):
            try:
                r = json.loads(line)
            except ValueError:
                bad += 1
                continue
            if r.get("type") in records and "step" in r:
                records[r["type"]][r["step"]] = r
    if bad:
        print(f"{path}: skipped {bad} broken line{'s' if bad > 1 else ''}", file=sys.stderr)
    return records


def series(records, key):
    """Steps and values of `key`, in step order; null and non-finite values are left out."""
    points = [(s, r[key]) for s, r in sorted(records.items()) if isinstance(r.get(key), (int, float))]
    points = [p for p in points if math.isfinite(p[1])]
    return [p[0] for p in points], [p[1] for p in points]


def smoothed(values, n):
    """Mean of the last n values at each point."""
    return [sum(values[max(0, i - n + 1):i + 1]) / min(n, i + 1) for i in range(len(values))]


def label(path):
    """out/log.jsonl -> out; other names stay."""
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if path.endswith("log.jsonl") else path


def main():
    ap = argparse.ArgumentParser(description="plot litespark logs")
    ap.add_argument("logs", nargs="+")
    ap.add_argument("-o", "--out", default="plot.png")
    ap.add_argument("--smooth", type=int, default=1, help="mean of the last N steps, for the training loss")
    args = ap.parse_args()
    panels = [("loss", "loss (nats per token)"), ("tokens_per_sec", "tokens/s"), ("grad_norm", "gradient norm"),
              ("joules_per_token", "joules/token")]
    logs = [(label(path), read_log(path)) for path in args.logs]
    if not any(log["step"] or log["val"] for _, log in logs):
        sys.exit(f"error: no step or val record in {' '.join(args.logs)}")
    panels = [p for p in panels if p[0] == "loss" or any(series(log["step"], p[0])[1] for _, log in logs)]
    rows = math.ceil(len(panels) / 2)
    fig, axes = plt.subplots(rows, min(2, len(panels)), figsize=(12, 4 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    for ax, (key, title) in zip(axes.flat, panels):
        for i, (name, log) in enumerate(logs):
            color = f"C{i % 10}"
            x, y = series(log["step"], key)
            ax.plot(x, smoothed(y, args.smooth) if key == "loss" else y, color=color, lw=1, label=name)
            if key == "loss":
                x, y = series(log["val"], "val_loss")
                ax.plot(x, y, color=color, ls="", marker="o", ms=4, mec="black", mew=0.5, label=name + " val")
                x, y = series(log["val"], "floor")
                ax.plot(x, y, color=color, ls="--", lw=1, label=name + " floor" if y else None)
        ax.set(xlabel="step", title=title)
        ax.grid(alpha=0.3)
        if key != "loss":
            ax.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize="small")
    fig.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
