"""Write the oracle that test_litespark.c compares with: three small Llama-family models, their loss,
gradients and ten AdamW steps, computed in fp64 by the plain PyTorch implementation below.

    python3 dev/fixture.py                # write dev/fixture/{llama,qwen2,qwen3}
    python3 dev/fixture.py --check        # recompute from the stored weights, compare with the stored results
    python3 dev/fixture.py --check-hf     # the same, and against Hugging Face's own model classes
    python3 dev/fixture.py --bf16         # write dev/fixture/*/bf16.json alone, the rest stays

Needs torch and safetensors; --check-hf and --bf16 also transformers. Each folder holds
    config.json           Hugging Face format (llama, qwen2: keys of transformers 4; qwen3: of transformers 5)
    model.safetensors     fp32 weights, Hugging Face names
    tokens.bin            the batch as a token shard: B windows of T tokens, in the order of `inputs`
    expected.json         the hyper-parameters, and how far a plain fp32 computation is from fp64
    expected.safetensors  results, rounded from fp64 to fp32:
        inputs, targets   int32 (B,T)          loss [1]    mean cross-entropy over all B*T targets
        logits            (B,V) at the last position of each row
        grad.NAME         gradient of `loss`, before clipping; tied models have no lm_head.weight
        losses [11]       before each of 10 AdamW steps on this batch, and after the last
        grad_norms [10]   global L2 norm before clipping
        after10.NAME      weights after the 10 steps
        masked.*          (llama only) targets with some -100, and loss, grad.NAME over the remaining ones
    bf16.json             how far PyTorch's bf16 gradients are from fp64 (see bf16_errors), with the versions

The sizes are odd on purpose: vocabularies that are no multiple of 128, T no multiple of 8, B odd, norm
weights that are not 1, biases that are not 0, and a RoPE whose llama3 scaling changes frequencies inside T.
"""
import argparse, json, math, os, struct, sys, zlib
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixture")
B, T, STEPS, IGNORE = 3, 19, 10, -100
ADAMW = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)
# Seeds for which no gradient element stays so close to zero that AdamW's division would blow up fp32 rounding:
# three fp32 computations, two from perturbed weights, end within 3e-7 of fp64 (`fp32_rel_l2` in expected.json).
SEEDS = dict(llama=1023, qwen2=1034, qwen3=1022)
COMMON = dict(num_hidden_layers=2, hidden_act="silu", max_position_embeddings=128, initializer_range=0.02,
              bos_token_id=0, eos_token_id=1)
CONFIGS = {
    "llama": dict(COMMON, architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=53, hidden_size=32,
                  intermediate_size=16, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                  tie_word_embeddings=False, attention_bias=False, mlp_bias=False, torch_dtype="float32",
                  # theta and original_max_position put one frequency in each branch of the llama3 rule
                  rope_theta=100.0, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                      high_freq_factor=4.0, original_max_position_embeddings=32)),
    "qwen2": dict(COMMON, architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=59, hidden_size=32,
                  intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
                  tie_word_embeddings=True, torch_dtype="float32", use_sliding_window=False, sliding_window=None,
                  # a large theta leaves parts of the k bias almost without gradient: softmax ignores a common shift
                  rope_theta=100.0, rope_scaling=None),
    "qwen3": dict(COMMON, architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=57, hidden_size=24,
                  intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
                  tie_word_embeddings=True, attention_bias=False, dtype="float32",
                  rope_parameters=dict(rope_type="default", rope_theta=1000.0),
                  use_sliding_window=False, sliding_window=None),
}


# ---- the model ------------------------------------------------------------------------------------------------
def head_dim(c):
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def shapes(c):
    """Hugging Face name -> shape of every parameter."""
    C, FF, D = c["hidden_size"], c["intermediate_size"], head_dim(c)
    H, K = c["num_attention_heads"], c["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (c["vocab_size"], C)}
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}."
        out[p + "input_layernorm.weight"] = (C,)
        for name, heads in (("q", H), ("k", K), ("v", K)):
            out[p + f"self_attn.{name}_proj.weight"] = (heads * D, C)
            if c["model_type"] == "qwen2":
                out[p + f"self_attn.{name}_proj.bias"] = (heads * D,)
        if c["model_type"] == "qwen3":
            out[p + "self_attn.q_norm.weight"] = out[p + "self_attn.k_norm.weight"] = (D,)
        out[p + "self_attn.o_proj.weight"] = (C, H * D)
        out[p + "post_attention_layernorm.weight"] = (C,)
        out[p + "mlp.gate_proj.weight"] = out[p + "mlp.up_proj.weight"] = (FF, C)
        out[p + "mlp.down_proj.weight"] = (C, FF)
    out["model.norm.weight"] = (C,)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], C)
    return out


def rope_tables(c, n, dtype):
    """cos, sin of shape (n, head_dim/2)."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or c["rope_theta"]
    freq = 1.0 / theta ** (torch.arange(0, head_dim(c), 2, dtype=torch.float64) / head_dim(c))
    if rope.get("rope_type") == "llama3":  # long wavelengths are divided by `factor`, short ones kept, a ramp between
        ctx, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
        turns = ctx * freq / (2 * math.pi)  # rotations within the original context
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / rope["factor"])
    angle = torch.arange(n, dtype=torch.float64)[:, None] * freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rmsnorm(x, w, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotate(x, cos, sin):
    """x (B,T,heads,D): the pair (i, i + D/2) turns by the angle of position t, as in Hugging Face's rotate_half."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def forward(c, w, ids):
    """Logits (B,T,V) of ids (B,T)."""
    n_batch, n_time = ids.shape
    H, K, D, eps = c["num_attention_heads"], c["num_key_value_heads"], head_dim(c), c["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    cos, sin = rope_tables(c, n_time, x.dtype)
    future = torch.ones(n_time, n_time, dtype=torch.bool).triu(1)
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}."
        h = rmsnorm(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = (F.linear(h, w[p + f"self_attn.{n}_proj.weight"], w.get(p + f"self_attn.{n}_proj.bias"))
                   .view(n_batch, n_time, heads, D) for n, heads in (("q", H), ("k", K), ("v", K)))
        if c["model_type"] == "qwen3":
            q = rmsnorm(q, w[p + "self_attn.q_norm.weight"], eps)
            k = rmsnorm(k, w[p + "self_attn.k_norm.weight"], eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(H // K, dim=2) for t in (k, v))  # H/K query heads share one k/v head
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        att = scores.masked_fill(future, -math.inf).softmax(-1)
        o = torch.einsum("bhts,bshd->bthd", att, v).reshape(n_batch, n_time, H * D)
        x = x + F.linear(o, w[p + "self_attn.o_proj.weight"])
        h = rmsnorm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = F.linear(h, w[p + "mlp.gate_proj.weight"]), F.linear(h, w[p + "mlp.up_proj.weight"])
        x = x + F.linear(F.silu(gate) * up, w[p + "mlp.down_proj.weight"])
    x = rmsnorm(x, w["model.norm.weight"], eps)
    return F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))


def loss_and_grads(c, w, inputs, targets):
    """Mean loss over targets that are not -100, logits, and the gradients by name; w are leaf tensors."""
    logits = forward(c, w, inputs.long())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), ignore_index=IGNORE)
    return loss.detach(), logits.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values()))))


# ---- the error of bf16 -------------------------------------------------------------------------------------
BF16_BATCHES, BF16_B = 16, 12  # test_bf16_error_is_that_of_pytorch says what scatter so many leave


def bf16_batches(vocab_size):
    """inputs, targets (BF16_B,T) of each batch. The tokens are a random stream that test_litespark.c makes
    again: high bits of Knuth's 64-bit linear congruential generator."""
    state, n = 1, BF16_B * T + 1
    for _ in range(BF16_BATCHES):
        tokens = []
        for _ in range(n):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            tokens.append((state >> 33) % vocab_size)
        yield tuple(torch.tensor(t).view(BF16_B, T) for t in (tokens[:-1], tokens[1:]))


def bf16_errors(c, folder, weights):
    """What bf16.json holds. error.NAME is the geometric mean of |g - r| / |r| over the batches: r is the
    gradient in fp64 from weights rounded to bf16, g that of transformers from the same weights, with the
    model as from_pretrained(dtype=bfloat16) gives it and, as in its own loss, the cross-entropy of
    logits.float(). (Geometric, since here and there a row of tokens has an error many times the usual one.)
    PyTorch leaves the gradient of a bf16 parameter in bf16, 1.6e-3 more beside 1e-2: who compares rounds its
    own.
    loss: in fp64, to prove that batches and weights are the same."""
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rounded = {k: t.bfloat16().double().requires_grad_() for k, t in weights.items()}
    params = dict(model.named_parameters())
    assert params.keys() == rounded.keys()
    assert all(torch.equal(params[k].double(), t) for k, t in rounded.items())
    losses, logs = [], dict.fromkeys(rounded, 0.0)
    for inputs, targets in bf16_batches(c["vocab_size"]):
        loss, _, want = loss_and_grads(c, rounded, inputs, targets)
        model.zero_grad()
        F.cross_entropy(model(inputs).logits.float().flatten(0, 1), targets.flatten()).backward()
        losses.append(float(f"{loss.item():.9g}"))
        for k, p in params.items():
            logs[k] += math.log(rel_l2(p.grad, want[k])) / BF16_BATCHES
    error = {k: float(f"{math.exp(x):.4g}") for k, x in logs.items()}
    return dict(torch=torch.__version__, transformers=transformers.__version__,
                attention=model.config._attn_implementation,
                batches=BF16_BATCHES, batch_size=BF16_B, seq_len=T, loss=losses, error=error)


# ---- the expected results -------------------------------------------------------------------------------------
def train(c, w, inputs, targets):
    """10 AdamW steps, in place on w; returns losses and gradient norms. PyTorch's own AdamW, except that the clip
    factor is exactly min(1, clip/norm): torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6."""
    decay = [t for t in w.values() if t.dim() == 2]
    rest = [t for t in w.values() if t.dim() != 2]  # norms and biases
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=ADAMW["weight_decay"]), dict(params=rest, weight_decay=0.0)],
                            lr=ADAMW["lr"], betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"])
    losses, norms = [], []
    for _ in range(STEPS):
        loss, _, grads = loss_and_grads(c, w, inputs, targets)
        norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
        for name, t in w.items():
            t.grad = grads[name] * min(1.0, ADAMW["grad_clip"] / norm)
        opt.step()
        losses.append(loss.item())
        norms.append(norm)
    losses.append(loss_and_grads(c, w, inputs, targets)[0].item())
    return losses, norms


def compute(c, weights, tokens, dtype):
    """Everything in expected.safetensors, in `dtype`."""
    leaves = lambda: {k: t.to(dtype, copy=True).requires_grad_() for k, t in weights.items()}
    inputs, targets = tokens[:-1].view(B, T), tokens[1:].clone().view(B, T)
    loss, logits, grads = loss_and_grads(c, leaves(), inputs, targets)
    out = dict(inputs=inputs, targets=targets, loss=loss.reshape(1), logits=logits[:, -1])
    out.update({"grad." + k: g for k, g in grads.items()})
    w = leaves()
    losses, norms = train(c, w, inputs, targets)
    out.update(losses=torch.tensor(losses, dtype=dtype), grad_norms=torch.tensor(norms, dtype=dtype))
    out.update({"after10." + k: t.detach() for k, t in w.items()})
    if c["model_type"] == "llama":
        masked = targets.clone()
        masked[0, 0] = masked[1, 7] = masked[1, 8] = IGNORE
        masked[2, T - 4:] = IGNORE
        loss, _, grads = loss_and_grads(c, leaves(), inputs, masked)
        out.update({"masked.targets": masked, "masked.loss": loss.reshape(1)})
        out.update({"masked.grad." + k: g for k, g in grads.items()})
    return out


def rel_l2(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def errors(got, want):
    """Worst relative L2 error by kind: loss, logits, grad, losses, grad_norms, after10, masked."""
    worst = {}
    assert got.keys() == want.keys()
    for k in want:
        kind = k.split(".")[0]
        worst[kind] = max(worst.get(kind, 0.0), rel_l2(got[k], want[k]))
    return worst


def write_shard(path, tokens, vocab_size, eod=-1):
    """llm.c's uint16 token shard; words 3 to 5 are the vocabulary size, the CRC-32 of the tokens and eod + 1, the id that
    ends a document, plus one."""
    data = struct.pack(f"<{len(tokens)}H", *tokens)
    with open(path, "wb") as f:
        f.write(struct.pack("<256I", 20240520, 1, len(tokens), vocab_size, zlib.crc32(data), eod + 1, *[0] * 250) + data)


def write(name, seed):
    c, folder = CONFIGS[name], os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    normal = lambda shape, mean, std: mean + std * torch.randn(shape, generator=rng)
    weights = {}
    for k, shape in shapes(c).items():
        mean, std = (1.0, 0.3) if "norm" in k else (0.0, 0.3) if k.endswith("bias") else (0.0, 0.2)
        weights[k] = normal(shape, mean, std)
    tokens = torch.randint(c["vocab_size"], (B * T + 1,), generator=rng, dtype=torch.int32)
    tokens[5], tokens[6] = 0, c["vocab_size"] - 1  # the first and the last row of the vocabulary take part
    want = compute(c, weights, tokens, torch.float64)
    assert want["losses"][-1] < 0.9 * want["losses"][0], "the ten steps should learn something"
    noise = errors(compute(c, weights, tokens, torch.float32), want)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    save_file({k: (t.float() if t.is_floating_point() else t).contiguous() for k, t in want.items()},
              os.path.join(folder, "expected.safetensors"))
    write_shard(os.path.join(folder, "tokens.bin"), tokens.tolist(), c["vocab_size"])
    facts = dict(batch_size=B, seq_len=T, steps=STEPS, schedule="constant", warmup_steps=0, ignore_index=IGNORE, **ADAMW,
                 decay="2-D tensors", clip="g *= min(1, grad_clip / norm)", computed_in="float64",
                 fp32_rel_l2={k: float(f"{v:.1e}") for k, v in noise.items() if v})
    for file, value in (("config.json", c), ("expected.json", facts)):
        with open(os.path.join(folder, file), "w") as f:
            f.write(json.dumps(value, indent=2) + "\n")
    paths = [os.path.join(folder, f) for f in os.listdir(folder)]
    for path in paths:
        os.chmod(path, 0o644)  # safetensors writes 0600
    size = sum(map(os.path.getsize, paths))
    print(f"{name}: {size} bytes, losses {want['losses'][0]:.4f} .. {want['losses'][-1]:.4f}, norms "
          f"{want['grad_norms'][0]:.3f} .. {want['grad_norms'][-1]:.3f}, fp32 rel-L2 {facts['fp32_rel_l2']}")


def check_hf(c, folder, weights, want):
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model = model.double()
    logits = model(want["inputs"].long()).logits
    F.cross_entropy(logits.flatten(0, 1), want["targets"].long().flatten()).backward()
    got = {"logits": logits[:, -1].detach(), **{"grad." + k: p.grad for k, p in model.named_parameters()}}
    return errors(got, {k: want[k] for k in want if k == "logits" or k.startswith("grad.")})


def main():
    ap = argparse.ArgumentParser(description="PyTorch oracle of litespark")
    ap.add_argument("--check", action="store_true", help="recompute from the stored weights and compare")
    ap.add_argument("--check-hf", action="store_true", help="also compare with Hugging Face transformers")
    ap.add_argument("--bf16", action="store_true", help="write bf16.json alone")
    args = ap.parse_args()
    bad = 0
    for name in CONFIGS:
        folder = os.path.join(HERE, name)
        if not (args.check or args.check_hf or args.bf16):
            write(name, SEEDS[name])
            continue
        with open(os.path.join(folder, "config.json")) as f:
            c = json.load(f)
        weights = load_file(os.path.join(folder, "model.safetensors"))
        if args.bf16:
            facts = bf16_errors(c, folder, weights)
            with open(os.path.join(folder, "bf16.json"), "w") as f:
                f.write(json.dumps(facts, indent=1) + "\n")
            error = facts["error"].values()
            print(f"{name}: errors of bf16 {min(error):.2e} .. {max(error):.2e}")
            continue
        stored = load_file(os.path.join(folder, "expected.safetensors"))
        tokens = torch.cat((stored["inputs"].flatten(), stored["targets"].flatten()[-1:]))
        want = compute(c, weights, tokens, torch.float64)
        rows = [("stored results", errors(stored, want), 1e-7)]  # one rounding to fp32
        if args.check_hf:
            rows.append(("transformers", check_hf(c, folder, weights, want), 1e-5))
            with open(os.path.join(folder, "bf16.json")) as f:
                old = json.load(f)["error"]
            # another version or CPU rounds other sums: as other batches, which move an error by 15 %
            # (standard deviation of the 8 elements of q_norm, the smallest tensor); three of these
            new = bf16_errors(c, folder, weights)["error"]
            moved = max(abs(math.log(new[k] / old[k])) for k in old)
            rows.append(("errors of bf16", {"largest change": moved}, 0.45))
        for what, worst, tol in rows:
            ok = all(v <= tol for v in worst.values())
            bad += not ok
            print(f"{name}: {what} {'agree' if ok else 'DIFFER'}:", {k: float(f"{v:.1e}") for k, v in worst.items()})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
