#!/usr/bin/env python3
"""ZeRO 0 to 3 and HSDP: whatever ranks share, a run is the run of one rank.

    dev/test_zero.py [--level quick|long|ptx] TRAINER... [word...]    tests whose names hold a word, all without

TRAINER: as in harness.py. `quick` takes each stage with several models and splits, `long` all of them, `ptx` a few that the
interpreter of PTX can run. What is compared: gradients (1e-5 per tensor), 20 losses, evaluations and samples of a run (1e-6),
checkpoints across stages, ranks and trainers, bits of two runs, memory and bytes between ranks against the formulas of each
stage, refusals. Planted errors at the end: each must be found by the comparison that its row names.
"""
import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

import harness
from harness import (Absent, Failed, Noise, Run, check, compare_grads, gradients, log_of, model, near, packed, pairs,
                     sft_documents, shards, tensors)

level = 'quick'


class Split:
    """How ranks share: N ranks, ZeRO stage, S ranks that share one copy (0: all)."""
    def __init__(self, ranks, zero=0, shard=0):
        self.ranks, self.zero, self.shard = ranks, zero, shard
        self.S = (shard or ranks) if zero else 1                # that share among themselves

    def args(self):
        return (['--zero', self.zero] if self.zero else []) + (['--shard-size', self.shard] if self.shard else [])

    def __str__(self):
        return f'{self.ranks} ranks ZeRO {self.zero}' + (f' shard {self.shard}' if self.shard else '')


def splits_of(text):
    """Ranks, stage and S, as in '4/3/2'."""
    return [Split(*map(int, word.split('/'))) for word in text.split()]


def all_splits(most=8):
    """Every stage with 1, 2, 4, 8 ranks, HSDP, and ranks that are no power of two."""
    found = splits_of('2/0 2/1 2/2 2/3 4/0 4/1 4/2 4/3 8/0 8/1 8/2 8/3 1/1 1/2 1/3 4/1/2 4/2/2 4/3/2 '
                      '8/1/2 8/1/4 8/2/2 8/2/4 8/3/2 8/3/4 3/3 6/2/3 6/3/2 2/3/1')
    return [s for s in found if s.ranks <= most]


def kind(trainer):
    name = os.path.basename(trainer[-1])
    return 'emu' if 'emu' in name else 'ptx' if 'ptx' in name else 'cuda' if 'cuda' in name else 'cpu'


def needs(trainer, *kinds):
    if kind(trainer) not in kinds:
        raise Absent(f'is for {" and ".join(kinds)}')


def some(items, every, offset=0):
    """All at the level long, else each `every`-th."""
    return items if level == 'long' else items[offset % every::every]


# ---- models and data
class Case:
    """A model, data of a stage, and the rows of an update."""
    def __init__(self, name, family='llama', stage='pretrain', T=11, rows=16, more=(), **keys):
        self.name, self.family, self.stage, self.T, self.rows, self.more = name, family, stage, T, rows, list(more)
        self.keys = {**dict(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                            intermediate_size=40, vocab_size=101), **keys}

    def make(self, folder, n_updates=1):
        """Writes data and model; what an update needs, without batch size and split."""
        folder = f'{folder}/{self.name.replace(" ", "_")}'
        V, T, n = self.keys['vocab_size'], self.T, self.rows * n_updates
        if self.stage == 'masked':
            data = bin_shard(folder, V, T, n)
        else:
            if self.stage == 'sft':
                rows, most = packed([[d] for d in sft_documents(6 * n, most=T // 3, V=V)], T)
            elif self.stage == 'dpo':
                rows, most = packed(pairs(3 * n, most=max(T // 5, 1), V=V), T)
            else:
                noise = Noise(len(self.name))
                rows, most = [noise.tokens(T + 1, V) for _ in range(n)], 1
            assert len(rows) >= n, (self.name, len(rows), n)
            data = shards(folder, self.stage, T, V, rows[:n], most)
        self.folder = folder
        stage = ['--document-mask', 'on'] if self.stage == 'masked' else ['--stage', self.stage]
        return ['--config', model(folder, self.family, **self.keys), '--train-data', data, '--seq-len', T,
                '--total-batch-tokens', self.rows * T, '--seed', 3] + stage + self.more

    def gradients(self, trainer, args, split, B=0, *more):
        if self.stage == 'dpo':                                 # the pass of the reference belongs to it
            for name in os.listdir(self.folder):
                if name.endswith('.ref'):
                    os.remove(f'{self.folder}/{name}')
        B = B or (self.rows if split.ranks == 1 else 1)
        return gradients(trainer, *args, '--batch-size', B, *split.args(), *more, ranks=split.ranks)


def bin_shard(folder, V, T, n):
    """Text whose documents end with token 2."""
    os.makedirs(folder, exist_ok=True)
    noise, tokens = Noise(8), []
    for _ in range(n * T + 1):
        tokens.append(2 if noise.below(6) == 0 else 3 + noise.below(V - 3))
    with open(f'{folder}/train.bin', 'wb') as f:
        f.write(struct.pack('<256i', 20240520, 1, len(tokens), V, 0, 3, *[0] * 250))
        f.write(struct.pack(f'<{len(tokens)}H', *tokens))
    return f'{folder}/train.bin'


CASES = [
    Case('llama'),
    Case('llama tied', tie_word_embeddings=True, vocab_size=97),
    Case('mistral', family='mistral', sliding_window=None),
    Case('qwen2 bias', family='qwen2', vocab_size=130),
    Case('qwen2 tied', family='qwen2', tie_word_embeddings=True),
    Case('qwen3 norm', family='qwen3', head_dim=24, tie_word_embeddings=False),
    Case('qwen3 tied', family='qwen3', head_dim=16, tie_word_embeddings=True, vocab_size=257),
    Case('odd', hidden_size=20, num_attention_heads=5, num_key_value_heads=1, head_dim=8, intermediate_size=28,
         num_hidden_layers=5, T=7, rows=12),
    Case('one layer', num_hidden_layers=1),
    Case('two layers', num_hidden_layers=2, tie_word_embeddings=True),
    Case('sft', stage='sft', T=23, vocab_size=101),
    Case('dpo', stage='dpo', T=31, more=['--dpo-sft-weight', 0.3]),
    Case('documents', stage='masked'),
    Case('chunks', more=['--logits-chunk', 5]),
]
RECOMPUTE = ('none', 'mlp', 'block')


# ---- the same gradients
def test_gradients_are_those_of_one_rank(trainer, folder):
    cases, splits, every = {
        'quick': (CASES, all_splits(4) + splits_of('8/3/4'), 6 if kind(trainer) == 'cpu' else 9),
        'long': (CASES, all_splits(), 1), 'ptx': ([CASES[1], CASES[5]], splits_of('2/0 2/1 2/2 2/3 4/3/2'), 2)}[level]
    worst, n = 0, 0
    for i, case in enumerate(cases):
        args, want = case.make(folder), None
        for j, split in enumerate(splits):
            if case.rows % split.ranks or (j - 4 * i) % len(splits) % every:
                continue
            if want is None:
                want = case.gradients(trainer, args, Split(1))
            micro = (1, 2, 4)[(i + j) % (3 if level == 'long' else 2)]
            B = case.rows // split.ranks // micro if case.rows // split.ranks % micro == 0 else case.rows // split.ranks
            got = case.gradients(trainer, args, split, B, '--recompute', RECOMPUTE[(i + j) % 3])
            worst, n = max(worst, compare_grads(f'{case.name}, {split}, B {B}', got, want)), n + 1
    return f'{n} splits, {worst:.1e} at most'


def random_case(noise, i):
    """A small model of any shape, and a split."""
    pick = lambda *items: items[noise.below(len(items))]
    family = ('llama', 'mistral', 'qwen2', 'qwen3')[i % 4]
    K = pick(1, 2, 3)
    H = K * pick(1, 2, 3)
    stage, ranks = pick('pretrain', 'masked', 'sft', 'dpo'), pick(2, 2, 3, 4, 5, 8)
    keys = dict(num_hidden_layers=pick(1, 2, 3, 4, 5), hidden_size=4 * H * pick(1, 2), num_attention_heads=H,
                num_key_value_heads=K, intermediate_size=4 * (1 + noise.below(16)), vocab_size=40 + noise.below(200),
                tie_word_embeddings=bool(noise.below(2)))
    if family != 'llama' or noise.below(2):
        keys['head_dim'] = pick(8, 16, 24)
    else:
        keys['hidden_size'] = 8 * H
    if family == 'mistral':
        keys['sliding_window'] = None
    divisors = [s for s in range(1, ranks) if ranks % s == 0]
    zero = noise.below(4)
    split = Split(ranks, zero, pick(0, pick(*divisors)) if zero else 0)
    B, micro = pick(1, 2), pick(1, 2, 3)
    more = ['--recompute', pick(*RECOMPUTE)]
    return Case(f'random {i}', family, stage, T=pick(20, 23, 31), rows=ranks * B * micro, more=more, **keys), split, B


def test_gradients_of_random_shapes(trainer, folder):
    noise, worst = Noise(2026), 0
    n = {'quick': 8 if kind(trainer) == 'cpu' else 4, 'long': 100, 'ptx': 1}[level]
    for i in range(n):
        case, split, B = random_case(noise, i)
        args = case.make(folder)
        want = case.gradients(trainer, args, Split(1))
        got = case.gradients(trainer, args, split, B)
        what = f'{case.name} ({case.family}, {case.stage}, {case.keys}), {split}, B {B}'
        worst = max(worst, compare_grads(what, got, want))
        shutil.rmtree(case.folder)
    return f'{n} models, {worst:.1e} at most'


def test_other_orders_of_work_give_the_same_bits(trainer, folder):
    needs(trainer, 'emu', 'ptx')
    variable = {'emu': 'EMU_ASYNC', 'ptx': 'PTXCPU_ASYNC'}[kind(trainer)]
    n = 0
    for i, case in enumerate(some([CASES[1], CASES[7], CASES[5]], 3)):
        args = case.make(folder)
        for split in some(splits_of('2/3 2/0 2/1 4/2/2 4/3/2'), 5 if level == 'ptx' else 3):
            B = case.rows // split.ranks // 2
            want = case.gradients(trainer, args, split, B)
            for seed in (1, 2, 3):
                os.environ[variable] = str(seed)
                try:
                    got = case.gradients(trainer, args, split, B)
                finally:
                    del os.environ[variable]
                check(got == want, f'{case.name}, {split}: other bits with {variable}={seed}')
                n += 1
    return f'{n} orders'


# ---- the same run
RUN = Case('run', family='qwen3', head_dim=16, rows=8, T=13, tie_word_embeddings=True)
OWN = Case('own head', family='qwen2', rows=8, T=13)
LOOK = ['--lr', 2e-3, '--eps', 1e-6, '--warmup-steps', 2, '--weight-decay', 0.1, '--sample-tokens', 8, '--temperature', 0,
        '--keep', 9]


def run_length(trainer):
    """Updates of a run: what takes minutes in the emulation is for the level long."""
    return 20 if level == 'long' or kind(trainer) == 'cpu' else 4


def lengths(n):
    return ['--steps', n, '--checkpoint-every', n // 2, '--val-every', n // 4, '--sample-every', n // 2]




class Training:
    """Losses, evaluations, samples and the folder of a run."""
    def __init__(self, trainer, args, split, out, *more, rows=8):
        self.out = out
        B = rows // split.ranks if split.zero % 2 else max(rows // split.ranks // 2, 1)     # one micro-step or two
        text = Run(trainer, *args, *LOOK, '--batch-size', B, *split.args(), '--out', out, *more, ranks=split.ranks).text
        self.steps, self.val = log_of(out), log_of(out, 'val')
        self.losses = [r['loss'] for r in self.steps]
        self.samples = [line for line in text.splitlines() if re.fullmatch(r'[ \d]+', line)]

    def compare(self, what, other, first=0, tolerance=1e-6):
        """The largest relative difference of a loss, from step `first` on."""
        mine, its = self.losses[first - len(other.steps):], other.losses[first:]
        check(len(mine) == len(its) > 0, f'{what}: {len(mine)} steps, expected {len(its)}')
        worst = 0
        for a, b in zip(mine, its):
            near(f'{what}: loss', a, b, tolerance)
            worst = max(worst, abs(a / b - 1))
        for a, b in zip(self.steps[first - len(other.steps):], other.steps[first:]):
            near(f'{what}: grad_norm', a['grad_norm'], b['grad_norm'], 10 * tolerance)
        vals = [v for v in other.val if v['step'] > first]
        check(len(self.val) >= len(vals) > 0, f'{what}: {len(self.val)} evaluations')
        for a, b in zip(self.val[-len(vals):], vals):
            near(f'{what}: val_loss', a['val_loss'], b['val_loss'], tolerance)
        n = min(len(self.samples), len(other.samples))
        check(n and self.samples[-n:] == other.samples[-n:], f'{what}: samples {self.samples}, expected {other.samples}')
        return worst

    def files(self, step):
        folder, found = f'{self.out}/step_{step:08}', {}
        for name in os.listdir(folder):
            if name.endswith('.safetensors'):
                with open(f'{folder}/{name}', 'rb') as f:
                    found[name] = f.read()
        return found


def run_args(case, folder):
    """Data for four updates; of the evaluation's 5 rows no number of ranks has as many each."""
    V, T, noise = case.keys['vocab_size'], case.T, Noise(77)
    args = case.make(folder, n_updates=4)
    return args + ['--val-data', shards(f'{case.folder}/val', 'pretrain', T, V, [noise.tokens(T + 1, V) for _ in range(5)], 1)]


def test_training_is_that_of_one_rank(trainer, folder):
    worst, n = 0, 0
    splits = splits_of('2/3 4/2/2 2/1 4/3/2 2/0 4/1/2 2/2 8/3 8/2 8/3/4')
    steps = lengths(run_length(trainer))
    n_splits = 10 if kind(trainer) == 'cpu' else {'quick': 4, 'ptx': 1}.get(level)
    for i, case in enumerate((RUN, OWN)):
        if level == 'ptx' and i:
            continue
        args = run_args(case, folder)
        one = Training(trainer, args, Split(1), f'{case.folder}/one', *steps)
        for j, split in enumerate(splits):
            if level != 'long' and (j // 2 % 2 != i or j >= n_splits):
                continue
            got = Training(trainer, args, split, f'{case.folder}/{j}', *steps, '--recompute', RECOMPUTE[j % 3])
            worst, n = max(worst, got.compare(f'{case.name}, {split}', one)), n + 1
    return f'{n} splits, losses within {worst:.1e}'


def test_two_runs_have_the_same_bits(trainer, folder):
    args = run_args(RUN, folder)
    splits = splits_of('2/2 4/3/2 2/3 2/0 2/1 8/3/4')
    for j, split in enumerate(splits if level == 'long' else splits[:2 if kind(trainer) == 'cpu' else 1]):
        a, b = (Training(trainer, args, split, f'{folder}/{j}{k}', *lengths(4)) for k in 'ab')
        check(a.losses == b.losses and a.val == b.val and a.samples == b.samples, f'{split}: other losses')
        check(a.files(4) == b.files(4), f'{split}: other weights or state')


RESUMES = splits_of('2/1 4/3/2 1 2/2 2/3 8/2/4 2/0 4/1/2 4/3')


def test_resume_across_stages_and_ranks(trainer, folder):
    splits = RESUMES if level == 'long' else RESUMES[:5 if kind(trainer) == 'cpu' else 3 if level == 'quick' else 1]
    args, n_steps = run_args(RUN, folder), run_length(trainer)
    steps = lengths(n_steps)
    straight = [Training(trainer, args, s, f'{folder}/{i}', *steps) for i, s in enumerate(splits)]
    worst = n = same = 0
    for i, j in itertools.product(range(len(splits)), repeat=2):
        if level != 'long' and i != j and (i + 1) % len(splits) != j:
            continue
        out = f'{folder}/{i}{j}'
        shutil.copytree(f'{folder}/{i}/step_{n_steps // 2:08}', f'{out}/step_{n_steps // 2:08}')
        again = Training(trainer, ['--resume', out], splits[j], out)
        what = f'{splits[i]}, then {splits[j]}'
        worst, n = max(worst, again.compare(what, straight[j], n_steps // 2)), n + 1
        if i == j:
            check(again.losses == straight[i].losses[n_steps // 2:], f'{what}: other bits than without a stop')
            check(again.files(n_steps) == straight[i].files(n_steps), f'{what}: other weights or state than without a stop')
            same += 1
        shutil.rmtree(out)
    return f'{n} resumes within {worst:.1e}, {same} with the same bits'


def twin_of(trainer):
    path = os.path.join(os.path.dirname(trainer[-1]), 'train_litespark')
    if not os.access(path, os.X_OK):
        raise Absent('the CPU trainer is not beside it')
    return [path]


def test_checkpoints_go_from_trainer_to_trainer(trainer, folder):
    needs(trainer, 'emu', 'ptx', 'cuda')
    twin, worst = twin_of(trainer), 0
    args, n_steps = run_args(RUN, folder), run_length(trainer)
    steps = lengths(n_steps)
    splits = splits_of('4/3/2 2/2 1 2/1 8/3')
    for i, split in enumerate(splits if level == 'long' else splits[:1]):
        other = splits[(i + 1) % len(splits)]
        for a, b, s, t in ((twin, trainer, split, other), (trainer, twin, other, split)):
            if level == 'ptx' and a is trainer:
                continue
            out = f'{folder}/{i}{kind(a)}'
            straight = Training(a, args, s, out, *steps)
            shutil.copytree(f'{out}/step_{n_steps // 2:08}', f'{out}b/step_{n_steps // 2:08}')
            again = Training(b, ['--resume', f'{out}b'], t, f'{out}b')
            worst = max(worst, again.compare(f'{kind(a)} {s}, then {kind(b)} {t}', straight, n_steps // 2, 1e-5))
    return f'losses within {worst:.1e}'


# ---- bf16
def relative(got, want):
    size = math.sqrt(sum(x * x for x in want))
    return math.sqrt(sum((x - y)**2 for x, y in zip(got, want))) / (size or 1)


def test_bf16(trainer, folder):
    """Ranks add no error to that of one rank; --reduce-dtype bf16 adds half a bit of bf16 (2^-9) for each addition."""
    most, most_wire = 0, 0
    for case in some([CASES[6], CASES[3]], 2):
        args = case.make(folder)
        exact = case.gradients(trainer, args, Split(1))
        one = case.gradients(trainer, args, Split(1), 0, '--precision', 'bf16')
        for split in some(splits_of('2/0 2/3 4/2/2 2/1 2/2 8/3/4'), 3, 1):
            got = case.gradients(trainer, args, split, 0, '--precision', 'bf16')
            for name in exact:
                e, e1 = relative(got[name], exact[name]), relative(one[name], exact[name])
                check(e <= 1.5 * e1 + 1e-3, f'{case.name}, {split}, {name}: error {e:.1e} in bf16, {e1:.1e} with one rank')
                most = max(most, e)
            if kind(trainer) == 'cpu':
                continue
            wire = case.gradients(trainer, args, split, 0, '--reduce-dtype', 'bf16')
            for name in exact:
                # each rank's part is rounded, then each sum; parts may be longer than their sum
                e, bound = relative(wire[name], exact[name]), 2 * split.ranks * 2**-9
                check(name == 'loss' or e <= bound, f'{case.name}, {split}, {name}: {e:.1e} by bf16 sums, allowed {bound:.1e}')
                most_wire = max(most_wire, e)
            check(most_wire > 1e-4, 'nothing was rounded with --reduce-dtype bf16')
    return f'error in bf16 {most:.1e} at most' + (f', of fp32 with --reduce-dtype bf16 {most_wire:.1e}' if most_wire else '')


# ---- memory and bytes
def unit_sizes(keys, S, biases=False, qk_norm=False):
    """Elements of embedding, a layer, head, as they lie in memory: tensors at multiples of 64, units of 128 S."""
    C, H, K = (keys[k] for k in ('hidden_size', 'num_attention_heads', 'num_key_value_heads'))
    F, V = keys['intermediate_size'], keys['vocab_size']
    D = keys.get('head_dim', C // H)
    padding = (-V % 128) * C
    up = lambda n, to: -(-n // to) * to

    def unit(tensors, more=0):
        n = 0
        for t in tensors:
            n = up(n, 64) + t
        return up(n + more, 128 * S)
    W = (H + 2 * K) * D
    layer = unit([C, W * C] + ([W] if biases else []) + ([D, D] if qk_norm else []) + [C * H * D, C, 2 * F * C, C * F])
    tied = keys.get('tie_word_embeddings')
    return unit([V * C], padding), layer, unit([C] if tied else [C, V * C], 0 if tied else padding)


def sizes_of(case, split):
    return unit_sizes(case.keys, split.S, biases=case.family == 'qwen2', qk_norm=case.family == 'qwen3')


def state_bytes(case, split, bf16=False, bf16_state=False):
    """Weights, gradients and optimizer state of a rank: the formulas of the stages."""
    L, (embed, layer, head) = case.keys['num_hidden_layers'], sizes_of(case, split)
    P, slots = embed + L * layer + head, embed + head + min(L, 2) * layer
    w = 2 if bf16 else 4
    weights = w * (P / split.S + slots if split.zero == 3 and split.S > 1 else P)
    grads = 4 * (P / split.S + slots if split.zero >= 2 and split.S > 1 else P)
    return weights, grads, ((4 if bf16_state else 8) + (4 if bf16 else 0)) * P / split.S


def reports(trainer, folder, args, ranks):
    """What a run of the emulation took and sent, by rank."""
    path, variable = f'{folder}/report.json', {'emu': 'EMU_REPORT', 'ptx': 'PTXCPU_NCCL_REPORT'}[kind(trainer)]
    os.environ[variable] = path
    try:
        text = Run(trainer, *args, ranks=ranks).text
    finally:
        del os.environ[variable]
    found = []
    for r in range(ranks):
        name = path + (f'.rank{r}' if r else '')
        with open(name) as f:
            found.append(json.load(f))
        os.remove(name)
    return found, text


def memory_line(text):
    line = [line for line in text.splitlines() if line.startswith('memory |')][0]
    return {name: float(x) for name, x in re.findall(r'\| (\w+) ([\d.]+) MiB', line)}, line


BIG = [Case('memory', family='qwen2', hidden_size=128, intermediate_size=264, vocab_size=1111, rows=8, T=8),
       Case('memory tied', family='qwen3', head_dim=24, hidden_size=96, vocab_size=901, tie_word_embeddings=True,
            num_hidden_layers=1, rows=8, T=8)]


def test_memory_is_the_planned(trainer, folder):
    needs(trainer, 'cpu', 'emu')
    n = 0
    for case in some(BIG, 2):
        args = case.make(folder)
        fitting = [s for s in all_splits(4) + splits_of('8/3/4') if case.rows % s.ranks == 0]
        for i, split in enumerate(some(fitting, 3 if kind(trainer) == 'cpu' else 5, 2)):
            bf16, bf16_state = i % 2 == 1, i % 4 == 3
            more = [*args, '--batch-size', case.rows // split.ranks, *split.args(), '--precision', 'bf16' if bf16 else 'fp32',
                    '--optimizer-dtype', 'bf16' if bf16_state else 'fp32']
            what = f'{case.name}, {split}{", bf16" * bf16}{", bf16 state" * bf16_state}'
            planned, line = memory_line(Run(trainer, *more, '--dry-run', ranks=split.ranks).text)
            # the twin keeps all in fp32, whatever the precision
            on_cpu = kind(trainer) == 'cpu'
            want = state_bytes(case, split, bf16, bf16_state)
            if on_cpu:
                want = state_bytes(case, split)[:2] + (state_bytes(case, split)[2] * (1.5 if bf16 else 1),)
            for name, size in zip(('weights', 'gradients', 'optimizer'), want):
                check(abs(planned[name] - size / 2**20) <= 0.051,
                      f'{what}: {name} {planned[name]} MiB planned, {size / 2**20:.2f} by formula')
            if not on_cpu:
                ranks, text = reports(trainer, folder, [*more, '--dump-grads', f'{folder}/g'], split.ranks)
                check(memory_line(text)[1] == line, f'{what}: the run says {memory_line(text)[1]}, --dry-run {line}')
                for r in ranks:
                    taken = r['allocations']
                    check(r['memory_peak'] == sum(taken), f'{what}: {r["memory_peak"]} bytes at most, {sum(taken)} of arenas')
                    for name, size, got in zip(('weights', 'gradients', 'optimizer'), want, taken):
                        check(got == size, f'{what}, rank {r["rank"]}: {got} bytes of {name}, {size:.0f} by formula')
                    check(abs(planned['total'] - sum(taken) / 2**20) <= 0.051,
                          f'{what}: {planned["total"]} MiB planned, {sum(taken)} bytes')
            n += 1
    return f'{n} plans'


def traffic_of_update(case, split, micro, bf16=False, wire=4):
    """Bytes of whole buffers of one update, by collective and how many ranks take part."""
    L, (embed, layer, head) = case.keys['num_hidden_layers'], sizes_of(case, split)
    P, N, S, w = embed + L * layer + head, split.ranks, split.S, 2 if bf16 else 4
    found = {}

    def add(call, ranks, size):
        if ranks > 1:
            found[call, ranks] = found.get((call, ranks), 0) + size
    if S == 1:
        add('AllReduce', N, wire * P)
        return found
    add('ReduceScatter', S, wire * P * (micro if split.zero >= 2 else 1))
    add('AllReduce', N // S, wire * P // S)                     # between copies, once
    if split.zero < 3:
        add('AllGather', S, w * P)
    else:
        # Embedding and head once; layers in forward and backward, but for the two that still lie in the slots
        first = L + max(L - 2, 0)
        later = 2 * max(L - 2, 0)
        add('AllGather', S, w * (embed + head + layer * (first + (micro - 1) * later)))
    return found


def test_bytes_between_ranks(trainer, folder):
    needs(trainer, 'emu', 'ptx')
    few = {3: splits_of('2/3 4/2/2'), 2: splits_of('2/3'), 5: splits_of('2/3'), 1: splits_of('2/1 2/3')}
    n = 0
    for L, splits in few.items():
        case = Case(f'{L} layers', num_hidden_layers=L, tie_word_embeddings=L % 3 == 0, rows=8, T=5)
        args = case.make(folder, n_updates=2)
        for j, split in enumerate({'quick': splits, 'long': all_splits(), 'ptx': splits[:1] if L == 3 else []}[level]):
            if case.rows % split.ranks:
                continue
            B = 2 if (L + j) % 5 == 4 and case.rows // split.ranks % 2 == 0 else 1
            micro, bf16, wire = case.rows // split.ranks // B, (L + j) % 3 == 2, 2 if (L + j) % 4 == 3 else 4
            found = []
            for steps in (1, 2):
                more = ['--batch-size', B, *split.args(), '--steps', steps, '--out', f'{folder}/{L}_{j}_{steps}',
                        '--checkpoint-every', 0, '--sample-every', 0, '--precision', 'bf16' if bf16 else 'fp32',
                        '--reduce-dtype', 'bf16' if wire == 2 else 'fp32']
                found.append(reports(trainer, folder, [*args, *more], split.ranks)[0])
            want = traffic_of_update(case, split, micro, bf16, wire)
            for one, two in zip(*found):
                got = {}
                for report, sign in ((one, -1), (two, 1)):
                    for c in report['calls']:
                        key = c['call'], c['ranks']
                        if c['ranks'] > 1:
                            got[key] = got.get(key, 0) + sign * c['bytes']
                got = {key: size for key, size in got.items() if size}
                check(got == want, f'{case.name}, {split}, {micro} micro-steps, {more}: an update takes {got}, {want} by formula')
            n += 1
    return f'{n} splits'


# ---- what does not fit
def test_what_does_not_fit_is_refused(trainer, folder):
    args = CASES[0].make(folder) + ['--batch-size', 1, '--steps', 1, '--out', f'{folder}/none']

    def refused(ranks, more, *words):
        r = Run(trainer, *args, *more, ranks=ranks, ok=False)
        r.refused(*words)
        said = {re.sub(r'rank \d+: ', '', line) for line in r.text.splitlines() if line.startswith('error')}
        check(len(said) == 1, f'{more}: not one line: {said}')
        check(not os.path.exists(f'{folder}/none'), f'{more}: a refused run left something behind')
    refused(4, ['--zero', 2, '--shard-size', 3], '--shard-size 3', '4 ranks')
    refused(4, ['--zero', 3, '--shard-size', 8], '--shard-size 8', '4 ranks')
    refused(2, ['--shard-size', 2], '--shard-size', '--zero')
    refused(1, ['--zero', 4], '--zero')
    refused(1, ['--zero', 3, '--shard-size', -1], '--shard-size')
    refused(1, ['--reduce-dtype', 'fp16'], '--reduce-dtype')
    refused(3, ['--zero', 3, '--shard-size', 2], '--shard-size 2', '3 ranks')
    refused(2, ['--timeout', 0], '--timeout 0: out of range')   # which already the start of MPI takes
    refused(2, ['--resume', f'{folder}/absent'], 'no checkpoint is there')
    if kind(trainer) == 'cpu':
        refused(2, ['--zero', 2, '--reduce-dtype', 'bf16'], '--reduce-dtype', 'CUDA')


# ---- planted errors
class Planted:
    """An error: after `anchor` in the trainers' text `old` is replaced by `new`; the finder must fail with that split."""
    def __init__(self, name, kinds, anchor, old, new, finder, *split):
        self.name, self.kinds, self.anchor, self.old, self.new, self.finder = name, kinds, anchor, old, new, finder
        self.split = Split(*split)


PLANTED = [
    Planted("the next rank's share", 'cpu emu', 'void state_share(', 'm->plan.rank % m->plan.shard',
            '(m->plan.rank + 1) % m->plan.shard', 'training', 2, 1),
    Planted('a unit that is not reduced', 'cpu emu', 'static void unit_reduce(', 'if (m->plan.zero < 2 && !last) return;',
            'if ((m->plan.zero < 2 && !last) || u == 2) return;', 'gradients', 2, 0),
    Planted('stale weights in a slot', 'cpu emu', 'static void weights_changed(', 'm->plan.zero < 3', '1', 'training', 2, 3),
    Planted('a sum over ranks replaces that of the micro-step before', 'cpu', 'static void unit_reduce(', 'to[i] += sum[i];',
            'to[i] = sum[i];', 'gradients', 2, 2),
    Planted('a sum over ranks replaces that of the micro-step before', 'emu', 'static void unit_reduce(',
            'convert<1>(own_grads(m, u), x + first, n);', 'convert<0>(own_grads(m, u), x + first, n);', 'gradients', 2, 2),
    Planted('copies keep their own sums', 'cpu', 'void reduce_finish(', 'm->plan.shard == m->plan.ranks', '1',
            'gradients', 4, 1, 2),
    Planted('copies keep their own sums', 'emu', 'static void unit_reduce(', 'm->plan.shard < m->plan.ranks', '0',
            'gradients', 4, 1, 2),
    Planted('the norm of a share for that of all', 'cpu emu', 'double gradient_norm(', 'comm_sum(squares, n);', ';',
            'training', 2, 2),
    Planted('weights before the update are gathered', 'emu', 'static void update_units(', 'm->is_whole[u] = 0;', ';',
            'training', 2, 1),
    Planted('weights are used before they are there', 'emu', 'static void unit_gather(',
            'comm_join(m->gathered[u]);', ';', 'order', 2, 3),
    Planted('a sum does not wait for the gradients', 'emu', 'void comm_follow(',
            'cudaCheck(cudaStreamWaitEvent(gpu.comm_stream, gpu.ready, 0));', ';', 'order', 2, 2),
    Planted('a slot of gradients is opened before its sum is complete', 'emu', 'static void grads_open(',
            'comm_join(m->reduced[v]);', ';', 'order', 2, 2),     # ZeRO 3: the layer's gather, begun later, is waited for
]


def planted_program(trainer, folder, rows):
    """The trainer with all errors, of which the variable PLANTED chooses one."""
    name, compiler = ('train_litespark.c', ['gcc', '-std=gnu11', '-march=native']) if kind(trainer) == 'cpu' else \
        ('train_litespark.cu', ['g++', '-x', 'c++', '-std=c++17', '-Idev/emu'])
    with open(name) as f:
        text = f.read()
    text = text.replace('#define CEIL_DIV',
                        '#define planted (getenv("PLANTED") ? atoi(getenv("PLANTED")) : -1)\n#define CEIL_DIV', 1)
    for i, row in enumerate(rows):
        at = text.find(row.anchor)
        at = text.find(row.old, at) if at >= 0 else -1
        check(at >= 0, f'{row.name}: its text is not in {name}: mend its row')
        both = f'if (planted == {i}) {{ {row.new} }} else {{ {row.old} }}' if row.old.endswith(';') else \
            f'(planted == {i} ? {row.new} : {row.old})'
        text = text[:at] + both + text[at + len(row.old):]
    with open(f'{folder}/{name}', 'w') as f:
        f.write(text)
    flags = [subprocess.run(['mpicc', f'--showme:{k}'], stdout=subprocess.PIPE, text=True).stdout.split()
             for k in ('compile', 'link')]
    program = f'{folder}/planted_{kind(trainer)}'
    done = subprocess.run([*compiler, '-O1', '-w', '-fopenmp', '-DUSE_MPI', *flags[0], f'{folder}/{name}', '-o', program,
                           *flags[1], '-ldl', '-lm'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    check(done.returncode == 0, f'the copy does not compile:\n{done.stdout[-1000:]}')
    return [program]


def test_planted_errors_are_found(trainer, folder):
    needs(trainer, 'cpu', 'emu')
    if level == 'quick' and kind(trainer) == 'emu':
        raise Absent('is for the level long')
    rows = [row for row in PLANTED if kind(trainer) in row.kinds]
    program = planted_program(trainer, folder, rows)
    case = CASES[0]
    args, run = case.make(folder), run_args(RUN, folder)
    want = case.gradients(trainer, args, Split(1))
    one = Training(trainer, run, Split(1), f'{folder}/one', *lengths(4))
    more = ['--timeout', 60]

    def find(finder, split, out):
        if finder == 'training':
            Training(program, run, split, out, *lengths(4), *more).compare('', one)
            return
        for seed in range(1, 9) if finder == 'order' else [0]:
            os.environ['EMU_ASYNC'] = str(seed)
            try:
                compare_grads('', case.gradients(program, args, split, 2, *more), want)
            finally:
                del os.environ['EMU_ASYNC']
    tried = set()
    for row in rows:                                            # nothing is planted: all must be well
        if (row.finder, str(row.split)) not in tried:
            find(row.finder, row.split, f'{folder}/none{len(tried)}')
            tried.add((row.finder, str(row.split)))
    missed = []
    for i, row in enumerate(rows):
        os.environ['PLANTED'] = str(i)
        try:
            find(row.finder, row.split, f'{folder}/{i}')
            missed.append(row.name)
        except Failed as e:                                     # of these errors none stops a rank: that is a slow machine
            check('waited ' not in str(e), f'{row.name}: {e}')
        finally:
            del os.environ['PLANTED']
    check(not missed, f'not found: {missed}')
    return f'{len(rows)} found'


def main():
    global level
    if '--level' in sys.argv:
        at = sys.argv.index('--level')
        level = sys.argv[at + 1] if at + 1 < len(sys.argv) else ''
        del sys.argv[at:at + 2]
        if level not in ('quick', 'long', 'ptx'):
            sys.exit('--level: quick, long or ptx')
    harness.main(globals(), __doc__)


main()
