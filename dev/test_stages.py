#!/usr/bin/env python3
"""Stages sft and dpo of the trainers, run as a user runs them.

    dev/test_stages.py [--oracle DIR] TRAINER... [word...]    tests whose names hold a word, all without

TRAINER is a program, or a command in quotes that ends with one (`ptxcpu --race -- build/train_litespark_ptx`). Against TRL's
numbers where DIR (oracle/trl: oracle.json, policy, reference) exists, against equalities that must hold everywhere else.
"""
import fcntl
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import harness
from harness import (START, TARGET, Absent, Noise, Run, alone, check, compare_grads, document, gradients, log_of, model, near, norms,
                     packed, pairs, row, sft_documents, shards)

oracle_dir = None


def start(trainer, folder):
    """A checkpoint of random weights to begin with."""
    rows = [row([document(Noise(1).tokens(9, 96), Noise(2).tokens(8, 96))], 16)]
    data = shards(f'{folder}/plain', 'sft', 16, 96, rows, 1)
    Run(trainer, '--config', model(folder), '--stage', 'sft', '--train-data', data, '--batch-size', 1, '--steps', 1,
        '--lr', 1e-9, '--sample-every', 0, '--out', f'{folder}/start', '--seed', 7)
    return f'{folder}/start/step_00000001'


# ---- tests: trainer, folder
def oracle():
    if not oracle_dir:
        raise Absent("TRL's numbers are not here")
    with open(f'{oracle_dir}/oracle.json') as f:
        return json.load(f)


def test_sft_equals_trl(trainer, folder):
    o = oracle()['sft']
    rows = []
    for p in o['packed']:
        words, at = [], 0
        for n in p['seq_lengths']:
            ids, labels = p['input_ids'][at:at + n], p['labels'][at:at + n]
            words += [i | (TARGET if l != -100 and k else 0) | (0 if k else START) for k, (i, l) in enumerate(zip(ids, labels))]
            at += n
        rows.append(words + [START] * (32 - len(words)))
    data = shards(folder + '/d', 'sft', 31, 96, rows, 8)
    for name, want in o['batches'].items():
        for B in (6, 2, 1):
            got = gradients(trainer, '--stage', 'sft', '--init-from', oracle_dir + '/policy', '--train-data', data,
                            '--batch-size', B, '--total-batch-tokens', 6 * 31)
            near(f'{name}, B {B}: loss', got['loss'][0], want['loss_fp64'])
            for tensor, norm in norms(got).items():
                near(f'{name}, B {B}: {tensor}', norm, want['grad_l2_fp64'][tensor])


DPO = {'sigmoid': [], 'sigmoid_beta0.5': ['--dpo-beta', 0.5], 'robust_ls0.1': ['--dpo-loss', 'robust', '--dpo-label-smoothing', 0.1],
       'sigmoid+sft': ['--dpo-sft-weight', 1], 'sigmoid+0.2sft': ['--dpo-sft-weight', 0.2], 'ipo': ['--dpo-loss', 'ipo'],
       'sigmoid_norm': ['--dpo-loss', 'norm', '--dpo-beta', 0.1], 'not_in_trl_cdpo_ls0.1': ['--dpo-label-smoothing', 0.1],
       'policy_is_reference': []}


def dpo_of_oracle(o, folder):
    groups = []
    for p in o['pairs']:
        whole = [p['prompt_ids'] + p[side] for side in ('chosen_ids', 'rejected_ids')]
        n = len(p['prompt_ids'])
        groups.append([document(ids[:n], ids[n:o['max_length']]) for ids in whole])
    rows, most = packed(groups, 95)
    return shards(folder + '/several', 'dpo', 95, 96, rows, most), shards(folder + '/one', 'dpo', 47, 96, alone(groups, 47)[0], 2)


def test_dpo_equals_trl(trainer, folder):
    o = oracle()['dpo']
    several, one = dpo_of_oracle(o, folder)
    for name, args in DPO.items():
        want = o['variants'][name]
        reference = 'policy' if name == 'policy_is_reference' else 'reference'
        for data, B, rows, S in ((one, 8, 8, 47), (one, 2, 8, 47), (several, 1, None, 95)):
            if rows is None:
                rows = os.path.getsize(os.path.dirname(data) + '/train_000.ds') // 4 // (S + 1)
            got = gradients(trainer, '--stage', 'dpo', '--init-from', oracle_dir + '/policy', '--dpo-reference',
                            f'{oracle_dir}/{reference}', '--train-data', data, '--batch-size', B, '--total-batch-tokens', rows * S, *args)
            near(f'{name}, B {B}, S {S}: loss', got['loss'][0], want['loss_fp64'])
            for tensor, norm in norms(got).items():
                near(f'{name}, B {B}, S {S}: {tensor}', norm, want['grad_l2_fp64'][tensor], 2e-5 if name == 'sigmoid_norm' else 1e-5)


def test_dpo_metrics_equal_trl(trainer, folder):
    o = oracle()['dpo']
    _, one = dpo_of_oracle(o, folder)
    for name in ('sigmoid', 'sigmoid_beta0.5', 'ipo', 'policy_is_reference'):
        reference = 'policy' if name == 'policy_is_reference' else 'reference'
        out = f'{folder}/{name}'
        Run(trainer, '--stage', 'dpo', '--init-from', oracle_dir + '/policy', '--dpo-reference', f'{oracle_dir}/{reference}',
            '--train-data', one, '--batch-size', 8, '--steps', 1, '--out', out, '--sample-every', 0, '--checkpoint-every', 0, *DPO[name])
        step = log_of(out)[0]
        for key, want in o['variants'][name]['metrics_trl'].items():
            if key.startswith(('rewards', 'logps')):
                if name == 'policy_is_reference' and key.startswith('rewards'):
                    check(step[key] == 0, f'{name}: {key} is {step[key]}, not 0')
                else:
                    near(f'{name}: {key}', step[key], want, 3e-5 if key.startswith('rewards') else 1e-5)
        if name == 'policy_is_reference':
            check(step['loss'] == math.log(2), f'loss {step["loss"]!r}, not ln 2')


def test_splits_of_an_update_are_equal(trainer, folder):
    begin = start(trainer, folder)
    sft, _ = alone([[d] for d in sft_documents(8, most=20)], 31)
    dpo, _ = alone(pairs(8), 31)
    for stage, rows, n in (('sft', sft, 1), ('dpo', dpo, 2)):
        data = shards(f'{folder}/{stage}', stage, 31, 96, rows, n)
        args = ['--stage', stage, '--init-from', begin, '--train-data', data, '--total-batch-tokens', 8 * 31]
        if stage == 'dpo':
            args += ['--dpo-sft-weight', 0.3]
        want = gradients(trainer, *args, '--batch-size', 8)
        for B in (1, 2, 4):
            compare_grads(f'{stage}, {B} rows at a time', gradients(trainer, *args, '--batch-size', B), want)
        if shutil.which('mpirun'):
            compare_grads(f'{stage}, 2 ranks', gradients(trainer, *args, '--batch-size', 2, ranks=2), want)


def test_packed_equals_separate(trainer, folder):
    begin = start(trainer, folder)
    groups = {'sft': [[d] for d in sft_documents(12)], 'dpo': pairs(9)}
    for stage, g in groups.items():
        found = []
        for name, (rows, n), S in (('packed', packed(g, 63), 63), ('alone', alone(g, 40), 40)):
            data = shards(f'{folder}/{stage}_{name}', stage, S, 96, rows, n)
            found.append(gradients(trainer, '--stage', stage, '--init-from', begin, '--train-data', data, '--batch-size', 1,
                                   '--total-batch-tokens', len(rows) * S))
        compare_grads(stage, *found)


def test_all_targets_is_pretraining(trainer, folder):
    begin = start(trainer, folder)
    S, noise = 32, Noise(3)
    rows = [noise.tokens(S + 1, 96) for _ in range(4)]
    data = shards(f'{folder}/sft', 'sft', S, 96, [[w | TARGET if i else w | START for i, w in enumerate(r)] for r in rows], 1)
    plain = shards(f'{folder}/plain_rows', 'pretrain', S, 96, rows, 1)
    args = ['--init-from', begin, '--batch-size', 2, '--total-batch-tokens', 4 * S]
    a = gradients(trainer, '--stage', 'sft', '--train-data', data, *args)
    b = gradients(trainer, '--train-data', plain, *args)
    check(a == b, 'rows of targets alone differ from the same text in pre-training')


def test_rows_without_targets_are_harmless(trainer, folder):
    begin = start(trainer, folder)
    S = 31
    rows, n = alone([[d] for d in sft_documents(3)], S)
    full = shards(f'{folder}/full', 'sft', S, 96, rows, n)
    more = shards(f'{folder}/more', 'sft', S, 96, rows + [row([], S)], n)
    args = ['--stage', 'sft', '--init-from', begin, '--batch-size', 1]
    compare_grads('a row of padding', gradients(trainer, *args, '--train-data', more, '--total-batch-tokens', 4 * S),
                  gradients(trainer, *args, '--train-data', full, '--total-batch-tokens', 3 * S))
    for stage in ('sft', 'dpo'):
        empty = shards(f'{folder}/empty_{stage}', stage, S, 96, [row([], S)] * 2, 2)
        grads = gradients(trainer, '--stage', stage, '--init-from', begin, '--train-data', empty, '--batch-size', 2, '--total-batch-tokens', 2 * S)
        check(all(x == 0 for t in grads.values() for x in t), f'{stage}: an update without targets has a loss or a gradient')
        args = ['--stage', stage, '--init-from', begin, '--train-data', empty, '--batch-size', 2, '--total-batch-tokens', 2 * S,
                '--sample-every', 0, '--val-every', 0]
        check('skipped | no target' in Run(trainer, *args, '--steps', 2, '--out', f'{folder}/{stage}_2').text, 'it is not said')
        with open(f'{begin}/model.safetensors', 'rb') as a, open(f'{folder}/{stage}_2/step_00000002/model.safetensors', 'rb') as b:
            check(a.read() == b.read(), f'{stage}: updates without targets changed the weights')
        Run(trainer, *args, '--steps', 9, '--out', f'{folder}/{stage}_9', ok=False).refused('5 updates in a row', 'no target')


def test_resume_has_the_same_bits(trainer, folder):
    begin = start(trainer, folder)
    for stage, (rows, n) in {'sft': packed([[d] for d in sft_documents(40)], 47), 'dpo': packed(pairs(30), 47)}.items():
        data = shards(f'{folder}/{stage}', stage, 47, 96, rows, n, n_shards=2)
        args = ['--train-data', data, '--val-data', data, '--batch-size', 2, '--total-batch-tokens', 4 * 47, '--steps', 8, '--lr', 1e-3,
                '--checkpoint-every', 4, '--keep', 9, '--sample-every', 0]
        Run(trainer, '--stage', stage, '--init-from', begin, *args, '--out', f'{folder}/{stage}_a')
        shutil.copytree(f'{folder}/{stage}_a/step_00000004', f'{folder}/{stage}_b/step_00000004')
        again = Run(trainer, '--resume', f'{folder}/{stage}_b/step_00000004', '--out', f'{folder}/{stage}_b')
        if stage == 'dpo':
            check('one pass over' not in again.text, 'the reference pass ran again')
        for name in sorted(f for f in os.listdir(f'{folder}/{stage}_a/step_00000008') if f.endswith('.safetensors')):
            with open(f'{folder}/{stage}_a/step_00000008/{name}', 'rb') as a, open(f'{folder}/{stage}_b/step_00000008/{name}', 'rb') as b:
                check(a.read() == b.read(), f'{stage}: {name} of the resumed run differs')
        a, b = log_of(f'{folder}/{stage}_a')[4:], log_of(f'{folder}/{stage}_b')
        for key in ('loss', 'grad_norm', 'trained_tokens', 'tokens') + (('rewards/margins',) if stage == 'dpo' else ()):
            check([r[key] for r in a] == [r[key] for r in b], f'{stage}: {key} differs after the resume')
        other = 'sft' if stage == 'dpo' else 'dpo'
        Run(trainer, '--resume', f'{folder}/{stage}_b', '--stage', other, ok=False).refused('--stage', stage, 'cannot change')


def test_policy_is_reference_is_ln_2(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(12), 63)
    data = shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n)
    for precision in ('fp32', 'bf16'):
        out = f'{folder}/{precision}'
        Run(trainer, '--stage', 'dpo', '--init-from', begin, '--train-data', data, '--val-data', data, '--batch-size', 2,
            '--total-batch-tokens', 4 * 63, '--steps', 1, '--lr', 0, '--precision', precision, '--out', out, '--sample-every', 0)
        for record, prefix, loss in ((log_of(out)[0], '', 'loss'), (log_of(out, 'val')[0], 'val_', 'val_loss')):
            near(f'{precision}: {loss}', record[loss], math.log(2), 1e-15)
            for name in ('chosen', 'rejected', 'margins', 'accuracies'):
                check(record[f'{prefix}rewards/{name}'] == 0, f'{precision}: {name} is {record[f"{prefix}rewards/{name}"]}')


def test_reference_files(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(12), 63)
    data = shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n, n_shards=2)
    args = ['--stage', 'dpo', '--train-data', data, '--batch-size', 2, '--total-batch-tokens', 4 * 63, '--steps', 2, '--lr', 1e-3,
            '--sample-every', 0]
    first = Run(trainer, *args, '--init-from', begin, '--out', f'{folder}/a')
    check('one pass over' in first.text, 'no reference pass')
    files = sorted(f for f in os.listdir(f'{folder}/dpo') if f.endswith('.ref'))
    check(len(files) == 2, f'files of the reference: {files}')
    whole = {f: open(f'{folder}/dpo/{f}', 'rb').read() for f in files}
    check('one pass over' not in Run(trainer, *args, '--init-from', begin, '--out', f'{folder}/b').text, 'they are not used')
    check(log_of(f'{folder}/a')[1]['loss'] == log_of(f'{folder}/b')[1]['loss'], 'another loss with kept log p')
    path = f'{folder}/dpo/{files[0]}'
    for at, word in ((8, 'CRC of the reference'), (12, 'CRC of the shard'), (16, 'sequence length'), (20, 'precision'), (24, 'rows'),
                     (28, 'pairs per row'), (70, 'CRC of the values')):
        damaged = bytearray(whole[files[0]])
        damaged[at] ^= 1
        open(path, 'wb').write(damaged)
        Run(trainer, *args, '--init-from', begin, '--out', f'{folder}/c', ok=False).refused(files[0], word, 'remove it')
    open(path, 'wb').write(whole[files[0]][:-4])
    Run(trainer, *args, '--init-from', begin, '--out', f'{folder}/c', ok=False).refused(files[0], 'bytes')
    open(path, 'wb').write(whole[files[0]])
    with open(f'{folder}/dpo/train_000.ds', 'r+b') as f:            # another shard under the same name
        f.seek(4 * 2)
        word = struct.unpack('<I', f.read(4))[0]
        f.seek(4 * 2)
        f.write(struct.pack('<I', word ^ 1))
    Run(trainer, *args, '--init-from', begin, '--out', f'{folder}/c', ok=False).refused(files[0], 'CRC of the shard')
    check(not os.path.exists(f'{folder}/c'), 'a refused run left something behind')
    # a resume whose files are gone needs the model it was begun with
    for f in files:
        os.remove(f'{folder}/dpo/{f}')
    more = ['--resume', f'{folder}/b', '--steps', 3]
    Run(trainer, *more, ok=False).refused('--dpo-reference')
    Run(trainer, *more, '--dpo-reference', f'{folder}/b/step_00000002', ok=False).refused('--dpo-reference', 'was begun with')
    check('one pass over' in Run(trainer, *more, '--dpo-reference', begin).text, 'no pass after the files are gone')


def test_kill_in_the_reference_pass_loses_nothing(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(4000), 63)
    data = shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n, n_shards=2)
    before = {f: open(f'{folder}/dpo/{f}', 'rb').read() for f in os.listdir(f'{folder}/dpo')}
    args = ['--stage', 'dpo', '--init-from', begin, '--train-data', data, '--batch-size', 1, '--total-batch-tokens', 2 * 63,
            '--sample-every', 0]
    killed_in_it = 0                        # so many steps that a fast machine does not save before it is killed
    for _ in range(3):
        p = subprocess.Popen(trainer + list(map(str, args)) + ['--steps', '100000', '--threads', '1', '--out', f'{folder}/a'],
                             stdout=subprocess.PIPE, text=True)
        for line in p.stdout:
            if line.startswith('reference'):
                break
        time.sleep(0.02)
        p.send_signal(signal.SIGKILL)
        killed_in_it += not any(line.startswith('step ') for line in p.stdout)
        p.wait()
    check(killed_in_it, 'every kill came after the pass')
    for f, content in before.items():
        check(open(f'{folder}/dpo/{f}', 'rb').read() == content, f'{f} has changed')
    check(not [f for _, folders, _ in os.walk(f'{folder}/a') for f in folders if f.startswith('step_')], 'a checkpoint of nothing')
    Run(trainer, *args, '--steps', 1, '--out', f'{folder}/a')
    check(os.path.exists(f'{folder}/a/step_00000001'), 'no run after the kills')
    left = [f for f in os.listdir(f'{folder}/dpo') if f not in before and not f.endswith('.ref')]
    check(not left, f'left behind: {left}')


def test_what_does_not_fit_is_refused(trainer, folder):
    begin = start(trainer, folder)
    rows, n = alone([[d] for d in sft_documents(4)], 31)
    sft = shards(f'{folder}/sft', 'sft', 31, 96, rows, n)
    rows, n = alone(pairs(4), 31)
    dpo = shards(f'{folder}/dpo', 'dpo', 31, 96, rows, n)
    base = ['--init-from', begin, '--batch-size', 1, '--steps', 1, '--out', f'{folder}/none']

    def refused(args, *words):
        Run(trainer, *base, *args, ok=False).refused(*words)
        check(not os.path.exists(f'{folder}/none'), 'a refused run left something behind')
    refused(['--train-data', sft], 'sft', 'pretrain')
    refused(['--stage', 'sft', '--train-data', dpo], '--stage dpo', '--stage sft')
    refused(['--stage', 'dpo', '--train-data', sft], '--stage sft', '--stage dpo')
    refused(['--stage', 'sft', '--train-data', sft, '--seq-len', 16], '--seq-len 31', '16')
    refused(['--stage', 'sft', '--train-data', sft, '--document-mask', 'off'], '--document-mask')
    refused(['--stage', 'sft', '--train-data', sft, '--dpo-beta', 1], '--dpo-beta', '--stage dpo')
    refused(['--stage', 'dpo', '--train-data', dpo, '--dpo-loss', 'ipo', '--dpo-label-smoothing', 0.1], '--dpo-label-smoothing', 'ipo')
    refused(['--stage', 'sft', '--train-data', sft, '--epochs', 2], '--epochs', '--steps')
    odd = shards(f'{folder}/odd', 'dpo', 31, 96, [row([d], 31) for d in sft_documents(4)], 2)
    refused(['--stage', 'dpo', '--train-data', odd], 'damaged', 'pairs')
    headless = shards(f'{folder}/headless', 'sft', 31, 96, [[w & ~START for w in row([d], 31)] for d in sft_documents(4)], 2)
    refused(['--stage', 'sft', '--train-data', headless], 'damaged', 'begin')
    beyond = shards(f'{folder}/beyond', 'sft', 31, 200, [row([document([150], [5, 6])], 31)] * 4, 2)
    refused(['--stage', 'sft', '--train-data', beyond], '150', 'vocabulary')


def test_rows_that_break_the_format_are_refused(trainer, folder):
    begin = start(trainer, folder)
    bare = document([20, 21, 22], [])
    sides = [document([5], [6]), document([5], [7])]
    high, padding = row(sides, 31), row(sides, 31)
    high[1] |= 1 << 24
    padding[9] |= TARGET
    for name, words, reason in (('sides', row([sides[0], bare, document([7], [8]), bare], 31), 'without a target'),
                                ('side', row([sides[0], bare], 31), 'without a target'),
                                ('none', row([bare, bare], 31), 'without a target'),
                                ('padding', padding, 'without a target'), ('high', high, str(6 | 1 << 24))):
        data = shards(f'{folder}/{name}', 'dpo', 31, 96, [words], 4)
        Run(trainer, '--stage', 'dpo', '--init-from', begin, '--train-data', data, '--batch-size', 1, '--steps', 1, '--out',
            f'{folder}/none', ok=False).refused(f'{name}/train_000.ds', reason)
    # in sft it costs nothing, so it is no reason to stop
    some = shards(f'{folder}/some', 'sft', 31, 96, [row([bare, sides[0], bare], 31)], 1)
    only = shards(f'{folder}/only', 'sft', 31, 96, [row([sides[0]], 31)], 1)
    args = ['--stage', 'sft', '--init-from', begin, '--batch-size', 1, '--total-batch-tokens', 31]
    compare_grads('a document without a target', gradients(trainer, *args, '--train-data', some),
                  gradients(trainer, *args, '--train-data', only))


def test_log_p_of_the_reference_outlive_other_runs(trainer, folder):
    begin = start(trainer, folder)
    few = alone(pairs(6, most=4), 31)
    many = packed(pairs(9, seed=3, most=3), 31)
    check(few[1] < many[1], 'both have as many pairs in a row')
    shards(f'{folder}/d/a', 'dpo', 31, 96, *few)
    shards(f'{folder}/d/b', 'dpo', 31, 96, *many)
    args = ['--stage', 'dpo', '--init-from', begin, '--batch-size', 1, '--total-batch-tokens', 4 * 31, '--steps', 2,
            '--sample-every', 0]
    a, both = f'{folder}/d/a/*.ds', f'{folder}/d/*/*.ds'
    Run(trainer, *args, '--train-data', a, '--out', f'{folder}/1')
    Run(trainer, *args, '--train-data', both, '--out', f'{folder}/2')
    for i, data in ((3, a), (4, both)):
        again = Run(trainer, *args, '--train-data', data, '--out', f'{folder}/{i}').text
        check('one pass over' not in again, 'the pass ran again')
    losses = [[r['loss'] for r in log_of(f'{folder}/{i}')] for i in (1, 2, 3, 4)]
    check(losses[0] == losses[2] and losses[1] == losses[3], f'another loss with kept log p: {losses}')
    check(losses[3][0] == math.log(2), 'not ln 2 with rows of two folders')


def test_a_reference_is_more_than_its_weights(trainer, folder):
    begin, other = start(trainer, folder), f'{folder}/other'
    shutil.copytree(begin, other)
    os.remove(f'{other}/checksums.txt')
    with open(f'{other}/config.json') as f:
        config = json.load(f)
    config['rope_theta'] = 77777.0
    config.pop('rope_parameters', None)
    with open(f'{other}/config.json', 'w') as f:
        json.dump(config, f)
    data = shards(f'{folder}/dpo', 'dpo', 31, 96, *alone(pairs(4), 31))
    args = ['--stage', 'dpo', '--train-data', data, '--batch-size', 1, '--total-batch-tokens', 4 * 31, '--steps', 1,
            '--sample-every', 0, '--out', f'{folder}/out']
    Run(trainer, *args, '--init-from', begin, '--dpo-reference', other, ok=False).refused(other, 'rope_theta 77777')
    Run(trainer, *args, '--init-from', begin)
    shutil.rmtree(f'{folder}/out')
    check('one pass over' in Run(trainer, *args, '--init-from', other).text, 'log p of another model were taken')


def test_log_p_that_cannot_be_kept_are_not_made(trainer, folder):
    if os.geteuid() == 0:
        raise Absent('root writes into every folder; run it as a user')
    begin = start(trainer, folder)
    data = shards(f'{folder}/dpo', 'dpo', 31, 96, *alone(pairs(4), 31))
    os.chmod(f'{folder}/dpo', 0o555)
    r = Run(trainer, '--stage', 'dpo', '--init-from', begin, '--train-data', data, '--batch-size', 1, '--steps', 1, '--out',
            f'{folder}/x', ok=False)
    os.chmod(f'{folder}/dpo', 0o755)
    r.refused('cannot write', f'{folder}/dpo/train_000')
    check('one pass over' not in r.text, 'it is said after the pass')


def test_evaluation_of_preferences(trainer, folder):
    begin = start(trainer, folder)
    data = shards(f'{folder}/dpo', 'dpo', 31, 96, *alone(pairs(4), 31))
    empty = shards(f'{folder}/empty', 'dpo', 31, 96, [row([], 31)] * 2, 2)
    args = ['--stage', 'dpo', '--init-from', begin, '--eval-only', '--batch-size', 1]
    check('its own reference' in Run(trainer, *args, '--val-data', data).text, 'it is not said that the margins mean nothing')
    named = Run(trainer, *args, '--val-data', data, '--dpo-reference', begin).text
    check('its own reference' not in named, 'said without a reason')
    Run(trainer, *args, '--val-data', empty, ok=False).refused('0 pairs', 'not finite')


def test_flops_are_those_of_all_ranks(trainer, folder):
    if not shutil.which('mpirun'):
        raise Absent('needs mpirun')
    begin, noise = start(trainer, folder), Noise(4)
    rows = [row([document([5], noise.tokens(1 + 4 * i, 96))], 31) for i in range(8)]
    data = shards(f'{folder}/sft', 'sft', 31, 96, rows, 1)
    found = []
    for ranks in (1, 2):
        Run(trainer, '--stage', 'sft', '--init-from', begin, '--train-data', data, '--batch-size', 1, '--total-batch-tokens', 2 * 31,
            '--steps', 4, '--sample-every', 0, '--out', f'{folder}/{ranks}', ranks=ranks)
        found.append([r['model_tflops_per_gpu'] / r['tokens_per_sec_per_gpu'] for r in log_of(f'{folder}/{ranks}')])
    check(max(found[0]) > 1.01 * min(found[0]), f'all updates cost the same: {found[0]}')
    for one, two in zip(*found):
        near('FLOPs per token', two, one, 1e-9)


def test_epochs_replace_the_steps_of_a_resumed_run(trainer, folder):
    begin = start(trainer, folder)
    data = shards(f'{folder}/sft', 'sft', 31, 96, *alone([[d] for d in sft_documents(8)], 31))
    args = ['--batch-size', 1, '--total-batch-tokens', 2 * 31, '--sample-every', 0, '--out', f'{folder}/out']
    Run(trainer, '--stage', 'sft', '--init-from', begin, '--train-data', data, '--steps', 2, *args)
    Run(trainer, '--resume', 'auto', '--epochs', 2, *args)
    check(len(log_of(f'{folder}/out')) == 8, f'{len(log_of(f"{folder}/out"))} updates for two epochs of four')
    check('step 8 of 8' in Run(trainer, '--resume', 'auto', *args).text, 'the next resume has other steps')


def test_a_policy_far_from_its_reference_is_said(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(12), 63)
    data = shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n)
    args = ['--stage', 'dpo', '--init-from', begin, '--train-data', data, '--batch-size', 2, '--total-batch-tokens', 4 * 63, '--steps', 12,
            '--warmup-steps', 0, '--sample-every', 0]
    check('far from its reference' in Run(trainer, *args, '--lr', 3e-2, '--dpo-beta', 100, '--out', f'{folder}/a').text, 'no warning')
    check('far from' not in Run(trainer, *args, '--lr', 1e-4, '--out', f'{folder}/b').text, 'a warning without a reason')
    # losses per token: a sum over an answer's tokens, times their larger beta, says nothing
    args += ['--dpo-loss', 'norm', '--lr', 1e-2]
    text = Run(trainer, *args, '--out', f'{folder}/c').text
    check(max(r['rewards/margins'] for r in log_of(f'{folder}/c')) > 20, 'the margins are too small to test with')
    check('far from' not in text, 'a warning of a sum over tokens')
    check('rewards/margins per token' in Run(trainer, *args, '--dpo-beta', 300, '--out', f'{folder}/d').text, 'no warning per token')


def test_templates_that_differ_are_said(trainer, folder):
    begin, rows = start(trainer, folder), packed([[d] for d in sft_documents(4)], 63)
    for name, template in (('a', 'chatml'), ('b', 'chatml'), ('c', 'zephyr')):
        shards(f'{folder}/{name}', 'sft', 63, 96, *rows)
        with open(f'{folder}/{name}/metadata.json') as f:
            meta = json.load(f)
        with open(f'{folder}/{name}/metadata.json', 'w') as f:
            json.dump(dict(meta, mask='assistant', template=template), f)
    args = ['--stage', 'sft', '--init-from', begin, '--batch-size', 1, '--steps', 0, '--checkpoint-every', 0, '--sample-every', 0]
    for pattern, n in (('[ab]', 0), ('[abc]', 1)):
        text = Run(trainer, *args, '--train-data', f'{folder}/{pattern}/*.ds', '--out', f'{folder}/out{n}').text
        found = [line for line in text.splitlines() if line.startswith('warning: train data: ')]
        check(len(found) == n and all('template: zephyr' in line and 'template: chatml' in line for line in found), text)


def test_shards_of_another_stage_are_refused(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(4), 63)
    data = {'sft': shards(f'{folder}/sft', 'sft', 63, 96, *packed([[d] for d in sft_documents(4)], 63)),
            'dpo': shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n), 'pretrain': f'{folder}/text.bin'}
    with open(data['pretrain'], 'wb') as f:
        f.write(struct.pack('<256i', 20240520, 1, 1000, 96, *[0] * 252) + bytes(2000))
    for stage in data:
        for train, val in [(a, b) for a in data for b in data if (a, b).count(stage) == 1]:
            args = ['--stage', stage, '--init-from', begin, '--train-data', data[train], '--val-data', data[val], '--seq-len', 63,
                    '--batch-size', 1, '--out', f'{folder}/out']
            said = []
            for more in (['--steps', 1], ['--dry-run']):
                run = Run(trainer, *args, *more, ok=False)
                run.refused(f'this run is --stage {stage};')
                said.append([line for line in run.text.splitlines() if line.startswith('error: ')])
            check(said[0] == said[1] and len(said[0]) == 1, f'{stage}: {train}, {val}: {said}')
    check(not os.path.exists(f'{folder}/out'), 'a refused run left a folder')


def test_parts_of_killed_reference_passes_go(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed(pairs(4), 63)
    data = shards(f'{folder}/dpo', 'dpo', 63, 96, rows, n)
    args = ['--stage', 'dpo', '--init-from', begin, '--train-data', data, '--batch-size', 1, '--steps', 1, '--sample-every', 0]
    Run(trainer, *args, '--out', f'{folder}/a')
    where = os.path.dirname(data)
    [ref] = [f for f in os.listdir(where) if f.endswith('.ref')]
    dead = subprocess.Popen(['true'])
    dead.wait()
    locked = open(f'{where}/{ref}.{dead.pid}9.part', 'w')       # of a process on another host that shares the folder
    fcntl.flock(locked, fcntl.LOCK_EX)
    stay = [f'{ref}.{os.getpid()}.part', f'{ref}.{dead.pid}.part.mine', f'{ref}.x.part', f'x.{ref}.{dead.pid}.part', locked.name[len(where) + 1:]]
    go = [f'{ref}.{dead.pid}.part']
    for name in stay[:-1] + go:
        open(f'{where}/{name}', 'w').close()
    os.symlink(f'{begin}/config.json', f'{where}/{ref}.{dead.pid}8.part')
    Run(trainer, *args, '--out', f'{folder}/b')
    found = set(os.listdir(where))
    check(not found & set(go), f'{go} is still there')
    check(found >= {*stay, f'{ref}.{dead.pid}8.part'} and os.path.exists(f'{begin}/config.json'), f'{stay}: what is left is {found}')


def test_checkpoints_carry_the_template_that_was_trained(trainer, folder):
    begin = start(trainer, folder)
    rows, n = packed([[d] for d in sft_documents(4)], 63)
    data = shards(f'{folder}/sft', 'sft', 63, 96, rows, n)
    for where, text in ((begin, 'of the model'), (f'{folder}/sft', 'of the data')):
        for name in ('chat_template.jinja', 'tokenizer_config.json', 'tokenizer.json'):
            with open(f'{where}/{name}', 'w') as f:
                f.write(text)
    args = ['--train-data', data, '--batch-size', 1, '--sample-every', 0]
    Run(trainer, *args, '--stage', 'sft', '--init-from', begin, '--steps', 1, '--out', f'{folder}/out')
    for f in (f'{folder}/sft/chat_template.jinja', f'{folder}/sft/tokenizer_config.json'):
        os.remove(f)
    Run(trainer, '--resume', 'auto', '--steps', 2, '--out', f'{folder}/out')
    for name, want in (('chat_template.jinja', 'of the data'), ('tokenizer_config.json', 'of the data'), ('tokenizer.json', 'of the model')):
        for step in (1, 2):
            with open(f'{folder}/out/step_{step:08}/{name}') as f:
                found = f.read()
            check(found == want, f'{name} of step {step} is that {found}')


def test_tokens_and_targets_are_counted(trainer, folder):
    begin = start(trainer, folder)
    documents = sft_documents(10)
    rows, n = packed([[d] for d in documents], 47)
    data = shards(f'{folder}/sft', 'sft', 47, 96, rows, n)
    text = Run(trainer, '--stage', 'sft', '--init-from', begin, '--train-data', data, '--val-data', data, '--batch-size', 1,
               '--total-batch-tokens', len(rows) * 47, '--epochs', 2, '--out', f'{folder}/out', '--sample-every', 0).text
    steps, targets = log_of(f'{folder}/out'), sum(w >> 31 for d in documents for w in d)
    check(len(steps) == 2, f'{len(steps)} updates for two epochs of one')
    check(steps[1]['tokens'] == 2 * len(rows) * 47 and steps[1]['trained_tokens'] == 2 * targets, f'{steps[1]}')
    check(f'{targets} targets' in text and 'trained' in text, text[-800:])


def main():
    global oracle_dir
    if '--oracle' in sys.argv:
        at = sys.argv.index('--oracle')
        if os.path.exists(f'{sys.argv[at + 1]}/oracle.json'):
            oracle_dir = sys.argv[at + 1]
        del sys.argv[at:at + 2]
    harness.main(globals(), __doc__)


main()
