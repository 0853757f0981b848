"""Draw litespark logs: one picture, or one HTML page with every metric, the options and the results of the runs.

    python3 dev/plot_log.py out/log.jsonl -o run.html                       everything, in one file that needs no network
    python3 dev/plot_log.py small/log.jsonl wide/log.jsonl -o both.html     several runs, one over the other
    python3 dev/plot_log.py out/log.jsonl -o loss.svg                       a picture of the loss: .svg, .png or .pdf
    python3 dev/plot_log.py out/log.jsonl --all --x energy -o run.png       all metrics, over the energy of the updates

Pictures need matplotlib (pip install matplotlib), the page needs nothing. A log that a kill cut short is fine, and so is one
that was resumed: where a step was logged twice the later record wins.
"""
import argparse
import bisect
import html
import json
import math
import os
import sys

FLOOR = "floor: what a perfect model would reach, the entropy of the data"


# The metrics, in the order of the page: a headline, what is drawn in one panel, and 1 if it begins at 0.
PANELS = [("loss, nats per token", ["loss"], 0),
          ("tokens per second", ["tokens_per_sec", "trained_tokens_per_sec"], 1),
          ("model FLOPs utilisation (MFU)", ["mfu", "mfu_causal"], 1),
          ("power of all ranks, W", ["watts"], 1),
          ("joules per token", ["joules_per_token", "joules_per_trained_token"], 1),
          ("gradient norm, before it is clipped", ["grad_norm"], 1),
          ("learning rate", ["lr"], 1),
          ("skipped updates so far", ["skipped_so_far"], 1),
          ("margin of the chosen answers over the rejected", ["rewards/margins", "rewards/chosen", "rewards/rejected"], 0),
          ("share of pairs whose chosen answer wins", ["rewards/accuracies"], 0),
          ("log p of the answers", ["logps/chosen", "logps/rejected"], 0),
          ("perplexity of held-out data", ["perplexity"], 0),
          ("bits per byte of held-out data", ["bits_per_byte"], 0),
          ("accuracy on held-out data", ["token_accuracy", "answer_accuracy"], 0)]
# drawn without a mean of several steps
AS_THEY_ARE = {"lr", "skipped_so_far", "watts", "joules_per_token", "joules_per_trained_token"}
# the parts of an update, whose seconds add up to its time; a panel of them is stacked, one per run
PARTS = ["data", "forward", "backward", "optimizer", "communication", "other"]
AXES = {"tokens": "tokens trained on", "time": "seconds in updates", "energy": "joules in updates", "step": "step"}


def number(r, key):
    return isinstance(r.get(key), (int, float)) and math.isfinite(r[key])


def read_log(path):
    """{"header": the first, "last": the last header, "step", "val": {step: record}, "look", "end": [records]}; a step record
    gets "time" and "energy" (seconds and joules of all updates up to it) and "skipped_so_far". Lines that are not JSON are
    counted and skipped."""
    log, bad = {"header": {}, "last": {}, "step": {}, "val": {}, "look": [], "end": []}, 0
    with open(path, errors="replace") as f:
        for line in filter(str.strip, f):
            try:
                r = json.loads(line)
            except ValueError:
                bad += 1
                continue
            kind, step = (r.get("type"), r.get("step")) if isinstance(r, dict) else (None, None)
            if not isinstance(r, dict):
                bad += 1
            elif kind == "header":
                log["header"], log["last"] = log["header"] or r, r
            elif kind in ("look", "end"):
                log[kind].append(r)
            elif kind in ("step", "val") and isinstance(step, int):
                log[kind][step] = {**(log["val"].get(step, {}) if kind == "val" else {}), **r}
                for name, source in (r.get("sources") or {}).items():
                    log[kind][step]["loss of " + name] = source.get("loss")
            elif kind == "tasks" and isinstance(step, int):
                val = log["val"].setdefault(step, {"step": step})
                for name, task in (r.get("tasks") or {}).items():
                    val |= {f"{name} {k}": task.get(k) for k in ("acc", "acc_norm")}
    if bad:
        print(f"{path}: skipped {bad} broken line{'s' if bad > 1 else ''}", file=sys.stderr)
    add_axes(log)
    return log


def add_axes(log):
    """Time adds up. Energy is known where a window of the counter ended; in between, it grows with the tokens."""
    time, skipped, knots = 0, 0, [(0, 0.0)]
    steps = [log["step"][s] for s in sorted(log["step"])]
    for r in steps + log["end"][-1:]:
        if number(r, "tokens") and number(r, "joules") and r["joules"] > knots[-1][1] and r["tokens"] > knots[-1][0]:
            knots.append((r["tokens"], r["joules"]))
    tokens = [k[0] for k in knots]
    for r in steps:
        time += r["time_per_iteration"] if number(r, "time_per_iteration") else 0
        skipped += r.get("skipped") is True
        r |= {"time": time, "skipped_so_far": skipped}
        if number(r, "tokens") and number(r, "joules") and len(knots) > 1:
            i = min(max(bisect.bisect_left(tokens, r["tokens"]), 1), len(knots) - 1)
            (a, x), (b, y) = knots[i - 1], knots[i]
            r["energy"] = x + (y - x) * min(1, (r["tokens"] - a) / (b - a))


def places(log, kind, axis):
    """{step: place on the axis} of the records of a kind; an evaluation is where the last logged step up to it is."""
    if axis == "step":
        return {s: s for s in log[kind]}
    steps = sorted(s for s, r in log["step"].items() if number(r, axis))
    def place(step):
        i = bisect.bisect_right(steps, step) - 1
        return log["step"][steps[i]][axis] if i >= 0 else 0
    return {s: place(s) for s in log[kind]} if steps else {}


def series(log, kind, key, axis="tokens"):
    """Places on the axis and values of `key`, in order, without null and non-finite values. Without tokens: over steps."""
    where = places(log, kind, axis) or (places(log, kind, "step") if axis == "tokens" else {})
    points = [(where[s], r[key]) for s, r in sorted(log[kind].items()) if s in where and number(r, key)]
    return [p[0] for p in points], [p[1] for p in points]


def wheres(key):
    """Where a metric stands: in step records, and in those of evaluations, there perhaps with val_ before its name."""
    return ("step", key), ("val", "val_" + key if key == "loss" or "/" in key else key)


def panels_of(logs):
    """The panels of PANELS for which there is something to draw, and those of the sources and tasks of these logs; each with the
    number of the run whose keys it stacks, or None."""
    of_val = {k for _, log in logs for r in log["val"].values() for k in r}
    sources = sorted(k for k in of_val if k.startswith("loss of "))
    tasks = sorted(k for k in of_val if k.endswith((" acc", " acc_norm")))
    panels = PANELS + [("loss of each source of held-out data", sources, 0),
                       ("multiple choice: share of right choices", tasks, 0)]
    pretrain = all(log["last"].get("options", {}).get("stage", "pretrain") == "pretrain" for _, log in logs)
    def drawn(key):
        values = [y for _, log in logs for where in wheres(key) for y in series(log, *where, "step")[1]]
        return any(values) and not (pretrain and "trained_" in key)
    panels = [(title, [k for k in keys if drawn(k)], zero, None) for title, keys, zero in panels]
    times = [("seconds of an update, by parts" + (f": {name}" if len(logs) > 1 else ""), [f"{p}_seconds" for p in PARTS], 1, i)
             for i, (name, log) in enumerate(logs) if all(series(log, "step", f"{p}_seconds", "step")[1] for p in PARTS)]
    at = 1 + max((i for i, p in enumerate(panels) if "mfu" in p[1]), default=0)
    return [p for p in panels[:at] + times + panels[at:] if p[1]]


def smoothed(values, n):
    """Mean of the n values around each point, fewer at the ends."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    ends = [(max(0, i - (n - 1) // 2), min(len(values), i + n // 2 + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def thinned(x, y, n):
    """At most n points of a line, with the first and the last: a picture has no more columns, and an SVG stays small."""
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
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    one, lowest, highest = len(logs) == 1, math.inf, -math.inf
    for i, (name, log) in enumerate(logs):
        color, prefix = f"C{i % 10}", "" if one else name + ": "
        x, y = series(log, "step", "loss", args.x)
        if y:
            n = args.smooth or max(1, len(y) // 100)
            ax.plot(*thinned(x, y, args.points), color=color, lw=0.6, alpha=0.45)
            ax.plot(*thinned(x, smoothed(y, n), args.points), color=color, lw=1.3,
                    label=prefix + "training loss" + (f", mean of {n} steps" if n > 1 else ""))
        vx, vy = series(log, "val", "val_loss", args.x)
        if vy:
            ax.plot(vx, vy, color="C1" if one else color, ls="", marker="o", ms=5.5, mec="black", mew=0.7, zorder=3,
                    label=prefix + "validation loss" + (f", {vy[-1]:.4f} at the end" if one else ""))
        skipped = [(a, b) for a, b in zip(*series(log, "step", "skipped_so_far", args.x)) if b]
        skipped = [b[0] for a, b in zip([(0, 0)] + skipped, skipped) if b[1] > a[1]]
        if skipped:
            ax.plot(skipped, [0.02] * len(skipped), color="red", ls="", marker="^", ms=5, transform=ax.get_xaxis_transform(),
                    label=f"{prefix}{len(skipped)} skipped")
        lowest, highest = min([lowest] + y + vy), max([highest] + y + vy)
    floors = sorted({f for _, log in logs for f in series(log, "val", "floor")[1]})
    for f in floors:
        ax.axhline(f, color="black", ls="--", lw=1.2)
        lowest = min(lowest, f)
    if lowest > 0:                         # on a logarithmic scale the last tenth above the floor is seen, too
        ax.set_yscale("log")
        low, high = lowest * (0.84 if floors else 0.95), highest * 1.05
        ticks = [m * 10 ** e for e in range(-4, 4) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        ticks = [t for t in ticks if low <= t <= high]
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for f in floors:                       # below its line, at the left end
        what = FLOOR if one else FLOOR.split(",")[0]
        ax.annotate(f"{f:.4f}  {what}", (0.012, f), xycoords=("axes fraction", "data"),
                    xytext=(0, -4), textcoords="offset points", va="top", fontsize=9)
    ax.set_ylabel("loss, nats per token" + (" (log scale)" if lowest > 0 else ""))
    ax.legend(fontsize=9, loc="upper right", framealpha=1)


def draw_metrics(ax, keys, logs, args):
    for i, (name, log) in enumerate(logs):
        for k, key in enumerate(keys):
            (x, y), (vx, vy) = (series(log, *where, args.x) for where in wheres(key))
            what = name if len(keys) == 1 else key if len(logs) == 1 else f"{name}: {key}"
            color, dashes = f"C{i % 10}", ("-", "--", ":")[k % 3]
            if y:
                ax.plot(*thinned(x, y, args.points), color=color, ls=dashes, lw=0.8, alpha=0.7, label=f"{what}: training")
            if vy:
                ax.plot(vx, vy, color=color, ls=dashes if not y else "", lw=1.0, marker="os^"[k % 3], ms=5, mec="black",
                        mew=0.6, label=f"{what}: held-out data, {vy[-1]:.4g} at the end")
    ax.legend(fontsize=9)


def draw_stack(ax, keys, log, args):
    of = [dict(zip(*series(log, "step", key, args.x))) for key in keys]
    x = sorted(set.intersection(*map(set, of)))
    n = args.smooth or max(1, len(x) // 100)
    layers = [thinned(x, smoothed([max(0, y[a]) for a in x], n), args.points)[1] for y in of]
    ax.stackplot(thinned(x, x, args.points)[0], layers, labels=[k.removesuffix("_seconds") for k in keys],
                 colors=[f"C{k}" for k in range(len(keys))], alpha=0.85, lw=0)
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], names[::-1], fontsize=9, loc="upper right")         # in the order of the picture


def write_picture(logs, args):
    try:
        import matplotlib
        matplotlib.use("Agg")  # no display needed
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        sys.exit(f"error: {args.out}: a picture needs matplotlib (pip install matplotlib); -o run.html does not")
    panels = [("", ["loss"], 0, None)]
    if args.keys:
        panels = [(key, [key], 0, None) for key in args.keys.split(",")]
        none = [key for key, _, _, _ in panels if not any(series(log, *where)[1] for _, log in logs for where in wheres(key))]
        if none:
            sys.exit(f"error: no record has {', '.join(none)}")
    elif args.all:
        panels += [p for p in panels_of(logs) if p[1] != ["loss"]]
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "litespark", "font.size": 10,   # same log, same bytes
                         "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]})
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = 8.5 if columns == 1 else 14, 4.6 * rows
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    by_step = args.x == "tokens" and not any(number(r, "tokens") for _, log in logs for r in log["step"].values())
    for ax, (title, keys, zero, stacked) in zip(axes.flat, panels):
        if keys == ["loss"] and not args.keys:
            draw_loss(ax, logs, args)
        elif stacked is not None:
            draw_stack(ax, keys, logs[stacked][1], args)
        else:
            draw_metrics(ax, keys, logs, args)
        if keys != ["loss"] or args.keys:
            ax.set_title(title, fontsize=11, loc="left")
        if zero:
            ax.set_ylim(bottom=0)
        ax.set_xlabel("step" if by_step else AXES[args.x])
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
                ([f"{short(x[-1])} tokens"] if x and not by_step else [])
        title = name + (": " + ", ".join(facts) if facts else "")
    if title:
        axes.flat[0].set_title(title, fontsize=11, loc="left")
    svg = os.path.splitext(args.out)[1].lower() == ".svg"
    try:
        fig.savefig(args.out, dpi=130, **({"metadata": {"Date": None}} if svg else {}))
    except (OSError, ValueError) as e:     # a folder that is not there, a suffix that is no picture
        sys.exit(f"error: {args.out}: {e}")


# ---- the page: dev/report.html draws what stands here as JSON
def kept_steps(log, n):
    """At most about n steps, evenly spaced, with those in between that were skipped or have the extreme losses and norms."""
    steps = sorted(log["step"])
    if len(steps) <= n:
        return steps
    keep, size = set(steps[-1:]), 5 * len(steps) / n
    for i in range(math.ceil(n / 5)):
        bucket = steps[int(i * size):int((i + 1) * size)]
        keep.update(bucket[:1] + [s for s in bucket if log["step"][s].get("skipped") is True][:1])
        for key in ("loss", "grad_norm"):
            of = [s for s in bucket if number(log["step"][s], key)]
            if of:
                keep.update((min(of, key=lambda s: log["step"][s][key]), max(of, key=lambda s: log["step"][s][key])))
    return sorted(keep)


def rounded(x):
    return float(f"{x:.6g}") if isinstance(x, (int, float)) and math.isfinite(x) else None


def page_data(logs, args):
    """What the page shows: see the comment in dev/report.html."""
    panels, runs = panels_of(logs), []
    keys = list(dict.fromkeys(k for _, of, _, _ in panels for k in of))
    for name, log in logs:
        steps, run = kept_steps(log, args.points_of_page), {"name": name, "lines": {}, "dots": {}, "floor": None}
        of_steps, of_vals = {"step": steps}, {"step": sorted(log["val"])}
        for axis in AXES:
            for kind, columns in (("step", of_steps), ("val", of_vals)):
                where = places(log, kind, axis)
                columns[axis] = [rounded(where[s]) if s in where else None for s in columns["step"]]
        for key in keys:
            (kind, k), (val, vk) = wheres(key)
            all_steps = [s for s in sorted(log["step"]) if number(log["step"][s], k)]
            if all_steps:
                of_steps[key] = [rounded(log["step"][s].get(k)) for s in steps]
            if all_steps and key not in AS_THEY_ARE:
                n = args.smooth or max(1, len(all_steps) // 100)
                mean = dict(zip(all_steps, smoothed([log["step"][s][k] for s in all_steps], n)))
                of_steps["mean of " + key] = [rounded(mean.get(s)) for s in steps]
            if any(number(r, vk) for r in log["val"].values()):
                of_vals[key] = [rounded(log["val"][s].get(vk)) for s in of_vals["step"]]
        run |= {"lines": of_steps, "dots": of_vals, "skipped": [s for s in steps if log["step"][s].get("skipped") is True]}
        floors = series(log, "val", "floor")[1]
        run["floor"] = floors[-1] if floors else None
        runs.append(run)
    axes = {a: title for a, title in AXES.items() if any(x for run in runs for x in run["lines"][a])}
    tables = [table("Results", [results(log, args) for _, log in logs]), table("Run", [facts(log) for _, log in logs]),
              table("Options", [log["last"].get("options", {}) for _, log in logs])]
    return {"title": args.title or ", ".join(name for name, _ in logs), "axes": axes, "tables": tables, "runs": runs,
            "panels": [{"title": t, "keys": k, "zero": z, "stacked": s} for t, k, z, s in panels]}


def table(title, columns):
    """Rows of a name and a text per run, in the order in which the runs bring them."""
    names = list(dict.fromkeys(n for c in columns for n in c))
    return {"title": title, "rows": [[n] + [str(c.get(n, "")) for c in columns] for n in names]}


def facts(log):
    """What stands in the header, but the options."""
    head, names = log["last"], {key: key for key in ("device", "host", "ranks", "parameters", "commit", "run")}
    names |= {"peak_tflops_per_gpu": "peak, TFLOP/s per rank", "idle_watts": "idle, W", "power_limit_watts": "power limit, W"}
    def text(x):
        return "unavailable" if x is None else f"{x:.4g}" if isinstance(x, float) else x
    return {title: text(head[key]) for key, title in names.items() if key in head}


def results(log, args):
    """What came out, as text; what no counter measured is "unavailable"."""
    steps = [log["step"][s] for s in sorted(log["step"])]
    last, val = steps[-1] if steps else {}, [log["val"][s] for s in sorted(log["val"])]
    def text(x, form):
        return form.format(x) if isinstance(x, (int, float)) and math.isfinite(x) else "unavailable"
    def at_end(key):
        return next((r[key] for r in reversed(val) if number(r, key)), None)
    rows = {"updates": last.get("step", 0), "of them skipped": last.get("skipped_so_far", 0),
            "tokens": text(last.get("tokens"), "{:,.0f}"), "trained tokens": text(last.get("trained_tokens"), "{:,.0f}")}
    seconds, tokens = last.get("time") or math.nan, last.get("tokens") or math.nan
    rows["time in updates"] = text(seconds, "{:,.1f} s")
    timed = [r for r in steps if number(r, "tokens_per_sec") and number(r, "time_per_iteration")]
    rows["tokens per second"] = text(sum(r["tokens_per_sec"] * r["time_per_iteration"] for r in timed) / seconds, "{:,.0f}")
    mfu = sorted(r["mfu"] for r in steps if number(r, "mfu"))
    rows["MFU, median"] = text(100 * mfu[len(mfu) // 2] if mfu else None, "{:.1f}%")
    split = {p: sum(r[f"{p}_seconds"] for r in steps if number(r, f"{p}_seconds")) for p in PARTS}
    if sum(split.values()) > 0:
        rows["time by parts"] = ", ".join(f"{p} {100 * x / sum(split.values()):.1f}%" for p, x in split.items())
    speed = sorted(r["of_modelled_speed"] for r in steps if number(r, "of_modelled_speed"))
    if speed:
        rows["of the modelled speed, median"] = f"{100 * speed[len(speed) // 2]:.1f}%"
    for key, title in (("val_loss", "loss of held-out data"), ("floor", "floor of that data"), ("perplexity", "perplexity"),
                       ("bits_per_byte", "bits per byte"), ("token_accuracy", "token accuracy"),
                       ("answer_accuracy", "answer accuracy"), ("val_rewards/margins", "margin"),
                       ("val_rewards/accuracies", "pairs won")):
        if at_end(key) is not None:
            rows[title] = f"{at_end(key):.4f}"
    if rows.keys() >= {"loss of held-out data", "floor of that data"} and at_end("floor"):
        above = at_end("val_loss") - at_end("floor")
        rows["above the floor"] = f"{above:.4f} ({100 * above / at_end('floor'):.1f}%)"
    # energy: NAN where a part of it is unavailable
    end = log["end"][-1] if log["end"] else {}
    joules = next((r["joules"] for r in [end] + steps[::-1] if number(r, "joules")), math.nan)
    parts = {"updates": joules}
    for kind in ("evaluation", "sample", "checkpoint"):
        looks, key = [r for r in log["look"] if kind + "_seconds" in r], kind + "_joules"
        if looks:
            parts[kind + "s"] = sum(r[key] if number(r, key) else math.nan for r in looks)
    rows |= {"energy of " + name: text(x / 3.6e6, "{:.4g} kWh") for name, x in parts.items()}
    idle = log["last"]["idle_watts"] if number(log["last"], "idle_watts") else math.nan
    targets = last["trained_tokens"] if number(last, "trained_tokens") else math.nan
    rows |= {"of updates above idle": text((joules - idle * seconds) / 3.6e6, "{:.4g} kWh"),
             "power of updates": text(joules / seconds, "{:.4g} W"), "joules per token": text(joules / tokens, "{:.4g}"),
             "joules per update": text(joules / (last.get("step") or math.nan), "{:.4g}"),
             "tokens per joule": text(tokens / joules, "{:.4g}"),
             "GFLOP per joule": text(end.get("gflop_per_joule"), "{:.4g}")}
    if targets and targets != tokens:
        rows["joules per trained token"] = text(joules / targets, "{:.4g}")
    if args.carbon_intensity is not None:
        grams = sum(parts.values()) / 3.6e6 * args.carbon_intensity
        rows[f"gCO2e at {args.carbon_intensity:g} g/kWh"] = text(grams, "{:.4g}")
    return rows


def write_page(logs, args):
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html"), encoding="utf-8") as f:
        page = f.read()
    data = page_data(logs, args)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")     # no text ends the script
    try:
        with open(args.out, "w", encoding="utf-8") as f:
            f.write(page.replace("TITLE", html.escape(data["title"]), 1).replace("null/*DATA*/", text, 1))
    except OSError as e:
        sys.exit(f"error: {args.out}: {e.strerror}")


def main():
    ap = argparse.ArgumentParser(description="plot litespark logs")
    ap.add_argument("logs", nargs="+")
    ap.add_argument("-o", "--out", default="run.html", help="what to write: a page (.html) or a picture (.svg, .png or .pdf)")
    ap.add_argument("--smooth", type=int, default=0, metavar="N",
                    help="training metrics: mean of N steps, 1 = none, 0 = a hundredth of the run")
    ap.add_argument("--title", help="headline; default: names, and of one run parameters and tokens")
    ap.add_argument("--carbon-intensity", type=float, metavar="G",
                    help="page: grams of CO2e per kWh, for the energy of updates, evaluations, samples and checkpoints")
    ap.add_argument("--x", choices=AXES, default="tokens", help="pictures: the horizontal axis (the page has a switch)")
    ap.add_argument("--points", type=int, default=400, help="pictures: most points of a line")
    ap.add_argument("--all", action="store_true", help="pictures: every metric, not only the loss")
    ap.add_argument("--keys", help="pictures: in place of the loss these metrics, each in a panel, of step and val records "
                                   "(lines and dots), such as answer_accuracy,rewards/margins,rewards/accuracies")
    args = ap.parse_args()
    args.points, args.points_of_page = max(2, args.points), 2000
    if args.carbon_intensity is not None and not 0 <= args.carbon_intensity < math.inf:
        sys.exit(f"error: --carbon-intensity {args.carbon_intensity:g}: grams per kWh are 0 or more")
    try:
        logs = [(label(path), read_log(path)) for path in args.logs]
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}")
    if not any(log["step"] or log["val"] for _, log in logs):
        sys.exit(f"error: no step or val record in {' '.join(args.logs)}")
    if args.x == "energy" and not any(number(r, "energy") for _, log in logs for r in log["step"].values()):
        sys.exit("error: --x energy: no counter of energy was readable in these runs")
    (write_page if args.out.lower().endswith((".html", ".htm")) else write_picture)(logs, args)
    print(args.out)


if __name__ == "__main__":
    main()
