#!/usr/bin/env python3
"""The parts of dev/gpu_quick.sh that need python3, its standard library alone (attention and hf also use torch and transformers where
they can be imported). The script starts `dev/gpu_quick.py PART` under a time limit, with the variables

    OUT  folder of results.jsonl     BIN  folder of what `make gpu-quick-build` built     CUDA_TRAINER  the command to measure
    ENDS  second of the epoch at which the part is killed     WORK  folder for models, data and output, shared by the parts
    TINY=1  small shapes, for an emulated device

Every result is one line of results.jsonl, written at once. `dev/gpu_quick.py summary` turns them into OUT/summary.md.
"""
import array
import csv
import glob
import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import speed_model                                              # noqa: E402  (the modelled times)

OUT, BIN, WORK = os.environ["OUT"], os.environ["BIN"], os.environ.get("WORK", "/tmp")
TRAINER = os.environ["CUDA_TRAINER"].split()
TINY = os.environ.get("TINY") == "1"
ENDS = float(os.environ.get("ENDS", time.time() + 3600))
PART = sys.argv[1] if len(sys.argv) > 1 else ""


# ---- rows, time, programs ---------------------------------------------------------------------------------------------------
def row(**fields):
    text = json.dumps({"part": PART} | {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()})
    with open(f"{OUT}/results.jsonl", "a") as f:
        f.write(text + "\n")
        f.flush()
        os.fsync(f.fileno())
    try: os.write(3, (text + "\n").encode())                    # the screen; standard output is the log
    except OSError: pass


def skip(why):
    print("skipped: " + why, flush=True)
    sys.exit(3)


def left():
    return ENDS - time.time()


def run(command, seconds, **more):
    """(exit status, output), also in the log; 124 after `seconds`"""
    print("run:", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=max(seconds, 1), **more)
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as e:
        status, text = 124, (e.stdout or b"").decode(errors="replace") + f"\nno end after {seconds:.0f} s"
    print(text[-4000:], flush=True)
    return status, text


def complaint(text):
    return (re.findall(r"error: .*|emu: .*", text) or [text.strip()[-300:]])[0]


def tool(name, *places):
    """Path of a program, on PATH or where the CUDA toolkit puts it; None"""
    return shutil.which(name) or next((p for g in places for p in sorted(glob.glob(g), reverse=True) if os.access(p, os.X_OK)), None)


# ---- models and data ----------------------------------------------------------------------------------------------------------
def shape(name, L=0):
    """(V, L, C, H, K, D, F, tied) of a preset's layers, L of them"""
    V, all_layers, C, H, K, D, F, tied = speed_model.PRESETS[name]
    if TINY: V, C, H, K, D, F = 500, 64, 4, 2, 16, 96
    return V, L or all_layers, C, H, K, D, F, tied


def bf16(x):
    return struct.unpack("<I", struct.pack("<f", x))[0] >> 16


def model_folder(name, s, weights=True):
    """config.json, and random weights in model.safetensors: a start from those takes seconds, the trainer's own random numbers minutes."""
    folder, (V, L, C, H, K, D, F, tied) = f"{WORK}/{name}", s
    if os.path.exists(f"{folder}/made"): return folder
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/config.json", "w") as f:
        json.dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "num_hidden_layers": L, "hidden_size": C,
                   "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "intermediate_size": F, "rms_norm_eps": 1e-5,
                   "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": bool(tied), "hidden_act": "silu"}, f)
    if weights:
        tensors = [("model.embed_tokens.weight", [V, C])]
        for i in range(L):
            p = f"model.layers.{i}."
            tensors += [(p + "input_layernorm.weight", [C]), (p + "self_attn.q_proj.weight", [H * D, C]), (p + "self_attn.k_proj.weight", [K * D, C]),
                        (p + "self_attn.v_proj.weight", [K * D, C]), (p + "self_attn.o_proj.weight", [C, H * D]), (p + "post_attention_layernorm.weight", [C]),
                        (p + "mlp.gate_proj.weight", [F, C]), (p + "mlp.up_proj.weight", [F, C]), (p + "mlp.down_proj.weight", [C, F])]
        tensors += [("model.norm.weight", [C])] + ([] if tied else [("lm_head.weight", [V, C])])
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for n, dims in tensors:
            size = 2 * math.prod(dims)
            header[n] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        draw = random.Random(1)
        block = array.array("H", [bf16(draw.gauss(0, 0.02)) for _ in range(65521)]).tobytes() * 64     # a prime: no two rows are alike
        one = struct.pack("<H", bf16(1.0))
        with open(f"{folder}/model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for n, dims in tensors:
                size = 2 * math.prod(dims)
                if len(dims) == 1: f.write(one * dims[0])
                else:
                    for done in range(0, size, len(block)): f.write(memoryview(block)[:min(len(block), size - done)])
    open(f"{folder}/made", "w").close()
    return folder


def token_shard(V, n, document=0):
    """A shard of n tokens below V, small ones often; document: mean length of one, which token 1 ends. data/README.md has the format."""
    path = f"{WORK}/tokens_{V}_{n}_{document}.bin"
    if not os.path.exists(path):
        draw = random.Random(V)
        ids = array.array("I", (min(V - 1, int(V ** draw.random())) for _ in range(n)))
        if document:
            for i in range(0, n): ids[i] = 1 if draw.random() * document < 1 else max(2, ids[i])
        with open(path, "wb") as f:
            f.write(struct.pack("<256i", 20240801, 7, n, V, 0, 2, *[0] * 250) + ids.tobytes())
    return path


QUIET = ["--checkpoint-every", "0", "--val-every", "0", "--sample-every", "0"]


def records(folder):
    """Steps of a run's log, also of one that was killed"""
    try:
        with open(f"{folder}/log.jsonl") as f: lines = f.read().split("\n")[:-1]
    except OSError:
        return []
    return [r for r in map(json.loads, lines) if r["type"] == "step"]


# ---- vocabulary -----------------------------------------------------------------------------------------------------------------
def vocabulary():
    """The largest vocabulary of the presets: a row of logits does not fit into shared memory."""
    s = (151936, 1, 32, 2, 1, 16, 32, 1) if TINY else (151936, 1, 128, 4, 2, 32, 256, 1)
    folder, T = model_folder("vocabulary", s), 8 if TINY else 256
    data, losses = token_shard(s[0], 4 * T + 1), {}
    for precision in ("bf16", "fp32"):
        for who, command in (("twin", [f"{BIN}/train_litespark"]), ("cuda", TRAINER)):
            out = f"{WORK}/out"
            shutil.rmtree(out, ignore_errors=True)
            status, text = run(command + ["--init-from", folder, "--train-data", data, "--seq-len", str(T), "--total-batch-tokens", str(2 * T), "--batch-size", "2",
                                          "--steps", "2", "--lr", "1e-3", "--precision", precision, "--out", out, *QUIET], left())
            losses[who] = [r["loss"] for r in records(out)]
            if status or len(losses[who]) != 2:
                row(says="FAIL", check=f"V 151936 {precision}", error=f"{who}: {complaint(text)}")
                break
        else:
            # a loss's own rounding; the second has seen the gradients through AdamW, which blows up what is near zero
            far = max(abs(a - b) / abs(b) for a, b in zip(losses["cuda"], losses["twin"]))
            row(says="ok" if far <= (1e-3 if precision == "bf16" else 1e-4) else "FAIL", check=f"V 151936 {precision}", losses=losses["cuda"], twin=losses["twin"])


# ---- compute-sanitizer ------------------------------------------------------------------------------------------------------------
def sanitizer():
    program = tool("compute-sanitizer", "/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer")
    if not program: skip("no compute-sanitizer")
    s = (61, 1, 32, 4, 2, 16, 24, 0)                            # the documents case of dev/test_cuda.c
    folder, data = model_folder("documents", s), token_shard(61, 2 * 2 * 150 + 1, document=23)
    tools = ("memcheck", "racecheck")
    for i, name in enumerate(tools):
        began = time.time()
        status, text = run([program, "--tool", name, "--error-exitcode", "9", *TRAINER, "--init-from", folder, "--train-data", data, "--seq-len", "150", "--batch-size", "2",
                            "--total-batch-tokens", "300", "--logits-chunk", "200", "--document-mask", "on", "--precision", "bf16", "--steps", "1", "--out", f"{WORK}/out", *QUIET],
                           (left() - 2) / (len(tools) - i))
        verdict = (re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text) or [""])[-1]
        clean = not status and re.search(r"SUMMARY: 0 (errors|hazards)", verdict)
        row(tool=name, says="ok" if clean else "skipped" if status == 124 or "not supported" in text else "FAIL",
            check=verdict or complaint(text), seconds=round(time.time() - began, 1))


# ---- training -----------------------------------------------------------------------------------------------------------------------
def modelled(s, T, B, chunk, total, mlp):
    """Seconds of an update as dev/speed_model.py has it, and the parts of that"""
    with open(speed_model.COUNTS) as f:
        counts = speed_model.Counts(json.load(f)["runs"])
    speed_model.choose_device("h200", counts.runs)
    ops, update = speed_model.step_ops(counts, speed_model.Config(*s), B, T, "none", chunk, "fp32", mlp)
    return total / (B * T) * sum(x.seconds * x.times for x in ops) + sum(x.seconds * x.times for x in update), ops, update


def measure(name, options, steps, model_seconds=None, **facts):
    """One run of the trainer; medians of its steps after warm-up. Also of what it did before its time was over."""
    out, began = f"{WORK}/out", time.time()
    shutil.rmtree(out, ignore_errors=True)
    status, text = run(TRAINER + ["--precision", "bf16", "--lr", "1e-4", "--steps", str(steps), "--out", out, *QUIET, *options], left() - 2)
    log = records(out)
    after = log[2:] if len(log) > 4 else log[1:]                # the first updates warm up: cuBLASLt's choices, clocks
    result = {"name": name, **facts, "steps": len(after), "seconds": round(time.time() - began, 1)}
    if status: result["says"] = f"cut short after {result['seconds']:.0f} s" if status == 124 else complaint(text)
    if status and not after: return row(**result)
    def median(key): return (lambda x: statistics.median(x) if x else None)([r[key] for r in after if r.get(key) is not None])
    for key in ("tokens_per_sec", "mfu", "mfu_causal", "time_per_iteration", "joules_per_token", "watts"): result[key] = median(key)
    result["tokens"] = int(after[0]["tokens"]) // after[0]["step"]      # of an update
    result["loss"] = after[-1]["loss"]
    if model_seconds: result["modelled_tokens_per_sec"] = result["tokens"] / model_seconds
    result["memory"] = (re.findall(r"^memory \|.*", text, re.M) or [""])[0]
    row(**result)


SECONDS = 0 if TINY else 4.5          # of updates in a row: two windows of the energy counter
TOTAL = 32 if TINY else 65536          # tokens of an update


def layers(name, T, chunk, mlp, L=4, steps=0, label="", seconds=SECONDS):
    s = shape(name, L)
    if TINY: T, chunk = T // 256, chunk // 256
    B = min(TOTAL, 32768) // T
    need = 4 * speed_model.Config(*s).n / 1e9 + 5 + seconds     # weights at half a GB/s, context and cuBLASLt, updates
    if left() < (1 if TINY else need):
        row(name=label or f"{name} L {L}", T=T, chunk=chunk, mlp=mlp, says=f"skipped: {left():.0f} s left in this part")
        return
    t, _, _ = modelled(s, T, B, chunk, TOTAL, mlp)
    if TINY: steps = 3
    if not steps: steps = max(6, min(60, round(seconds / t)))
    folder = model_folder(f"{name}_L{L}", s)
    data = token_shard(s[0], 5 * TOTAL + 1)
    measure(label or f"{name} L {L}", ["--init-from", folder, "--train-data", data, "--seq-len", str(T), "--logits-chunk", str(chunk), "--mlp", mlp,
                                       "--total-batch-tokens", str(TOTAL), *(["--batch-size", str(B)] if TINY else [])], steps, t, T=T, chunk=chunk, mlp=mlp)


def preset(name, total):
    if left() < (1 if TINY else 10): return row(name=name, says=f"skipped: {left():.0f} s left in this part")
    if TINY: return measure(name, ["--config", model_folder(name + "_tiny", shape(name, 1), False) + "/config.json", "--seq-len", "16", "--batch-size", "2", "--total-batch-tokens", "32",
                                   "--train-data", token_shard(500, 161)], 3, T=16, mlp="auto")
    measure(name, ["--preset", name, "--train-data", token_shard(32000, 5 * 65536 + 1), "--total-batch-tokens", str(total)], 20, mlp="auto")


def training():
    lengths = (4096,) if TINY else (4096, 1024)
    for name in ("3B", "llama3.2-1B"):
        for T in lengths:
            for mlp in ("passes", "products"): layers(name, T, 2048, mlp)
    layers("3B", 4096, 2048, "products", 2 if TINY else 28, 8, "3B, whole", seconds=16)
    preset("15M", 524288)
    preset("100M", 131072)
    for name in ("3B", "llama3.2-1B"):                          # the other chunk last: it changes the head alone
        for T in lengths:
            for mlp in ("passes", "products"): layers(name, T, 8192, mlp, seconds=SECONDS / 2)


# ---- time per kernel ----------------------------------------------------------------------------------------------------------------
# a kernel's name begins or contains -> ops of dev/speed_model.py; the first that fits counts, the rest are cuBLASLt's
KERNEL_OPS = [("embedding_forward", ["embedding forward"]), ("embedding_backward", ["embedding backward"]),
              ("rmsnorm_forward", ["RMSNorm forward", "final RMSNorm forward"]), ("rmsnorm_backward", ["RMSNorm backward, norm rebuilt", "final RMSNorm backward"]),
              ("column_sums", ["sums of its partials"]), ("rope_forward", ["RoPE forward"]), ("rope_backward", ["RoPE backward"]),
              ("attention_forward", ["attention forward"]), ("attention_backward_dq", ["attention backward: dq"]),
              ("attention_backward_dkdv", ["attention backward: dk dv"]), ("attention_backward_add", ["attention backward: parts added"]),
              ("gate_up_swiglu", ["gate/up forward with SwiGLU"]),
              ("swiglu_down_backward", ["down backward x with SwiGLU"]), ("swiglu_forward", ["SwiGLU forward"]), ("swiglu_backward", ["SwiGLU backward, h rebuilt"]),
              ("cross_entropy", ["cross-entropy"]), ("adamw_update", ["AdamW"]), ("sum_of_squares", ["global norm"])]


def kernel_of(name):
    for part, _ in KERNEL_OPS:
        if part in name: return part
    own = re.search(r"(\w+)_kernel\d+\b", name)
    return own.group(1) if own else "cuBLASLt"


def ncu_times(path):
    """{kernel: [microseconds of each launch]} of ncu's --csv"""
    times, scale = {}, {"n": 1e-3, "u": 1, "m": 1e3, "s": 1e6}
    with open(path, errors="replace") as f:
        lines = [x for x in f if x.startswith('"')]
    for r in csv.DictReader(lines):
        if not (r.get("Metric Name") or "").startswith("gpu__time_duration"): continue
        us = float(r["Metric Value"].replace(",", "")) * scale[r["Metric Unit"][0]]     # ns or nsecond, us, ms, second
        times.setdefault(kernel_of(r["Kernel Name"]), []).append(us)
    return times


def kernels():
    program = tool("ncu", "/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/nsight-compute*/ncu")
    if not program: skip("no ncu")
    forms = ("passes", "products")
    for i, mlp in enumerate(forms):
        s = shape("3B", 2)
        T, B, chunk = (32, 2, 32) if TINY else (4096, 2, 2048)
        log = f"{WORK}/ncu.csv"
        status, text = run([program, "--clock-control", "none", "--metrics", "gpu__time_duration.sum", "--csv", "--log-file", log, *TRAINER, "--init-from", model_folder("3B_L2", s),
                            "--train-data", token_shard(s[0], 5 * TOTAL + 1), "--precision", "bf16", "--seq-len", str(T), "--batch-size", str(B), "--total-batch-tokens", str(B * T),
                            "--logits-chunk", str(chunk), "--mlp", mlp, "--steps", "1", "--out", f"{WORK}/out", *QUIET], (left() - 2) / (len(forms) - i))
        times = ncu_times(log) if os.path.exists(log) else {}
        if not times:
            with open(log, errors="replace") if os.path.exists(log) else open(os.devnull) as f: text += f.read()
            row(mlp=mlp, says=(re.findall(r"==ERROR== .*", text) or [complaint(text)])[0])
            continue
        model = {}
        for op in [x for part in modelled(s, T, B, chunk, B * T, mlp)[1:] for x in part]:
            where = next((k for k, names in KERNEL_OPS if op.name in names), "cuBLASLt" if op.group == "GEMM" else None)
            if where: model[where] = model.get(where, 0) + op.seconds * op.times * 1e6
        for kernel, us in sorted(times.items(), key=lambda x: -sum(x[1])):
            row(mlp=mlp, kernel=kernel, launches=len(us), us=round(sum(us), 2), median_us=round(statistics.median(us), 2), modelled_us=round(model[kernel], 2) if kernel in model else None)
        if status: row(mlp=mlp, says=f"the run under ncu: exit status {status}")


# ---- attention: ours and PyTorch's ----------------------------------------------------------------------------------------------------
def shipped(op):
    """The numbers of the shipped variants in dev/op.cu: one, or one for each kind of GPU"""
    number, found = None, []
    with open(f"{HERE}/{op}.cu") as f:
        for line in f:
            if m := re.match(r"\s*\{(\d+), ", line): number = m.group(1)
            if re.search(r"\bSHIPPED\}", line): found.append(number)
    return found or sys.exit(f"gpu_quick: dev/{op}.cu names no shipped variant")


def bench(op, seconds):
    """The shipped variants of a bench, row by row as its tables come"""
    command, text, head = [f"{BIN}/{op}", "--time", *shipped(op)], "", None
    if not os.access(command[0], os.X_OK): return row(name=op, says=f"skipped: no {command[0]}")
    with subprocess.Popen(["timeout", "-k", "2", str(max(1, int(seconds))), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as p:
        for line in p.stdout:
            print(line, end="", flush=True)
            text += line
            if m := re.match(op + r"  (.*?) +floor ([\d.]+) us", line): head = m
            elif m := re.search(r"^ *(\d+) .* ([\d.]+) +([\d.]+)\.\.([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +\d+ +\d+ +\d+ .*<- shipped", line):
                row(name=op, kernel=int(m.group(1)), shape=head.group(1), us=float(m.group(2)), p10=float(m.group(3)), p90=float(m.group(4)), tflops=float(m.group(6)), floor_us=float(head.group(2)))
            elif "FAIL" in line: row(name=op, says="FAIL", check=line.strip())
    if p.returncode: row(name=op, says=f"no end after {seconds:.0f} s" if p.returncode == 124 else f"exit status {p.returncode}: {text.strip()[-200:]}")


def torch_device(torch):
    """cuda; the CPU only where this script is tested"""
    return "cuda" if torch.cuda.is_available() else "cpu" if TINY else skip("torch sees no GPU")


def median_us(torch, device, work, samples=20):
    """As dev/bench.cuh measures: warm-up, the L2 cache overwritten before each sample, the median"""
    if device == "cpu":
        began = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - began)
    flush, times = torch.empty(128 << 20, dtype=torch.int8, device=device), []
    for i in range(3 + samples):
        flush.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        work()
        b.record()
        torch.cuda.synchronize()
        if i >= 3: times.append(1e3 * a.elapsed_time(b))
    return statistics.median(times)


def torch_attention(torch, device):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    print("torch", torch.__version__, flush=True)
    shapes = [(8, 2048, 16, 2, 128), (2, 2048, 16, 4, 104), (2, 4096, 16, 2, 128)]      # two of the benches', and that of the part kernels
    for B, T, H, K, D in [(1, 32, 4, 2, 16)] if TINY else shapes:
        def make(heads, grad=True): return torch.randn(B, heads, T, D, dtype=torch.bfloat16, device=device, requires_grad=grad)
        q, k, v, dout = make(H), make(K), make(K), make(H, False)
        flops = 4.0 * B * H * T * (T + 1) / 2 * D
        for label, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)) if device == "cuda" else (("math", SDPBackend.MATH),):
            if left() < 3: return row(name="torch SDPA", says="skipped: no time left")
            facts = {"name": f"torch SDPA {label}", "shape": f"B {B} T {T} H {H} K {K} D {D} bf16"}
            try:
                with sdpa_kernel(backend):
                    def forward(): return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
                    out = forward()
                    us = median_us(torch, device, forward)
                    row(**facts, op="attention_forward", us=round(us, 2), tflops=round(flops / us / 1e6, 2))
                    us = median_us(torch, device, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
                    row(**facts, op="attention_backward", us=round(us, 2), tflops=round(2.5 * flops / us / 1e6, 2))
            except Exception as e:                              # a backend that does not take the shape, or no memory
                row(**facts, says=str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__)
    for name in ("3B", "llama3.2-1B"):                          # the products of a layer, forward
        V, L, C, H, K, D, F, _ = shape(name)
        N = 64 if TINY else 32768
        for what, n_out, n_in in (("qkv", (H + 2 * K) * D, C), ("o", C, H * D), ("gate and up", 2 * F, C), ("down", C, F), ("logits of a chunk", V, C)):
            if left() < 2: return row(name="torch.matmul", says="skipped: no time left")
            rows = min(N, 2048) if what.startswith("logits") else N
            x, w = (torch.randn(a, n_in, dtype=torch.bfloat16, device=device) for a in (rows, n_out))
            us = median_us(torch, device, lambda: torch.matmul(x, w.T))
            row(name="torch.matmul", op=f"{name} {what}", shape=f"{rows} x {n_out} x {n_in} bf16", us=round(us, 2), tflops=round(2.0 * rows * n_out * n_in / us / 1e6, 2))


def attention():
    bench("attention_forward", left() * 0.3)
    try: import torch
    except ImportError: torch = row(name="torch", says="skipped: torch cannot be imported")
    if torch:
        global ENDS
        ends, ENDS = ENDS, time.time() + left() * 0.5           # the rest is for the backward, whose reference is slow
        torch_attention(torch, torch_device(torch))
        ENDS = ends
    bench("attention_backward", left() - 3)


# ---- Hugging Face ------------------------------------------------------------------------------------------------------------------------
def hf():
    try:
        import torch
        import transformers
    except ImportError as e:
        skip(f"{e.name} cannot be imported")
    device = torch_device(torch)
    for name in ("3B", "llama3.2-1B"):
        for compiled in (False, True):
            V, L, C, H, K, D, F, tied = shape(name, 4)
            B, T, micro = (2, 32, 2) if TINY else (4, 4096, 4)  # as many tokens per update as the part training
            facts = {"name": f"{name} L {L}", "T": T, "compiled": compiled, "tokens": B * T * micro}
            if left() < (1 if TINY else 8):
                row(**facts, says=f"skipped: {left():.0f} s left in this part")
                continue
            try:
                model = step = None
                config = transformers.LlamaConfig(vocab_size=V, num_hidden_layers=L, hidden_size=C, num_attention_heads=H, num_key_value_heads=K, head_dim=D, intermediate_size=F,
                                                  tie_word_embeddings=bool(tied), max_position_embeddings=8192, attn_implementation="sdpa", use_cache=False)
                with torch.device(device): model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda")
                forward = torch.compile(model) if compiled else model
                tokens = torch.randint(0, V, (B, T), device=device)

                def step():
                    for _ in range(micro):
                        loss = forward(input_ids=tokens, labels=tokens).loss / micro
                        loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    return micro * loss.detach()

                times = []
                for i in range(3 if TINY else 7):
                    began = time.perf_counter()
                    loss = float(step())                        # waits for the device
                    if device == "cuda": torch.cuda.synchronize()
                    if i >= 2: times.append(time.perf_counter() - began)
                    if len(times) >= 3 and left() < 3: break
                seconds = statistics.median(times)
                c = speed_model.Config(V, L, C, H, K, D, F, tied)
                row(**facts, tokens_per_sec=round(facts["tokens"] / seconds), loss=loss, time_per_iteration=seconds,
                    mfu=c.flops_per_token(T, False) * facts["tokens"] / seconds / speed_model.DEVICES["h200"][0], steps=len(times),
                    says=f"torch {torch.__version__}, transformers {transformers.__version__}, weights and AdamW in bf16")
            except Exception as e:                              # no memory, a compiler that is not there
                row(**facts, says=f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}")
            del model, step


# ---- litespark beside PyTorch ----------------------------------------------------------------------------------------------------------------
def benchmark():
    try: import torch                                           # noqa: F401
    except ImportError as e: skip(f"{e.name} cannot be imported")
    if left() < 100: skip(f"{left():.0f} s left: a case takes minutes")
    status, text = run([sys.executable, f"{HERE}/benchmark.py", "--binary", TRAINER[0], "--minutes", f"{(left() - 10) / 60:.2f}", "--out", f"{OUT}/benchmark"], left())
    for case in json.load(open(f"{OUT}/benchmark.json"))["cases"] if os.path.exists(f"{OUT}/benchmark.json") else []:
        for who, f in case["figures"].items(): row(name=case["name"], who=who, **f)
        for note in case["notes"]: row(name=case["name"], says=note)
    if status: row(name="benchmark", says="FAIL" if "FAIL" in text else f"exit status {status}", check=(re.findall(r"FAIL.*", text) or [complaint(text)])[-1])


# ---- the summary -------------------------------------------------------------------------------------------------------------------------
def show(x, form="{}"):
    return "-" if x is None else form.format(x)


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(" ".join(str(x).replace("|", "/").split()) for x in r) + " |" for r in rows] + [""]


def summary():
    with open(f"{OUT}/results.jsonl") as f:
        rows = [json.loads(x) for x in f if x.strip()]
    ends = [r for r in rows if "end" in r]
    of = {}
    for r in rows:
        if "end" not in r: of.setdefault(r["part"], []).append(r)
    facts = {r["name"]: r["value"] for r in of.get("facts", [])}
    text = [f"# gpu-quick: {facts.get('name', 'no GPU named')}", "", "Measured where a column does not say modelled. `dev/gpu_quick.sh`; all rows are in results.jsonl, what programs said in log.txt.", ""]
    text += ["## Parts", ""] + table(["part", "end", "s"], [[r["part"], r["end"], r["seconds"]] for r in ends])
    if facts: text += ["## Facts", ""] + table(["what", "value"], facts.items())
    checks = [r for part in ("proof", "vocabulary", "sanitizer") for r in of.get(part, [])]
    if checks:
        text += ["## Proof", ""]
        lines = []
        for part, key in (("proof", "mlp"), ("vocabulary", None), ("sanitizer", "tool")):
            for group in dict.fromkeys(r.get(key) for r in of.get(part, [])):
                rs = [r for r in of[part] if r.get(key) == group]
                n = {w: sum(r["says"] == w for r in rs) for w in ("ok", "FAIL", "skipped")}
                complete = part != "proof" or any(r["says"] == "end" for r in rs)
                lines.append([part + {"mlp": f", --mlp {group}", "tool": f", {group}"}.get(key, ""), n["ok"], n["FAIL"], n["skipped"], "yes" if complete else "no: cut short"])
        text += table(["checks", "ok", "FAIL", "skipped", "complete"], lines)
        text += [f"    {r['part']}: {r['says']}: {r['check']} {r.get('error', '')}".rstrip() for r in checks if r["says"] == "FAIL" or (r["part"] == "sanitizer")] + [""]
    if "training" in of:
        percent = lambda x: show(None if x is None else 100 * x, "{:.1f}%")
        text += ["## Training", "", "bf16, medians of the updates after warm-up; tokens/s modelled: dev/speed_model.py for an H200.", ""]
        text += table(["model", "T", "logits chunk", "MLP", "tokens/s", "modelled", "MFU (report)", "MFU (causal)", "ms per update", "tokens per update", "J/token", "W", "updates", "note"],
                      [[r["name"], show(r.get("T")), show(r.get("chunk")), show(r.get("mlp")), show(r.get("tokens_per_sec"), "{:.0f}"), show(r.get("modelled_tokens_per_sec"), "{:.0f}"),
                        percent(r.get("mfu")), percent(r.get("mfu_causal")), show(None if r.get("time_per_iteration") is None else 1e3 * r["time_per_iteration"], "{:.1f}"), show(r.get("tokens")),
                        show(r.get("joules_per_token"), "{:.3g}"), show(r.get("watts"), "{:.0f}"), show(r.get("steps")), r.get("says", "")] for r in of["training"]])
    if "kernels" in of:
        text += ["## Kernels", "", "One update of two layers of the 3B under ncu (caches cleared before each launch, clocks as they are); modelled: dev/speed_model.py for an H200.", ""]
        text += table(["MLP", "kernel", "launches", "us in all", "modelled us", "measured / modelled", "median us"],
                      [[r["mlp"], r.get("kernel", r.get("says")), show(r.get("launches")), show(r.get("us")), show(r.get("modelled_us")),
                        show(r["us"] / r["modelled_us"] if r.get("modelled_us") else None, "{:.2f}"), show(r.get("median_us"))] for r in of["kernels"]])
    if "attention" in of:
        text += ["## Attention and products", ""] + table(["what", "op", "shape", "median us", "TFLOP/s", "note"],
            [[("litespark" if r["name"].startswith("attention") else r["name"]), f"{r['name']}, kernel {r['kernel']}" if "kernel" in r else r.get("op", r["name"]), r.get("shape", "-"), show(r.get("us")), show(r.get("tflops")),
              r.get("says", "") + " " + r.get("check", "")] for r in of["attention"]])
    if "hf" in of:
        text += ["## Hugging Face Llama, SDPA", ""] + table(["model", "T", "compiled", "tokens/s", "MFU (report)", "tokens per update", "note"],
            [[r["name"], r["T"], "yes" if r["compiled"] else "no", show(r.get("tokens_per_sec")), show(None if r.get("mfu") is None else 100 * r["mfu"], "{:.1f}%"), show(r.get("tokens")),
              r.get("says", "")] for r in of["hf"]])
    if "benchmark" in of:
        text += ["## litespark beside PyTorch", "", "Losses coincide; more in benchmark.md.", ""] + table(["case", "who", "tokens/s", "MFU (report)", "peak MiB", "J/token", "litespark is", "note"],
            [[r["name"], r.get("who", "-"), show(r.get("tokens_per_sec"), "{:.0f}"), show((r.get("mfu") or {}).get("report"), "{:.3f}"), show(r.get("memory"), "{:.0f}"),
              show(r.get("joules"), "{:.3g}"), show(r.get("speed_up"), "{:.2f}x"), f"{r.get('says', '')} {r.get('check', '')}"] for r in of["benchmark"]])
    with open(f"{OUT}/summary.part", "w") as f: f.write("\n".join(text) + "\n")
    os.replace(f"{OUT}/summary.part", f"{OUT}/summary.md")


if __name__ == "__main__":
    parts = {f.__name__: f for f in (vocabulary, sanitizer, training, kernels, attention, hf, benchmark, summary)}
    if PART not in parts: sys.exit(__doc__)
    parts[PART]()
