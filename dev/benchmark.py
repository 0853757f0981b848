#!/usr/bin/env python3
"""litespark and two PyTorch baselines, in turns: same model, weights, data in the same order, updates, precision.

    make benchmark                              dev/results/benchmark*.json and .md (ARGS='...': the options below)
    PYTHON_WITH_TORCH dev/benchmark.py --minutes 8        pip install torch transformers; on a GPU also liger-kernel

    hf       Hugging Face LlamaForCausalLM, eager attention, AdamW with foreach, not compiled: the kind of baseline that
             the Litespark report (arXiv 2510.02483) compares with
    pytorch  the strongest PyTorch that we know: merged qkv and gate|up, scaled_dot_product_attention, fused AdamW, each
             block compiled; on a GPU also with Liger's fused linear cross-entropy, where that is installed; and without
             the compiler. The fastest of these forms counts, all are in the .json
With several ranks both are wrapped in DDP. bf16: the forward takes bf16 copies of fp32 weights, made in each micro-step,
so that gradients, their sums and AdamW are fp32, as in litespark.

A case is a model, a precision and a number of ranks. It begins with a round that is not timed: the losses of all
contestants, update by update, and their gradient norms in the first --warmup updates must be those of litespark within
TOLERANCE, the losses also within half of what another seed (another order of the data) changes; else the benchmark fails,
and nothing is timed. Then come the timed rounds, A B C A B C ..., so that a slow minute of the machine hits all alike,
each checked in the same way. A round's time is the median of its updates after --warmup; ratios are taken inside a round;
the table has medians over rounds. Every contestant takes the largest micro-batch that fits, halved from the case's.

FLOPs per token: 6 x (matrices of the blocks + head) + 12 L H D T ("report": attention as if not causal), or with half of
that attention ("causal"). MFU: over the peak that litespark's log gives. Memory: on a CPU that of the largest process, on
a GPU what nvidia-smi shows as used, less what was used before. Energy: the counters of the GPUs or of the processor
packages, over the timed updates.
"""
import argparse
import ctypes
import glob
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import speed_model                                              # noqa: E402  (the shapes of presets, FLOPs)

# model: T, sequences of an update (on GPUs: times the largest number of ranks), sequences of a micro-step at most
CPU_SIZES = {"15M": (256, 4, 4), "100M": (512, 2, 2)}
GPU_SIZES = {"3B": (4096, 16, 4), "llama3.2-1B": (4096, 32, 8), "100M": (1024, 256, 64), "15M": (1024, 512, 128)}
CPU_CASES, GPU_CASES = "15M:fp32 15M:fp32:2 15M:bf16 100M:fp32", "3B:bf16 llama3.2-1B:bf16 100M:bf16"
# What losses and gradient norms may differ by, relative: the same arithmetic in another order; bf16: rounded elsewhere.
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (2e-3, 3e-2)}
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}    # PyTorch keeps big blocks
# The Litespark report's tables: model, H200 GPUs, then tokens/s of all, TFLOP/s per GPU, MFU, s per iteration and MWh per
# 500B tokens, of Litespark and of its Llama baseline.
PUBLISHED = [("3B", 8, (439644.81, 888.06, 89.35, 2.38, 0.79), (218967.60, 442.30, 44.70, 6.44, 1.75)),
             ("3B", 16, (862899.88, 871.51, 88.65, 1.40, 0.80), (396768.52, 400.73, 40.63, 5.49, 1.80)),
             ("3B", 128, (1387342.21, 175.15, 17.66, 2.23, 1.65), (364328.66, 45.99, 4.67, 7.19, 5.44)),
             ("3B", 256, (964981.24, 61.58, 6.29, 2.43, 3.41), (428056.25, 27.31, 2.73, 7.63, 8.01)),
             ("30B", 256, (471486.24, 393.25, 39.54, 2.23, 125.35), (99604.57, 83.08, 8.43, 10.53, 732.08)),
             ("30B", 512, (508260.62, 215.78, 21.88, 2.07, 189.47), (79891.47, 33.32, 3.38, 13.09, 751.75))]
CAVEATS = """\
- T is not given there; 4096 fits all cells within 2% with the "report" FLOPs, MFU being over 989 TFLOP/s.
- 888 TFLOP/s in that form are 810 of necessary (causal) work over the whole step; the best bf16 product alone measured on
  such GPUs reaches 794.5 (ml-engineering's MAMF).
- s per iteration and tokens/s do not agree with 256 sequences of 4096 in most rows: the 3B baseline on 8 GPUs would need
  4.79 s.
- The energies imply 313 and 345 W per GPU for the 3B on 8, 93 and 96 W on 256, 1,662 and 2,051 W for the 30B on 256; an
  H200 is limited to 700 W. At most their ratios can be used.
- 256 sequences over 256 GPUs are one per GPU: the low MFU there is that of a small batch. The baseline is slow for the
  30B: 389 tokens/s per GPU on 256, where MosaicML publishes 1,802 to 2,308 on 8 to 32 H100."""

WORKER = [sys.executable, os.path.abspath(__file__), "--worker"]


class Mismatch(Exception):
    """Losses that must coincide do not."""


class Failed(Exception):
    """A contestant did not run."""


# ---- model and data ------------------------------------------------------------------------------------------------------
def model_config(name):
    """config.json of a preset's shape, or the file itself."""
    if name in speed_model.PRESETS and name != "tiny":
        V, L, C, H, K, D, F, tied = speed_model.PRESETS[name]
        return dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=V, num_hidden_layers=L, hidden_size=C,
                    num_attention_heads=H, num_key_value_heads=K, head_dim=D, intermediate_size=F, rms_norm_eps=1e-5,
                    rope_theta=10000.0, max_position_embeddings=8192, tie_word_embeddings=bool(tied), hidden_act="silu")
    if not os.path.isfile(name):
        known = [n for n in speed_model.PRESETS if n != "tiny"]
        sys.exit(f"error: --cases: no model '{name}': choose of {', '.join(known)}, or name a config.json")
    with open(name, encoding="utf-8") as f:
        c = json.load(f)
    odd = [k for k in ("rope_scaling", "attention_bias", "mlp_bias", "sliding_window") if c.get(k)]
    if c.get("model_type") != "llama" or odd:
        sys.exit(f"error: {name}: the baselines are plain Llamas, this has model_type {c.get('model_type')} {' '.join(odd)}")
    return c


def dimensions(c):
    """V, L, C, H, K, D, F, tied of a config.json"""
    H = c["num_attention_heads"]
    return (c["vocab_size"], c["num_hidden_layers"], c["hidden_size"], H, c.get("num_key_value_heads") or H,
            c.get("head_dim") or c["hidden_size"] // H, c["intermediate_size"], bool(c.get("tie_word_embeddings")))


def tensor_shapes(c):
    """{name in model.safetensors: shape}"""
    V, L, C, H, K, D, F, tied = dimensions(c)
    out = {"model.embed_tokens.weight": (V, C)}
    for i in range(L):
        layer = dict(input_layernorm=(C,), post_attention_layernorm=(C,)) | {
            "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C),
            "self_attn.o_proj": (C, H * D), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}
        out |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    return out | {"model.norm.weight": (C,)} | ({} if tied else {"lm_head.weight": (V, C)})


def write_model(folder, c):
    """Random weights that bf16 holds exactly, so that every precision starts from the same ones."""
    import torch
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, header, at = tensor_shapes(c), {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(f"{folder}/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            w = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, device=device)
            f.write(memoryview(w.to(torch.bfloat16).cpu().view(torch.uint8).numpy()))


def read_model(torch, folder):
    """{name: fp32 tensor}"""
    path = f"{folder}/model.safetensors"
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(n))
    data = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)[8 + n:]
    return {k: data[slice(*v["data_offsets"])].clone().view(torch.bfloat16).view(v["shape"]).float()
            for k, v in header.items() if k != "__metadata__"}


def write_tokens(path, V, n):
    """A shard (data/README.md) of n tokens with something to learn: half of them follow from the one before, the others
    are drawn, small ones more often."""
    draw, ids = random.Random(1), [0] * n
    for i in range(1, n):
        ids[i] = (ids[i - 1] * 5 + 7) % V if draw.random() < 0.5 else min(V - 1, int(V ** draw.random()))
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240801, 7, n, V, 0, 0, *[0] * 250) + struct.pack(f"<{n}I", *ids))


class Data:
    """litespark's loader: windows of T tokens in the order of a seed. train_litespark.c, section Data, has the definition."""
    def __init__(self, pattern, T, seed):
        self.T, self.seed, self.shards, self.n = T, seed, [], 0
        for path in sorted(glob.glob(pattern)):
            with open(path, "rb") as f:
                magic, _, n = struct.unpack("<3i", f.read(12))
            if magic not in (20240520, 20240801):
                sys.exit(f"error: --train-data: {path} is no .bin token shard")
            self.shards.append((path, 2 if magic == 20240520 else 4, self.n))
            self.n += (n - 1) // T

    def permute(self, epoch, position):
        mask64, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

        def mix(z):
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask64
            z = (z ^ z >> 27) * 0x94D049BB133111EB & mask64
            return z ^ z >> 31

        def bits(seed, stream, index):
            key = mix(mix((seed + golden) & mask64) ^ (stream * golden + 1 & mask64))
            return mix(mix(key + index * golden & mask64) ^ key)
        stream = 0xCBF29CE484222325
        for byte in b"loader":
            stream = (stream ^ byte) * 0x100000001B3 & mask64
        key, h = bits(self.seed, mix(stream), epoch), 0
        while 1 << 2 * h < self.n:
            h += 1
        x = position
        while True:
            left, right = x >> h, x & (1 << h) - 1
            for r in range(12):
                left, right = right, left ^ (bits(key, r, right) >> 32 & (1 << h) - 1)
            x = left << h | right
            if x < self.n:
                return x

    def window(self, position):
        """T + 1 tokens"""
        w = self.permute(position // self.n, position % self.n)
        path, width, first = [s for s in self.shards if s[2] <= w][-1]
        with open(path, "rb") as f:
            f.seek(1024 + width * (w - first) * self.T)
            return struct.unpack(f"<{self.T + 1}{'H' if width == 2 else 'I'}", f.read(width * (self.T + 1)))


# ---- energy --------------------------------------------------------------------------------------------------------------
def joules_counter(torch, device):
    """Function: joules so far of this rank's GPU, or of the processor packages and their memory; None: no counter"""
    if device == "cuda":
        try:
            nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)): return None
        except (OSError, AttributeError):
            return None

        def read():
            total = ctypes.c_ulonglong()
            failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
            return math.nan if failed else total.value / 1e3
    else:
        zones = []
        for zone in glob.glob("/sys/class/powercap/intel-rapl:*"):
            try:
                with open(f"{zone}/name") as f: name = f.read().strip()
                with open(f"{zone}/energy_uj") as f: f.read()
            except OSError:
                continue
            if zone.count(":") == 1 or name == "dram": zones.append(f"{zone}/energy_uj")
        if not zones: return None

        def read():
            total = 0
            for zone in zones:
                with open(zone) as f: total += int(f.read())
            return total / 1e6
    return read if math.isfinite(read()) else None


# ---- the baselines: one process per rank -----------------------------------------------------------------------------------
def make_hf(torch, folder, precision):
    """Hugging Face's model; bf16: its forward on bf16 copies of the weights"""
    from transformers import LlamaForCausalLM

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            self.llama.config.use_cache = False

        def forward(self, ids, targets):
            weights = {k: p.bfloat16() for k, p in self.llama.named_parameters()} if precision == "bf16" else {}
            logits = torch.func.functional_call(self.llama, weights, (), {"input_ids": ids}).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return Model()


def make_pytorch(torch, folder, precision, form, device):
    """Our own Llama for PyTorch. `form`: words of compile, liger"""
    F = torch.nn.functional
    with open(f"{folder}/config.json") as f: c = json.load(f)
    V, L, C, H, K, D, _, tied = dimensions(c)
    eps, theta, w = c["rms_norm_eps"], c.get("rope_theta", 10000.0), read_model(torch, folder)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    grouped = {"enable_gqa": True} if device == "cuda" and K != H else {}

    def norm(x, weight): return F.rms_norm(x, (C,), weight.to(kind), eps)

    def rope(x, cos, sin):                                      # (B,heads,T,D)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def block(x, norm_1, qkv, o, norm_2, gate_up, down, cos, sin):
        B, T, _ = x.shape
        q, k, v = F.linear(norm(x, norm_1), qkv.to(kind)).view(B, T, H + 2 * K, D).transpose(1, 2).split((H, K, K), 1)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if K != H and not grouped:
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, H * D), o.to(kind))
        gate, up = F.linear(norm(x, norm_2), gate_up.to(kind)).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down.to(kind))

    def head(x, weight_norm, weight, targets):
        return F.cross_entropy(F.linear(norm(x, weight_norm), weight.to(kind)).float().flatten(0, 1), targets.flatten())
    if "compile" in form:
        block, head, norm_last = torch.compile(block), torch.compile(head), torch.compile(norm)
    if "liger" in form:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

        def head(x, weight_norm, weight, targets):              # noqa: F811
            return fused(weight.to(kind), norm_last(x, weight_norm).flatten(0, 1), targets.flatten())

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            make = lambda *tensors: torch.nn.ParameterList(torch.nn.Parameter(t) for t in tensors)
            self.embed, self.norm = make(w["model.embed_tokens.weight"]), make(w["model.norm.weight"])
            self.head = self.embed if tied else make(w["lm_head.weight"])
            self.blocks = torch.nn.ModuleList()
            for i in range(L):
                of = lambda k: w.pop(f"model.layers.{i}.{k}.weight")
                qkv = torch.cat([of(f"self_attn.{m}_proj") for m in "qkv"])
                gate_up = torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")])
                self.blocks.append(make(of("input_layernorm"), qkv, of("self_attn.o_proj"), of("post_attention_layernorm"),
                                        gate_up, of("mlp.down_proj")))

        def forward(self, ids, targets):
            angle = torch.arange(ids.shape[1])[:, None] / theta ** (torch.arange(0, D, 2) / D)[None, :]
            cos, sin = (torch.cat((f(angle),) * 2, -1).to(device, kind) for f in (torch.cos, torch.sin))
            x = F.embedding(ids, self.embed[0]).to(kind)
            for weights in self.blocks:
                x = block(x, *weights, cos, sin)
            return head(x, self.norm[0], self.head[0], targets)
    return Model()


def worker(a):
    """One rank of a baseline: trains, rank 0 prints a line of JSON. `a`: the job, see Bench.torch."""
    import contextlib
    import torch
    if a["what"] == "make":
        write_model(a["folder"], a["config"])
        return print(torch.__version__)
    rank, world, device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), a["device"]
    torch.set_num_threads(a["threads"])
    if device == "cuda": torch.cuda.set_device(rank)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{a['meet']}",
                                             rank=rank, world_size=world)
    if a["what"] == "hf": model = make_hf(torch, a["folder"], a["precision"])
    else: model = make_pytorch(torch, a["folder"], a["precision"], a["form"].split("+"), device)
    model.to(device)
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() == 2], weight_decay=WEIGHT_DECAY),
              dict(params=[p for p in params if p.dim() != 2], weight_decay=0.0)]
    kind = {"foreach": True} if a["what"] == "hf" else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=LR * (1.05 if a["plant"] == "lr" else 1), betas=BETAS, eps=EPS, **kind)
    run = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    data, B = Data(a["data"], a["T"], a["seed"]), a["micro"]
    micro_steps = a["batch"] // (B * world)
    counter = joules_counter(torch, device)
    out = dict(losses=[], norms=[], seconds=[], joules=None)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for step in range(a["warmup"] + a["steps"]):
        batches = []
        for i in range(micro_steps):
            first = step * a["batch"] + (i * world + rank) * B + (a["plant"] == "data")
            rows = torch.tensor([data.window(first + b) for b in range(B)])
            batches.append((rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)))
        wait()
        start, total = time.perf_counter(), 0
        if step == a["warmup"]: timed, joules = start, counter() if counter else None
        for i, (ids, targets) in enumerate(batches):
            with run.no_sync() if world > 1 and i + 1 < micro_steps else contextlib.nullcontext():
                loss = run(ids, targets) / micro_steps
                loss.backward()
            total = total + loss.detach()
        if step < a["warmup"]:                                  # of our own: PyTorch's is some 1e-4 off on a CPU
            out["norms"].append(sum(torch.linalg.vector_norm(p.grad, dtype=torch.float64) ** 2 for p in params).sqrt().item())
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if world > 1: torch.distributed.all_reduce(total)
        out["losses"].append(total.item() / world)
        wait()
        if step >= a["warmup"]: out["seconds"].append(time.perf_counter() - start)
    if counter and time.perf_counter() - timed >= 2:            # as litespark's windows: the counters move every 0.1 s
        spent = torch.tensor(counter() - joules, device=device, dtype=torch.float64)
        if world > 1 and device == "cuda": torch.distributed.all_reduce(spent)
        out["joules"] = spent.item() / (a["steps"] * a["batch"] * a["T"])
    if rank == 0: print(json.dumps(out), flush=True)
    if world > 1: torch.distributed.destroy_process_group()


# ---- running a contestant --------------------------------------------------------------------------------------------------
class Bench:
    def __init__(self, o, scratch):
        self.o, self.scratch, self.ends = o, scratch, time.time() + 60 * o.minutes if o.minutes else math.inf
        self.device_name = self.version = None
        self.made = []

    def left(self): return self.ends - time.time()

    def children(self, commands):
        """(output of the first process, the largest memory of all in MiB, seconds). If one fails or time is up, all end."""
        gpu = GpuMemory() if self.o.device == "cuda" else None
        began, processes, outs, peak, failed = time.time(), [], [], 0, None
        for command, env in commands:
            outs.append(tempfile.TemporaryFile("w+", dir=self.scratch))
            processes.append(subprocess.Popen([*shlex.split(self.o.start), *command], stdin=subprocess.DEVNULL, env=env,
                                              stdout=outs[-1], stderr=subprocess.STDOUT, process_group=0))
        waiting = dict(enumerate(processes))
        try:
            while waiting and failed is None and self.left() > 0:
                for i, p in list(waiting.items()):
                    done, status, usage = os.wait4(p.pid, os.WNOHANG)
                    if not done: continue
                    del waiting[i]
                    p.returncode = os.waitstatus_to_exitcode(status)
                    peak = max(peak, usage.ru_maxrss / 1024)
                    if p.returncode and failed is None: failed = i
                time.sleep(0.02)
        finally:
            for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 60)):        # mpirun ends its ranks on TERM
                for p in waiting.values():
                    try: os.killpg(p.pid, number)
                    except ProcessLookupError: pass
                for p in waiting.values():
                    try: p.wait(patience)
                    except subprocess.TimeoutExpired: pass
            if gpu: peak = gpu.stop()
        texts = []
        for out in outs:
            out.seek(0)
            texts.append(out.read().strip())
            out.close()
        if failed is not None:
            says = re.findall(r"^error: .*|^\S*Error: .*|.*out of memory.*", texts[failed], re.M)
            raise Failed((says or [texts[failed][-300:] or f"exit status {processes[failed].returncode}"])[-1][:300])
        if waiting: raise Failed(f"no end before the {self.o.minutes:g} minutes were over")
        return texts[0], peak, time.time() - began

    def litespark(self, case, micro, seed=1):
        o, out = self.o, f"{self.scratch}/out"
        shutil.rmtree(out, ignore_errors=True)
        options = {"init-from": case["folder"], "train-data": case["data"], "seq-len": case["T"], "batch-size": micro,
                   "total-batch-tokens": case["batch"] * case["T"], "steps": o.warmup + o.steps, "lr": LR, "seed": seed,
                   "precision": case["precision"], "schedule": "constant", "warmup-steps": 0, "weight-decay": WEIGHT_DECAY,
                   "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "grad-clip": CLIP, "checkpoint-every": 0, "val-every": 0,
                   "sample-every": 0, "out": out} | ({"threads": case["threads"]} if o.device == "cpu" else {})
        command = [o.binary] + [str(x) for k, v in options.items() for x in (f"--{k}", v)]
        if case["ranks"] > 1:
            mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
            command = [*mpirun, "-np", str(case["ranks"]), *command]
        _, memory, wall = self.children([(command, os.environ)])
        with open(f"{out}/log.jsonl", encoding="utf-8") as f: log = [json.loads(x) for x in f]
        header, steps = log[0], [r for r in log if r["type"] == "step"]
        if header["ranks"] != case["ranks"]: raise Failed(f"{o.binary} was built without MPI: not {case['ranks']} ranks")
        case["peak"] = max(header.get("peak_tflops_per_gpu") or 0, case.get("peak", 0))     # a CPU's is measured
        self.device_name, self.commit = header["device"], header["commit"]
        energies = [r["joules_per_token"] for r in steps if r.get("joules_per_token")]
        return dict(losses=[r["loss"] for r in steps], norms=[r["grad_norm"] for r in steps[:o.warmup]],
                    seconds=[r["time_per_iteration"] for r in steps[o.warmup:]], memory=memory, wall=wall,
                    joules=energies[-1] if energies else None)

    def torch(self, case, what, form, micro):
        meet = f"{self.scratch}/meet"
        if os.path.exists(meet): os.remove(meet)
        job = dict(what=what, form=form, micro=micro, seed=1, device=self.o.device, meet=meet, plant=self.o.plant,
                   steps=self.o.steps, warmup=self.o.warmup)
        job |= {k: case[k] for k in ("folder", "data", "T", "batch", "precision", "threads")}
        env = dict(os.environ, **MALLOC, OMP_NUM_THREADS=str(case["threads"]), WORLD_SIZE=str(case["ranks"]),
                   PYTHONWARNINGS="ignore", TORCHINDUCTOR_CACHE_DIR=self.o.cache)
        command = [*WORKER, json.dumps(job)]
        text, memory, wall = self.children([(command, dict(env, RANK=str(r))) for r in range(case["ranks"])])
        return json.loads(text.splitlines()[-1]) | dict(memory=memory, wall=wall)


def fitting(case, run):
    """(micro-batch, run(micro-batch)): the largest that fits, halved from the case's"""
    micro = case["micro"]
    while True:
        try: return micro, run(micro)
        except Failed as e:
            if micro == 1 or not re.search(r"out of memory|smaller --batch-size", str(e), re.I): raise
            micro //= 2


class GpuMemory:
    """MiB in use on the fullest GPU, less what was in use before, as nvidia-smi says twice a second."""
    def __init__(self):
        query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        self.before, self.most = self.numbers(subprocess.run(query, capture_output=True, text=True).stdout), {}
        self.process = subprocess.Popen([*query, "-lms", "500"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        threading.Thread(target=self.watch, daemon=True).start()

    @staticmethod
    def numbers(text): return {i: int(n) for i, n in re.findall(r"(\d+), (\d+)", text)}

    def watch(self):
        for line in self.process.stdout:
            for i, n in self.numbers(line).items(): self.most[i] = max(n, self.most.get(i, 0))

    def stop(self):
        self.process.kill()
        self.process.wait()
        return max((n - self.before.get(i, 0) for i, n in self.most.items()), default=None)


# ---- a case --------------------------------------------------------------------------------------------------------------
def prepare(bench, case):
    """The model's folder and the shard of a case; the model before it is removed."""
    folder = case["folder"] = f"{bench.scratch}/{re.sub('[^A-Za-z0-9.]', '_', case['model'])}"
    if not os.path.exists(folder):
        for old in bench.made: shutil.rmtree(old)
        os.makedirs(folder)
        bench.made = [folder]
        with open(f"{folder}/config.json", "w") as f: json.dump(case["config"], f)
        job = json.dumps(dict(what="make", folder=folder, config=case["config"]))
        bench.version = bench.children([([*WORKER, job], os.environ)])[0]
    case["data"] = bench.o.train_data or f"{folder}/tokens_{case['T']}_{case['batch']}.bin"
    if not os.path.exists(case["data"]) and not bench.o.train_data:
        updates = bench.o.warmup + bench.o.steps
        write_tokens(case["data"], case["config"]["vocab_size"], updates * case["batch"] * case["T"] + 1)


def apart(one, two, key):
    """Largest relative difference of two curves"""
    return max(abs(x - y) / abs(y) for x, y in zip(one[key], two[key]))


def check(case, name, result, ours, noise):
    """Losses and gradient norms must be litespark's; `noise`: how far apart the losses of another seed are."""
    for key, what, most in zip(("losses", "norms"), ("loss", "gradient norm"), TOLERANCE[case["precision"]]):
        if key == "losses": most = min(most, noise / 2)
        for step, (x, y) in enumerate(zip(result[key], ours[key], strict=True), 1):
            if not abs(x - y) <= most * abs(y):
                raise Mismatch(f"{case['name']}: update {step}: {what} of {name} {x:.7g}, of litespark {y:.7g}: "
                               f"{abs(x - y) / abs(y):.1e} apart, allowed {most:.1e}")


def contestants(bench):
    """[(name, its forms)]"""
    forms = (["compile+liger"] if bench.o.device == "cuda" and bench.o.liger else []) + ["compile", "eager"]
    chosen = lambda name, all_forms: [f for f in all_forms if re.search(bench.o.only, f"{name} {f}")]
    return [(n, chosen(n, f)) for n, f in (("hf", ["eager"]), ("pytorch", forms))]


def run_case(bench, case, say):
    """Fills in case["rows"], {contestant: form, micro, check, rounds}, and case["notes"], what did not run."""
    case |= dict(rows={}, notes=[], forms={})
    micro, ours = fitting(case, lambda m: bench.litespark(case, m))
    case["rows"]["litespark"] = dict(form="", micro=micro, check=ours, rounds=[])
    case["other_seed"] = bench.litespark(case, micro, seed=2)["losses"]
    noise = case["noise"] = apart(dict(losses=case["other_seed"]), ours, "losses")
    say(f"{case['name']}: litespark, micro-batch {micro}: losses {ours['losses'][0]:.5f} to {ours['losses'][-1]:.5f}")
    for name, forms in contestants(bench):
        for form in forms:
            try: m, result = fitting(case, lambda m: bench.torch(case, name, form, m))
            except Failed as e:
                case["notes"].append(f"{name} ({form}) did not run: {e}")
                say(f"{case['name']}: {case['notes'][-1]}")
                continue
            check(case, f"{name} ({form})", result, ours, noise)
            case["forms"][f"{name} {form}"] = result
            best = case["rows"].get(name)
            if not best or statistics.median(result["seconds"]) < statistics.median(best["check"]["seconds"]):
                case["rows"][name] = dict(form=form, micro=m, check=result, rounds=[])
            say(f"{case['name']}: {name} ({form}), micro-batch {m}: losses {apart(result, ours, 'losses'):.1e} apart, "
                f"another seed {noise:.1e}")
    if len(case["rows"]) == 1: raise Failed("; ".join(case["notes"]) or "--only leaves no baseline")
    took = sum(r["check"]["wall"] for r in case["rows"].values())
    for i in range(bench.o.rounds):
        if bench.left() < 1.2 * took: break
        results, start = {}, time.time()
        try:
            for name, row in case["rows"].items():
                if name == "litespark": results[name] = bench.litespark(case, row["micro"])
                else: results[name] = bench.torch(case, name, row["form"], row["micro"])
                check(case, name, results[name], results["litespark"], noise)
        except Failed as e:
            case["notes"].append(f"round {i + 1} was cut: {e}")
            break
        took = time.time() - start
        for name, r in results.items(): case["rows"][name]["rounds"].append(r)
        rates = {n: case["batch"] * case["T"] / statistics.median(r["seconds"]) for n, r in results.items()}
        say(f"{case['name']}: round {i + 1}: " + ", ".join(f"{n} {x:.1f} tokens/s" for n, x in rates.items()))
    if not case["rows"]["litespark"]["rounds"]: case["notes"].append("no timed round: no time left")
    case["load"] = os.getloadavg()[0]


# ---- the report ----------------------------------------------------------------------------------------------------------
def median(values): return statistics.median(values) if values else None


def show(x, form): return "unavailable" if x is None else form.format(x)


def percent(x): return show(None if x is None else 100 * x, "{:.1f}%")


def table(head, rows):
    return ["| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows]] + [""]


def figures(case):
    """{contestant: what its row of the table has}, medians over rounds"""
    model, tokens, out = speed_model.Config(*dimensions(case["config"])), case["batch"] * case["T"], {}
    ours = case["rows"]["litespark"]["rounds"]
    for name, row in case["rows"].items():
        if not row["rounds"]: continue
        seconds = [median(r["seconds"]) for r in row["rounds"]]
        rate, per_rank = median([tokens / s for s in seconds]), case["ranks"] * 1e12
        flops = {k: model.flops_per_token(case["T"], k == "causal") * rate / per_rank for k in ("report", "causal")}
        joules = median([r["joules"] for r in row["rounds"] if r["joules"] is not None])
        out[name] = f = dict(form=row["form"], micro=row["micro"], rounds=len(row["rounds"]), tokens_per_sec=rate,
                             slowest=tokens / max(seconds), fastest=tokens / min(seconds), seconds=median(seconds),
                             tflops=flops["report"], joules=joules, kwh=None if joules is None else joules * 500e9 / 3.6e6,
                             mfu={k: x / case["peak"] if case["peak"] >= flops["report"] else None for k, x in flops.items()},
                             memory=median([r["memory"] for r in row["rounds"] if r["memory"] is not None]))
        if name == "litespark": continue
        f["speed_up"] = median([median(r["seconds"]) / median(s["seconds"]) for r, s in zip(row["rounds"], ours)])
        theirs = out["litespark"]["joules"]
        f["energy_saved"] = None if joules is None or theirs is None else 1 - theirs / joules
        for key, what in ("losses", "loss_apart"), ("norms", "norm_apart"):
            f[what] = max(apart(r, s, key) for r, s in zip(row["rounds"], ours))
    return out


def case_text(case, m, report):
    f, ranks = case["figures"], case["ranks"]
    where = f"{ranks} GPU(s)" if m["kind"] == "cuda" else f"{ranks} rank(s) of {case['threads']} thread(s)"
    rounds = f["litespark"]["rounds"] if f else 0
    text = [f"## {case['name']}", "", f"{case['batch'] * case['T']:,} tokens per update ({case['batch']} x {case['T']}), "
            f"{where}, peak {case['peak']:.4g} TFLOP/s per rank; {rounds} rounds of {report['steps']} updates after "
            f"{report['warmup']}; load at the end {case['load']:.1f}.", ""]
    head = ["contestant", "micro-batch", "tokens/s (min - max)", "TFLOP/s per rank", "MFU report", "MFU causal",
            "s per iteration", "peak MiB", "J/token", "kWh per 500B tokens (extrapolated)", "litespark is", "energy saved",
            "losses apart", "norms apart"]
    rows = []
    for n, r in f.items():
        rows.append([f"{n} ({r['form']})" if r["form"] else n, r["micro"],
                     f"{r['tokens_per_sec']:.1f} ({r['slowest']:.1f} - {r['fastest']:.1f})", f"{r['tflops']:.4g}",
                     percent(r["mfu"]["report"]), percent(r["mfu"]["causal"]), f"{r['seconds']:.3f}",
                     show(r["memory"], "{:.0f}"), show(r["joules"], "{:.3g}"), show(r["kwh"], "{:.0f}")])
        rows[-1] += [""] * 4 if n == "litespark" else [f"**{r['speed_up']:.2f}x**", percent(r["energy_saved"]),
                                                       f"{r['loss_apart']:.1e}", f"{r['norm_apart']:.1e}"]
    if rows: text += table(head, rows)
    curves = {n: r["check"]["losses"] for n, r in case["rows"].items()} | {"litespark, another seed": case["other_seed"]}
    text += table(["loss of update", *range(1, len(case["other_seed"]) + 1)],
                  [[n, *(f"{x:.5f}" for x in c)] for n, c in curves.items()])
    text += [f"Another seed (another order of the data) is up to {case['noise']:.1e} apart.", ""]
    return text + [f"- {n}" for n in case["notes"]] + [""] * bool(case["notes"])


def markdown(report):
    m = report["machine"]
    text = ["# litespark beside PyTorch", "",
            f"Measured by `{report['command']}` on {m['device']}, {m['cpus']} CPUs{m['gpus']}; {m['versions']}; litespark "
            f"{m['commit']}; {report['date']}. `dev/benchmark.py` says what the contestants are and how this is measured. "
            "\"litespark is\": times as fast as that row; apart: relative, at most.", ""]
    for case in report["cases"]: text += case_text(case, m, report)
    text += [f"Not run: {x}" for x in report["left_out"]] + [""] * bool(report["left_out"])
    if m["kind"] == "cpu":
        text += ["On a CPU litespark computes bf16 in fp32, rounded where the CUDA trainer stores bf16: a reference, not a "
                 "fast path.", ""]
    rows = []
    for model, gpus, *both in PUBLISHED:
        for who, (rate, tflops, mfu, seconds, mwh) in zip(("Litespark", "its Llama baseline"), both):
            joules = mwh * 3.6e9 / 500e9
            rows.append([model, gpus, who, f"{rate:,.0f}", f"{rate / gpus:,.0f}", tflops, mfu, seconds, f"{mwh * 1e3:,.0f}",
                         f"{joules:.3g}", f"{joules * rate / gpus:,.0f}"])
    text += ["## Published by the Litespark report, not measured here", "",
             "arXiv 2510.02483, H200 GPUs, 256 sequences per update. J/token and W per GPU follow from its MWh and tokens/s.",
             ""]
    text += table(["model", "GPUs", "who", "tokens/s", "per GPU", "TFLOP/s per GPU", "MFU %", "s per iteration",
                   "kWh per 500B tokens", "J/token", "W per GPU"], rows)
    return "\n".join(text + [CAVEATS]) + "\n"


def write(out, report):
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(f"{out}.json", "w") as f: json.dump(report, f, indent=1)
    with open(f"{out}.md", "w") as f: f.write(markdown(report))


# ---- main ----------------------------------------------------------------------------------------------------------------
def gpus_here():
    """[(name, MiB)]"""
    if not shutil.which("nvidia-smi"): return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [(name, float(mib)) for name, mib in (line.rsplit(", ", 1) for line in lines)]


def cases_of(o, gpus):
    """The cases in the order in which they are run, and what does not fit."""
    sizes, out, left_out = GPU_SIZES if o.device == "cuda" else CPU_SIZES, [], []
    ranks = [int(r) for r in o.ranks.split(",")] if o.ranks else [2 ** i for i in range(8) if 2 ** i <= max(1, len(gpus))]
    for what in o.cases.split():
        parts = re.fullmatch(r"(.+):(fp32|bf16)(?::([1-9]\d*))?", what)
        if not parts: sys.exit(f"error: --cases: '{what}' is not MODEL:fp32, MODEL:bf16 or MODEL:PRECISION:RANKS")
        model, precision, own_ranks = parts.groups()
        config = model_config(model)
        label = os.path.basename(os.path.dirname(os.path.abspath(model))) if os.path.isfile(model) else model
        T, batch, micro = sizes.get(model, (256, 4, 4))
        T, batch, micro = o.seq_len or T, o.batch or batch * (max(ranks) if gpus else 1), o.micro or micro
        n = speed_model.Config(*dimensions(config)).n
        if gpus and 20 * n > 0.9 * 2 ** 20 * gpus[0][1]:
            left_out.append(f"{what}: the state of {n / 1e9:.1f} billion parameters is more than one {gpus[0][0]} holds")
            continue
        for r in [int(own_ranks)] if own_ranks else ranks:
            if batch % r: sys.exit(f"error: {r} ranks do not divide {batch} sequences per update")
            m = min(micro, batch // r)
            while batch % (m * r): m -= 1
            out.append(dict(name=f"{label}, {precision}, {r} rank{'s' if r > 1 else ''}", model=model, config=config, ranks=r,
                            precision=precision, T=T, batch=batch, micro=m, threads=max(1, o.threads // r)))
    return out, left_out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default="./train_litespark")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where nvidia-smi lists a GPU")
    p.add_argument("--cases", help="MODEL:fp32 or MODEL:bf16, MODEL a preset or a config.json, then perhaps :RANKS; "
                   f"default '{CPU_CASES}', on a GPU '{GPU_CASES}'")
    p.add_argument("--ranks", help="of cases that say none, such as 1,2,4; default: 1, 2, 4, ... up to the GPUs, else 1")
    p.add_argument("--seq-len", type=int, default=0)
    p.add_argument("--batch", type=int, default=0, help="sequences per update, over all ranks")
    p.add_argument("--micro", type=int, default=0, help="sequences per rank and micro-step, at most")
    p.add_argument("--train-data", help="a pattern of .bin token shards; default: made here")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=5, help="timed updates of a round")
    p.add_argument("--warmup", type=int, default=2, help="updates before those")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of all ranks together, on a CPU")
    p.add_argument("--minutes", type=float, default=0, help="time for everything; 0: no limit")
    p.add_argument("--start", default="", help="a command before each contestant's, such as 'chrt -f 10'")
    p.add_argument("--only", default="", help="regular expression on 'hf eager', 'pytorch compile', 'pytorch eager', ...")
    p.add_argument("--out", help="results, without .json and .md; default: dev/results/benchmark, on a GPU with its name")
    p.add_argument("--plant", default="", help=argparse.SUPPRESS)       # lr, data: a wrong baseline, for the test
    p.add_argument("--worker", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.worker: return worker(json.loads(o.worker))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # with the children
    if not importlib.util.find_spec("torch"):
        print("skipped: benchmark: no torch (pip install torch transformers)")
        return 0
    gpus = gpus_here() if o.device != "cpu" else []
    o.device = o.device or ("cuda" if gpus else "cpu")
    o.liger = bool(importlib.util.find_spec("liger_kernel"))
    o.binary, o.cases = os.path.abspath(o.binary), o.cases or (GPU_CASES if gpus else CPU_CASES)
    if not os.access(o.binary, os.X_OK): sys.exit(f"error: --binary {o.binary} is not there: make train")
    of_gpu = "_" + re.sub("[^A-Za-z0-9]+", "_", gpus[0][0]).strip("_") if gpus else ""
    o.out = o.out or os.path.join(HERE, "results", "benchmark" + of_gpu)
    cases, left_out = cases_of(o, gpus)
    say = lambda text: print(f"benchmark: {text}", file=sys.stderr, flush=True)
    machine = dict(kind=o.device, cpus=os.cpu_count(), gpus=f", {len(gpus)} GPU(s) {gpus[0][0]}" if gpus else "")
    report = dict(command=" ".join(["dev/benchmark.py", *map(shlex.quote, sys.argv[1:])]), date=time.strftime("%Y-%m-%d"),
                  steps=o.steps, warmup=o.warmup, machine=machine, cases=[], left_out=left_out)
    with tempfile.TemporaryDirectory() as scratch:
        o.cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/inductor")
        bench = Bench(o, scratch)
        for case in cases:
            try:
                if bench.left() < 20: raise Failed("no time left")
                prepare(bench, case)
                run_case(bench, case, say)
            except Mismatch as e:
                print(f"FAIL  {e}")
                return 1
            except Failed as e:
                left_out.append(f"{case['name']}: {e}")
                say(left_out[-1])
                continue
            case["figures"] = figures(case)
            for key in ("folder", "data"): del case[key]
            report["cases"].append(case)
            versions = f"PyTorch {bench.version}, {'with' if o.liger else 'no'} liger-kernel"
            machine |= dict(device=bench.device_name, commit=bench.commit, versions=versions)
            write(o.out, report)                                # after each: a machine may be lost
    if not report["cases"]:
        print("FAIL  no case ran: " + "; ".join(left_out))
        return 1
    write(o.out, report)                                        # with what was left out
    print(markdown(report))
    say(f"{o.out}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
