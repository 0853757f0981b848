"""litespark against PyTorch on this machine's CPU: same model, batch and optimizer, interleaved in one run.

    make train DEVICE=cpu
    python3 -m venv build/venv && build/venv/bin/pip install torch            # opponent "newest"
    apt-get install python3-torch libopenblas0-openmp                         # opponent "tuned 1.13" (Debian 12)
    python3 dev/bench_cpu.py --binary ./train_litespark --venv build/venv
    python3 dev/bench_cpu.py --venv build/venv --only torch --rounds 1        # the opponents alone

One training step = forward + backward + clip to norm 1.0 + AdamW (decay on matrices only), fp32, B*T tokens, no
accumulation. Every contestant runs once per round (A B C A B C ...), so that a slow minute of the machine hits all of
them; a round's figure is the median of its timed steps, a ratio is taken inside a round, the table shows medians over
rounds. An opponent has several forms (compiled or eager, ...): the table compares with its fastest, --all shows the rest.
Both opponents are tuned: OpenMP OpenBLAS for Debian's build, malloc thresholds that keep big blocks for reuse, merged
QKV and gate|up matrices. Untuned PyTorch is 1.5-3x slower; comparing with that would say nothing.
"""
import argparse, glob, json, os, random, re, shutil, statistics, struct, subprocess, sys, tempfile, time

SHAPES = {  # the presets of the same name; then long texts
    "15M": dict(hidden=288, layers=6, heads=6, kv=6, mlp=768, vocab=32000, batch=4, seq=256),
    "100M": dict(hidden=768, layers=12, heads=12, kv=4, mlp=2048, vocab=32000, batch=2, seq=512),
}
for T in (1024, 4096, 8192):
    SHAPES[f"15M-{T}"] = dict(SHAPES["15M"], batch=8192 // T, seq=T)
OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-openmp"  # where Debian's libopenblas0-openmp puts it
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def flops_per_token(s):
    """6 x (block matrices + head, once although tied) + 12 L hidden T: the non-causal "report" form."""
    kv = s["hidden"] * s["kv"] // s["heads"]
    block = s["hidden"] * (2 * s["hidden"] + 2 * kv + 3 * s["mlp"])
    return 6 * (s["layers"] * block + s["hidden"] * s["vocab"]) + 12 * s["layers"] * s["hidden"] * s["seq"]


# ---- worker: PyTorch, run by the opponent's own interpreter ----------------------------------------------------
def torch_worker(s, form, steps, warmup, threads):
    """Train on random tokens; print {"version", "seconds": [...]} as the last line. Runs on torch 1.13 and later."""
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    C, H, K, D, FF, V = s["hidden"], s["heads"], s["kv"], s["hidden"] // s["heads"], s["mlp"], s["vocab"]
    B, T = s["batch"], s["seq"]
    weight = lambda *shape: torch.nn.Parameter(0.02 * torch.randn(*shape))
    ones = lambda: torch.nn.Parameter(torch.ones(C))
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)[None, :]
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)  # (T,D)
    causal = torch.full((T, T), float("-inf")).triu(1)

    def norm(x, w):
        if "rms_norm" in form:
            return F.rms_norm(x, (C,), w, 1e-5)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w

    def rope(x):  # (B,heads,T,D)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = ones(), ones()
            self.qkv, self.o = weight((H + 2 * K) * D, C), weight(C, H * D)
            self.gate_up, self.down = weight(2 * FF, C), weight(C, FF)

        def forward(self, x):
            q, k, v = F.linear(norm(x, self.n1), self.qkv).view(B, T, H + 2 * K, D).transpose(1, 2).split((H, K, K), 1)
            q, k = rope(q), rope(k)
            if K != H:
                k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
            if "sdpa" in form:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = (q @ k.transpose(2, 3) * D ** -0.5 + causal).softmax(-1) @ v
            x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), self.o)
            gate, up = F.linear(norm(x, self.n2), self.gate_up).chunk(2, -1)
            return x + F.linear(F.silu(gate) * up, self.down)

    class Llama(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.n = weight(V, C), ones()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(s["layers"]))

        def forward(self, ids, targets):
            x = F.embedding(ids, self.embed)
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(F.linear(norm(x, self.n), self.embed).view(B * T, V), targets.view(-1))

    model = Llama()
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() == 2], weight_decay=0.1),
              dict(params=[p for p in params if p.dim() != 2], weight_decay=0.0)]
    kind = {k: True for k in ("fused", "foreach") if k in form}
    opt = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, **kind)
    run = torch.compile(model) if "compile" in form else model
    seconds = []
    for _ in range(warmup + steps):
        tokens = torch.randint(V, (B, T + 1))
        start = time.perf_counter()
        loss = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(version=torch.__version__, seconds=seconds[warmup:])))


# ---- contestants: each returns seconds per step and the peak resident memory of its process ---------------------
def run_child(cmd, env):
    """(stdout, peak RSS in MiB); the rusage of exactly this child."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(cmd, stdout=out, stderr=err, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(cmd[:3])} ... exited {child.returncode}: {err.read()[-300:].strip()}")
        return out.read(), usage.ru_maxrss / 1024


def run_torch(python, env, name, form, args):
    cmd = [python, os.path.abspath(__file__), "--worker", form, "--shapes", name, "--steps", str(args.steps),
           "--warmup", str(args.warmup), "--threads", str(args.threads)]
    out, rss = run_child(cmd, env)
    return json.loads(out.strip().splitlines()[-1])["seconds"], rss


def run_litespark(name, args, scratch):
    s, data, folder = SHAPES[name], os.path.join(scratch, f"{name}.bin"), os.path.join(scratch, "out")
    n = s["batch"] * s["seq"] * (args.steps + args.warmup) + 1
    if not os.path.exists(data):
        tokens = random.Random(0).choices(range(s["vocab"]), k=n)
        with open(data, "wb") as f:
            f.write(struct.pack("<256i", 20240520, 1, n, s["vocab"], *[0] * 252) + struct.pack(f"<{n}H", *tokens))
    shutil.rmtree(folder, ignore_errors=True)
    config = os.path.join(scratch, f"{name}.json")
    with open(config, "w") as f:
        json.dump(dict(model_type="llama", hidden_size=s["hidden"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
                       num_key_value_heads=s["kv"], intermediate_size=s["mlp"], vocab_size=s["vocab"], hidden_act="silu",
                       max_position_embeddings=s["seq"], rms_norm_eps=1e-5, tie_word_embeddings=True), f)
    _, rss = run_child([args.binary, "--config", config, "--batch-size", str(s["batch"]), "--seq-len", str(s["seq"]),
                        "--total-batch-tokens", str(s["batch"] * s["seq"]), "--steps", str(args.steps + args.warmup),
                        "--train-data", data, "--threads", str(args.threads), "--out", folder, "--precision", "fp32",
                        "--checkpoint-every", "0", "--val-every", "0", "--sample-every", "0"], dict(os.environ))
    with open(os.path.join(folder, "log.jsonl")) as f:
        steps = [r["time_per_iteration"] for r in map(json.loads, f) if r["type"] == "step"]
    return steps[args.warmup:], rss


def find_torch(python, env):
    if not os.path.exists(python):
        return None
    probe = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], env=env, capture_output=True, text=True)
    return probe.stdout.strip() if probe.returncode == 0 else None


def contestants(args, scratch):
    """[(group, form, function of the shape name)] and notes on what is absent."""
    rows, notes = [], []
    if os.access(args.binary, os.X_OK):
        rows.append(("litespark", "", lambda name: run_litespark(name, args, scratch)))
    else:
        notes.append(f"litespark: skipped, {args.binary} is not here (make train DEVICE=cpu)")
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "LD_LIBRARY_PATH")}
    debian = dict(clean, **MALLOC, LD_LIBRARY_PATH=OPENBLAS)
    newest = os.path.join(args.venv, "bin", "python") if args.venv else ""
    for group, python, env, forms in (
            ("torch 1.13 tuned", "/usr/bin/python3", debian, ("plain", "plain+foreach")),
            ("torch newest", newest, dict(clean, **MALLOC), ("sdpa+fused", "sdpa+fused+rms_norm", "sdpa+fused+compile", "sdpa+fused+rms_norm+compile"))):
        version = find_torch(python, env)
        if not version or ("1.13" in group and not (version.startswith("1.13") and glob.glob(OPENBLAS + "/*"))):
            notes.append(f"{group}: skipped, not installed (see the top of this script)")
            continue
        notes.append(f"{group}: torch {version}")
        for form in forms:
            rows.append((group, form, lambda name, p=python, e=env, f=form: run_torch(p, e, name, f, args)))
    return [r for r in rows if re.search(args.only, f"{r[0]} {r[1]}")], notes


# ---- the table ------------------------------------------------------------------------------------------------
def cpu_name():
    with open("/proc/cpuinfo") as f:
        return next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown CPU")


def table(results, names, show_all):
    """results[shape][(group, form)] = [(tokens/s, rss), ...] by round -> markdown."""
    median = lambda xs: statistics.median(xs) if xs else float("nan")
    lines = ["| shape | contestant | tok/s | min - max | GFLOP/s | peak RSS MiB | litespark is |", "|---|---|---|---|---|---|---|"]
    for name in names:
        rows = {k: v for k, v in results[name].items() if v}
        if not show_all:  # the fastest form of each group
            best = {}
            for k in rows:
                best[k[0]] = max(best.get(k[0], k), k, key=lambda j: median([r[0] for r in rows[j]]))
            rows = {k: rows[k] for k in best.values()}
        ours = rows.get(("litespark", ""))
        for (group, form), rounds in rows.items():
            speed = [r[0] for r in rounds]
            ratio = f"{median([o[0] / r[0] for o, r in zip(ours, rounds)]):.2f}x" if ours and group != "litespark" else ""
            gflops = median(speed) * flops_per_token(SHAPES[name]) / 1e9
            lines.append(f"| {name} | {group} {form and '(' + form + ')'} | {median(speed):.1f} | {min(speed):.1f} - "
                         f"{max(speed):.1f} | {gflops:.1f} | {median([r[1] for r in rounds]):.0f} | {ratio} |")
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description="litespark against PyTorch on the CPU")
    ap.add_argument("--binary", default="./train_litespark")
    ap.add_argument("--venv", default="", help="virtual environment with the newest torch")
    ap.add_argument("--shapes", default="15M,100M")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=6, help="timed steps per run")
    ap.add_argument("--warmup", type=int, default=2, help="steps not timed")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", default="", help="regular expression on 'contestant form'")
    ap.add_argument("--all", action="store_true", help="show every form, not only the fastest")
    ap.add_argument("--json", default="", help="also write the raw figures here")
    ap.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = ap.parse_args()
    names = args.shapes.split(",")
    if any(n not in SHAPES for n in names):
        sys.exit(f"error: --shapes {args.shapes}: choose from {','.join(SHAPES)}")
    if args.worker:
        return torch_worker(SHAPES[names[0]], args.worker.split("+"), args.steps, args.warmup, args.threads)
    args.binary = os.path.abspath(args.binary)
    with tempfile.TemporaryDirectory() as scratch:
        rows, notes = contestants(args, scratch)
        results = {n: {(g, f): [] for g, f, _ in rows} for n in names}
        for name in names:
            tokens = SHAPES[name]["batch"] * SHAPES[name]["seq"]
            for i in range(args.rounds):
                for group, form, run in rows:
                    try:
                        seconds, rss = run(name)
                    except RuntimeError as e:
                        sys.exit(f"error: {group} {form}: {e}")
                    results[name][group, form].append((tokens / statistics.median(seconds), rss))
                    print(f"{name} round {i + 1}/{args.rounds} {group} {form}: {results[name][group, form][-1][0]:.1f} tok/s",
                          file=sys.stderr, flush=True)
    print(f"{cpu_name()}, {args.threads} threads, {args.rounds} rounds x {args.steps} steps, load {os.getloadavg()[0]:.1f}")
    print("\n".join(notes) + "\n\n" + table(results, names, args.all))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({n: {" ".join(k).strip(): v for k, v in r.items()} for n, r in results.items()}, f, indent=1)


if __name__ == "__main__":
    main()
