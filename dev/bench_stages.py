#!/usr/bin/env python3
"""Stages sft and dpo beside TRL on this CPU: the same model (15M, fp32), the same rows, the same number of threads.

    PYTHON_WITH_TRL dev/bench_stages.py [--rounds 3] [--threads 2] [--binary build/train_litespark]    pip install trl

Each round runs every case once, in turn; the table has medians over rounds. A case's speed is that of its updates after the first:
trained tokens (sft) or pairs (dpo) per second. Peak memory is that of the process. TRL runs without gradient checkpointing, which
is faster; its reference log-probs are computed beforehand, outside of the time.
"""
import argparse
import json
import os
import random
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)) + '/../data')
TARGET, START, V, S = 0x80000000, 0x40000000, 32000, 512


def sft_rows(n=48):
    """(ids, length of the prompt): chat-like lengths, 24 to 512 tokens, median about 110."""
    rng, rows = random.Random(1), []
    for _ in range(n):
        total = max(24, min(S, int(rng.lognormvariate(4.7, 0.7))))
        rows.append(([rng.randrange(3, V) for _ in range(total)], total // 3))
    return rows


def dpo_rows(n=24):
    rng, rows = random.Random(2), []
    for _ in range(n):
        prompt = [rng.randrange(3, V) for _ in range(rng.randrange(16, 64))]
        rows.append([prompt] + [[rng.randrange(3, V) for _ in range(max(8, min(190, int(rng.lognormvariate(4, 0.6)))))] for _ in range(2)])
    return rows


def document(ids, prompt):
    return [t | (START if i == 0 else TARGET if i >= prompt else 0) for i, t in enumerate(ids)]


def pack(groups):
    """Best-fit decreasing: rows of whole groups of documents."""
    rows = []
    for g in sorted(groups, key=lambda g: -sum(map(len, g))):
        n = sum(map(len, g))
        fits = [r for r in rows if sum(map(len, r)) + n <= S + 1]
        if fits:
            min(fits, key=lambda r: S + 1 - sum(map(len, r))).extend(g)
        else:
            rows.append(list(g))
    return rows


def write(folder, stage, rows):
    os.makedirs(folder)
    with open(folder + '/train_000.ds', 'wb') as f:
        for r in rows:
            words = [w for d in r for w in d]
            f.write(struct.pack(f'<{S + 1}I', *(words + [START] * (S + 1 - len(words)))))
    with open(folder + '/metadata.json', 'w') as f:
        json.dump({'vocab_size': V, 'sequence_length': S, 'token_size_bytes': 4, 'stage': stage, 'documents_per_row': max(map(len, rows))}, f)
    return folder + '/*.ds'


# ---- the cases: each prints one line of JSON
def litespark(a, top, case):
    stage = case.split()[0]
    if stage == 'sft':
        groups = [[document(*r)] for r in sft_rows()]
    else:
        groups = [[document(p + c, len(p)), document(p + r, len(p))] for p, c, r in dpo_rows()]
    rows = pack(groups) if 'packed' in case else [list(g) for g in groups]
    folder = f'{top}/{case.replace(" ", "_")}'
    data = f'{folder}/*.ds' if os.path.exists(folder) else write(folder, stage, rows)
    out = tempfile.mkdtemp(dir=top)
    updates = 3
    batch = min(8, len(rows)) if 'packed' not in case else min(4, len(rows))
    per_update = len(rows) // batch * batch
    command = [a.binary, '--stage', stage, '--init-from', f'{top}/start/step_00000001', '--train-data', data, '--steps', updates, '--batch-size',
               batch, '--total-batch-tokens', per_update * S, '--lr', 1e-6, '--sample-every', 0, '--checkpoint-every', 0, '--threads', a.threads, '--out', out]
    p = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(p.pid, 0)
    if status:
        sys.exit(f'{case}: exit status {status}: {" ".join(map(str, command))}')
    steps = [r for r in map(json.loads, open(out + '/log.jsonl')) if r['type'] == 'step']
    seconds = sum(s['time_per_iteration'] for s in steps[1:])
    trained = steps[-1]['trained_tokens'] - steps[0]['trained_tokens']
    if stage == 'sft':
        return {'speed': trained / seconds, 'memory': usage.ru_maxrss / 1024, 'loss': steps[0]['loss']}
    pairs = sum(len(r) // 2 for r in rows) * per_update / len(rows) * (updates - 1)
    return {'speed': pairs / seconds, 'memory': usage.ru_maxrss / 1024, 'loss': steps[0]['loss']}


def trl(a, top, case):
    import torch
    torch.set_num_threads(a.threads)
    import datasets
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from tokenizers import Tokenizer, models
    datasets.disable_progress_bars()
    words = Tokenizer(models.WordLevel({**{f't{i}': i for i in range(3, V)}, '<p>': 0, '<s>': 1, '</s>': 2}, unk_token='<p>'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<p>', eos_token='</s>')
    start = f'{top}/start/step_00000001'
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)

    class Clock(TrainerCallback):
        times, logs = [], []

        def on_step_begin(self, *_, **__):
            self.began = time.time()

        def on_step_end(self, *_, **__):
            self.times.append(time.time() - self.began)

        def on_log(self, *_, logs=None, **__):
            self.logs.append(logs)
    common = dict(output_dir=tempfile.mkdtemp(dir=top), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
                  learning_rate=1e-6, max_length=S, save_strategy='no', disable_tqdm=True, max_steps=3, dataloader_num_workers=0, dataset_num_proc=1)
    if case.startswith('sft'):
        from trl import SFTConfig, SFTTrainer
        rows = [{'input_ids': ids, 'labels': [-100] * n + ids[n:]} for ids, n in sft_rows()]
        packing = 'packed' in case
        # one update is a pass over all rows, 8 at a time (packed: 4 rows of S tokens)
        batch = 4 if packing else 8
        accumulate = len(rows) // 8 if not packing else max(1, len(pack([[document(*r)] for r in sft_rows()])) // 4)
        trainer = SFTTrainer(model, args=SFTConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, packing=packing, **common),
                             train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    else:
        from trl import DPOConfig, DPOTrainer
        text = lambda ids: ' '.join(f't{i}' for i in ids)
        words.pre_tokenizer = __import__('tokenizers').pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<p>', eos_token='</s>')
        rows = [{'prompt': text(p) + ' ', 'chosen': text(c), 'rejected': text(r)} for p, c, r in dpo_rows()]
        trainer = DPOTrainer(model, args=DPOConfig(per_device_train_batch_size=8, gradient_accumulation_steps=len(rows) // 8, precompute_ref_log_probs=True,
                                                   beta=0.1, **common), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    sys.stdout = sys.stderr
    trainer.train()
    sys.stdout = sys.__stdout__
    seconds = statistics.mean(Clock.times[1:])
    if case.startswith('sft'):
        work = sum(len(ids) - n for ids, n in sft_rows())
        if 'packed' in case:                                # whole packs of four
            work *= min(1, accumulate * 4 / len(trainer.train_dataset))
    else:
        work = len(rows)
    return {'speed': work / seconds, 'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'loss': Clock.logs[0]['loss']}


CASES = ['sft', 'sft packed', 'dpo', 'dpo packed']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--binary', default='build/train_litespark')
    p.add_argument('--case', help=argparse.SUPPRESS)
    p.add_argument('--top', help=argparse.SUPPRESS)
    a = p.parse_args()
    a.binary = os.path.abspath(a.binary)
    if a.case:
        print(json.dumps(trl(a, a.top, a.case)))
        return
    with tempfile.TemporaryDirectory() as top:
        data = write(f'{top}/begin', 'sft', [[document(*r)] for r in sft_rows(2)])
        subprocess.run([a.binary, '--preset', '15M', '--stage', 'sft', '--train-data', data, '--steps', '1', '--lr', '1e-12', '--batch-size', '1',
                        '--sample-every', '0', '--out', f'{top}/start'], check=True, stdout=subprocess.DEVNULL)
        found = {}
        for r in range(a.rounds):
            for case in CASES:
                found.setdefault(('litespark', case), []).append(litespark(a, top, case))
                if case != 'dpo packed':                    # TRL has no packing for dpo
                    out = subprocess.run([sys.executable, __file__, '--case', case, '--top', top, '--threads', str(a.threads), '--binary', a.binary],
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                    if out.returncode:
                        sys.exit(f'TRL, {case}: {out.stderr[-2000:]}')
                    found.setdefault(('TRL', case), []).append(json.loads(out.stdout.splitlines()[-1]))
                print(f'round {r + 1}: {case}', {k[0]: v[-1] for k, v in found.items() if k[1] == case}, flush=True)
        print(f'{"":12} {"case":12} {"per second":>12} {"MiB":>8} {"first loss":>12}   (trained tokens; dpo: pairs)')
        for (who, case), rows in found.items():
            median = {k: statistics.median(x[k] for x in rows) for k in rows[0]}
            print(f'{who:12} {case:12} {median["speed"]:12.1f} {median["memory"]:8.0f} {median["loss"]:12.5f}')
        speed = lambda who, case: statistics.median(x['speed'] for x in found[who, case])
        memory = lambda who, case: statistics.median(x['memory'] for x in found[who, case])
        print(f'sft packed against TRL unpacked {speed("litespark", "sft packed") / speed("TRL", "sft"):.2f}x, packed '
              f'{speed("litespark", "sft packed") / speed("TRL", "sft packed"):.2f}x; against unpacked rows here '
              f'{speed("litespark", "sft packed") / speed("litespark", "sft"):.2f}x')
        print(f'dpo packed against TRL {speed("litespark", "dpo packed") / speed("TRL", "dpo"):.2f}x; memory sft '
              f'{memory("litespark", "sft packed") / memory("TRL", "sft"):.2f}x, dpo {memory("litespark", "dpo packed") / memory("TRL", "dpo"):.2f}x')


main()
