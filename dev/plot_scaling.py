"""Draw how the 3B and the 30B scale, as the planner of the CUDA trainer has it (--dry-run --device h100 --gpus auto): modelled, not measured.

    pip install matplotlib
    make train DEVICE=emu && python3 dev/plot_scaling.py ./train_litespark -o dev/results/scaling.svg

Each point is the fastest layout that fits (ZeRO, ranks that share, recomputation, micro-step). What each term of the model assumes stands at the
head of section 16 of the trainers. The report's points (arXiv 2510.02483, H200, 1,048,576 tokens per update) are beside them.
"""
import argparse
import subprocess

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

T = 4096
UPDATES = (1 << 20, 1 << 24)        # tokens: 256 sequences as in the report, and 4,096
REPORT = {"3B": {8: 89.35, 16: 88.65, 128: 17.66, 256: 6.29}, "30B": {256: 39.54, 512: 21.88}}          # MFU in percent
BASELINE = {"3B": {8: 44.70, 16: 40.63, 128: 4.67, 256: 2.73}, "30B": {256: 8.43, 512: 3.38}}


def plans(trainer, preset, tokens):
    """[(gpus, MFU in percent, share of the step that waits for communication, layout)] by the number of GPUs"""
    out = subprocess.run([trainer, "--preset", preset, "--precision", "bf16", "--seq-len", str(T), "--total-batch-tokens", str(tokens), "--train-data", "none",
                          "--tokens", "500e9", "--device", "h100", "--gpus", "auto", "--dry-run"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 8) for line in out.splitlines()[2:]]
    return sorted((int(r[0]), float(r[7].rstrip("%")), float(r[6].rstrip("%")), r[8]) for r in rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trainer")
    p.add_argument("-o", required=True, help="the suffix chooses: .svg, .png or .pdf")
    o = p.parse_args()
    plt.rcParams |= {"svg.hashsalt": "litespark", "font.size": 10}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for axis, preset in zip(axes, REPORT):
        for tokens, style in zip(UPDATES, ("o-", "s-")):
            rows = plans(o.trainer, preset, tokens)
            axis.plot([r[0] for r in rows], [r[1] for r in rows], style, label=f"modelled, {tokens / 1e6:.0f} M tokens per update")
            for gpus, mfu, exposed, layout in rows: print(f"{preset} {tokens} tokens per update, {gpus} x h100: MFU {mfu}%, exposed {exposed}%, {layout}")
        axis.plot(list(REPORT[preset]), list(REPORT[preset].values()), "^:", color="tab:red", label="the report, 1 M tokens")
        axis.plot(list(BASELINE[preset]), list(BASELINE[preset].values()), "v:", color="tab:gray", label="its baseline")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks([1, 8, 64, 512, 4096])
        axis.set_title(preset)
        axis.set_xlabel("GPUs (ours H100, the report's H200)")
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("MFU in %, report's form")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(o.o, metadata={"Date": None} if o.o.endswith(".svg") else None)


if __name__ == "__main__":
    main()
