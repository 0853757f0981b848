#!/usr/bin/env python3
"""`make test-plots`: dev/plot_log.py and export_log.py on logs of the trainer and on logs with all that can go wrong in one. The page runs
in headless Chromium (apt-get install chromium), pictures need matplotlib, exports tensorboard and wandb, which read them back: what is not
here is skipped. Words choose tests by name.

    dev/test_plots.py build/train_litespark [word ...]
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import harness
from harness import Absent, check as expect, top as TOP

DEV = os.path.dirname(os.path.abspath(__file__))
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
trainer = None


def need(module):
    if importlib.util.find_spec(module) is None:
        raise Absent(f"pip install {module}")


def plot(*words, tool="plot_log.py"):
    r = subprocess.run([sys.executable, f"{DEV}/{tool}", *map(str, words)], capture_output=True, text=True, timeout=300)
    return r.returncode, r.stdout + r.stderr


def export(*words):
    return plot(*words, tool="export_log.py")


def steps_of(n, **more):
    """Step records of a run of n updates that takes 0.5 s and 40 J each; the counter is read every fourth update."""
    joules = lambda i: 160.0 * (i // 4)
    return [{"type": "step", "step": i, "loss": 0.5 + 7 / i, "lr": 1e-3, "grad_norm": 1 + 1 / i, "tokens": 100.0 * i, "trained_tokens": 60.0 * i,
             "tokens_per_sec": 200.0, "trained_tokens_per_sec": 120.0, "mfu": 0.4, "mfu_causal": 0.35, "time_per_iteration": 0.5,
             "data_seconds": 0.05, "forward_seconds": 0.125, "backward_seconds": 0.25, "optimizer_seconds": 0.0375, "communication_seconds": 0.0125,
             "other_seconds": 0.025, "of_modelled_speed": None, "joules_per_token": 0.4 if i >= 4 else None, "watts": 80.0 if i >= 4 else None, "joules": joules(i), "skipped": False} | more
            for i in range(1, n + 1)]


def header(**more):
    return {"type": "header", "program": "litespark", "commit": "abc", "device": "a <b>processor</b>", "host": "h", "ranks": 1, "parameters": 1000,
            "peak_tflops_per_gpu": 0.5, "run": "1", "step": 0, "idle_watts": 30.0, "power_limit_watts": 200.0,
            "options": {"stage": "pretrain", "lr": "0.001", "out": "x</script><script>document.title = 'broken out'</script>"} | more}


def write_log(name, records):
    os.makedirs(f"{TOP}/{name}", exist_ok=True)
    path = f"{TOP}/{name}/log.jsonl"
    with open(path, "w") as f:
        f.write("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def hard_log(name="hard", **options):
    """Resumed at step 5 (with other losses), a skipped step without loss, half a line, lines that are no records, text and NaN for numbers."""
    old, new = steps_of(8, loss=9.0), steps_of(40)[5:]
    new[10] |= {"loss": None, "grad_norm": None, "skipped": True}       # step 16
    new[12] |= {"grad_norm": 77.0}                                      # step 18
    vals = [{"type": "val", "step": s, "val_loss": 1 + 1 / s, "floor": 0.49, "perplexity": 3.0, "bits_per_byte": 0.2, "token_accuracy": 0.5 + s / 100,
             "sources": {"web": {"loss": 2.0 / s}, "<i>code</i>": {"loss": 1.0}}} for s in (20, 40)]
    tasks = [{"type": "tasks", "step": 40, "tasks": {"story": {"acc": 0.6, "acc_norm": 0.7, "tasks": 9}}}]
    looks = [{"type": "look", "step": 20, "evaluation_seconds": 2.0, "evaluation_joules": 3600.0, "checkpoint_seconds": 1.0, "checkpoint_joules": 1800.0}]
    end = [{"type": "end", "step": 40, "tokens": 4000, "joules": 1600.0, "gflop_per_joule": 2.5}]
    return write_log(name, [header(**options), *old, '{"type": "step", "step": 9, "lo', "[1, 2]", "17", '{"type": "step"}', '{"type": "val", "step": "x"}',
                            header(**options), '{"type": "step", "step": 3, "loss": "text", "mfu": NaN}', *steps_of(5)[2:], *new[:15], vals[0], *looks,
                            *new[15:], vals[1], *tasks, *end])


def dpo_log():
    rows = [r | {"rewards/margins": i / 10, "rewards/chosen": -1.0, "rewards/rejected": -1 - i / 10, "rewards/accuracies": 0.9, "logps/chosen": -20.0,
                 "logps/rejected": -30.0} for i, r in enumerate(steps_of(20))]
    for r in rows:
        r |= {"joules": None, "joules_per_token": None, "watts": None}
    vals = [{"type": "val", "step": 20, "val_loss": 0.3, "val_rewards/margins": 1.9, "val_rewards/accuracies": 0.97}]
    return write_log("dpo", [header(stage="dpo", lr="0.002"), *rows, *vals])


# Runs in the page: every axis, every panel, a mouse, a run switched off, the other theme
PROBE = """
const result = {error: document.documentElement.dataset.error || null, title: document.title, axes: {}};
const box = e => e.getBoundingClientRect();
const count = () => [...document.querySelectorAll(".panel")].map(p => ({title: p.querySelector("h3").textContent,
    paths: [...p.querySelectorAll("svg:last-child path:not(.skipped)")].map(e => (e.getAttribute("d").match(/[ML]/g) || []).length),
    circles: p.querySelectorAll("circle").length, floors: p.querySelectorAll(".floor").length, skipped: p.querySelectorAll(".skipped").length}));
for (const option of document.getElementById("axis").options) {
    document.getElementById("axis").value = option.value;
    document.getElementById("axis").dispatchEvent(new Event("change"));
    const svg = document.querySelector(".panel svg:last-child"), b = box(svg);
    svg.dispatchEvent(new MouseEvent("mousemove", {clientX: b.left + b.width * (58 + 0.5 * 548) / 620, clientY: b.top + 20, bubbles: true}));
    const tip = document.getElementById("tip");
    result.axes[option.value] = {panels: count(), tip: tip.style.visibility === "visible" ? tip.textContent : null};
    svg.dispatchEvent(new MouseEvent("mouseleave"));
    result.axes[option.value].left = tip.style.visibility;
}
result.bad = document.querySelectorAll('[d*="NaN"], [cx*="NaN"], [cy*="NaN"], [x*="NaN"], [y1*="NaN"], [d*="Infinity"]').length;
result.rows = Object.fromEntries([...document.querySelectorAll("tr")].map(r => [...r.cells].map(c => c.textContent)).map(c => [c[0], c.slice(1)]));
result.differs = [...document.querySelectorAll("tr.differs")].map(r => r.cells[0].textContent);
result.width = innerWidth;
const panels = [...document.querySelectorAll(".panel")], last = p => p.querySelector(":scope > svg");
result.scales = panels.map(p => box(last(p)).width / last(p).viewBox.baseVal.width);         // of the text in a picture
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const overlap = list => list.some((e, i) => list.slice(i + 1).some(f => !apart(box(e), box(f))));
result.overlaps = panels.filter(p => overlap([...last(p).querySelectorAll("text")]) || overlap([p.querySelector("h3"), p.querySelector(".keys"),
    p.querySelector("button")])).map(p => p.querySelector("h3").textContent);
result.cells = Math.min(...[...document.querySelectorAll("td")].map(e => box(e).width));
const stack = panels.find(p => p.querySelector(".area")), paint = e => getComputedStyle(e).getPropertyValue(e.tagName === "path" ? "fill" : "background-color");
if (stack) {
    const at = () => { const b = box(last(stack)); last(stack).dispatchEvent(new MouseEvent("mousemove", {clientX: b.left + b.width / 2, clientY: b.top + 20,
        bubbles: true})); return document.getElementById("tip").textContent.split("\\n").slice(1); };
    result.stack = {fills: [...stack.querySelectorAll(".area")].map(paint), legend: [...stack.querySelectorAll(".swatch")].map(paint), seconds: at()};
    stack.querySelector("button").click();
    result.stack.shares = at();
    const areas = [...stack.querySelectorAll(".area")].map(e => e.getBBox()), cursor = stack.querySelector(".cursor");
    result.stack.gaps = [Math.min(...areas.map(b => b.y)) - cursor.getAttribute("y1"), Math.max(...areas.map(b => b.y + b.height)) - cursor.getAttribute("y2")];
    stack.querySelector("button").click();
    last(stack).dispatchEvent(new MouseEvent("mouseleave"));
}
result.wide = document.documentElement.scrollWidth > innerWidth;
const first = document.querySelector("#runs input");
if (first) { first.click(); result.one_less = count(); first.click(); }
const button = document.querySelector(".panel button"), labels = () => [...document.querySelectorAll(".panel:first-child svg text")].map(t => t.textContent).join();
result.log = labels(); button.click(); result.linear = labels(); button.click();
result.colors = [getComputedStyle(document.body).backgroundColor];
document.getElementById("theme").click(); result.colors.push(getComputedStyle(document.body).backgroundColor);
parent.postMessage(JSON.stringify(result), "*");
"""
# A window has a least width; a frame has none.
FRAME = """<body style="margin: 0"><iframe src="PAGE" style="border: 0; width: WIDTHpx; height: 1900px"></iframe><script>
onmessage = m => document.body.append(Object.assign(document.createElement("pre"), {id: "result", textContent: m.data}));
</script></body>"""


def chromium(page, *flags, width=1400):
    if not CHROMIUM:
        raise Absent("apt-get install chromium")
    r = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1900",
                        f"--user-data-dir={tempfile.mkdtemp(dir=TOP)}", *flags, "file://" + page], capture_output=True, text=True, timeout=120)
    expect(r.returncode == 0, r.stderr)
    return r.stdout


def probed(page, width=1400):
    with open(page) as f:
        text = f.read()
    text = text.replace("<head>", "<head><script>onerror = m => document.documentElement.dataset.error = m</script>", 1)
    with open(page + ".probe.html", "w") as f:
        f.write(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    with open(page + ".frame.html", "w") as f:
        f.write(FRAME.replace("PAGE", os.path.basename(page) + ".probe.html").replace("WIDTH", str(width)))
    dom = chromium(page + ".frame.html", "--dump-dom", width=max(width, 500))
    if '<pre id="result">' not in dom:                      # what the page says of itself without the frame
        dom = chromium(page + ".probe.html", "--dump-dom")
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    expect(found, "the page ended before the probe: " + dom[:800])
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    expect(result["error"] is None, result["error"])
    expect(result["bad"] == 0, f"{result['bad']} coordinates are no numbers")
    return result


def test_page_shows_every_metric_of_a_hard_log():
    status, said = plot(hard_log(), "-o", f"{TOP}/hard.html", "--carbon-intensity", 400)
    expect(status == 0 and "skipped 3 broken lines" in said, said)
    r = probed(f"{TOP}/hard.html")
    panels = {p["title"]: p for p in r["axes"]["tokens"]["panels"]}
    for title in ("loss, nats per token", "tokens per second", "model FLOPs utilisation (MFU)", "power of all ranks, W", "joules per token",
                  "gradient norm, before it is clipped", "learning rate", "skipped updates so far", "perplexity of held-out data",
                  "bits per byte of held-out data", "accuracy on held-out data", "loss of each source of held-out data",
                  "multiple choice: share of right choices"):
        expect(title in panels, f"no panel {title}")
    expect(not any("margin" in p for p in panels), "a panel of dpo")
    loss = panels["loss, nats per token"]
    expect(loss["paths"] == [39, 39] and loss["circles"] == 2 and loss["floors"] == 1 and loss["skipped"] == 1, loss)
    split = panels["seconds of an update, by parts"]
    expect(split["paths"] == [80] * 6 and not split["circles"], split)      # areas: 40 steps, above and below
    expect(set(r["axes"]) == {"tokens", "time", "energy", "step"}, set(r["axes"]))
    tip = r["axes"]["tokens"]["tip"].split("\n")        # the middle of 4000 tokens: step 20, whose loss is 0.5 + 7/20
    expect(tip[0] == "2000 tokens" and "loss 0.85  at step 20" in tip and "loss (held-out) 1.05  at step 20" in tip, tip)
    expect(r["axes"]["time"]["tip"].split("\n")[:2] == ["10 s", "loss 0.85  at step 20"], r["axes"]["time"]["tip"])
    expect(r["axes"]["energy"]["tip"].startswith("800 J\nloss 0.85"), r["axes"]["energy"]["tip"])
    expect(r["axes"]["tokens"]["left"] == "hidden", "the values stay when the mouse has left")
    expect(r["title"] == "hard" and not r["wide"] and r["log"] != r["linear"], "title, width or scale")
    parts = "data 10.0%, forward 25.0%, backward 50.0%, optimizer 7.5%, communication 2.5%, other 5.0%"
    want = {"updates": "40", "of them skipped": "1", "time by parts": parts, "tokens": "4,000", "tokens per second": "200", "loss of held-out data": "1.0250",
            "above the floor": "0.5350 (109.2%)", "energy of updates": "0.0004444 kWh", "energy of evaluations": "0.001 kWh",
            "energy of checkpoints": "0.0005 kWh", "of updates above idle": "0.0002778 kWh", "power of updates": "80 W", "joules per token": "0.4",
            "joules per update": "40", "tokens per joule": "2.5", "joules per trained token": "0.6667", "GFLOP per joule": "2.5", "gCO2e at 400 g/kWh": "0.7778", "lr": "0.001", "device": "a <b>processor</b>", "power limit, W": "200"}
    for name, text in want.items():
        expect(r["rows"].get(name) == [text], f"{name}: {r['rows'].get(name)}, not {text}")


def test_page_compares_runs_and_says_unavailable():
    both = [dpo_log(), hard_log("other", lr="0.001")]
    status, said = plot(*both, "-o", f"{TOP}/two.html")
    expect(status == 0, said)
    r = probed(f"{TOP}/two.html")
    panels = {p["title"]: p for p in r["axes"]["tokens"]["panels"]}
    less = {p["title"]: p for p in r["one_less"]}
    expect(len(panels["loss, nats per token"]["paths"]) == 4 and len(less["loss, nats per token"]["paths"]) == 2, "a run is not switched off")
    margins = panels["margin of the chosen answers over the rejected"]
    expect(len(margins["paths"]) == 6 and margins["circles"] == 1, margins)
    expect(not less["margin of the chosen answers over the rejected"]["paths"], "the margins stay")
    for name in ("dpo", "other"):
        title = f"seconds of an update, by parts: {name}"
        expect(len(panels[title]["paths"]) == 6 and bool(less[title]["paths"]) == (name == "other"), title)
    expect(r["rows"]["joules per token"] == ["unavailable", "0.4"] and r["rows"]["pairs won"] == ["0.9700", ""], r["rows"])
    expect("lr" in r["differs"] and "commit" not in r["differs"], r["differs"])
    expect("dpo: loss" in r["axes"]["tokens"]["tip"] and "other: loss" in r["axes"]["tokens"]["tip"], r["axes"]["tokens"]["tip"])


def test_page_is_readable_on_screens_of_any_width():
    """Names that no blank breaks; a telephone, a window, a wide one: no text over another, none shrunk, no column of single letters."""
    long = "a_run_whose_name_has_no_blank_and_no_hyphen_in_it_and_goes_on_for_long"
    status, said = plot(hard_log(long), dpo_log(), "-o", f"{TOP}/narrow.html")
    expect(status == 0, said)
    for width in (390, 1280, 2000):
        r = probed(f"{TOP}/narrow.html", width)
        expect(r["width"] == width and not r["wide"], f"at {width}: the page is {r['width']} wide, or wider than its window")
        expect(min(r["scales"]) > 0.97 and r["cells"] > 75, f"at {width}: text is {min(r['scales'])} of its size, a column {r['cells']} wide")
        expect(not r["overlaps"], f"at {width}: text lies on text in {r['overlaps']}")
        stack = r["stack"]
        expect(len(set(stack["fills"])) == 6 and stack["fills"] == stack["legend"], f"at {width}: colours {stack['fills']}, legend {stack['legend']}")
        expect(stack["seconds"][1] == "forward (mean) 0.125 s" or stack["seconds"][1].startswith("forward 0.125 s"), stack["seconds"])
        shares = [float(re.search(r"([\d.]+)%", line)[1]) for line in stack["shares"]]
        expect(shares == [10, 25, 50, 7.5, 2.5, 5], f"at {width}: {stack['shares']}")
        expect(max(map(abs, stack["gaps"])) < 0.5, f"at {width}: the shares do not fill the picture: {stack['gaps']}")
    pictures = [f"{TOP}/{width}.png" for width in (390, 1280)]
    for width, picture in zip((390, 1280), pictures):
        chromium(f"{TOP}/narrow.html", f"--screenshot={picture}", width=width)
    need("matplotlib")
    import matplotlib.image
    for width, picture in zip((390, 1280), pictures):
        pixels = matplotlib.image.imread(picture)
        expect(pixels.shape[1] == width and len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 20, f"at {width}: an empty picture")


def test_page_is_light_and_dark_and_alone():
    plot(hard_log(), "-o", f"{TOP}/alone.html")
    with open(f"{TOP}/alone.html") as f:
        text = f.read()
    links = set(re.findall(r"https?://[^\"' )]*|\bsrc=|@import|\bfetch\(", text)) - {"http://www.w3.org/2000/svg"}
    expect(not links, f"the page asks for {links}")
    for preferred, flags in enumerate((["--blink-settings=preferredColorScheme=0"], ["--blink-settings=preferredColorScheme=1"])):
        picture = f"{TOP}/{preferred}.png"
        chromium(f"{TOP}/alone.html", f"--screenshot={picture}", *flags)
        need("matplotlib")
        import matplotlib.image
        pixels = matplotlib.image.imread(picture)[..., :3]
        corner, spread = pixels[2, 2].mean(), pixels[100:600, 100:600].std()
        expect((corner > 0.9) == bool(preferred) and (corner < 0.15) != bool(preferred), f"the background is {corner}")
        blue = ((pixels[..., 2] > pixels[..., 0] + 0.25)).sum()
        expect(blue > 500 and spread > 0.02, f"{blue} pixels of the first run's colour")
    r = probed(f"{TOP}/alone.html")
    expect(len(set(r["colors"])) == 2, "the button changes nothing")


def test_page_of_a_long_run_keeps_extremes_and_is_small():
    rows = steps_of(20000)
    rows[12344] |= {"loss": 99.0}
    rows[17776] |= {"skipped": True, "loss": None}
    status, said = plot(write_log("long", [header(), *rows]), "-o", f"{TOP}/long.html")
    expect(status == 0, said)
    with open(f"{TOP}/long.html") as f:
        text = f.read()
    data = json.loads(re.search(r"^const data = (.*);$", text, re.M)[1])
    lines = data["runs"][0]["lines"]
    expect(99.0 in lines["loss"] and 17777 in data["runs"][0]["skipped"], "a spike or a skipped step is lost")
    expect(len(lines["step"]) <= 2600 and len(text) < 1 << 20, f"{len(lines['step'])} steps, {len(text)} bytes")
    expect(lines["step"][0] == 1 and lines["step"][-1] == 20000 and lines["step"] == sorted(set(lines["step"])), "order of steps")


def test_page_of_a_run_of_the_trainer():
    out = f"{TOP}/run"
    fixture = f"{DEV}/fixture/llama"
    r = subprocess.run([trainer, "--config", f"{fixture}/config.json", "--train-data", f"{fixture}/tokens.bin", "--val-data", f"{fixture}/tokens.bin",
                        *"--seq-len 16 --batch-size 2 --steps 30 --val-every 10 --sample-every 0 --checkpoint-every 0 --threads 1 --out".split(), out],
                       capture_output=True, text=True)
    expect(r.returncode == 0, r.stderr)
    status, said = plot(f"{out}/log.jsonl", "-o", f"{TOP}/run.html")
    expect(status == 0 and "skipped" not in said, said)
    r = probed(f"{TOP}/run.html")
    loss = r["axes"]["tokens"]["panels"][0]
    expect(loss["paths"] == [30] or loss["paths"] == [30, 30], loss)
    expect(loss["circles"] == 3 and r["rows"]["updates"] == ["30"] and r["rows"]["seq-len"] == ["16"], loss)
    expect(float(r["rows"]["tokens per second"][0].replace(",", "")) > 0, r["rows"])


def test_pictures():
    need("matplotlib")
    hard = hard_log()
    for words in (["-o", f"{TOP}/a.svg"], ["--all", "--x", "energy", "-o", f"{TOP}/b.png"], ["--keys", "bits_per_byte,mfu", "--x", "time", "-o", f"{TOP}/c.svg"]):
        status, said = plot(hard, dpo_log(), *words)
        expect(status == 0 and os.path.getsize(words[-1]) > 5000, said)
    import matplotlib.image
    expect(matplotlib.image.imread(f"{TOP}/b.png").std() > 0.05, "an empty picture")
    with open(f"{TOP}/a.svg") as f:
        text = f.read()
    for what in ("hard: validation loss", "0.4900", "hard: 1 skipped", "dpo: training loss"):
        expect(what in text, f"no '{what}' in the picture")
    plot(hard, "-o", f"{TOP}/d.svg"), plot(hard, "-o", f"{TOP}/e.svg")
    with open(f"{TOP}/d.svg") as f, open(f"{TOP}/e.svg") as g:
        expect(f.read() == g.read(), "the same log, other bytes")


# What hard_log and dpo_log must come to elsewhere: {tag: [(step, value)]}
def expect_scalars(of, name):
    if name == "hard":
        expect(len(of["train/loss"]) == 39 and 16 not in dict(of["train/loss"]), of["train/loss"])          # that of the skipped step is null
        for step, x in of["train/loss"]:
            expect(abs(x - (9 if step < 3 else 0.5 + 7 / step)) < 1e-6, f"loss {x} of step {step}")         # what was logged twice: the later
        expect([s for s, _ in of["val/loss"]] == [20, 40] and abs(dict(of["val/loss"])[40] - 1.025) < 1e-6, of["val/loss"])
        parts = [dict(of[f"train/{p}_seconds"])[40] for p in ("data", "forward", "backward", "optimizer", "communication", "other")]
        expect(abs(sum(parts) - dict(of["train/time_per_iteration"])[40]) < 1e-6 and "train/of_modelled_speed" not in of, parts)
        expect(abs(dict(of["val/story acc"])[40] - 0.6) < 1e-6 and abs(dict(of["val/loss of web"])[20] - 0.1) < 1e-6, of.keys())
    else:
        expect(len(of["train/rewards/margins"]) == 20 and abs(dict(of["val/rewards/margins"])[20] - 1.9) < 1e-6, of.keys())
        expect("train/watts" not in of and "train/joules" not in of, "what is unavailable has values")


def test_tensorboard_reads_what_was_exported():
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    status, said = export(hard_log(), dpo_log(), "--tensorboard", f"{TOP}/events")
    expect(status == 0, said)
    for name in ("hard", "dpo"):
        a = EventAccumulator(f"{TOP}/events/{name}", size_guidance={"scalars": 0, "tensors": 0})
        a.Reload()
        expect_scalars({tag: [(e.step, e.value) for e in a.Scalars(tag)] for tag in a.Tags()["scalars"]}, name)
        text = a.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
        expect("| lr | 0.00" in text and "processor" in a.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode(), text)
        times = [e.wall_time for e in a.Scalars("train/loss")]
        expect(abs(times[-1] - times[0] - 0.5 * (len(times) - (name == "dpo"))) < 0.6, "times of events")
    status, said = export(hard_log(), "--tensorboard", f"{TOP}/events")
    expect(status == 1 and "holds events already" in said and "Traceback" not in said, said)


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB of pieces, each with 7 bytes of checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2
    with open(path, "rb") as f:
        data = f.read()
    at, record = 7, b""                                 # after the magic of the file
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        n, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        record += data[at + 7:at + 7 + n]
        at += 7 + n
        if kind in (1, 4):                              # whole, or its last piece
            r = wandb_internal_pb2.Record()
            r.ParseFromString(record)
            record = b""
            yield r


def test_wandb_runs_hold_what_was_exported():
    need("wandb")
    for name, log in (("hard", hard_log()), ("dpo", dpo_log())):
        status, said = export(log, "--wandb", f"{TOP}/{name}-runs")
        expect(status == 0, said)
        place = next(line for line in said.split("\n") if line.startswith(f"{TOP}/{name}-runs"))
        of, config, runs = {}, {}, 0
        for r in wandb_records(*(f"{place}/{f}" for f in os.listdir(place) if f.endswith(".wandb"))):
            kind = r.WhichOneof("record_type")
            if kind == "run":
                runs += 1
                expect(r.run.display_name == name and r.run.project == "litespark", r.run)
                config |= {c.key: json.loads(c.value_json) for c in r.run.config.update}
            elif kind == "history":
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
                for tag, x in row.items():
                    of.setdefault(tag, []).append((row.get("_step", r.history.step.num), x))
        expect_scalars(of, name)
        expect(runs == 1 and config["lr"].startswith("0.00") and config["facts"]["parameters"] == 1000, config)


def test_errors_are_one_line():
    empty = write_log("empty", [header()])
    for words, what in (([f"{TOP}/none.jsonl"], "No such file"), ([empty], "no step or val record"), ([hard_log(), "-o", f"{TOP}/none/x.html"], "No such file"),
                        ([dpo_log(), "--x", "energy", "-o", f"{TOP}/x.png"], "no counter of energy"),
                        ([hard_log(), "--carbon-intensity", "-1"], "grams per kWh")):
        status, said = plot(*words)
        last = said.strip().split("\n")[-1]
        expect(status == 1 and last.startswith("error: ") and what in last and "Traceback" not in said, f"{words}: {said}")
    for words, what in (([f"{TOP}/none.jsonl", "--tensorboard", f"{TOP}/x"], "No such file"), ([hard_log()], "name what to write"),
                        ([empty, "--wandb", f"{TOP}/x"], "no step or val record"), ([hard_log(), hard_log(), "--wandb", f"{TOP}/x"], "one name")):
        status, said = export(*words)
        expect(status == 1 and said.strip().split("\n")[-1].startswith("error: ") and what in said and "Traceback" not in said, f"{words}: {said}")


def run(test):
    """With the trainer where the tests look for it."""
    def with_trainer(words, folder):
        global trainer
        trainer = words[0]
        return test()
    return with_trainer


harness.main({name: run(test) for name, test in list(globals().items()) if name.startswith("test_")}, __doc__)
