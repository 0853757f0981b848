#!/usr/bin/env python3
"""Modelled time of a training step of train_litespark.cu. Nothing here is measured on a GPU: every figure is MODELLED.

    dev/speed_model.py [--preset 3B] [--seq-len 4096] [--recompute none|mlp|block] [--batch-size 0] [--logits-chunk 0]
                       [--total-batch-tokens 1048576] [--optimizer-dtype fp32|bf16] [--device h100|h200|a100|b200|l40s|4090] [--mlp auto|passes|products] [--attention auto|mma|wgmma] [--markdown]
    dev/speed_model.py --kernels [--markdown]             the counts of each kernel: bytes, conflicts, instructions, time
    dev/speed_model.py --wgmma [--markdown]               kernels with wgmma and TMA (sm_90a), beside published figures
    dev/speed_model.py --check TRAINER                    the memory formula against the trainer's own --dry-run
    dev/speed_model.py --planner check|sync               the counts that the trainers' planner has (train_litespark.c, section 16)
    dev/speed_model.py --measure PTXCPU BINARY            counts again: writes dev/results/kernel_counts.json

Where the numbers come from
  counts   dev/results/kernel_counts.json: bytes, FLOPs and instructions of every kernel, counted while ptxcpu, an emulator of the
           compiled PTX, ran the trainer on small models (--measure). Each count is fitted as fixed + slope * rows (attention:
           a + b*T + c*T^2 per query head, exact at T 4096) and taken at the size asked for; the fixed part is kept.
  GEMM     cuBLASLt at 700 TFLOP/s, or its compulsory bytes at 3.0 TB/s where that takes longer (small chunks of logits).
  MLP      passes: SwiGLU between cuBLASLt's products. products: SwiGLU in the epilogues of our own. auto: what the trainer's auto
           takes, products on all but the B200. With mma.sync their time is like attention's, a sum of terms; on Hopper it is the
           largest term of the wgmma kernels (--wgmma), times a factor from published figures of such products.
  bytes    non-GEMM bytes count what a product's epilogue moves beyond its plain output: the residual that it adds, h, gate and up.
  DRAM     3.0 TB/s of the 3.35 of the data sheet. Memory-bound kernels: all sectors they touch (no cache), or the instruction
           terms where those take longer.
  attention  tensor + issue + SFU terms added up (mma.sync at 0.62 of 989.4 TFLOP/s; 4 warp instructions, 16 SFU lanes, 64 integer
           lanes and 128 shared bytes per clock and SM, 132 SMs, 1.755 GHz), no DRAM, or the shared or integer term where that takes
           longer; the sum times the factor that brings the same sum for FlashAttention-2's kernel (forward, backward) to its published speed.
           On Hopper that is --attention mma; what ships there (auto, wgmma): the largest term of a tile of the wgmma kernels, times a factor from published
           figures of such kernels.
  launches what the gaps between them may cost is printed (LAUNCH_GAP), not added.
  left out gaps between kernels, the host, latency, NCCL, power limits; but for the wgmma kernels of attention, whose blocks are played through, tails
           of the last wave and causal imbalance between blocks.
"""
import argparse
import heapq
import json
import os
import re
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
COUNTS = os.path.join(HERE, "results", "kernel_counts.json")

# ---- the device and the assumptions -----------------------------------------------------------------------------------
# The table of GPUs is that of the trainers (section 16), with its sources: dense bf16 peak (fp32 sums), cuBLASLt's FLOP/s, DRAM bytes/s, SMs, clock,
# mma.sync's share of the peak, memory in GiB. The counts are in us of an H100; for another device its tensor term is scaled by mma.sync's rate, the
# others by SMs times clock.
TRAINER = os.path.join(HERE, "..", "train_litespark.c")


def devices():
    with open(TRAINER, encoding="utf-8") as f:
        text = f.read()
    rows = re.findall(r'^    \{"(\w+)", "[^"]+",((?: *[0-9.]+,?){12})\}', text[text.index("gpu_kinds[] = {"):], re.M)
    found = {}
    for name, numbers in rows:
        bf16, _, products, dram, sms, clock, mma_sync, memory = [float(x) for x in numbers.split(",")[:8]]
        found[name] = (bf16 * 1e12, products * 1e12, dram * 1e12, int(sms), clock * 1e9, mma_sync, memory)
    return found


DEVICES = devices()
PEAK, GEMM, DRAM, SMS, CLOCK, MMA_SYNC, MEMORY_GIB = DEVICES["h100"]
HOPPER, MMA_SYNC_ALL = True, False      # of the device chosen: wgmma; mma.sync has all of the tensor cores
CHOSEN_SMS = SMS                        # its own; SMS stays the H100's, whose counts are scaled


def choose_device(name, runs):
    global PEAK, GEMM, DRAM, HOPPER, MMA_SYNC_ALL, CHOSEN_SMS
    PEAK, GEMM, DRAM, sms, clock, mma_sync, memory = DEVICES[name]
    HOPPER, MMA_SYNC_ALL, CHOSEN_SMS = name in ("h100", "h200"), mma_sync == 1, sms
    tensor, others = DEVICES["h100"][0] * MMA_SYNC / (PEAK * mma_sync), SMS * CLOCK / (sms * clock)
    for r in runs.values():
        for k in r["kernels"].values():
            for t in TERMS: k[t] *= tensor if t == "tensor_us" else others
    return memory


# Launches. Between two kernels of a stream the device idles: LAUNCH_GAP us (1.3 on an H100 inside a CUDA graph: Hazy Research,
# "Look Ma, No Bubbles", 2025; 1.6 on an RTX 5090 in a plain stream, the mean of 1,076 gaps: sparkinfer PR 800; the larger is taken).
# Programmatic dependent launch hides what of it is start-up: LAUNCH_SAVED us (CUB's radix sort of 65,536 8-byte keys on a B200,
# NVIDIA/cccl PR 9247: 6.5 to 7.0 us less for its histogram, scan and 8 passes). It cannot save more than the gap.
LAUNCH_GAP, LAUNCH_SAVED = 1.6, 0.7

MIB = 1 << 20
GPU_ALLOWANCE = 800 * MIB       # context, cuBLASLt, NCCL: as in the trainer
ENOUGH_ROWS = 32768             # of a micro-step, as in the trainer
DEFAULT_CHUNK = 2048            # rows of logits, as in the trainer

# FlashAttention-2's forward kernel in the same emulator: T 2048, 16 query heads, head_dim 128, causal. 18.25 GFLOP executed,
# 29.76 us tensor, 16.0 PTX instructions per causal (q, k) pair without moves; one ex2 and half a conversion per executed pair.
# Published (FlashAttention-3 paper, H100 SXM, bf16, hd 128, causal, T 4096): 319 TFLOP/s forward.
FA2 = {"T": 2048, "heads": 16, "executed": 18.25e9, "tensor_us": 29.76, "instructions_per_pair": 16.0, "published": 319e12}
# Its backward: 45.63 GFLOP executed, 74.4 us tensor, 35.9 instructions per pair; one ex2 and one conversion per executed pair; helpers 17.6 us
# of DRAM. Published, same paper, but for the full square (no causal figure there): 310 TFLOP/s.
FA2_BACKWARD = {"executed": 45.63e9, "tensor_us": 74.4, "instructions_per_pair": 35.9, "helpers_us": 17.6, "published": 310e12}

PRESETS = {     # V, L, C, H, K, D, F, tied, (qkv bias, qk norm)
    "tiny": (912, 2, 192, 6, 6, 32, 512, 1), "15M": (32000, 6, 288, 6, 6, 48, 768, 1), "100M": (32000, 12, 768, 12, 4, 64, 2048, 1),
    "3B": (32000, 28, 2048, 16, 2, 128, 11008, 0), "30B": (32000, 60, 6656, 64, 64, 104, 17920, 0),
    "llama3.2-1B": (128256, 16, 2048, 32, 8, 64, 8192, 1), "llama3.1-8B": (128256, 32, 4096, 32, 8, 128, 14336, 0),
    "mistral-7B": (32000, 32, 4096, 32, 8, 128, 14336, 0), "smollm2-135M": (49152, 30, 576, 9, 3, 64, 1536, 1),
}       # Qwen: its bias and head-norm kernels are not in the counts


class Config:
    def __init__(self, V, L, C, H, K, D, F, tied):
        self.V, self.L, self.C, self.H, self.K, self.D, self.F, self.tied = V, L, C, H, K, D, F, tied
        self.Vp = -(-V // 128) * 128
        self.HD, self.W = H * D, (H + 2 * K) * D
        self.layer_gemm = C * self.W + self.HD * C + 3 * C * F
        self.n = V * C * (1 if tied else 2) + L * (self.layer_gemm + 2 * C) + C     # parameters

    def unit_sizes(self):
        pad = (self.Vp - self.V) * self.C
        sizes = [self.V * self.C + pad] + [self.layer_gemm + 2 * self.C] * self.L + [self.C + (0 if self.tied else self.V * self.C + pad)]
        return [-(-s // UNIT_ALIGN) * UNIT_ALIGN for s in sizes]

    def flops_per_token(self, T, causal):
        return 6 * (self.L * self.layer_gemm + self.C * self.V) + (6 if causal else 12) * self.L * self.HD * T


# ---- memory: the arenas of the trainer (layout() in section 4) -------------------------------------------------------
UNIT_ALIGN = 128
MAX_PARTIALS, SQUARES_BLOCKS = 264, 1024
PARTS_SMS = 132


def attention_parts(kv_heads, T, group, sms):
    """Parts into which attention's backward for keys and values splits the query heads of a key head, as in the trainer; kv_heads: B K"""
    fill = lambda parts: 5 * parts * kv_heads * (-(-T // 128) + 1) >= 8 * min(sms, PARTS_SMS)
    return next((x for x in range(1, group) if group % x == 0 and fill(x)), group)


def added_bytes(kv_heads, T, D, parts):
    """Of their sums, fp32, which are written, and read to be added, all in DRAM, though L2 may hold them"""
    return kv_heads * T * D * (16.0 * parts + 4) if parts > 1 else 0.0


def arenas(c, B, T, recompute, chunk, state_bytes=4):
    """bytes: weights, gradients, optimizer, activations, workspace (bf16, one rank)"""
    N = B * T
    up = lambda n, size: -(-n * size // 256) * 256
    n = sum(c.unit_sizes())
    block = [(N, 4), (N * c.W, 2), (N * c.HD, 2), (N * c.H, 4), (N * c.C, 2), (N, 4)]
    mlp = [(N * 2 * c.F, 2)]
    once = (block if recompute == "block" else []) + (mlp if recompute != "none" else [])
    layer = [(N * c.C, 2)] + (block if recompute != "block" else []) + (mlp if recompute == "none" else [])
    acts = sum(up(*x) for x in once) + c.L * sum(up(*x) for x in layer) + up(N * c.C, 2) + up(N, 4)
    chunk = min(chunk, N)
    padded = -(-N // chunk) * chunk
    parts = attention_parts(B * c.K, T, c.H // c.K, PARTS_SMS)
    scratch = max(MAX_PARTIALS * c.C, MAX_PARTIALS * 2 * c.D, MAX_PARTIALS * c.W, 2 * SQUARES_BLOCKS, N * c.H + (N * parts * 2 * c.K * c.D if parts > 1 else 0))
    tensors = c.L * 9 + 2 + (0 if c.tied else 1)
    work = [(padded * c.C, 2)] * 2 + [(N * c.F, 2)] + [(N * c.C, 2), (N * c.HD, 2), (N * c.W, 2), (chunk * c.Vp, 2), (padded, 4), (N, 8),
            (T * c.D // 2, 4), (T * c.D // 2, 4), (scratch, 4), (tensors + 1, 8), (32 * MIB, 1), (6 * N + 1, 4)]
    return [up(n, 2), up(n, 4), up(n, 4) + 2 * up(n, state_bytes), acts, sum(up(*x) for x in work)]


def largest_batch(c, T, recompute, chunk, total, memory, state_bytes):
    """As the trainer chooses: the largest divisor of the sequences per update that fits."""
    rows, best = total // T, 0
    for b in range(1, rows + 1):
        if b > 1 and b * T > ENOUGH_ROWS: break
        if rows % b == 0 and sum(arenas(c, b, T, recompute, chunk, state_bytes)) < memory: best = b
    return best


def check_memory(trainer):
    bad = 0
    for preset, recompute, B, T in [("3B", "none", 1, 4096), ("3B", "none", 4, 4096), ("3B", "mlp", 2, 2048), ("3B", "block", 8, 4096),
                                    ("30B", "block", 1, 4096), ("llama3.2-1B", "none", 2, 1000), ("100M", "mlp", 3, 777)]:
        c = Config(*PRESETS[preset])
        for state in ("fp32", "bf16"):
            out = subprocess.run([trainer, "--preset", preset, "--seq-len", str(T), "--precision", "bf16", "--recompute", recompute, "--batch-size", str(B),
                                  "--total-batch-tokens", str(B * T), "--optimizer-dtype", state, "--dry-run"], capture_output=True, text=True).stdout
            says = [float(x) for x in re.findall(r" ([0-9.]+) MiB \|", out)][:5]
            ours = [x / MIB for x in arenas(c, B, T, recompute, DEFAULT_CHUNK, 4 if state == "fp32" else 2)]
            ok = len(says) == 5 and all(abs(a - b) < 0.06 for a, b in zip(says, ours))
            bad += not ok
            print(f"{'equal ' if ok else 'DIFFER'} {preset} B {B} T {T} recompute {recompute} optimizer {state}: "
                  + (f"{sum(ours):.1f} MiB" if ok else f"trainer {says}, formula {[round(x, 1) for x in ours]}"))
    return 1 if bad else 0


# ---- counting: the trainer under ptxcpu -------------------------------------------------------------------------------
# name: (V, L, C, H, K, D, F), T, B, logits chunk. Narrow where the kernels of interest do not see the width, so that it takes minutes.
# One sequence is too few for dk dv, whose groups are split now (attention_parts): counted anew, it has a block per query head here.
RUNS = {"norm 1": ((512, 1, 2048, 16, 2, 128, 128), 256, 9, 256), "norm 2": ((512, 2, 2048, 16, 2, 128, 128), 256, 9, 256),
        "norm 3": ((512, 1, 2048, 16, 2, 128, 128), 256, 16, 256), "mlp 1": ((32000, 1, 128, 1, 1, 128, 11008), 256, 2, 256),
        "mlp 2": ((32000, 1, 128, 1, 1, 128, 11008), 256, 4, 256)}
for _D, _H, _K in ((128, 8, 1), (104, 1, 1), (64, 4, 1), (128, 4, 1)):
    for _T in (768, 1536, 2304, 4096):      # multiples of the tiles of 64 and 128, for the fit
        RUNS[f"attention D{_D} G{_H // _K} T{_T}"] = ((512, 1, _H * _D, _H, _K, _D, 128), _T, 1, 256)
for _C in (256, 512):                       # the MLP's products with SwiGLU: a + b C per element of h
    RUNS[f"products C{_C}"] = ((512, 1, _C, 2, 1, 128, 512), 256, 2, 256)


def zipf_tokens(V, n):
    x, out = 1, []
    for _ in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        out.append(min(V - 1, int(V ** ((x >> 11) / (1 << 53))) - 1))
    return out


def measure(ptxcpu, binary, only=None):
    runs = {}
    if only and os.path.exists(COUNTS):
        with open(COUNTS) as f:
            runs = {n: r for n, r in json.load(f)["runs"].items() if n in RUNS}
    with tempfile.TemporaryDirectory() as tmp:
        for name, (shape, T, B, chunk) in RUNS.items():
            if only and only not in name: continue
            V, L, C, H, K, D, F = shape
            with open(f"{tmp}/config.json", "w") as f:
                json.dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "num_hidden_layers": L, "hidden_size": C,
                           "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "intermediate_size": F, "rms_norm_eps": 1e-5,
                           "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": True, "hidden_act": "silu"}, f)
            n = B * T + 1
            with open(f"{tmp}/tokens.bin", "wb") as f:
                f.write(struct.pack("<256i", 20240520, 1, n, *[0] * 253) + struct.pack(f"<{n}H", *zipf_tokens(V, n)))
            command = [ptxcpu, "--device", "h100", "--report", f"{tmp}/report.json", "--unique", "--", binary, "--config", f"{tmp}/config.json",
                       "--train-data", f"{tmp}/tokens.bin", "--precision", "bf16", "--seq-len", T, "--batch-size", B, "--total-batch-tokens", B * T,
                       "--logits-chunk", chunk, "--steps", 1, "--checkpoint-every", 0, "--sample-every", 0, "--out", f"{tmp}/out {name}"]
            command += ["--mlp", "products" if name.startswith("products") else "passes"]
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
            if done.returncode: sys.exit(f"speed_model: {name}: {done.stdout[-500:]}{done.stderr[-1500:]}")
            with open(f"{tmp}/report.json") as f:
                report = json.load(f)
            kernels = {}
            for k in report["kernels"]:
                key = re.sub(r"_kernel\d+\b", "", re.sub(r"\(.*", "", k["name"]).replace("void ", "").replace("__nv_bfloat16", "bf16"))
                add = counts_of(k)
                old = kernels.setdefault(key, {x: 0 for x in add} | {"launches": 0})
                for x in add:       # sums over all launches
                    old[x] = max(old[x], add[x]) if x in MAXIMA else old[x] + add[x]
                old["launches"] += k["launches"]
            runs[name] = {"V": V, "L": L, "C": C, "H": H, "K": K, "D": D, "F": F, "T": T, "B": B, "chunk": chunk, "kernels": kernels}
            print(f"{name}: {len(kernels)} kernels", flush=True)
            with open(COUNTS, "w") as f:
                write_counts(f, runs)


MAXIMA = ("registers", "shared_bytes", "threads", "blocks_per_sm", "bank_loads", "bank_stores")


def counts_of(k):
    """Of all launches of one report entry. Terms are seconds*1e6 on all SMs: the report's, freed of its blocks < SMs correction."""
    n, blocks = k["launches"], k["grid"][0] * k["grid"][1] * k["grid"][2]
    terms = {t: us * n * (1 if t == "dram" else min(SMS, blocks) / SMS) for t, us in k["model"]["terms_us"].items()}
    c = {"sectors": k["dram_bytes_all_sectors"], "compulsory": k["dram_bytes_compulsory"], "mma_flops": sum(k["mma_sync_flops"].values()),
         "instructions": k["thread_instructions"] - k["thread_instructions_by_class"].get("move", 0)}
    c |= {t + "_us": round(us, 4) for t, us in terms.items() if t != "dram"}
    return c | {"registers": k["registers"], "shared_bytes": k["dynamic_smem"] + k["static_smem"], "threads": k["block"][0] * k["block"][1] * k["block"][2],
                "blocks_per_sm": k["blocks_per_sm"], "bank_loads": k["shared_loads"]["bank_conflict_factor"], "bank_stores": k["shared_stores"]["bank_conflict_factor"]}


def write_counts(f, runs):
    f.write('{"note": "counted by ptxcpu, an emulator of the compiled PTX (sm_80 code); *_us are modelled, on all 132 SMs of an H100; sums over all launches",\n "runs": {\n')
    for i, (name, r) in enumerate(runs.items()):
        head = {k: v for k, v in r.items() if k != "kernels"}
        f.write(f"  {json.dumps(name)}: {json.dumps(head)[:-1]}, \"kernels\": {{\n")
        f.write(",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in r["kernels"].items()))
        f.write("}}" + ("," if i + 1 < len(runs) else "") + "\n")
    f.write(" }}\n")


# ---- from counts to sizes ---------------------------------------------------------------------------------------------
TERMS = ("tensor_us", "fp32_us", "int_us", "sfu_us", "shared_us", "issue_us", "shuffle_us")
SUMS = ("sectors", "compulsory", "mma_flops", "instructions") + TERMS
FIT_T = (768, 2304, 4096)       # exact where it matters most; T 1536 lies between


class Counts:
    """Quantities of one launch: {name: value} at any size, fitted to the runs."""

    def __init__(self, runs):
        self.runs = runs

    def total(self, run, kernel):
        return self.runs[run]["kernels"][kernel]

    def lines(self, run1, run2, x1, x2, get):
        """{quantity: (fixed, slope)} of get(run)[quantity] over x"""
        a, b = get(run1), get(run2)
        fits = {}
        for q in SUMS:
            slope = (b[q] - a[q]) / (x2 - x1)
            fits[q] = (a[q] - slope * x1, slope)
        return fits

    def at(self, fits, x, fixed_scale=1.0, slope_scale=1.0):
        return {q: f * fixed_scale + s * slope_scale * x for q, (f, s) in fits.items()}

    def per_launch(self, run, kernel):
        k = self.total(run, kernel)
        return {q: k[q] / k["launches"] for q in SUMS}

    def norm_backward(self, kernel, N, C, end):
        """rmsnorm_backward: a layer's launch, or (end) the one that does not rebuild the norm's output."""
        rows = self.runs["norm 1"]["B"] * self.runs["norm 1"]["T"], self.runs["norm 3"]["B"] * self.runs["norm 3"]["T"]
        one, two = self.total("norm 1", kernel), self.total("norm 2", kernel)   # end + 2 layer, end + 4 layer launches
        part = {}
        for q in SUMS:
            layer = (two[q] - one[q]) / 2
            part[q] = (one[q] - 2 * layer) / layer if layer else 0      # end / layer; taken as the same at other sizes
        get = lambda run: {q: self.total(run, kernel)[q] / (2 + part[q]) * (part[q] if end else 1) for q in SUMS}
        r = C / self.runs["norm 1"]["C"]
        return self.at(self.lines("norm 1", "norm 3", *rows, get), N, r, r)

    def product(self, kernel, N, C, F):
        """The MLP's products with SwiGLU: (a + b C) N F."""
        per = lambda run: {q: self.total(run, kernel)[q] / (self.runs[run]["B"] * self.runs[run]["T"] * self.runs[run]["F"]) for q in SUMS}
        fits = self.lines("products C256", "products C512", 256, 512, per)
        return {q: v * N * F for q, v in self.at(fits, C).items()}

    def rows(self, kernel, N, width, run1, run2, key):
        """A kernel whose work is rows x width."""
        r1, r2 = self.runs[run1], self.runs[run2]
        r = width / key(r1)
        return self.at(self.lines(run1, run2, r1["B"] * r1["T"], r2["B"] * r2["T"], lambda run: self.per_launch(run, kernel)), N, r, r)

    def per_item(self, run, kernel, items, n):
        k = self.total(run, kernel)
        return {q: k[q] / items * n for q in SUMS}

    def attention(self, kernel, c, B, T, bytes_only=False):
        """Per query head a + b T + c T^2, through the runs of FIT_T with the same head_dim and group. bytes_only: of a group as near as
        can be, in proportion to head_dim."""
        group = c.H // c.K
        have = sorted({(r["D"], r["H"] // r["K"]) for n, r in self.runs.items() if n.startswith("attention")})
        same = [x for x in have if x[0] == c.D or bytes_only] or sys.exit(f"speed_model: no counts for head_dim {c.D}: add it to RUNS and --measure")
        D, G = min(same, key=lambda x: (abs(x[1] - group), abs(x[0] - c.D)))
        runs = [f"attention D{D} G{G} T{t}" for t in FIT_T]
        t = FIT_T
        out = {}
        for q in SUMS:
            name = next(k for k in self.runs[runs[0]]["kernels"] if k.startswith(kernel))
            y = [self.total(n, name)[q] / self.runs[n]["H"] for n in runs]
            out[q] = c.D / D * B * c.H * sum(y[i] * (T - t[(i + 1) % 3]) * (T - t[(i + 2) % 3]) / ((t[i] - t[(i + 1) % 3]) * (t[i] - t[(i + 2) % 3])) for i in range(3))
        return out

    def name(self, run, start):
        return next(k for k in self.runs[run]["kernels"] if k.startswith(start))


# ---- one op of the step -----------------------------------------------------------------------------------------------
class Op:
    def __init__(self, group, name, times, seconds, limit, sectors=0.0, compulsory=0.0, flops=0.0, terms=""):
        self.group, self.name, self.times, self.seconds, self.limit = group, name, times, seconds, limit
        self.sectors, self.compulsory, self.flops, self.terms = sectors, compulsory, flops, terms


def memory_bound(group, name, times, q):
    terms = {"dram": q["sectors"] / DRAM} | {t[:-3]: q[t] * 1e-6 for t in TERMS}
    limit = max(terms, key=terms.get)
    second = max((t for t in terms if t != limit), key=terms.get)
    return Op(group, name, times, terms[limit], limit, q["sectors"], q["compulsory"], 0, f"{second} {terms[second] * 1e6:.1f}")


def clear(group, name, times, nbytes):
    return Op(group, name, times, nbytes / DRAM, "dram", nbytes, nbytes)


def gemm(name, times, M, N, K, out_bytes=2, add=False):
    flops, nbytes = 2.0 * M * N * K, 2.0 * (M * K + N * K) + M * N * out_bytes * (2 if add else 1)
    seconds = max(flops / GEMM, nbytes / DRAM)
    residual = 2.0 * M * N if add and out_bytes == 2 else 0         # counted with the non-GEMM bytes
    return Op("GEMM", name, times, seconds, "tensor" if flops / GEMM >= nbytes / DRAM else "dram", residual, residual, flops,
              f"{'dram' if flops / GEMM >= nbytes / DRAM else 'tensor'} {min(flops / GEMM, nbytes / DRAM) * 1e6:.1f}")


def attention_sum(q):
    return (q["tensor_us"] + q["issue_us"] + q["sfu_us"]) * 1e-6


def fa2():
    """Modelled and published forward of FlashAttention-2 at T 4096: (TFLOP/s of the sum, factor, terms in us)."""
    pairs, flops = FA2["heads"] * FA2["T"] ** 2 / 2, 4.0 * FA2["heads"] * FA2["T"] ** 2 / 2 * 128
    executed = pairs * FA2["executed"] / flops
    terms = {"tensor": FA2["tensor_us"], "issue": FA2["instructions_per_pair"] * pairs / 32 / (4 * SMS * CLOCK) * 1e6,
             "sfu": executed * 1.125 / (16 * SMS * CLOCK) * 1e6}
    waste = FA2["executed"] / flops                 # 1.062 at T 2048, halves with twice the length
    scale = 4 * (1 + (waste - 1) / 2) / waste       # to T 4096
    terms = {t: us * scale for t, us in terms.items()}
    speed = 4 * flops / (sum(terms.values()) * 1e-6)
    return speed, speed / FA2["published"], terms


def fa2_backward():
    """The same for its backward over the full square: (TFLOP/s, factor)."""
    b, pairs, flops = FA2_BACKWARD, FA2["heads"] * FA2["T"] ** 2 / 2, 10.0 * FA2["heads"] * FA2["T"] ** 2 / 2 * 128
    executed = pairs * b["executed"] / flops
    us = b["tensor_us"] + b["instructions_per_pair"] * pairs / 32 / (4 * SMS * CLOCK) * 1e6 + executed * 1.25 / (16 * SMS * CLOCK) * 1e6
    speed = 2 * flops / ((us * 2 * flops / b["executed"] + b["helpers_us"]) * 1e-6)
    return speed, speed / b["published"]


def attention_op(name, times, q, factor):
    parts = {"tensor+issue+sfu": attention_sum(q) * factor, "shared": q["shared_us"] * 1e-6, "int": q["int_us"] * 1e-6}
    limit = max(parts, key=parts.get)
    terms = ", ".join(f"{t[:-3]} {q[t]:.0f}" for t in ("tensor_us", "issue_us", "sfu_us", "shared_us", "int_us"))
    return Op("attention", name, times, parts[limit], limit, q["sectors"], q["compulsory"], q["mma_flops"], terms)


def own_product(name, times, q, factor, extra):
    """A product of our own; extra: bytes its epilogue moves beyond the plain output"""
    op = attention_op(name, times, q, factor)
    op.group, op.sectors, op.compulsory = "GEMM", extra, extra
    return op


def wgmma_op(name, times, N, C, F, kernel, extra):
    """A product of our own on Hopper"""
    seconds, clocks, flops = wgmma_product(N, C, F, kernel, wgmma_product_factor())
    limit = max(clocks, key=clocks.get)
    return Op("GEMM", name, times, seconds, limit, extra, extra, flops, "of a tile, in clocks: " + ", ".join(f"{k} {v:.0f}" for k, v in clocks.items()))


def counted_parameters(counts):
    r = counts.runs["mlp 1"]
    return Config(r["V"], r["L"], r["C"], r["H"], r["K"], r["D"], r["F"], 1).n


def step_ops(counts, c, B, T, recompute, chunk, state, mlp_form="passes", attention="auto"):
    """Ops of a micro-step (N = B*T tokens) and of an update, in the order of the program."""
    N, C, F, L = B * T, c.C, c.F, c.L
    factor, backward_factor = fa2()[1], fa2_backward()[1]
    norm_backward = counts.name("norm 1", "rmsnorm_backward")
    rope_forward, rope_backward = counts.name("norm 1", "qk_norm_rope_forward"), counts.name("norm 1", "qk_norm_rope_backward")
    width = lambda r: (r["H"] + r["K"]) * r["D"]
    rope = lambda kernel: counts.rows(kernel, N, (c.H + c.K) * c.D, "norm 1", "norm 3", width)
    mlp = lambda kernel: counts.rows(counts.name("mlp 1", kernel), N, F, "mlp 1", "mlp 2", lambda r: r["F"])
    if attention == "auto": attention = "wgmma" if HOPPER else "mma"
    counted_attention = lambda kernel: counts.attention(kernel, c, B, T, attention == "wgmma")
    again = {"none": 0, "mlp": 0, "block": 1}[recompute] * (L - 1)      # the last layer's activations are still there
    again_up = {"none": 0, "mlp": 1, "block": 1}[recompute] * (L - 1)
    cls_rows = min(chunk, N)
    chunks = -(-N // cls_rows)
    added = added_bytes(B * c.K, T, c.D, attention_parts(B * c.K, T, c.H // c.K, CHOSEN_SMS))
    run = counts.runs["mlp 2"]
    cross = counts.per_item("mlp 2", counts.name("mlp 2", "cross_entropy"), run["B"] * run["T"] * run["V"], float(cls_rows) * c.V)
    embed = lambda kernel: counts.rows(counts.name("norm 1", kernel), N, C, "norm 1", "norm 3", lambda r: r["C"])
    columns = {q: v * C / run_c for run_c in [counts.runs["norm 3"]["C"]] for q, v in counts.per_launch("norm 3", "column_sums").items()}
    if mlp_form == "auto": mlp_form = "products" if HOPPER or MMA_SYNC_ALL else "passes"
    if mlp_form == "passes":
        up = [gemm("gate/up forward", L + again_up, N, 2 * F, C), memory_bound("SwiGLU", "SwiGLU forward", L, mlp("swiglu_forward"))]
        down = [gemm("down backward x", L, N, F, C), memory_bound("SwiGLU", "SwiGLU backward, h rebuilt", L, mlp("swiglu_backward"))]
    elif HOPPER:
        up = [wgmma_op("gate/up forward with SwiGLU", L + again_up, N, C, F, "gate_up_swiglu", 2.0 * N * F)]
        down = [wgmma_op("down backward x with SwiGLU", L, N, C, F, "swiglu_down_backward", 2.0 * 4 * N * F)]
    else:
        up = [own_product("gate/up forward with SwiGLU", L + again_up, counts.product("gate_up_swiglu", N, C, F), factor, 2.0 * N * F)]
        down = [own_product("down backward x with SwiGLU", L, counts.product("swiglu_down_backward", N, C, F), factor, 2.0 * 4 * N * F)]
    ops = [
        memory_bound("other", "embedding forward", 1, embed("embedding_forward")),
        memory_bound("norm", "RMSNorm forward", 2 * L + again + again_up, embed("rmsnorm_forward")),
        memory_bound("norm", "final RMSNorm forward", 1, embed("rmsnorm_forward")),
        gemm("qkv forward", L + again, N, c.W, C),
        memory_bound("RoPE", "RoPE forward", L + again, rope(rope_forward)),
        attention_op("attention forward", L + again, counted_attention("attention_forward"), factor),
        gemm("o forward + residual", L + again, N, C, c.HD, 2, True),
        *up,
        gemm("down forward + residual", L, N, C, F, 2, True),
        gemm("logits", chunks, cls_rows, c.Vp, C),
        memory_bound("cross-entropy", "cross-entropy", chunks, cross),
        gemm("logits backward x", chunks, cls_rows, C, c.Vp),
        gemm("logits backward w", chunks, c.Vp, C, cls_rows, 4, True),
        clear("other", "clear dx", 1, 2.0 * N * C),
        memory_bound("norm", "final RMSNorm backward", 1, counts.norm_backward(norm_backward, N, C, True)),
        *down,
        gemm("down backward w", L, C, F, N, 4, True),
        gemm("gate/up backward x", L, N, C, 2 * F),
        memory_bound("norm", "RMSNorm backward, norm rebuilt", 2 * L, counts.norm_backward(norm_backward, N, C, False)),
        memory_bound("norm", "sums of its partials", 2 * L + 1, columns),
        gemm("gate/up backward w", L, 2 * F, C, N, 4, True),
        gemm("o backward w", L, C, c.HD, N, 4, True),
        gemm("o backward x", L, N, c.HD, C),
        attention_op("attention backward: dq", L, counted_attention("attention_backward_dq"), backward_factor),
        attention_op("attention backward: dk dv", L, counted_attention("attention_backward_dkdv"), backward_factor),
        *([clear("attention", "attention backward: parts added", L, added)] if added else []),
        memory_bound("RoPE", "RoPE backward", L, rope(rope_backward)),
        gemm("qkv backward x", L, N, C, c.W),
        gemm("qkv backward w", L, c.W, C, N, 4, True),
        memory_bound("other", "embedding backward", 1, embed("embedding_backward")),
    ]
    if attention == "wgmma":
        for x in ops: wgmma_attention(x, c, B, T)
    run_n = counted_parameters(counts)
    adamw = counts.per_item("mlp 1", counts.name("mlp 1", "adamw_update<bf16, float>"), run_n, c.n)
    if state == "bf16":     # m and v: 4 bytes less to read and to write each; instructions as with float
        adamw = adamw | {"sectors": adamw["sectors"] - 8.0 * c.n, "compulsory": adamw["compulsory"] - 8.0 * c.n}
    update = [clear("optimizer", "clear gradients", 1, 4.0 * c.n),
              memory_bound("optimizer", "global norm", 1, counts.per_item("mlp 1", "sum_of_squares", run_n, c.n)),
              memory_bound("optimizer", "AdamW", 1, adamw)]
    return ops, update


# ---- the planner's constants ------------------------------------------------------------------------------------------
# The trainers' planner (section 16, --dry-run --device) has the same ops; its counts are rows that this writes into train_litespark.c.
def planner_passes(counts):
    """name: bytes per column of a pass over rows: (fixed, per row); of those over parameters: per parameter"""
    def of(per):        # per(rows): quantities of a launch with one column, rows 0 and 1 apart
        return per(0)["sectors"], per(1)["sectors"] - per(0)["sectors"]
    width = lambda r: (r["H"] + r["K"]) * r["D"]
    rows = lambda kernel, pair, key: of(lambda N: counts.rows(counts.name(pair[0], kernel), N, 1, *pair, key))
    norm, mlp = ("norm 1", "norm 3"), ("mlp 1", "mlp 2")
    backward = counts.name("norm 1", "rmsnorm_backward")
    run, r3 = counts.runs["mlp 2"], counts.runs["norm 3"]
    per_param = lambda kernel: counts.per_item("mlp 1", counts.name("mlp 1", kernel), counted_parameters(counts), 1)["sectors"]
    cross = counts.per_item("mlp 2", counts.name("mlp 2", "cross_entropy"), run["B"] * run["T"] * run["V"], 1)["sectors"]
    return {"embedding forward": rows("embedding_forward", norm, lambda r: r["C"]), "embedding backward": rows("embedding_backward", norm, lambda r: r["C"]),
            "RMSNorm forward": rows("rmsnorm_forward", norm, lambda r: r["C"]), "RMSNorm backward": of(lambda N: counts.norm_backward(backward, N, 1, False)),
            "the final one's": of(lambda N: counts.norm_backward(backward, N, 1, True)),
            "sums of its partials": (counts.per_launch("norm 3", "column_sums")["sectors"] / r3["C"], 0),
            "RoPE forward": rows("qk_norm_rope_forward", norm, width), "RoPE backward": rows("qk_norm_rope_backward", norm, width),
            "SwiGLU forward": rows("swiglu_forward", mlp, lambda r: r["F"]), "SwiGLU backward": rows("swiglu_backward", mlp, lambda r: r["F"]),
            "cross-entropy": (0, cross), "clear gradients": (0, 4), "sum of squares": (0, per_param("sum_of_squares")),
            "AdamW": (0, per_param("adamw_update<bf16, float>"))}


def planner_rows(counts):
    """The text between the marks in train_litespark.c"""
    out = ["static const struct { double fixed, per_row; } passes[] = {         // bytes per column"]
    out += [f"    {{{a:.6g}, {b:.6g}}},".ljust(32) + f"// {name}" for name, (a, b) in planner_passes(counts).items()]
    out += ["};", "static const MmaKernel mma_kernels[] = {        // tensor cores; instructions and exponentials"]
    factor, backward_factor = fa2()[1], fa2_backward()[1]
    numbers = lambda xs: ", ".join(f"{x:.4g}" for x in xs)
    row = lambda name, D, G, tensor, other: f"    {{{name}, {D}, {G}, {{{numbers(tensor)}}}, {{{numbers(other)}}}}},"
    for D, G in sorted({(r["D"], r["H"] // r["K"]) for n, r in counts.runs.items() if n.startswith("attention")}):
        c = Config(512, 1, D * G, G, 1, D, 128, 1)
        for name, kernels, f in (("ATTENTION_FORWARD", ["attention_forward"], factor), ("ATTENTION_BACKWARD", ["attention_backward_dq", "attention_backward_dkdv"], backward_factor)):
            at = lambda T, terms: f * sum(counts.attention(k, c, 1, T)[t] for k in kernels for t in terms) / G
            fit = lambda terms: quadratic(FIT_T, [at(T, terms) for T in FIT_T])
            out.append(row(name, D, G, fit(("tensor_us",)), fit(("issue_us", "sfu_us"))))
    for name, kernel in (("GATE_UP_SWIGLU", "gate_up_swiglu"), ("DOWN_SWIGLU_BACKWARD", "swiglu_down_backward")):
        at = lambda C, terms: factor * sum(counts.product(kernel, 1, C, 1)[t] for t in terms)
        line = lambda terms: (at(0, terms), at(1, terms) - at(0, terms), 0)
        out.append(row(name, 0, 0, line(("tensor_us",)), line(("issue_us", "sfu_us"))))
    for name, kernel in (("GATE_UP_WGMMA", "gate_up_swiglu"), ("DOWN_WGMMA", "swiglu_down_backward")):     # per element of h, but for DRAM and the last tiles
        at = lambda C: wgmma_product_factor() * max(product_on_chip(C)) * WGMMA_PRODUCTS[kernel]["columns_per_f"] / (ROWS * COLUMNS * SMS * CLOCK) * 1e6
        out.append(row(name, 0, 0, (2 * at(1024) - at(2048), (at(2048) - at(1024)) / 1024, 0), (0, 0, 0)))
    out += ["};", "static const WgmmaAttention wgmma_attention[] = {   // clocks: start and end of a block, a tile"]
    whole = lambda *xs: ", ".join(f"{x:.0f}" for x in xs)
    for D in WGMMA_WIDTHS:
        (_, dq), (_, dkdv) = wgmma_backward(TILE, 1, 1, D)
        (forward, backward), blocks = wgmma_factors(), [wgmma_block(x) for x in (wgmma_forward(TILE, 1, D)[1], dq, dkdv)]
        out.append(f"    {{{D}, " + ", ".join(f"{{{whole(f * ends, f * tile)}}}" for f, (ends, tile) in zip((forward, backward, backward), blocks)) + "},")
    return "\n".join(out + ["};"]) + "\n"


def quadratic(x, y):
    """a, b, c of a + b x + c x^2 through three points"""
    d1, d2 = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    c = (d2 - d1) / (x[2] - x[0])
    b = d1 - c * (x[0] + x[1])
    return y[0] - b * x[0] - c * x[0] ** 2, b, c


PLANNER = re.compile(r"(// counted, written by dev/speed_model.py --planner sync\n).*?(// end of what is counted\n)", re.S)


def planner(counts, what):
    """sync: writes the rows; check: they are there, and what they leave out (other terms of a kernel) is the limit on no device. 1: it is not so"""
    with open(TRAINER, encoding="utf-8") as f:
        text = f.read()
    if not PLANNER.search(text): sys.exit("speed_model: train_litespark.c has no marks for the planner's rows")
    wanted = PLANNER.sub(lambda m: m[1] + planner_rows(counts) + m[2], text)
    if what == "sync":
        if wanted != text:
            with open(TRAINER, "w", encoding="utf-8") as f:
                f.write(wanted)
        return 0
    bad = wanted != text
    if bad: print("speed_model: the planner's rows in train_litespark.c are not what results/kernel_counts.json gives (make sync)")
    for device in DEVICES:
        with open(COUNTS) as f:
            counts = Counts(json.load(f)["runs"])
        choose_device(device, counts.runs)
        for preset, T in (("3B", 4096), ("30B", 4096), ("llama3.2-1B", 1024)):
            ops, update = step_ops(counts, Config(*PRESETS[preset]), 1, T, "none", DEFAULT_CHUNK, "fp32", "passes")
            for x in ops + update:
                if x.group != "GEMM" and not (HOPPER and x.group == "attention") and x.limit not in ("dram", "tensor+issue+sfu"):
                    print(f"speed_model: the planner leaves out that {x.name} is bound by {x.limit} on {device} ({preset})")
                    bad = True
    return 1 if bad else 0

# ---- attention with wgmma and TMA: attention_forward_kernel4, attention_backward_dq_kernel3 and _dkdv_kernel3 ------------
# One warpgroup copies, two compute in turns or out of step, so a tile takes its largest term (kernels on mma.sync: the sum, see above).
# Per clock and SM of an H100 or H200: 4096 FLOP of wgmma, 16 exponentials, 128 lanes of other instructions, 128 bytes of shared memory.
# Published, TFLOP/s of the causal FLOPs, bf16, head_dim 128: cuDNN 9.19 on an H200, B 1, 64 query heads, 8 of keys (its own table, Feb 2026);
# FlashAttention-3 on an H100: T 4096 forward (paper), T 8192, 16 heads (its pull request 1893), there deterministic 474 backward.
WGMMA_SM = {"tensor": 4096, "exponentials": 16, "instructions": 128, "shared": 128}
WGMMA_PUBLISHED = {2048: "cuDNN 484", 4096: "cuDNN 591; FA3 579", 8192: "cuDNN 644; FA3 660", 16384: "cuDNN 673", 32768: "cuDNN 688"}
WGMMA_BACKWARD = {2048: (370, 0), 4096: (474, 0), 8192: (541, 575), 16384: (579, 0), 32768: (581, 0)}     # cuDNN, FlashAttention-3
TILE = 128                  # queries of a block, keys of a tile
INSTRUCTIONS = 4.5          # per score, beside 2^x: maximum, scale and subtract, sum, half a conversion, and what belongs to loops
BACKWARD_INSTRUCTIONS = 4.5 # the same of the backward kernels: scale and subtract, minus delta, times P, half a conversion or one, lse and delta
TMA_CLOCKS = 1500           # assumed: start of a block, its first tiles through TMA, its last store; nothing hides them with one block per SM


def wgmma_clocks(scores, tensor, shared, instructions):
    work = {"tensor": tensor, "exponentials": scores, "instructions": instructions * scores, "shared": shared}
    return {k: work[k] / WGMMA_SM[k] for k in work}


def wgmma_block(clocks):
    """Clocks of a block of n tiles: (a, b) of a + b n. Beside the first scores and the last product runs nothing."""
    tile = max(clocks.values())
    return TMA_CLOCKS + clocks["tensor"] + max(clocks["exponentials"], clocks["instructions"]) - tile, tile


def wgmma_seconds(blocks, clocks):
    """blocks: the tiles of each, in the order of the grid; each goes to the SM that is free first."""
    ends, tile = wgmma_block(clocks)
    free = [0.0] * SMS
    heapq.heapify(free)
    for tiles in blocks: heapq.heappush(free, heapq.heappop(free) + ends + tiles * tile)
    return max(free) / CLOCK


WGMMA_WIDTHS = (64, 96, 104, 128)       # compiled: with_wgmma_width() in train_litespark.cu; a head takes the narrowest that holds it


def wgmma_widths(D):
    """What is computed of D: the depth of the scores (steps of 16), the columns of out, dq, dk and dv. And the width of the tiles that TMA writes."""
    columns = next(w for w in WGMMA_WIDTHS if D <= w)
    return -(-columns // 16) * 16, columns, 64 if D <= 64 else 128


def wgmma_forward(T, heads, D):
    """Seconds of a causal forward, and the clocks of each term per tile of 128 queries and 128 keys."""
    depth, columns, width = wgmma_widths(D)
    scores = TILE * TILE
    bytes_read = 2 * (64 + TILE) * depth * 2 + 2 * TILE * columns * 2 + 2 * TILE * width * 2      # q and k; v; what TMA writes
    clocks = wgmma_clocks(scores, 2 * scores * (depth + columns), bytes_read, INSTRUCTIONS)
    return wgmma_seconds([tiles for tiles in range(-(-T // TILE), 0, -1) for _ in range(heads)], clocks), clocks


L2_BYTES = (50 << 20) * 5 // 8  # of an H100 or H200: what heads_together() in train_litespark.cu counts on


def wgmma_keys_from_dram(T, kv_heads, D, sections=True):
    """Bytes of K and V that a launch of attention_forward_kernel4 or attention_backward_dq_kernel3 reads from DRAM. A row of blocks reads the keys
    up to its own, of as many heads as go in step: again from DRAM where these exceed L2_BYTES, else only the 128 that are new."""
    together = min(kv_heads, max(1, L2_BYTES // (4 * T * D))) if sections else kv_heads
    row = lambda end: 4 * D * (end if 4 * D * end * together > L2_BYTES else TILE)
    return kv_heads * sum(row(end) for end in range(TILE, T + TILE, TILE))


def wgmma_backward(T, heads, kv_heads, D):
    """Of dq and of dk dv: seconds, and the clocks of each term per tile. 2-byte elements; a product of a warpgroup reads its left operand
    (unless that is in registers) and all of its right one; TMA writes two tiles. Without the adding of parts."""
    depth, columns, width = wgmma_widths(D)
    scores = TILE * TILE                                    # dq: 128 queries, 128 keys; three products
    dq = wgmma_clocks(scores, 2 * scores * (2 * depth + columns), (2 * 2 * (64 + TILE) * depth + 2 * TILE * columns + 2 * TILE * width) * 2, BACKWARD_INSTRUCTIONS)
    rows = range(-(-T // TILE), 0, -1)
    first = wgmma_seconds([tiles for tiles in rows for _ in range(heads)], dq)
    scores = TILE * 64                                      # dk dv: 128 keys, 64 queries; four products
    dkdv = wgmma_clocks(scores, 4 * scores * (depth + columns), (2 * 2 * (64 + 64) * depth + 2 * 2 * 64 * columns + 2 * 64 * width) * 2, BACKWARD_INSTRUCTIONS)
    group = heads // kv_heads
    parts = attention_parts(kv_heads, T, group, SMS)
    second = wgmma_seconds([2 * tiles * (group // parts) for tiles in rows for _ in range(kv_heads * parts)], dkdv)
    return (first, dq), (second, dkdv)


def wgmma_one_pass(T, heads):
    """Seconds of FlashAttention-3's backward by the same rules: a block has 128 keys of a query head and walks over tiles of 64 queries; five
    products; dS (16-bit) and dq (32-bit) go through shared memory, the latter on to a sum in DRAM that no SM waits for."""
    scores, width = TILE * 64, 128
    shared = (2 * 2 * (64 + 64) + 2 * 2 * 64 + 2 * 64) * width * 2 + 2 * scores + 2 * (64 * TILE + TILE * width // 2) * 2 + 2 * 64 * width * 4
    clocks = wgmma_clocks(scores, 10 * scores * width, shared, BACKWARD_INSTRUCTIONS)
    return wgmma_seconds([2 * tiles for tiles in range(-(-T // TILE), 0, -1) for _ in range(heads)], clocks), clocks


# attention_backward_onepass_kernel1 of dev/attention_backward.cu: dq is added up in turns. The blocks' walks are played through: who starts when, who
# waits for whom, which sums L2 still has. Assumed:
HAND_OVER = 3000            # clocks from the end of a tile's products until the next block's sum may be added: the copy that adds, its wait, release, a look
ADD_BYTES = 64              # per clock and SM, of a copy that adds to L2
L2_KEPT = 32e6              # bytes of what was touched last, of an L2 of 50 MB in two halves
TURNS_PUBLISHED = 474 / 574.7       # FlashAttention-3, T 8192, causal: shortest block of keys first, to any order


def wgmma_in_turns(T, heads, kv_heads, D, B=1, together=1):
    """Seconds: of the pass as played through, of its DRAM traffic, of the kernels before and after it; clocks of each term per tile; of the SMs' time
    what is not a tile's, of tiles what L2 has not. together: heads of a group that a block walks over, one after another."""
    width, queries = (64, 128) if D <= 64 else (128, 64)
    scores, walk, group = TILE * queries, TILE // queries, heads // kv_heads
    shared = (2 * 2 * (64 + 64) + 2 * 2 * 64) * width * 2 * queries // 64 + 2 * queries * width * 2 + 2 * scores + 2 * (64 * TILE + TILE * 64) * 2 + 2 * 2 * 64 * 64 * 4
    clocks = wgmma_clocks(scores, 10 * scores * width, shared, BACKWARD_INSTRUCTIONS + 0.5)    # and stmatrix, dq to shared memory
    tile = max(clocks.values())
    starts = TMA_CLOCKS + clocks["tensor"] + max(clocks["exponentials"], clocks["instructions"])
    sums = 2 * TILE * width * 4                             # dk, dv of a block, if they are added to those of other heads
    ends = 2 * sums / WGMMA_SM["shared"] + sums / ADD_BYTES + TMA_CLOCKS if group > together else 0
    blocks, all_heads = -(-T // TILE), B * heads // together
    at_once = max(1, SMS // blocks)
    # of many heads of a long text the first ones are played, the others go on as these end
    played = all_heads if all_heads * (blocks * walk) ** 2 < 2e6 else min(all_heads, 16 * at_once)
    free, tiles, added, kv_added, visits, halfway = [0.0] * SMS, blocks * walk, [[0.0] * (blocks * walk) for _ in range(played * together)], {}, [], 0
    for first in range(0, played, at_once):
        if first <= played // 2: halfway = max(free)
        for block in range(blocks - 1, -1, -1):             # right-most keys first
            for head in range(first, min(first + at_once, played)):
                t = heapq.heappop(free) + starts
                for h in range(head * together, (head + 1) * together):
                    mine = added[h]
                    for i in range(block * walk, tiles):
                        t += tile
                        turn = mine[i] + HAND_OVER if mine[i] else 0
                        t = max(t, turn - tile)             # a tile's sum may wait while the next one is computed
                        mine[i] = max(t, turn)
                        visits.append((t, h * tiles + i))
                if group > together:
                    t = kv_added[head % (B * kv_heads), block] = max(t, kv_added.get((head % (B * kv_heads), block), 0)) + ends
                heapq.heappush(free, t)
    seconds, recent, missed, touched = max(free) / CLOCK, {}, 0, 2 * queries * width * 2 + queries * width * 4       # q, dout, dq of a tile
    for _, what in sorted(visits):
        if recent.pop(what, None) is None: missed += 1
        recent[what] = True
        if len(recent) > L2_KEPT / touched: del recent[next(iter(recent))]
    busy = len(visits) * tile / SMS / CLOCK / seconds
    seconds += (seconds - halfway / CLOCK) * (all_heads - played) / (played - played // 2)
    dram = missed / len(visits) * B * heads * blocks * (blocks + 1) / 2 * walk * (touched + queries * width * 4) + (2 * sums * blocks * all_heads if ends else 0)
    elements, kv = B * T * heads * D, B * T * kv_heads * D if ends else 0
    return {"pass": seconds, "dram": dram / DRAM, "helpers": (4 * elements + 6 * elements + 12 * kv) / DRAM, "clocks": clocks, "idle": 1 - busy, "missed": missed / len(visits)}


def print_turns(markdown):
    rows, H = [], 64
    for name, T, heads, kv_heads, D, B, together in [(f"T {T}, D {D}", T, H, 8, D, 1, 1) for D in (128, 64) for T in (2048, 4096, 8192, 16384, 32768)] + \
            [("3B: B 4, T 4096, 16 heads, 2 of keys", 4096, 16, 2, 128, 4, 1), ("3B, 2 heads of a group in a block", 4096, 16, 2, 128, 4, 2),
             ("3B, all 8", 4096, 16, 2, 128, 4, 8), ("30B: T 4096, 64 heads, 64 of keys, D 104", 4096, 64, 64, 104, 1, 1)]:
        one = wgmma_in_turns(T, heads, kv_heads, D, B, together)
        two = sum(x[0] for x in wgmma_backward(T, B * heads, B * kv_heads, D)) + added_bytes(B * kv_heads, T, D, attention_parts(B * kv_heads, T, heads // kv_heads, SMS)) / DRAM
        any_order = wgmma_one_pass(T, H)[0]
        factor = max(x for x in WGMMA_BACKWARD[T] if x) / (5.0 * T * T * 128 * H / any_order / 1e12)
        tflops = lambda seconds: 5.0 * B * T * T * D * heads / seconds / 1e12
        slow = max(one["pass"] / factor, one["dram"]) + one["helpers"]
        as_published = WGMMA_BACKWARD[T][WGMMA_BACKWARD[T][1] > 0] * TURNS_PUBLISHED
        rows.append([name, f"{two * 1e6:.0f}", f"{one['pass'] * 1e6:.0f} + {one['helpers'] * 1e6:.0f}", f"{100 * one['idle']:.0f}%", f"{one['dram'] * 1e6:.0f}; {100 * one['missed']:.0f}%",
                     f"{tflops(two / factor):.0f}", f"{tflops(slow):.0f}", f"{as_published:.0f}" if D == 128 else "-", f"{100 * (two / factor / slow - 1):+.0f}%"])
    table(["attention backward, one pass in turns, causal", "us, modelled: two kernels", "one pass + helpers", "of the pass idle", "DRAM us; not in L2", "two kernels, with the factor",
           "one pass, with the factor", "published with turns", "one pass to two kernels"], rows, markdown)
    says = lambda clocks: ", ".join(f"{k} {v:.0f}" for k, v in clocks.items())
    print(f"Clocks per tile: D 128 (64 queries) {says(wgmma_in_turns(1024, 8, 8, 128)['clocks'])}; D 64 (128 queries) {says(wgmma_in_turns(1024, 8, 8, 64)['clocks'])}.")
    print("The factor: published over any order in this model, the larger of cuDNN's and FlashAttention-3's, not on the helpers. Published with turns: times 474 / 574.7.\n")


# ---- the MLP's products with wgmma and TMA: gate_up_swiglu_kernel4, swiglu_down_backward_kernel3 -----------------------
# Tiles of 128 rows and `columns` sums, both operands 64 deep per step. Published, of plain products of bf16, H100 SXM: fast.cu (its README at
# commit a1bb7b2), tiles of 128 x 256 whose epilogue nothing hides.
# instructions and exponentials per sum of the epilogue: counted in the compiled code; bytes moved per sum, DRAM.
WGMMA_PRODUCTS = {"gate_up_swiglu": {"instructions": 7.0, "exponentials": 1.0, "bytes": 3.0, "columns_per_f": 2},
                  "swiglu_down_backward": {"instructions": 25.0, "exponentials": 2.0, "bytes": 10.0, "columns_per_f": 1}}
PLAIN_PUBLISHED = {4096: 763e12, 8192: 808e12}
ROWS, COLUMNS, GROUP = 128, 192, 16     # of a tile; rows of tiles that share what they read of the right operand


def product_clocks(columns, steps):
    """Clocks of a tile: of tensor cores; of shared memory: operands read by wgmma of 64 rows each, and written by TMA"""
    reads, writes = 2 * (64 + columns) * 64 * 2, (ROWS + columns) * 64 * 2
    return steps * 2 * ROWS * columns * 64 / WGMMA_SM["tensor"], steps * (reads + writes) / WGMMA_SM["shared"]


def product_on_chip(C):
    """Clocks of a tile of ours: of tensor cores; of shared memory, with the sums that are written and read once on their way to memory"""
    tensor, shared = product_clocks(COLUMNS, -(-C // 64))
    return tensor, shared + 2 * ROWS * COLUMNS * 2 / WGMMA_SM["shared"]


def wgmma_product_factor():
    """Modelled time of fast.cu's product, 4096 x 4096 x 4096, to published: what the model does not know, latency and clocks under load"""
    n = 4096
    tensor, shared = product_clocks(256, n // 64)
    staging = 2 * ROWS * 256 * 2 / WGMMA_SM["shared"]
    tiles = -(-(n // ROWS) * (n // 256) // SMS)
    modelled = (TMA_CLOCKS + tiles * (max(tensor, shared) + staging)) / CLOCK
    return 2.0 * n ** 3 / PLAIN_PUBLISHED[n] / modelled


def wgmma_product(N, C, F, kernel, factor):
    """Seconds, the clocks of each term per tile (the chip's without the factor), FLOPs. A tile takes its largest term: the two warpgroups alternate."""
    k = kernel if isinstance(kernel, dict) else WGMMA_PRODUCTS[kernel]
    width, sums = F * k["columns_per_f"], ROWS * COLUMNS
    rows, columns = -(-N // ROWS), -(-width // COLUMNS)
    tensor, shared = product_on_chip(C)
    tiles = rows * columns
    operands = 2.0 * N * C + 2.0 * width * C * max(1, rows / GROUP)     # the right one anew for each group of rows
    clocks = {"tensor": tensor, "shared": shared, "instructions": k["instructions"] * sums / WGMMA_SM["instructions"],
              "exponentials": k["exponentials"] * sums / WGMMA_SM["exponentials"], "dram": (k["bytes"] * sums + operands / tiles) * SMS * CLOCK / DRAM}
    ends = TMA_CLOCKS + clocks["dram"]                                  # the first loads; the last tile's epilogue
    return (-(-tiles // SMS) * max(factor * max(tensor, shared), clocks["dram"]) + ends) / CLOCK, clocks, 2.0 * N * C * width


def print_wgmma_products(markdown):
    factor, rows = wgmma_product_factor(), []
    for name, C, F in (("3B", 2048, 11008), ("llama3.1-8B", 4096, 14336), ("llama3.2-1B", 2048, 8192), ("100M", 768, 2048)):
        for kernel in WGMMA_PRODUCTS:
            (t, clocks, flops), (slower, _, _) = (wgmma_product(16384, C, F, kernel, x) for x in (1, factor))
            rows.append([f"{kernel}, {name}", f"{t * 1e6:.0f}", f"{flops / t / 1e12:.0f}", f"{slower * 1e6:.0f}", f"{flops / slower / 1e12:.0f}",
                         ", ".join(f"{k} {v:.0f}" for k, v in clocks.items())])
    table(["the MLP's products, N 16384", "us, modelled", "TFLOP/s, modelled", "us, with the factor", "TFLOP/s, with the factor", "clocks per tile of 128 x 192; the largest counts"], rows, markdown)
    print(f"Factor {factor:.3f}: fast.cu's product of 4096 x 4096 x 4096 in this model to its published {PLAIN_PUBLISHED[4096] / 1e12:.0f} TFLOP/s on an H100. DRAM at {DRAM / 1e12:.1f} TB/s.")


def wgmma_factors():
    """(forward, backward): the model to cuDNN's published figures on an H200, T 4096, 64 heads of 128. Backward that of a pass like cuDNN's."""
    n, heads = 4096, 64
    return 2.0 * n * n * 128 * heads / wgmma_forward(n, heads, 128)[0] / 591e12, 5.0 * n * n * 128 * heads / wgmma_one_pass(n, heads)[0] / 474e12


def wgmma_attention(op, c, B, T):
    """op as its wgmma kernel: the model times its factor. Bytes stay as counted."""
    forward, backward = wgmma_factors()
    off = {"attention forward": forward, "attention backward: dq": backward, "attention backward: dk dv": backward}
    if op.name not in off: return
    dq, dkdv = wgmma_backward(T, B * c.H, B * c.K, c.D)
    t, clocks = {"attention forward": wgmma_forward(T, B * c.H, c.D), "attention backward: dq": dq, "attention backward: dk dv": dkdv}[op.name]
    op.seconds, op.limit = t * off[op.name], max(clocks, key=clocks.get)
    op.terms = f"times {off[op.name]:.2f}; of a tile, in clocks: " + ", ".join(f"{k} {v:.0f}" for k, v in clocks.items())


def print_parts(markdown):
    """The parts of a group that attention_parts chooses: dk dv with and without them, and beside the best choice."""
    def us(B, T, H, K, D, parts):       # dk dv as modelled, and the pass that adds, if there are several
        group, clocks = H // K, wgmma_backward(TILE, 1, 1, D)[1][1]
        blocks = [2 * tiles * (group // parts) for tiles in range(-(-T // TILE), 0, -1) for _ in range(B * K * parts)]
        return wgmma_factors()[1] * wgmma_seconds(blocks, clocks) * 1e6, (added_bytes(B * K, T, D, parts) / DRAM * 1e6)
    rows = []
    for name, B, T in (("3B", 1, 4096), ("3B", 2, 4096), ("3B", 4, 4096), ("3B", 1, 1024), ("llama3.1-8B", 1, 2048), ("llama3.2-1B", 1, 1024)):
        c = Config(*PRESETS[name])
        parts = attention_parts(B * c.K, T, c.H // c.K, SMS)
        rows.append([f"{name}, T {T}, B {B}", parts, f"{us(B, T, c.H, c.K, c.D, 1)[0]:.0f}", " + ".join(f"{x:.0f}" for x in us(B, T, c.H, c.K, c.D, parts) if x)])
    table(["dk dv, us, modelled, with the factor", "parts", "a block per group", "with parts + the pass that adds"], rows, markdown)
    worse, whole = [], []
    for group, K, D in ((8, 2, 128), (4, 8, 128), (4, 8, 64), (8, 1, 128), (4, 4, 128), (7, 4, 128), (3, 3, 64), (2, 8, 128), (6, 2, 128), (8, 4, 128), (3, 4, 64), (12, 2, 128)):
        for T in (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384):
            for B in (1, 2, 3, 4, 6, 8):
                all_of = {p: sum(us(B, T, group * K, K, D, p)) for p in range(1, group + 1) if group % p == 0}
                worse.append(all_of[attention_parts(B * K, T, group, SMS)] / min(all_of.values()) - 1)
                whole.append(all_of[1] / min(all_of.values()) - 1)
    print(f"Of {len(worse)} shapes (groups of 2 to 12, T 512 to 16384, B 1 to 8) the parts chosen are {100 * sum(worse) / len(worse):.1f}% slower than the best divisor in the mean, "
          f"{sum(x > 0.1 for x in worse)} by more than 10%, the worst by {100 * max(worse):.0f}%; a block per group {100 * sum(whole) / len(whole):.0f}% in the mean.\n")


def print_wgmma(markdown):
    lengths = (2048, 4096, 8192, 16384, 32768)
    says = lambda clocks: ", ".join(f"{k} {v:.0f}" for k, v in clocks.items())
    rows = []
    for D in (128, 64):
        for T in lengths:
            t, clocks = wgmma_forward(T, 64, D)
            rows.append([f"T {T}, D {D}", f"{t * 1e6:.0f}", f"{2.0 * T * T * D * 64 / t / 1e12:.0f}", WGMMA_PUBLISHED[T] if D == 128 else "-", says(clocks)])
    table(["attention forward, B 1, 64 heads, causal", "us, modelled", "TFLOP/s, modelled", "published TFLOP/s", "clocks per tile; the largest counts"], rows, markdown)
    rows = []
    for D in (128, 64):
        for T in lengths:
            (dq, dq_clocks), (dkdv, dkdv_clocks) = wgmma_backward(T, 64, 8, D)
            dkdv += added_bytes(8, T, D, attention_parts(8, T, 8, SMS)) / DRAM
            one, one_clocks = wgmma_one_pass(T, 64)
            ours, one_pass = [5.0 * T * T * D * 64 / t / 1e12 for t in (dq + dkdv, one)]
            published = [x for x in WGMMA_BACKWARD[T] if x] if D == 128 else []
            rows.append([f"T {T}, D {D}", f"{dq * 1e6:.0f} + {dkdv * 1e6:.0f}", f"{ours:.0f}", f"{one_pass:.0f}" if D == 128 else "-",
                         "; ".join(f"{n} {x}" for n, x in zip(("cuDNN", "FA3"), published)) or "-", "; ".join(f"{x / one_pass:.2f}" for x in published) or "-",
                         "; ".join(f"{ours * x / one_pass:.0f}" for x in published) or "-"])
        if D == 128: clocks_of = f"dq {says(dq_clocks)}; dk dv {says(dkdv_clocks)}; one pass {says(one_clocks)}"
    table(["attention backward, B 1, 64 heads, 8 of keys, causal", "us, modelled: dq + dk dv", "TFLOP/s of 5 products, modelled", "one pass, modelled", "published",
           "published / one pass", "ours times that"], rows, markdown)
    print(f"Backward, clocks per tile at D 128: {clocks_of}.\n")
    rows = []
    for name, B, T, H, K, D in (("30B", 4, 4096, 64, 64, 104), ("llama3.1-8B", 4, 8192, 32, 8, 128), ("3B", 8, 4096, 16, 2, 128), ("3B", 1, 131072, 16, 2, 128)):
        step, ours = wgmma_keys_from_dram(T, B * K, D, False), wgmma_keys_from_dram(T, B * K, D)
        t = (wgmma_forward(T, B * H, D)[0], wgmma_backward(T, B * H, B * K, D)[0][0])
        rows.append([f"{name}, B {B}, T {T}, {B * K} heads of keys", f"{4e-6 * B * K * T * D:.0f}", f"{step / 1e9:.2f}", f"{ours / 1e9:.2f}",
                     f"{step / DRAM * 1e6:.0f}", f"{ours / DRAM * 1e6:.0f}", f"{t[0] * 1e6:.0f}; {t[1] * 1e6:.0f}"])
    table(["forward, and dq: K and V from DRAM", "MB, each once", "GB, all heads in step", "GB, as many as L2 holds", "us at full rate, in step", "us, as L2 holds", "us of forward; dq, modelled without DRAM"], rows, markdown)
    print("Modelled, not measured: the largest term hides the others but at the ends of a block; 132 SMs at 1.755 GHz, which a GPU at its power limit does not hold.\n")
    print_parts(markdown)
    print_turns(markdown)
    print_wgmma_products(markdown)
    return 0


# ---- reports ----------------------------------------------------------------------------------------------------------
def table(head, rows, markdown, left=1):
    rows = [[str(x) for x in r] for r in rows]
    if markdown:
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for r in rows: print("| " + " | ".join(r) + " |")
    else:
        w = [max(len(r[i]) for r in [head] + rows) for i in range(len(head))]
        for r in [head] + rows: print("  ".join(x.ljust(n) if i < left or i == len(head) - 1 else x.rjust(n) for i, (x, n) in enumerate(zip(r, w))).rstrip())
    print()


LLMQ = {"RMSNorm forward x2": (8, 0), "RoPE forward + backward": (4.5, 0), "attention forward": (2.25, 0), "SwiGLU forward": (0, 3),
        "SwiGLU backward": (0, 5), "RMSNorm backward x2": (8, 0), "attention backward": (4.5, 0)}     # of the 3B: elements of C, of F
LLMQ_SUM, LLMQ_SAME, TARGET_BYTES = 287744, 370176, 261120


def per_layer(ops, c, N):
    """Bytes per token and layer, op by op: (name, compulsory, sectors)."""
    groups = {"RMSNorm forward x2": ["RMSNorm forward"], "residual, read by the products": ["o forward + residual", "down forward + residual"],
              "RoPE forward + backward": ["RoPE forward", "RoPE backward"], "attention forward": ["attention forward"],
              "SwiGLU forward": ["SwiGLU forward", "gate/up forward with SwiGLU"],
              "SwiGLU backward": ["SwiGLU backward, h rebuilt", "down backward x with SwiGLU"], "RMSNorm backward x2": ["RMSNorm backward, norm rebuilt"],
              "attention backward": ["attention backward: dk dv", "attention backward: dq", "attention backward: parts added"], "sums of partials": ["sums of its partials"]}
    by = {o.name: o for o in ops}
    rows = []
    for name, members in groups.items():
        b = [sum(getattr(by[m], what) * by[m].times for m in members if m in by) / N / c.L for what in ("compulsory", "sectors")]
        rows.append((name, *b))
    return rows


def own_launches(ops, c, micro):
    """Kernels of ours in an update: all of the micro-steps but cuBLASLt's products and clearing, and the sum of their losses; then per
    tensor two for the global norm, and AdamW. As many as ptxcpu counted in the runs of kernel_counts.json."""
    ours = [x for x in ops if (x.group != "GEMM" or "SwiGLU" in x.name) and not x.name.startswith("clear")]
    return micro * (sum(x.times for x in ours) + 1) + 3 * (c.L * 9 + 2 + (0 if c.tied else 1))


def print_launches(ops, c, micro, step):
    ours = own_launches(ops, c, micro)
    cost = lambda us: f"{ours * us * 1e-3:.1f} ms, {ours * us * 1e-6 / step * 100:.2f}%"
    print(f"{ours:.0f} launches per update are of our kernels. Programmatic dependent launch of these would save {cost(LAUNCH_SAVED)} of the step "
          f"at {LAUNCH_SAVED} us each, at most {cost(LAUNCH_GAP)}: the whole gap of {LAUNCH_GAP} us.\n")


# A layer's norms inside the products beside them. Those before a norm also sum squares per row, those after it scale their rows by
# rstd (the norm's weight is in theirs), those backward finish dx in their epilogue: the sum over dnorm and the norm's input is that
# over the gradient and the value of what follows. Five products become ours: (width, depth, bytes per sum that the epilogue moves).
# 8 instructions per sum are assumed, as nothing of this is built; 40 would still hide under the products.
def norm_products(c):
    return {"qkv forward": (c.W, c.C, 2), "o forward + residual": (c.C, c.HD, 4), "down forward + residual": (c.C, c.F, 4),
            "gate/up backward x": (c.C, 2 * c.F, 6), "qkv backward x": (c.C, c.W, 6)}


def print_norms(ops, c, N, micro, step):
    """What the RMSNorm passes of the layers cost, what of it would stay (backward reads x and dx), what products of our own would add."""
    layer = {x[0]: x[1] for x in per_layer(ops, c, N)}
    moved, stay = sum(layer[x] for x in ("RMSNorm forward x2", "RMSNorm backward x2", "sums of partials")), 2 * 2 * 2 * c.C
    passes = micro * sum(x.seconds * x.times for x in ops if x.group == "norm" and not x.name.startswith("final"))
    products = [x for x in ops if x.name in norm_products(c)]
    theirs = micro * sum(x.seconds * x.times for x in products)
    share = lambda s: f"{s * 1e3:.1f} ms, {s / step * 100:.2f}%"
    print(f"RMSNorm inside the products instead of passes: {moved:.0f} bytes per token and layer become {stay}. The passes are {share(passes)} of the step: "
          f"the most that can go, if the rest hides under the products; {share(passes - stay * N * c.L / DRAM * micro)}, if it costs as in a pass.")
    if not HOPPER: return print()
    ours = 0.0
    for x in products:
        width, depth, moves = norm_products(c)[x.name]
        epilogue = {"instructions": 8.0, "exponentials": 0.0, "bytes": moves, "columns_per_f": 1}
        ours += micro * x.times * wgmma_product(N, depth, width, epilogue, wgmma_product_factor())[0]
    print(f"The five products that then are ours (tiles of 128 x 192, modelled as those with SwiGLU) take {ours * 1e3:.1f} ms instead of cuBLASLt's {theirs * 1e3:.1f}: "
          f"{share(passes - (ours - theirs))} left; nothing is left if they are {passes / theirs * 100:.1f}% slower.\n")


def verdict(ok):
    return "met" if ok else "NOT MET"


def kernel_rows(counts):
    """(kernel, run, elements per launch, what an element is)"""
    r1, r2 = counts.runs["norm 3"], counts.runs["mlp 2"]
    N1, N2 = r1["B"] * r1["T"], r2["B"] * r2["T"]
    n = Config(*[r2[k] for k in "VLCHKDF"], 1).n
    rows = [("rmsnorm_forward", "norm 3", 3 * N1 * 2048), ("rmsnorm_backward", "norm 3", 3 * N1 * 2048), ("column_sums", "norm 3", 3 * MAX_PARTIALS * 2048),
            ("qk_norm_rope_forward", "norm 3", N1 * 18 * 128), ("qk_norm_rope_backward", "norm 3", N1 * 18 * 128), ("swiglu_forward", "mlp 2", N2 * r2["F"]),
            ("swiglu_backward", "mlp 2", N2 * r2["F"]), ("cross_entropy", "mlp 2", N2 * r2["V"]), ("adamw_update", "mlp 2", n), ("sum_of_squares", "mlp 2", n),
            ("embedding_forward", "norm 3", N1 * 2048), ("embedding_backward", "norm 3", N1 * 2048)]
    r3 = counts.runs["products C512"]
    rows += [(name, "products C512", r3["B"] * r3["T"] * r3["F"]) for name in ("gate_up_swiglu", "swiglu_down_backward")]
    for name in ("attention_forward", "attention_backward_dkdv", "attention_backward_dq"):
        for run in ("attention D128 G8 T4096", "attention D104 G1 T4096", "attention D64 G4 T4096"):
            r = counts.runs[run]
            rows.append((name, run, r["H"] * r["T"] * r["T"] / 2))
    return rows


def print_kernels(counts, markdown):
    out = []
    for start, run, elements in kernel_rows(counts):
        name = counts.name(run, start)
        if name.startswith("adamw"): name = "adamw_update<bf16, float>"
        k = counts.total(run, name)
        terms = {"dram": k["sectors"] / DRAM * 1e6} | {t[:-3]: k[t] for t in TERMS}
        if "attention" in start or run.startswith("products"): terms.pop("dram")
        order = sorted(terms, key=terms.get, reverse=True)
        ratio = k["sectors"] / k["compulsory"]
        shape = run.replace("attention ", "").replace("products C512", "N 512 C 512 F 512").replace("norm 3", "C 2048").replace("mlp 2", "F 11008, V 32000")
        out.append([name, shape, k["registers"], k["shared_bytes"], f"{k['blocks_per_sm'] * k['threads'] / 2048:.2f}", f"{k['sectors'] / 1e6:.2f}",
                    f"{k['compulsory'] / 1e6:.2f}", f"{ratio:.3f}", "/".join(f"{x:.2f}" if x else "-" for x in (k["bank_loads"], k["bank_stores"])),
                    f"{k['instructions'] / elements:.1f}", f"{terms[order[0]]:.2f}", f"{order[0]}; {order[1]} {terms[order[1]]:.2f}"])
    table(["kernel", "run", "regs", "shared B", "occupancy", "sectors MB", "compulsory MB", "ratio", "bank ld/st", "instr/elem", "us", "limit; second term"], out, markdown)


def main():
    p = argparse.ArgumentParser(description="Modelled (not measured) time of a training step; see the head of this file.")
    p.add_argument("--preset", default="3B", choices=list(PRESETS))
    p.add_argument("--seq-len", type=int, default=4096)
    p.add_argument("--recompute", default="none", choices=["none", "mlp", "block"])
    p.add_argument("--batch-size", type=int, default=0, help="0: the largest divisor that fits")
    p.add_argument("--logits-chunk", type=int, default=0, help="rows; 0: the trainer's default")
    p.add_argument("--total-batch-tokens", type=int, default=1048576)
    p.add_argument("--optimizer-dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--device", default="h100", choices=list(DEVICES))
    p.add_argument("--memory-gib", type=float, default=0, help="0: the device's")
    p.add_argument("--mlp", default="auto", choices=["auto", "passes", "products"])
    p.add_argument("--attention", default="auto", choices=["auto", "mma", "wgmma"])
    p.add_argument("--markdown", action="store_true")
    p.add_argument("--kernels", action="store_true")
    p.add_argument("--wgmma", action="store_true")
    p.add_argument("--check", metavar="TRAINER")
    p.add_argument("--planner", choices=["check", "sync"])
    p.add_argument("--measure", nargs=2, metavar=("PTXCPU", "BINARY"))
    p.add_argument("--only", help="with --measure: runs whose name contains this; the others are kept")
    o = p.parse_args()
    if o.check: return check_memory(o.check)
    if o.measure: return measure(*o.measure, o.only)
    with open(COUNTS) as f:
        counts = Counts(json.load(f)["runs"])
    if o.planner: return planner(counts, o.planner)
    memory_gib = choose_device(o.device, counts.runs)
    o.memory_gib = o.memory_gib or memory_gib
    if o.wgmma: return print_wgmma(o.markdown)
    if o.kernels:
        print_kernels(counts, o.markdown)
        return 0
    c, T, total, md = Config(*PRESETS[o.preset]), o.seq_len, o.total_batch_tokens, o.markdown
    state_bytes = 4 if o.optimizer_dtype == "fp32" else 2
    chunk = o.logits_chunk or DEFAULT_CHUNK
    memory = o.memory_gib * 1024 * MIB - GPU_ALLOWANCE
    B = o.batch_size or largest_batch(c, T, o.recompute, chunk, total, memory, state_bytes)
    fits = B > 0 and sum(arenas(c, B, T, o.recompute, chunk, state_bytes)) < memory
    B = B or 1
    N = B * T
    need = arenas(c, B, T, o.recompute, chunk, state_bytes)
    ops, update = step_ops(counts, c, B, T, o.recompute, chunk, o.optimizer_dtype, o.mlp, o.attention)
    micro = total / N
    seconds = lambda xs: sum(x.seconds * x.times for x in xs)
    step = micro * seconds(ops) + seconds(update)
    print(f"MODELLED, not measured: preset {o.preset}, {c.n / 1e6:.1f} M parameters, T {T}, B {B} ({N} tokens per micro-step, {micro:g} micro-steps), recompute {o.recompute}, MLP in {o.mlp}, "
          f"logits chunk {min(chunk, N)}, one {o.device}")
    print("arenas in MiB: " + ", ".join(f"{n} {x / MIB:.1f}" for n, x in zip(("weights", "gradients", "optimizer", "activations", "workspace"), need))
          + f", total {sum(need) / MIB:.1f}" + ("" if fits else f": DOES NOT FIT one GPU of {o.memory_gib:g} GiB (states must be sharded; NCCL is not modelled)") + "\n")

    rows, share = [], {}
    for x, per in [(x, micro) for x in ops] + [(x, 1) for x in update]:
        t = x.seconds * x.times * per
        share[x.group] = share.get(x.group, 0) + t
        rows.append([x.name, x.group, f"{x.times * per:.0f}", f"{x.seconds * 1e6:.1f}", f"{t * 1e3:.2f}", f"{100 * t / step:.2f}%", x.limit, x.terms])
    table(["op", "group", "launches per update", "us each", "ms per update", "share", "limit", "other terms in us"], rows, md, 2)
    table(["group", "ms per update", "share"], [[g, f"{t * 1e3:.1f}", f"{100 * t / step:.2f}%"] for g, t in sorted(share.items(), key=lambda x: -x[1])]
          + [["sum", f"{step * 1e3:.1f}", "100%"]], md)
    report, causal = c.flops_per_token(T, False), c.flops_per_token(T, True)
    rest = step - share["GEMM"] - share["attention"]
    launches = micro * sum(x.times for x in ops)
    print(f"step of {total} tokens: {step * 1e3:.1f} ms, {total / step:.0f} tokens/s, MFU {100 * report * total / step / PEAK:.1f}% (report form, {report / 1e9:.2f} GFLOP per token), "
          f"{100 * causal * total / step / PEAK:.1f}% (causal, {causal / 1e9:.2f})\n{launches:.0f} launches: each microsecond of gap between two would cost {launches * 1e-6 / step * 100:.2f}%")
    print_launches(ops, c, micro, step)

    # bytes per token and layer
    layer = per_layer(ops, c, N)
    rows = []
    for name, compulsory, sectors in layer:
        q = int(2 * (LLMQ[name][0] * 2048 + LLMQ[name][1] * 11008)) if name in LLMQ and o.preset == "3B" else None
        rows.append([name, f"{compulsory:.0f}", f"{sectors:.0f}", q if q is not None else "-"])
    ours, sectors = sum(x[1] for x in layer), sum(x[2] for x in layer)
    rows.append(["sum", f"{ours:.0f}", f"{sectors:.0f}", LLMQ_SUM if o.preset == "3B" else "-"])
    table(["non-GEMM bytes per token and layer", "counted (each tensor of a launch once)", "sectors, no cache", "LLM.Q"], rows, md)

    # targets
    forward = next(x for x in ops if x.name == "attention forward")
    causal_flops = 4.0 * B * c.H * T * T / 2 * c.D
    small = 16384 / N * seconds(ops) + seconds(update)
    norms = [(x.name, x.sectors / x.compulsory) for x in ops + update if x.group not in ("GEMM", "attention") and x.compulsory]
    worst, others = max(norms, key=lambda x: x[1]), max((x for x in norms if x[0] != "embedding forward"), key=lambda x: x[1])
    shown = [(counts.name(run, start), run) for start, run, _ in kernel_rows(counts)]
    bank = max(((n, max(counts.total(run, n)[x] for x in ("bank_loads", "bank_stores"))) for n, run in shown), key=lambda x: x[1])
    rows = [["non-GEMM, non-attention time", "<= 12% of the step", f"{100 * rest / step:.2f}%", verdict(rest <= 0.12 * step)],
            ["the same, with 16384 tokens per update", "(shown)", f"{100 * (16384 / N * (seconds([x for x in ops if x.group not in ('GEMM', 'attention')])) + seconds(update)) / small:.2f}%, "
             f"AdamW {100 * update[2].seconds / small:.2f}%", "-"],
            ["AdamW with this batch", "(shown)", f"{update[2].seconds * 1e3:.2f} ms, {100 * update[2].seconds / step:.2f}%", "-"],
            ["sectors / compulsory of the memory-bound kernels", "<= 1.1", f"at most {worst[1]:.3f} ({worst[0]})" + (f", else {others[1]:.3f} ({others[0]})" if worst != others else ""), verdict(worst[1] <= 1.1)],
            ["bank-conflict factor", "<= 1.1", f"at most {bank[1]:.2f} ({bank[0]})", verdict(bank[1] <= 1.1)]]
    if o.preset == "3B":
        rows += [["non-GEMM bytes per token and layer", f"<= {TARGET_BYTES}", f"{ours:.0f}", verdict(ours <= TARGET_BYTES)],
                 ["against LLM.Q's default, which saves 91,720 B per token and layer", f"< {LLMQ_SUM}", f"{ours:.0f}", verdict(ours < LLMQ_SUM)],
                 ["against LLM.Q with our saved set (norm + swiglu)", f"< {LLMQ_SAME}", f"{ours:.0f}", verdict(ours < LLMQ_SAME)]]
    wgmma = o.attention == "wgmma" or (o.attention == "auto" and HOPPER)
    if wgmma:
        rows += [["attention forward, with wgmma", "(shown)", f"{causal_flops / forward.seconds / 1e12:.0f} TFLOP/s, the factor in it", "-"]]
        table(["target", "wanted", "modelled", ""], rows, md)
    else: print_mma_attention(counts.attention("attention_forward", c, B, T), causal_flops, c.D == 128 and T == 4096, rows, md)
    print_choices(c, T, B, o, chunk, state_bytes, memory, ours, ops, update, micro, step, counts, md)
    return 0


def print_mma_attention(q, causal_flops, as_published, rows, md):
    """The table of targets (rows) with that of attention with mma.sync, and what its factors come from."""
    fa_speed, factor, fa_terms = fa2()
    raw = causal_flops / attention_sum(q) / 1e12
    rows += [["attention forward, tensor + issue + SFU", ">= 300 TFLOP/s" if as_published else "(shown)", f"{raw:.0f} TFLOP/s; with the factor {raw / factor:.0f}; executed "
              f"{q['mma_flops'] / causal_flops:.3f} of the causal FLOPs", verdict(raw >= 300) if as_published else "-"]]
    table(["target", "wanted", "modelled", ""], rows, md)
    print("Calibration: the same sum for FlashAttention-2 forward (hd 128, causal, T 4096) is " + " + ".join(f"{t} {us:.1f}" for t, us in fa_terms.items())
          + f" us = {fa_speed / 1e12:.0f} TFLOP/s; published {FA2['published'] / 1e12:.0f}; factor {factor:.3f} on the sum of the forward kernel. Backward (full square, T 2048 counted, published for T 4096): modelled "
          f"{fa2_backward()[0] / 1e12:.0f}, published {FA2_BACKWARD['published'] / 1e12:.0f}, factor {fa2_backward()[1]:.3f} on the sums of dk dv and dq.")
    terms = {t: q[t] for t in ("tensor_us", "issue_us", "sfu_us", "shared_us", "int_us")}
    print("Attention forward, one launch: " + ", ".join(f"{t[:-3]} {v:.1f} us" for t, v in terms.items())
          + f"; largest single term alone: {causal_flops / max(terms.values()) / 1e6:.0f} TFLOP/s.\n")


def print_choices(c, T, B, o, chunk, state_bytes, memory, ours, ops, update, micro, step, counts, md):
    """What other choices would give: bytes, memory, time."""
    N = B * T
    free = memory - sum(arenas(c, B, T, o.recompute, chunk, state_bytes))
    C, F, HD = 2 * c.C, 2 * c.F, 2 * c.HD       # bytes
    kv, layer = 2 * c.K * c.D, {x[0]: x[1] for x in per_layer(ops, c, N)}
    ideal_backward = 4 * HD + 4 * kv            # q, o, do in, dq out; k, v in, dk, dv out
    choices = [("h saved by forward (SwiGLU backward does not write it)", F, F), ("both norm outputs saved", 2 * C, 2 * C), ("RoPE inside the attention kernels", layer["RoPE forward + backward"], 0),
               ("attention backward reads each tensor once", layer["attention backward"] - ideal_backward, 0)]
    rows, left, room = [], ours, 0
    for name, less, saved in choices:
        left -= less
        room += saved * N * c.L
        rows.append([name, f"-{less:.0f}", f"{left:.0f}", f"-{less * N * c.L / DRAM * micro / step * 100:.2f}%",
                     f"+{saved * N * c.L / MIB:.0f} MiB" + (" (fits)" if room < free else f" (does not fit with B {B})") if saved else "-"])
    table(["to move fewer bytes (one after the other)", "bytes per token and layer", "left", "time of the step", "memory"], rows, md)
    print_norms(ops, c, N, micro, step)
    rows = []
    for recompute in ("none", "mlp", "block"):
        for rows_of_logits in (128, DEFAULT_CHUNK, 4096):
            b = largest_batch(c, T, recompute, rows_of_logits, o.total_batch_tokens, memory, state_bytes)
            if not b: continue
            ops2, up2 = step_ops(counts, c, b, T, recompute, rows_of_logits, o.optimizer_dtype, o.mlp, o.attention)
            m = o.total_batch_tokens / (b * T)
            t = m * sum(x.seconds * x.times for x in ops2) + sum(x.seconds * x.times for x in up2)
            rows.append([recompute, rows_of_logits, b, f"{sum(arenas(c, b, T, recompute, rows_of_logits, state_bytes)) / MIB:.0f}", f"{o.total_batch_tokens / t:.0f}",
                         f"{100 * c.flops_per_token(T, False) * o.total_batch_tokens / t / PEAK:.1f}%", f"{100 * c.flops_per_token(T, True) * o.total_batch_tokens / t / PEAK:.1f}%"])
    if rows: table(["recompute", "logits chunk", "largest B", "MiB", "tokens/s", "MFU (report)", "MFU (causal)"], rows, md)


if __name__ == "__main__":
    sys.exit(main())
