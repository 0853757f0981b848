#!/usr/bin/env python3
"""Loss curves from the same weights over the same tokens in the same order: litespark, Hugging Face's eager Llama, compiled PyTorch (the
contestants of dev/benchmark.py), and litespark with another order of the data: the noise to judge differences by.

    PYTHON_WITH_TORCH curves.py BINARY TRAIN_SHARDS UPDATES FOLDER       writes FOLDER/losses.csv and losses.svg
"""
import argparse
import csv
import os
import signal
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import benchmark                                                # noqa: E402

MODEL, T, BATCH, MEAN = "15M", 256, 4, 20                       # MEAN: updates that a curve is averaged over
OTHER = "litespark, another order of the data"


def runs(binary, data, updates):
    """{name: losses}"""
    with tempfile.TemporaryDirectory() as scratch:
        o = argparse.Namespace(binary=os.path.abspath(binary), device="cpu", start="", minutes=0, warmup=1, steps=updates - 1, plant="",
                               cache=f"{scratch}/inductor", train_data=data)
        bench = benchmark.Bench(o, scratch)
        case = dict(name=MODEL, model=MODEL, config=benchmark.model_config(MODEL), ranks=1, precision="fp32", T=T, batch=BATCH, micro=BATCH,
                    threads=os.cpu_count())
        benchmark.prepare(bench, case)
        out = {}
        for name, run in (("litespark", lambda: bench.litespark(case, BATCH)), (OTHER, lambda: bench.litespark(case, BATCH, seed=2)),
                          ("Hugging Face, eager", lambda: bench.torch(case, "hf", "eager", BATCH)),
                          ("PyTorch, compiled", lambda: bench.torch(case, "pytorch", "compile", BATCH))):
            out[name] = run()["losses"]
            print(f"{name}: {out[name][0]:.5f} to {out[name][-1]:.5f}", flush=True)
    return out


def mean(x):
    return [sum(x[i:i + MEAN]) / MEAN for i in range(len(x) - MEAN + 1)]


def draw(losses, path):
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "litespark", "font.size": 10})
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8.5, 7.5), sharex=True, layout="constrained", height_ratios=(3, 2))
    styles = {"litespark": dict(color="C0", lw=4, alpha=0.4), OTHER: dict(color="0.5", lw=1, ls=":")}
    for i, (name, x) in enumerate(losses.items()):
        style = styles.get(name, dict(color=f"C{i}", lw=1.2, ls="--" if i % 2 else "-"))
        top.plot(range(MEAN, len(x) + 1), mean(x), label=name, **style)
        if name != "litespark":
            apart = [abs(a - b) for a, b in zip(mean(x), mean(losses["litespark"]))]
            bottom.semilogy(range(MEAN, len(x) + 1), [max(d, 1e-9) for d in apart], label=name, **style)
    top.set_ylabel(f"loss, nats per token (mean of {MEAN} updates)")
    bottom.set_ylabel("apart from litespark, nats")
    bottom.set_xlabel("update")
    for ax in (top, bottom):
        ax.legend(fontsize=9)
        ax.grid(alpha=0.3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    fig.savefig(path, metadata={"Date": None})


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # with the children
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    binary, data, updates, folder = sys.argv[1:]
    losses = runs(binary, data, int(updates))
    with open(f"{folder}/losses.csv", "w", newline="") as f:
        w = csv.writer(f, lineterminator="\n")
        w.writerow(["update", *losses])
        w.writerows([i, *(f"{x:.6f}" for x in row)] for i, row in enumerate(zip(*losses.values()), 1))
    for name in losses:
        apart = [abs(a - b) for a, b in zip(losses[name], losses["litespark"])]
        smooth = [abs(a - b) for a, b in zip(mean(losses[name]), mean(losses["litespark"]))]
        last = sum(losses[name][-MEAN:]) / MEAN
        print(f"| {name} | {last:.5f} | {max(apart):.1e} | {max(smooth):.1e} | {smooth[-1]:.1e} |")
    draw(losses, f"{folder}/losses.svg")


if __name__ == "__main__":
    main()
