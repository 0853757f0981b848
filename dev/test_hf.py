"""litespark and Hugging Face must agree, in both directions, with the newest transformers and safetensors.

    pip install torch transformers safetensors numpy
    python3 dev/test_hf.py --binary ./train_litespark            # last line: N passed, N failed
    python3 dev/test_hf.py --binary ./train_litespark --work DIR --only qwen3    # keeps the files in DIR

For small random Llama (rope type llama3), Mistral, Qwen2 and Qwen3 models:
  1. save_pretrained -> litespark: evaluation loss 1e-5, gradient of every tensor 1e-5 (relative L2), from fp32, bf16 and
     sharded files, and from config.json as transformers 4 and as transformers 5 write it; packed documents under
     --document-mask on have the loss of transformers' packed rows;
  2. litespark -> from_pretrained: a pass through litespark keeps every bit; checkpoints of runs from --config and
     --init-from load with no missing or unexpected key and have the loss that litespark reports for them; greedy text;
  3. every file litespark wrote opens in the safetensors library, with the expected dtypes and shapes;
  4. a key that config.json lacks means what AutoConfig says, each in turn; sliding windows, odd rope keys and odd
     folders give transformers' loss, or are refused;
  5. what inference needs is the same before and after: eos list, pad id, generation_config, tokenizer, chat template;
  6. --eval-tasks has the acc and acc_norm of data/choices.py's tasks that the model has in transformers, and in lm_eval
     (pip install lm_eval==0.4.13; else skipped), to the last digit; bits per byte are of the bytes of the text;
  7. a model that two ranks save in two files loads bit-equal, its index is what transformers writes, and --init-from
     and --resume refuse it once a byte of either file or of the index differs (mpirun; else skipped).
Hugging Face's side runs in fp64 (except where its own code casts to fp32), so the tolerance is litespark's alone.
"""
import argparse, bz2, contextlib, glob, importlib.util, io, json, math, os, random, re, shutil, struct, subprocess, sys, tempfile

try:
    import torch, transformers
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                              PreTrainedTokenizerFast)
except ImportError as e:
    print(f"skipped: {e}; pip install torch transformers safetensors numpy")
    sys.exit(0)
from fixture import rel_l2, write_shard

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
import tokens  # noqa: E402

B, T = 3, 29                      # T is no multiple of a tile
VAL_TOKENS = 7 * T + 1 + 5        # 7 windows: the last batch of 3 is not full, 5 tokens are dropped
TRAIN_TOKENS = 2 * B * T + 1      # exactly one update of two micro-steps, so the order of windows does not matter
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
DEFAULT = dict(rope_type="default", rope_theta=3000.0)
SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=120, max_position_embeddings=128,
             bos_token_id=0, eos_token_id=1, pad_token_id=None)
FAMILIES = {
    "llama": (LLAMA3, dict(SMALL, vocab_size=257, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                           bos_token_id=256, eos_token_id=256, tie_word_embeddings=False)),
    "mistral": (DEFAULT, dict(SMALL, vocab_size=211, num_attention_heads=4, num_key_value_heads=1, head_dim=24,
                              sliding_window=64, tie_word_embeddings=False)),
    "qwen2": (DEFAULT, dict(SMALL, vocab_size=130, num_attention_heads=4, num_key_value_heads=2,
                            tie_word_embeddings=True)),
    "qwen3": (DEFAULT, dict(SMALL, vocab_size=199, num_attention_heads=3, num_key_value_heads=3, head_dim=32,
                            tie_word_embeddings=True)),
}
DTYPES = dict(float32="F32", bfloat16="BF16")
passed = failed = 0


def check(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok or detail:
        print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' if detail else ''}{detail}", flush=True)
    return ok


# ---- the Hugging Face side ------------------------------------------------------------------------------------
def make_model(family):
    """A random model with nothing trivial in it: norms are not 1, biases not 0."""
    rope, fields = FAMILIES[family]
    if int(transformers.__version__.split(".")[0]) >= 5:
        fields = dict(fields, rope_parameters=rope)
    else:
        fields = dict(fields, rope_theta=rope["rope_theta"],
                      rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if rope is LLAMA3 else None)
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.3 * noise if "norm" in name else (0.3 if p.dim() == 1 else 0.12) * noise)
        if family == "llama":  # byte tokenizer: let only space and letters win, so that greedy text is printable
            words = torch.zeros(257, 1)
            words[32] = words[97:123] = 1
            model.lm_head.weight.mul_(words)
    return model


def load_hf(name, folder):
    """The model in fp64; checks that no key is missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                       output_loading_info=True)
    bad = {k: v for k, v in info.items() if v}
    check(f"{name} loads in transformers", not bad, f"{bad}" if bad else "")
    return model.double()


def windows(tokens):
    n = (len(tokens) - 1) // T
    rows = torch.tensor([tokens[i * T:i * T + T + 1] for i in range(n)])
    return rows[:, :-1], rows[:, 1:]


def mean_nll(model, tokens):
    x, y = windows(tokens)
    return torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


# ---- the litespark side ---------------------------------------------------------------------------------------
class Litespark:
    def __init__(self, binary, work):
        self.binary, self.work, self.count = os.path.abspath(binary), work, 0

    def run(self, name, *options):
        """(fresh OUT folder, stdout as bytes), or None after a failed check."""
        self.count += 1
        out = os.path.join(self.work, f"out{self.count:03d}")
        cmd = [self.binary, "--sample-every", "0", "--out", out, *map(str, options)]
        for option, value in ("--batch-size", B), ("--seq-len", T), ("--total-batch-tokens", 2 * B * T):
            if option not in options:
                cmd += [option, str(value)]
        done = subprocess.run(cmd, capture_output=True)
        if done.returncode:
            check(f"{name} runs", False, f"exit {done.returncode}: {done.stderr.decode(errors='replace').strip()[-300:]}\n"
                  f"     {' '.join(cmd)}")
            return None
        return out, done.stdout

    def start(self, folder, *options):
        """A run that should be refused."""
        return subprocess.run([self.binary, "--init-from", folder, "--seq-len", str(T), "--out", self.work + "/no", *options],
                              capture_output=True)

    def evaluate(self, name, folder, val, *options):
        """Loss over all windows of `val`, from the log; NaN after a failed check."""
        done = self.run(name, "--init-from", folder, "--eval-only", "--val-data", val, "--val-batches", 0, *options)
        if not done:
            return float("nan")
        with open(os.path.join(done[0], "eval.jsonl")) as f:
            losses = [r["val_loss"] for r in map(json.loads, f) if r["type"] == "val"]
        printed = done[1].decode(errors="replace").partition("val loss ")[2].split()
        if check(f"{name} logs one val loss", len(losses) == 1, "" if len(losses) == 1 else f"{losses}"):
            check(f"{name} prints it", printed and abs(float(printed[0]) - losses[0]) < 1e-3, f"{printed[:1]}" if not printed else "")
        return losses[-1] if losses else float("nan")


def check_documents(name, ls, folder, model, tokens):
    """--document-mask on: the loss of transformers' packed rows, whose position_ids begin again with each document."""
    path, eod = os.path.join(ls.work, "documents.bin"), 1
    tokens = [eod if i % 7 == 5 or i % 11 == 3 else t for i, t in enumerate(tokens)]
    write_shard(path, tokens, model.config.vocab_size, eod)
    x, y = windows(tokens)
    starts = torch.zeros_like(x)        # the position in the row at which the document of a token begins
    for row, of_row in zip(x, starts):
        for t in range(1, T):
            of_row[t] = t if row[t - 1] == eod else of_row[t - 1]
    y = y.masked_fill(x == eod, -100)   # no document predicts the first token of the next one
    def loss(**options):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(x, **options).logits.flatten(0, 1), y.flatten()).item()
    # transformers 5.24 keeps them apart only without a cache and without an attention_mask, be it all ones
    # (findings/transformers_use_cache_decides_whether_documents_meet.sh)
    want = loss(position_ids=torch.arange(T) - starts, use_cache=False)
    check(f"{name} documents matter", abs(want - loss()) > 1e-3)
    check_loss(f"{name} packed documents", ls.evaluate(name, folder, path, "--document-mask", "on"), want)


def last_checkpoint(out):
    steps = sorted(glob.glob(os.path.join(out, "step_*")))
    return steps[-1] if steps else None


def check_loss(name, got, want, tol=1e-5):
    check(f"{name} loss", abs(got - want) <= tol, f"{got:.7f}, Hugging Face {want:.7f}, diff {abs(got - want):.1e}")


def check_grads(name, ls, folder, train, model, tokens):
    path = os.path.join(ls.work, "grads.safetensors")
    if not ls.run(name, "--init-from", folder, "--train-data", train, "--steps", 1, "--dump-grads", path):
        return
    got = load_file(path)
    model.zero_grad()
    loss = mean_nll(model, tokens)
    loss.backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    same = {k: tuple(t.shape) for k, t in got.items() if k != "loss"} == {k: tuple(t.shape) for k, t in want.items()}
    if check(f"{name} gradient names and shapes", same, "" if same else f"{sorted(set(got) ^ set(want))}"):
        worst = max(want, key=lambda k: rel_l2(got[k], want[k]))
        err = rel_l2(got[worst], want[worst])
        check(f"{name} gradients", err <= 1e-5, f"{len(want)} tensors, worst {err:.1e} ({worst})")
    check_loss(f"{name} training", got["loss"].item(), loss.item())


def check_checkpoint(name, folder, model, dtype="float32"):
    """Files, dtypes, shapes and config of a litespark checkpoint; `model` is any model of the same configuration."""
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}  # a tied head is listed once
    seen, opened, optimizer = {}, 0, 0
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_slice(k) for k in f.keys()}
            finite = all(f.get_tensor(k).float().isfinite().all() for k in tensors)
            is_model = os.path.basename(path).startswith("model")
            if is_model:
                check(f"{name} metadata format", (f.metadata() or {}).get("format") == "pt")
        opened += 1
        check(f"{name} {os.path.basename(path)} is finite", finite)
        want = DTYPES[dtype] if is_model else "F32"
        kinds = {s.get_dtype() for s in tensors.values()}
        check(f"{name} {os.path.basename(path)} dtype", kinds == {want}, "" if kinds == {want} else f"{kinds}, not {want}")
        if is_model:
            seen.update({k: tuple(s.get_shape()) for k, s in tensors.items()})
        else:
            optimizer += sum(torch.Size(s.get_shape()).numel() for s in tensors.values())
    check(f"{name} model and optimizer files", opened >= 2, f"{opened}" if opened < 2 else "")
    check(f"{name} tensor shapes", seen == shapes, "" if seen == shapes else f"{set(seen.items()) ^ set(shapes.items())}")
    params = sum(torch.Size(s).numel() for s in shapes.values())
    check(f"{name} optimizer holds master, m and v", optimizer >= 3 * params, "" if optimizer >= 3 * params else
          f"{optimizer} values for {params} parameters")
    got, want = AutoConfig.from_pretrained(folder).to_dict(), model.config.to_dict()
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
            "rope_parameters", "rope_theta", "rope_scaling", "sliding_window", "bos_token_id", "eos_token_id")
    diff = {k: (got.get(k), want[k]) for k in keys if k in want and got.get(k) != want[k]}
    check(f"{name} AutoConfig", not diff, f"(read, expected) {diff}" if diff else "")
    with open(os.path.join(folder, "config.json")) as f:
        raw = json.load(f)
    rope = want.get("rope_parameters") or {}
    check(f"{name} config.json for transformers 4", raw.get("rope_theta") == rope.get("rope_theta", raw.get("rope_theta"))
          and bool(raw.get("rope_scaling")) == (rope.get("rope_type", "default") != "default")
          and raw.get("torch_dtype") == dtype and raw.get("architectures") == [type(model).__name__])
    GenerationConfig.from_pretrained(folder)


def as_transformers4(folder, target):
    """A copy whose config.json has the keys of transformers 4."""
    shutil.copytree(folder, target)
    path = os.path.join(target, "config.json")
    with open(path) as f:
        c = json.load(f)
    rope = c.pop("rope_parameters", None)
    if rope:
        c["rope_theta"] = rope.pop("rope_theta")
        c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if "dtype" in c:
        c["torch_dtype"] = c.pop("dtype")
    with open(path, "w") as f:
        json.dump(c, f)


def check_generation(ls, folder, model):
    """Greedy text of a byte-level model; a leading bos token is litespark's choice."""
    path, prompt, n = os.path.join(ls.work, "tokenizer.bin"), "once upon", 16
    pieces = [b"<0x%02X>" % i for i in range(256)] + [b"<|endoftext|>"]
    with open(path, "wb") as f:
        f.write(struct.pack("<8i", 20251002, 1, 1, 257, 256, 256, 0, 0))
        f.write(b"".join(struct.pack("<fi", 0.0, len(p)) + p for p in pieces))
    done = ls.run("llama greedy", "--init-from", folder, "--generate", "--prompt", prompt, "--temperature", 0,
                  "--sample-tokens", n, "--tokenizer", path)
    if not done:
        return
    texts = []
    for start in ([256], []):
        ids = start + list(prompt.encode())
        for _ in range(n):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        texts.append(bytes(ids[len(start) + len(prompt):]).decode())
    want = [(prompt + text[:n // 2]).encode() for text in texts]
    ok = any(w in done[1] for w in want)
    check("llama greedy text", ok, f"{want} " + ("" if ok else f"not in {done[1][-200:]}"))


# ---- the tests of one family ----------------------------------------------------------------------------------
def test_family(family, ls):
    work = os.path.join(ls.work, family)
    os.makedirs(work)
    model = make_model(family)
    tokens = {k: torch.randint(model.config.vocab_size, (n,)).tolist()
              for k, n in (("val", VAL_TOKENS), ("train", TRAIN_TOKENS))}
    files = {k: os.path.join(work, k + ".bin") for k in tokens}
    for k in tokens:
        write_shard(files[k], tokens[k], model.config.vocab_size)
    data = ("--train-data", files["train"])

    sources = {k: os.path.join(work, k) for k in ("fp32", "sharded", "bf16", "transformers4")}
    model.save_pretrained(sources["fp32"])
    model.save_pretrained(sources["sharded"], max_shard_size="60KB")
    model.bfloat16().save_pretrained(sources["bf16"])
    as_transformers4(sources["fp32"], sources["transformers4"])
    assert len(glob.glob(os.path.join(sources["sharded"], "*.safetensors"))) > 1
    for kind, folder in sources.items():
        name = f"{family} {kind}"
        model = load_hf(name, folder)
        with torch.no_grad():
            want = mean_nll(model, tokens["val"]).item()
        check_loss(name, ls.evaluate(name, folder, files["val"]), want)
        if kind == "fp32":
            check_documents(name, ls, folder, model, tokens["val"])
        if kind in ("fp32", "bf16"):
            check_grads(name, ls, folder, files["train"], model, tokens["train"])

        name += " passed through"
        done = ls.run(name, "--init-from", folder, *data, "--steps", 0)
        saved = done and last_checkpoint(done[0])
        if not check(f"{name} writes a checkpoint", saved):
            continue
        check_checkpoint(name, saved, model)
        again = load_hf(name, saved)
        same = [k for k, p in model.named_parameters() if torch.equal(p, again.get_parameter(k))]
        check(f"{name} weights bit-equal", len(same) == len(list(model.named_parameters())), f"{len(same)} tensors")
        x, _ = windows(tokens["val"])
        with torch.no_grad():
            diff = (model(x).logits - again(x).logits).abs().max().item()
        check(f"{name} logits", diff <= 1e-4, "" if diff <= 1e-4 else f"differ by {diff:.1e}")
        check_loss(name, ls.evaluate(name, saved, files["val"]), want)
        if kind == "fp32" and family == "llama":
            check_generation(ls, saved, model)

    config = os.path.join(sources["fp32"], "config.json")
    runs = {"random init": ("--config", config, "--steps", 0), "trained from --config": ("--config", config, "--steps", 2),
            "trained from --init-from": ("--init-from", sources["fp32"], "--steps", 2),
            "trained in bf16": ("--init-from", sources["fp32"], "--steps", 2, "--precision", "bf16")}
    for kind, options in runs.items():
        name = f"{family} {kind}"
        done = ls.run(name, *options, *data)
        saved = done and last_checkpoint(done[0])
        if not check(f"{name} writes a checkpoint", saved):
            continue
        check_checkpoint(name, saved, model, "bfloat16" if "bf16" in kind else "float32")
        got = load_hf(name, saved)
        if kind == "random init":
            check_init(name, got)
        with torch.no_grad():
            want = mean_nll(got, tokens["val"]).item()
        check_loss(name, ls.evaluate(name, saved, files["val"]), want)


    check_odd_models(family, ls, work, model, tokens, files)
    check_inference(family, ls, work, model, files)
    check_defaults(family, ls, work, files)


def edit_json(path, change):
    with open(path) as f:
        c = json.load(f)
    change(c)
    with open(path, "w") as f:
        json.dump(c, f)


def check_odd_models(family, ls, work, model, tokens, files):
    """Each has transformers' loss or, where transformers fails or has another model than the file says, is refused."""
    qwen = family.startswith("qwen")
    types = ["full_attention", "sliding_attention"]
    rope = lambda **more: dict(LLAMA3, **more)
    rows = {  # keys of config.json (None: the key goes); None: refused
        "window of T": dict(sliding_window=T, use_sliding_window=True, max_window_layers=0),
        "window null": dict(sliding_window=None, use_sliding_window=True, max_window_layers=0),
        "window in no layer": dict(sliding_window=T if family == "mistral" else 4, use_sliding_window=True, max_window_layers=2),
        "window off": dict(sliding_window=T if family == "mistral" else 4, use_sliding_window=False),
        "layer_types full": dict(sliding_window=T if family == "mistral" else 4, use_sliding_window=True, max_window_layers=0,
                                 layer_types=types[:1] * 2),
        "layer_types": dict(sliding_window=T, use_sliding_window=True, layer_types=types),
        "attention_bias": dict(attention_bias=True), "mlp_bias": dict(mlp_bias=True), "is_causal": dict(is_causal=False),
        "original outside": dict(rope_parameters=rope(), original_max_position_embeddings=8),
        "original only outside": dict(rope_parameters={k: v for k, v in rope().items() if k[0] != "o"},
                                      original_max_position_embeddings=8),
        "original nowhere": dict(rope_parameters={k: v for k, v in rope().items() if k[0] != "o"}),
        "rope_scaling before rope_parameters": dict(rope_scaling=rope(rope_type="default"), rope_parameters=rope()),
        "rope_theta outside": dict(rope_parameters={k: v for k, v in rope().items() if k != "rope_theta"}, rope_theta=77.0),
        "rope type": dict(rope_parameters=None, rope_scaling={**{k: v for k, v in rope().items() if k != "rope_type"},
                                                              "type": "llama3"}),
    }
    refused = {"attention_bias": family in ("llama", "qwen3"), "mlp_bias": family == "llama", "is_causal": True}
    source = os.path.join(work, "fp32")
    for kind, keys in rows.items():
        name, folder = f"{family} {kind}", os.path.join(work, kind.replace(" ", "_"))
        shutil.copytree(source, folder)
        edit_json(os.path.join(folder, "config.json"),
                  lambda c: (c.pop("layer_types", None), c.pop("rope_parameters") if "rope_parameters" in keys else 0, c.update(keys)))
        if refused.get(kind):
            done = ls.start(folder, "--eval-only", "--val-data", files["val"])
            check(f"{name} is refused", done.returncode == 1 and kind.encode() in done.stderr, f"{done.stderr[-200:]}")
            continue
        with torch.no_grad():
            want = mean_nll(load_hf(name, folder), tokens["val"]).item()
        check_loss(name, ls.evaluate(name, folder, files["val"]), want)
        done = ls.run(name, "--init-from", folder, "--train-data", files["train"], "--steps", 0)
        if done:  # and again from its checkpoint, on both sides
            with torch.no_grad():
                check_loss(f"{name} saved", mean_nll(load_hf(name, last_checkpoint(done[0])), tokens["val"]).item(), want, 1e-9)
    if qwen:  # transformers: a TypeError in forward
        folder = os.path.join(work, "types_off")
        shutil.copytree(source, folder)
        edit_json(os.path.join(folder, "config.json"), lambda c: c.update(layer_types=types, use_sliding_window=False))
        done = ls.start(folder, "--eval-only", "--val-data", files["val"])
        check(f"{family} layer_types without a window is refused", done.returncode == 1 and b"layer_types" in done.stderr)

    # files: the head under its own name only; a head that differs from the embedding; extra tensors; no prefix
    weights = load_file(os.path.join(source, "model.safetensors"))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    bare = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    unembedded = {k: v for k, v in bare.items() if k != "model.embed_tokens.weight"}
    odd = {"extra tensors": (None, dict(weights, **{"model.layers.7.x": torch.ones(3)})),
           "tied, head's name": (True, dict(unembedded, **{"lm_head.weight": head})),
           "tied, two equal": (True, dict(bare, **{"lm_head.weight": bare["model.embed_tokens.weight"].clone()})),
           "tied, two": (True, dict(bare, **{"lm_head.weight": head + 1})),
           "tied, no prefix": (True, {k.removeprefix("model."): v for k, v in bare.items()})}
    for kind, (tied, tensors) in odd.items():
        name, folder = f"{family} {kind}", os.path.join(work, kind.replace(" ", "_"))
        os.makedirs(folder)
        save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        shutil.copy(os.path.join(source, "config.json"), folder)
        if tied is not None:
            edit_json(os.path.join(folder, "config.json"), lambda c: c.update(tie_word_embeddings=tied))
        if kind == "tied, two":  # transformers 5.24 computes with both, and config.json still says tied
            done = ls.start(folder, "--eval-only", "--val-data", files["val"])
            check(f"{name} is refused", done.returncode == 1 and b"tie_word_embeddings" in done.stderr, f"{done.stderr[-200:]}")
            continue
        with torch.no_grad():
            want = mean_nll(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double(), tokens["val"]).item()
        check_loss(name, ls.evaluate(name, folder, files["val"]), want)


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def check_inference(family, ls, work, model, files):
    """Ids, generation settings, tokenizer and chat template before and after, from a list of eos ids and a pad id."""
    name, folder = f"{family} inference", os.path.join(work, "instruct")
    model.generation_config.update(eos_token_id=[2, 5, 7], pad_token_id=3, temperature=0.6, top_p=0.9, do_sample=True)
    model.float().save_pretrained(folder)
    edit_json(os.path.join(folder, "config.json"),
              lambda c: c.update(eos_token_id=[2, 5, 7], pad_token_id=3, bos_token_id=1, novel_key={"a": [1, 2.5, None]}))
    words = {w: i for i, w in enumerate("<unk> <s> </s> <pad> once upon a time <|user|> hi".split())}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tok.chat_template = TEMPLATE
    tok.save_pretrained(folder)
    check(f"{name} has its template in a file of its own", os.path.exists(os.path.join(folder, "chat_template.jinja")))
    done = ls.run(name, "--init-from", folder, "--train-data", files["train"], "--steps", 1)
    again = done and ls.run(name, "--init-from", last_checkpoint(done[0]), "--train-data", files["train"], "--steps", 1)
    if not again:
        return
    saved, chat = last_checkpoint(again[0]), [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "once"}]
    before, after = ((AutoModelForCausalLM.from_pretrained(f), AutoTokenizer.from_pretrained(f)) for f in (folder, saved))
    for what, get in {
            "generation_config": lambda m, t: {k: v for k, v in m.generation_config.to_dict().items() if v is not None},
            "config": lambda m, t: {k: v for k, v in m.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")},
            "tokens": lambda m, t: t("once upon a time <|user|> hi </s>")["input_ids"],
            "special tokens": lambda m, t: t.special_tokens_map,
            "chat": lambda m, t: t.apply_chat_template(chat, tokenize=False)}.items():
        a, b = get(*before), get(*after)
        if what == "config" and family == "qwen2":  # has none in its class; ours says hidden_size / heads
            a.setdefault("head_dim", b["head_dim"])
        diff = {k: (a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)} if isinstance(a, dict) else (a, b)
        check(f"{name} {what}", a and a == b, "" if a == b else f"(before, after) {diff}")
    check(f"{name} stops at all of the list", after[0].generation_config.eos_token_id == [2, 5, 7] == after[0].config.eos_token_id)


def check_defaults(family, ls, work, files):
    """config.json without each key in turn: what litespark saves is what AutoConfig reads."""
    base = dict(model_type=family, vocab_size=300, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.03,
                rope_theta=77.0, tie_word_embeddings=True, sliding_window=64, bos_token_id=3, eos_token_id=4, hidden_act="silu",
                use_sliding_window=True, max_window_layers=1, attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    small = dict(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8)  # where the default is large
    extra = dict(vocab_size=small, num_attention_heads=dict(head_dim=8),
                 num_key_value_heads=dict(num_attention_heads=32), intermediate_size=small, num_hidden_layers=small,
                 hidden_size=dict(head_dim=8))
    path = os.path.join(work, "absent.json")
    rows = [(k, {**base, **extra.get(k, {})}) for k in base if k != "model_type"]
    rows += [("all ids", {k: v for k, v in base.items() if k != "bos_token_id"})]
    bad = {}
    for key, c in rows:
        c = {k: v for k, v in c.items() if k != key and not (key == "all ids" and k == "eos_token_id")}
        with open(path, "w") as f:
            json.dump(c, f)
        done = ls.run(f"{family} without {key}", "--config", path, "--train-data", files["train"], "--steps", 0, "--seq-len", 16,
                      "--total-batch-tokens", 16, "--batch-size", 1)
        if not done:
            continue
        want, got = (AutoConfig.from_pretrained(p).to_dict() for p in (path, last_checkpoint(done[0])))
        skip = ("architectures", "dtype", "transformers_version", "_name_or_path")
        if want.get("head_dim") is None:  # Qwen2's class reads it where it is, and has no such field
            want["head_dim"] = c["hidden_size"] // c["num_attention_heads"]
        diff = {k: (got.get(k), want.get(k)) for k in {*got, *want} if k not in skip and got.get(k) != want.get(k)}
        if diff:
            bad[key] = diff
        shutil.rmtree(done[0])
    check(f"{family} absent keys mean what AutoConfig says", not bad, f"{len(rows)} keys" if not bad else f"(saved, AutoConfig) {bad}")


def check_init(name, model):
    """Hugging Face's: matrices normal(0, initializer_range), norms 1, biases 0."""
    bad = []
    for k, p in model.named_parameters():
        if p.dim() == 1:
            ok = (p == (0 if k.endswith("bias") else 1)).all()
        else:  # 5 standard errors
            std, n = model.config.initializer_range, p.numel()
            ok = abs(p.std() / std - 1) < 5 / (2 * n) ** 0.5 and abs(p.mean()) < 5 * std / n ** 0.5
        if not ok:
            bad.append(k)
    check(f"{name} distribution", not bad, f"{bad}" if bad else "")


# ---- multiple choice ------------------------------------------------------------------------------------------
SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "shared", "data")
N_TASKS = 200


def made_tasks(n):
    """Questions and choices of random words, in which nothing is trivial: 2 to 5 choices, some spaces at the end of a query, an
    empty query, one that is too long."""
    rng, tasks = random.Random(7), []
    words = lambda low, high: " ".join("".join(rng.choices("etaoinshr", k=rng.randint(1, 7))) for _ in range(rng.randint(low, high)))
    for i in range(n):
        query = "" if i == 5 else words(60, 60) if i == 6 else words(2, 12) + "  " * (i % 9 == 0)
        choices = list(dict.fromkeys(words(2, 4) + "\u00e9" * (i % 3) for _ in range(rng.randint(2, 5))))
        tasks.append({"query": query, "choices": choices, "gold": rng.randrange(len(choices))})
    return tasks


def llama2c_tokenizer(path, folder):
    """tokenizer.json of a llama2.c tokenizer.bin, whose pieces are SentencePiece's."""
    with open(path, "rb") as f:
        data, at, pieces = f.read(), 4, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8:at + 8 + size].decode().strip("\n" if len(pieces) < 3 else "").replace(" ", "\u2581"), score))
        at += 8 + size
    rank = {text: -score for text, score in pieces[259:]}
    replace = lambda a, b: {"type": "Replace", "pattern": {"String": a}, "content": b}
    parts = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")]},
             "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [replace("\u2581", " "), {"type": "ByteFallback"}, {
                 "type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
             "model": tokens.bpe({text: i for i, (text, _) in enumerate(pieces)}, rank, unk_token="<unk>", byte_fallback=True,
                                 fuse_unk=True)}
    for name, text in tokens.hugging_face(parts, {"<unk>": 0, "<s>": 1, "</s>": 2}, "<s>", "</s>").items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(text)
    return os.path.join(folder, "tokenizer.json")


def hellaswag_rows(n):
    """The first tasks of the prepared text as HellaSwag's JSON lines have them."""
    with bz2.open(os.path.join(SHARED, "text", "hellaswag_val_full.txt.bz2"), "rt", encoding="utf-8") as f:
        lines = [next(f).rstrip("\n") for _ in range(6 * n)]
    for i in range(0, len(lines), 6):
        label, _, context = lines[i].partition(": ")
        end = 0 if context.endswith(".") else max([m.end() for m in re.finditer(r"[.!?][\"')]* +", context)], default=0)
        a, b = (context[:end].rstrip(), context[end:]) if end or not context.endswith(".") else (context, "")
        yield {"activity_label": label, "ctx_a": a, "ctx_b": b, "label": lines[i + 1], "endings": lines[i + 2:i + 6]}


def own_shares(model, tokenizer, tasks, S):
    """acc, acc_norm in fp64, and the smallest distance between the best two scores of a task."""
    right, closest = [0, 0], float("inf")
    for task in tasks:
        rows, lengths = [], []
        for choice in task["choices"]:
            query, rest = task["query"], " " + choice
            rest, query = query[len(query.rstrip()):] + rest, query.rstrip()
            if query:
                before = tokenizer.encode(query)
                after = tokenizer.encode(query + rest)[len(before):]
            else:
                before = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
                after = tokenizer.encode(rest, add_special_tokens=False)
            rows.append((before + after)[-(S + 1):])
            lengths.append(len(after))
        ids = torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])      # what follows is not seen
        log_p = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scores = [log_p[i, len(r) - 1 - n:len(r) - 1].sum().item() for i, (r, n) in enumerate(zip(rows, lengths))]
        for k, scale in enumerate((lambda c: 1, len)):
            scaled = [s / scale(c) for s, c in zip(scores, task["choices"])]
            right[k] += scaled.index(max(scaled)) == task["gold"]
            closest = min(closest, *(abs(a - b) for i, a in enumerate(scaled) for b in scaled[:i]))
    return [r / len(tasks) for r in right], closest


def lm_eval_shares(model, tokenizer, path, S, hellaswag):
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=path + ".cache", LMEVAL_LOG_LEVEL="ERROR")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": path}}, "validation_split":
            "validation", "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice":
            "choices", "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]}
    if hellaswag:
        task["process_docs"] = process_docs
    with contextlib.redirect_stderr(io.StringIO()):         # progress bars
        done = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, max_length=S, batch_size=8), tasks=[task],
                                       bootstrap_iters=1, log_samples=False)
    return done["results"]["mine"]


def check_choices(name, ls, folder, tokenizer_path, rows, S, hellaswag=False):
    work = os.path.join(ls.work, name)
    os.makedirs(work)
    path = os.path.join(work, "tasks.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    choices_py = os.path.join(os.path.dirname(tokens.__file__), "choices.py")
    done = subprocess.run([sys.executable, choices_py, path, "--tokenizer", tokenizer_path, "--seq-len", str(S), "--name", "mine",
                           "--out", work + "/mine"], capture_output=True, text=True)
    if not check(f"{name} choices.py", done.returncode == 0, done.stderr.strip()[-300:]):
        return
    exported = ls.run(f"{name} export", "--init-from", folder, "--steps", 0, "--seq-len", 8, "--batch-size", 1,
                      "--total-batch-tokens", 8, "--train-data", text_shard(work, folder))
    if not exported:
        return
    checkpoint = last_checkpoint(exported[0])
    got = {}
    for B in 1, 3:
        done = ls.run(f"{name} evaluation", "--init-from", checkpoint, "--eval-only", "--eval-tasks", work + "/mine/validation/*.ds",
                      "--seq-len", S, "--batch-size", B, "--total-batch-tokens", B * S)
        if not done:
            return
        with open(os.path.join(done[0], "eval.jsonl")) as f:
            got[B] = json.loads(f.read())["tasks"]["mine"]
    check(f"{name} does not depend on --batch-size", got[1] == got[3], "" if got[1] == got[3] else f"{got}")
    tokenizer = AutoTokenizer.from_pretrained(work + "/mine/validation")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    if hellaswag:
        import choices
        tasks = [{"query": q, "choices": c, "gold": g} for _, q, c, g in choices.read_tasks([path], "lm_eval")]
    else:
        tasks = rows
    if importlib.util.find_spec("lm_eval"):
        theirs = lm_eval_shares(model, tokenizer, path, S, hellaswag)
        for key in "acc", "acc_stderr", "acc_norm", "acc_norm_stderr":
            want = theirs[key + ",none"]
            check(f"{name} {key} of lm_eval", abs(got[1][key] - want) < 1e-12, f"{got[1][key]}, lm_eval {want}")
    else:
        print(f"skipped: {name}: lm_eval (pip install lm_eval==0.4.13)")
    with torch.no_grad():
        want, closest = own_shares(model.double(), tokenizer, tasks, S)
    check(f"{name} acc and acc_norm", [got[1]["acc"], got[1]["acc_norm"]] == want and got[1]["tasks"] == len(rows),
          f"{got[1]['acc']}, {got[1]['acc_norm']}, transformers {want}, {len(rows)} tasks, closest scores {closest:.1e}")


def check_bits_per_byte(name, ls, folder, tokenizer_path, first):
    """The bytes of all targets are those of the text. first: bytes of text in its first token, which is no target."""
    rng, lines = random.Random(5), []
    for i in range(40):
        lines.append(" ".join(rng.choice(("Once", "there", "was", "a", "caf\u00e9", "", "\U0001f600", "king,", "12")) for _ in range(20)))
        lines[-1] = "The" + lines[-1] + "."
    work = os.path.join(ls.work, name + "-bytes")
    for n in range(len(lines), 0, -1):                      # until windows of some length take all the text
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        with open(work + "/text.txt", "w", encoding="utf-8") as f:
            f.write("\n\n".join(lines[:n]) + "\n")
        subprocess.run([sys.executable, tokens.__file__, work + "/text.txt", "--split-on", "blank-lines", "--val-fraction", "0",
                        "--tokenizer", tokenizer_path, "--out", work + "/out"], check=True, capture_output=True)
        path = work + "/out/train_000.bin"
        count = struct.unpack("<3i", open(path, "rb").read(12))[2] - 1
        length = next((t for t in range(120, 15, -1) if count % t == 0), 0)
        if length:
            break
    done = ls.run(f"{name} bits per byte", "--init-from", folder, "--eval-only", "--val-data", path, "--seq-len", length,
                  "--total-batch-tokens", B * length)
    if done:
        with open(os.path.join(done[0], "eval.jsonl")) as f:
            got = json.loads(f.read())
        size = sum(len(x.encode()) for x in lines[:n]) - first
        bits = got["val_loss"] * got["targets"] / math.log(2) / size
        check(f"{name} bits per byte", got["targets"] == count and abs(got["bits_per_byte"] / bits - 1) < 1e-12,
              f"{got['bits_per_byte']}, loss in bits / {size} bytes {bits}")


def text_shard(work, folder):
    """Some tokens, for a run of no steps."""
    path = os.path.join(work, "text.bin")
    write_shard(path, list(range(9)), AutoConfig.from_pretrained(folder).vocab_size)
    return path


def test_choices(ls):
    folder = os.path.join(ls.work, "random")
    make_model("llama").save_pretrained(folder)
    check_choices("choices", ls, folder, "bytes", made_tasks(N_TASKS), 128)
    check_bits_per_byte("choices", ls, folder, "bytes", 1)
    trained = os.path.join(SHARED, "models", "stories260K_hf")
    if not os.path.isdir(trained):
        print(f"skipped: hellaswag: {trained} is not here")
        return
    tokenizer = os.path.join(ls.work, "tok512")
    os.makedirs(tokenizer)
    llama2c_tokenizer(os.path.join(SHARED, "tokenizers", "tok512.bin"), tokenizer)
    check_choices("hellaswag", ls, trained, tokenizer + "/tokenizer.json", list(hellaswag_rows(N_TASKS)), 256, hellaswag=True)
    check_bits_per_byte("hellaswag", ls, trained, tokenizer + "/tokenizer.json", 0)


def test_split(ls):
    """Two ranks: two files of the model, each by another rank, and an index."""
    if not shutil.which("mpirun"):
        print("skipped: split: no mpirun (apt-get install openmpi-bin)")
        return
    config, data, out = (os.path.join(ls.work, x) for x in ("config.json", "data.bin", "out"))
    with open(config, "w") as f:                # 142 MB: two files of at least 64 MiB
        json.dump(dict(SMALL, model_type="llama", vocab_size=32000, hidden_size=512, intermediate_size=1024,
                       num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False), f)
    write_shard(data, [i * 7 % 32000 for i in range(99)], 32000)
    run_sh = os.path.join(os.path.dirname(os.path.abspath(__file__)), "run.sh")
    def train(*options):
        return subprocess.run([run_sh, "-np", "2", "--oversubscribe", os.path.abspath(ls.binary), "--threads", "1", *options],
                              capture_output=True, text=True)
    done = train("--config", config, "--train-data", data, "--seq-len", "8", "--batch-size", "1", "--steps", "2",
                 "--checkpoint-every", "1", "--sample-every", "0", "--out", out)
    folder = os.path.join(out, "step_00000002")
    if not check("split: run", done.returncode == 0, done.stderr[-300:]):
        return
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    found = {n: load_file(os.path.join(folder, n)) for n in names}
    with open(os.path.join(folder, "model.safetensors.index.json")) as f:
        text = f.read()
    tensors = {k: v for t in found.values() for k, v in t.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    index = {"metadata": {"total_parameters": model.num_parameters(), "total_size": sum(v.nbytes for v in tensors.values())},
             "weight_map": {k: n for n, t in found.items() for k in t}}
    same = text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    check("split: index", same, "" if same else text[:300])
    sizes = [sum(v.nbytes for v in t.values()) for t in found.values()]
    check("split: sizes", max(sizes) < 1.2 * min(sizes), f"{sizes} bytes")
    state = model.state_dict()
    check("split: weights", state.keys() == tensors.keys() and all(torch.equal(state[k], tensors[k]) for k in state))
    units = {}                                  # the masters, which fp32 weights are, by unit
    for path in sorted(glob.glob(os.path.join(folder, "optimizer-*-of-00002.safetensors"))):
        for name, x in load_file(path).items():
            unit, kind, offset = name.rsplit(".", 2)
            if kind == "master":
                units.setdefault(unit, {})[int(offset)] = x
    flat = {u: torch.cat([x for _, x in sorted(parts.items())]) for u, parts in units.items()}
    check("split: masters", torch.equal(flat["embed"].view(32000, 512), state["model.embed_tokens.weight"])
          and len(units["layers.0"]) == 2)
    same = train("--resume", folder, "--steps", "2", "--out", out + "2")
    check("split: resume", same.returncode == 0 and all(
        open(os.path.join(folder, n), "rb").read() == open(os.path.join(out + "2", "step_00000002", n), "rb").read() for n in names),
        same.stderr[-300:])
    for name in [*names, "model.safetensors.index.json", "optimizer-00001-of-00002.safetensors"]:
        path = os.path.join(folder, name)
        with open(path, "r+b") as f:
            f.seek(-99, os.SEEK_END)
            byte = f.read(1)
            f.seek(-99, os.SEEK_END)
            f.write(bytes([byte[0] ^ 1]))
        for how in [("--resume", folder, "--out", out + "3"), *([("--init-from", folder, "--train-data", data, "--seq-len", "8",
                                                                  "--batch-size", "1", "--out", out + "3")] * (name[0] == "m"))]:
            refused = train(*how, "--steps", "3")
            check(f"split: {name} {how[0]}", refused.returncode == 1 and f"{name} is damaged" in refused.stderr,
                  refused.stderr[-300:] if refused.returncode != 1 else "")
        with open(path, "r+b") as f:
            f.seek(-99, os.SEEK_END)
            f.write(byte)


def main():
    ap = argparse.ArgumentParser(description="litespark against Hugging Face transformers")
    ap.add_argument("--binary", default="./train_litespark")
    ap.add_argument("--work", default="", help="keep all files here (default: a temporary folder, removed)")
    ap.add_argument("--only", default=",".join([*FAMILIES, "choices", "split"]),
                    help="families, choices and split, comma separated")
    args = ap.parse_args()
    if not os.access(args.binary, os.X_OK):
        sys.exit(f"error: {args.binary} is not an executable; run `make train` first")
    os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")  # Open MPI: no daemon for a single process
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    work = args.work or tempfile.mkdtemp(prefix="test_hf")
    for family in args.only.split(","):
        base = os.path.join(work, family + "-runs")
        shutil.rmtree(base, ignore_errors=True)
        os.makedirs(base)
        ls = Litespark(args.binary, base)
        {"choices": test_choices, "split": test_split}.get(family, lambda ls: test_family(family, ls))(ls)
    if not args.work:
        shutil.rmtree(work)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
