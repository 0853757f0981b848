#!/usr/bin/env python3
"""A fault campaign: runs of a tiny model are killed, stopped, signalled, starved of disk and damaged, and must go on as if
nothing had been.

    dev/faults.py [--count 1000] [--seed 1] [--ranks 1 2 3 4] [--stages 0 1 2 3] [--only WORD...] [--report dev/FAULTS.md]

Of each number of ranks and ZeRO stage one run is never disturbed: its log is the reference. Another one suffers fault after
fault, each in a process that was started with --resume auto after the one before, until it has done all its steps; then comes
the next. dev/faults.c, preloaded into the ranks, strikes at the n-th call of a kind (write, fsync, rename, ...) in one of
them, so every phase is hit by design and not by luck. After each fault:

    lost        the next start goes on before the newest checkpoint that checksums.txt calls whole, or not at all; one that was
                said to be saved is gone; or a signal that should save did not
    wrong       a loss, gradient norm or evaluation after it, or the last checkpoint, has other bits than the reference
    unbounded   a process was still there when all should have ended
    unclear     it ended with an error, and not with one line that says which

Python's own library only; real full disks need root (a tmpfs).
"""
import argparse
import collections
import errno
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--count', type=int, default=1000)
p.add_argument('--seed', type=int, default=1)
p.add_argument('--seconds', type=float, default=1e9, help='begin no fault after these, though there were to be more')
p.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 3, 4])
p.add_argument('--stages', type=int, nargs='+', default=[0, 1, 2, 3], help='of ZeRO')
p.add_argument('--only', nargs='+', default=[], help='faults whose "kind, phase" holds all these words')
p.add_argument('--trainer', default='build/train_litespark')
p.add_argument('--work', default='build/faults')
p.add_argument('--report', help='write the table to this file')
args = p.parse_args()

STEPS, EVERY, ROWS, T, V = 120, 3, 12, 16, 53       # of a run; ROWS: sequences of an update, for 1 to 4 ranks
TIMEOUT, PATIENCE = 8, 60       # --timeout where a rank is stopped and elsewhere
GRACE = 15                      # seconds for mpirun to end its ranks, on a busy machine
# phase: kind of call, which ranks make it, the n-th call of a process, up to so many microseconds after it
PHASES = {
    'start': ('load', 'any', 1, 1, 300000), 'verify': ('read', 'zero', 1, 9, 100), 'resume': ('read', 'any', 10, 40, 300),
    'data': ('train', 'any', 1, 60, 0), 'step': ('log', 'zero', 2, 14, 5000), 'evaluation': ('val', 'any', 1, 20, 200),
    'create': ('create', 'any', 1, 20, 0), 'write': ('write', 'any', 1, 80, 50), 'fsync': ('sync', 'any', 1, 18, 200),
    'rename': ('rename', 'zero', 1, 5, 50), 'prune': ('remove', 'zero', 1, 16, 50), 'log': ('log', 'zero', 1, 14, 0)}
ALL = [name for name in PHASES if name != 'log']
RUNNING = [name for name in ALL if name not in ('start', 'verify', 'resume')]
WRITES = ['create', 'write', 'fsync', 'rename', 'prune', 'log']
READS = ['verify', 'resume', 'data', 'evaluation']
RANKS, MPIRUN, LAUNCHER = -1, -2, -3                # victims, as dev/faults.c has them
# kind of fault: share of the campaign, fewest ranks, phases
KINDS = {
    'kill -9 of one rank': (24, 1, ALL), 'kill -9 of all ranks': (14, 2, ALL), 'kill -9 of mpirun': (5, 2, ALL),
    'SIGSTOP of one rank': (6, 2, ALL),
    'TERM to one rank': (3, 1, ALL), 'USR1 to one rank': (3, 1, ALL), 'INT to one rank': (3, 1, ALL),
    'HUP to one rank': (3, 1, ALL),
    'TERM to dev/run.sh': (3, 2, ALL), 'USR1 to dev/run.sh': (2, 2, ALL), 'INT to dev/run.sh': (2, 2, ALL),
    'HUP to dev/run.sh': (2, 2, ALL),
    'one call fails, EIO': (5, 1, WRITES), 'one call fails, ENOSPC': (4, 1, WRITES), 'from a call on ENOSPC': (5, 1, WRITES),
    'one read fails, EIO': (4, 1, READS), 'full disk': (5, 1, ['any']),
    'flipped bit': (7, 1, ['at rest']), 'truncated file': (5, 1, ['at rest']), 'missing file': (2, 1, ['at rest']),
    'longer file': (2, 1, ['at rest']), 'all checkpoints damaged': (1, 1, ['at rest'])}
DAMAGES = [kind for kind, row in KINDS.items() if row[2] == ['at rest']]
FAULT = collections.namedtuple('FAULT', 'kind phase ranks stage')
rng = random.Random(args.seed)
work = os.path.abspath(args.work)
counts = collections.defaultdict(collections.Counter)       # by FAULT: count, lost, wrong, unbounded, unclear
slowest = collections.Counter()                             # by kind of fault: seconds from the strike to the end
silent = set()                                              # (when, rank > 0, stage): ranks that make no such calls
failures, said = 0, []                                      # said: a line for each failure


# ---- a tiny model and its data
def write_data():
    with open(f'{work}/config.json', 'w') as f:
        json.dump({'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'vocab_size': V, 'num_hidden_layers': 2,
                   'hidden_size': 32, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24,
                   'max_position_embeddings': 64, 'rms_norm_eps': 1e-5, 'rope_theta': 10000.0, 'hidden_act': 'silu',
                   'tie_word_embeddings': False, 'bos_token_id': 1, 'eos_token_id': 2}, f)
    state = 1
    for name, n in (('train_0', 4000), ('train_1', 3000), ('val_0', 500)):
        tokens = []
        for _ in range(n):
            state = (state * 7 + 3) % V if rng.random() < .75 else rng.randrange(V)
            tokens.append(state)
        with open(f'{work}/{name}.bin', 'wb') as f:
            f.write(struct.pack('<256i', 20240520, 1, n, *[0] * 253) + struct.pack(f'<{n}H', *tokens))


# ---- what lies in a folder, by checksums.txt alone
def files_of(folder):
    """{name: (crc, bytes)} if the list is whole, else None."""
    try:
        with open(f'{folder}/checksums.txt', 'rb') as f:
            text = f.read()
    except OSError:
        return None
    if len(text) < 9 or text[-9:] != b'%08x\n' % zlib.crc32(text[:-9]):
        return None
    lines = [line.split(' ', 2) for line in text[:-9].decode().splitlines()]
    return {name: (int(crc, 16), int(size)) for crc, size, name in lines}


def is_whole(folder):
    files = files_of(folder)
    if not files:
        return False
    for name, (crc, size) in files.items():
        try:
            with open(f'{folder}/{name}', 'rb') as f:
                data = f.read()
        except OSError:
            return False
        if len(data) != size or zlib.crc32(data) != crc:
            return False
    return True


def steps_in(out):
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r'step_\d{8,}', name))


def newest_whole(out):
    return max((step for step in steps_in(out) if is_whole(f'{out}/step_{step:08d}')), default=None)


def records(out, start=0):
    """The records of OUT/log.jsonl from byte `start` on, and where they end."""
    try:
        with open(f'{out}/log.jsonl', 'rb') as f:
            f.seek(start)
            text = f.read()
    except OSError:
        return [], start
    return [json.loads(line) for line in text.splitlines()], start + len(text)


# ---- a process, and a strike at it
Ended = collections.namedtuple('Ended', 'code out err seconds after struck left')


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError:
        return False


def run(ranks, stage, out, timeout, strike=None):
    folder = f'{work}/process'
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(f'{folder}/mpi')
    env = dict(os.environ, FAULT_DIR=folder, FAULT_OUT=out + '/', OMP_NUM_THREADS='1',
               OMPI_MCA_orte_tmpdir_base=f'{folder}/mpi', OMPI_MCA_btl_vader_backing_directory=f'{folder}/mpi', OMPI_MCA_odls_base_sigkill_timeout='1')
    if strike:
        env['FAULT'] = ' '.join(map(str, strike))
    preload = f'LD_PRELOAD={work}/faults.so'
    start = [f'{work}/run.sh', '-np', str(ranks), '--oversubscribe', '-x', preload] if ranks > 1 else ['env', preload]
    command = start + [args.trainer, '--config', f'{work}/config.json', '--train-data', f'{work}/train_*.bin', '--val-data',
                       f'{work}/val_*.bin', '--seq-len', str(T), '--batch-size', '1', '--total-batch-tokens', str(ROWS * T),
                       '--steps', str(STEPS), '--val-every', '5', '--val-batches', '3', '--checkpoint-every', str(EVERY),
                       '--sample-every', '0', '--zero', str(stage), '--lr', '3e-3', '--timeout', str(timeout),
                       '--threads', '1', '--resume', 'auto', '--out', out]
    begun = time.time()
    with open(f'{folder}/out', 'wb') as o, open(f'{folder}/err', 'wb') as e:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=o, stderr=e, env=env, start_new_session=True)
    with open(f'{folder}/launcher', 'w') as f:
        f.write(f'{process.pid}\n')
    try:
        code = process.wait(timeout + GRACE + 60)
    except subprocess.TimeoutExpired:
        code = None
    ended = time.time()

    def number(name):
        try:
            with open(f'{folder}/{name}') as f:
                return int(f.read() or 0)
        except (OSError, ValueError):
            return 0
    struck = number('struck')
    after = ended - os.path.getmtime(f'{folder}/struck') if struck else 0
    pids = [number(str(rank)) for rank in range(ranks)]
    wait = time.time() + (timeout + GRACE if strike and strike[5] == MPIRUN else GRACE)
    while any(pid and alive(pid) for pid in pids) and time.time() < wait:
        time.sleep(.02)
    left = [rank for rank, pid in enumerate(pids) if pid and alive(pid)]
    for pid in [pids[rank] for rank in left] + ([process.pid] if code is None else []):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    if code is None:
        time.sleep(2)                   # mpirun, in a session of its own, ends when its ranks have
        process.wait()
    with open(f'{folder}/out', errors='replace') as o, open(f'{folder}/err', errors='replace') as e:
        return Ended(code, o.read(), e.read(), ended - begun, after, struck, left)


# ---- a run that suffers
def facts(record):
    keys = {'step': ('loss', 'grad_norm', 'lr', 'tokens', 'skipped'), 'val': ('val_loss', 'token_accuracy')}
    return {key: record.get(key) for key in keys[record['type']]}


class Chain:
    def __init__(self, ranks, stage):
        self.ranks, self.stage = ranks, stage
        self.name = f'{ranks}-{stage}'
        self.number = 0
        whole = f'{work}/whole-{self.name}'
        ended = run(ranks, stage, whole, PATIENCE)
        if ended.code != 0:
            sys.exit(f'faults: the undisturbed run on {ranks} ranks, --zero {stage}, ended with {ended.code}: {ended.err}')
        self.reference = {(r['type'], r['step']): facts(r) for r in records(whole)[0] if r['type'] in ('step', 'val')}
        self.last = f'{whole}/step_{STEPS:08d}'
        self.size = sum(size for _, size in files_of(self.last).values())
        self.begin()

    def begin(self):
        self.out = f'{work}/disk/{self.name}'
        shutil.rmtree(self.out, ignore_errors=True)
        self.log_end, self.fault = 0, None

    def bad(self, what, text, ended, fault=None):
        """Counts one failure of the fault (default: the one before) and keeps what the process said."""
        global failures
        fault = fault or self.fault or self.now
        counts[fault][what] += 1
        failures += 1
        said.append(f'{what}: {fault.kind}, {fault.phase}, {fault.ranks} ranks, stage {fault.stage}: {text}')
        print(said[-1], flush=True)
        folder = f'{work}/failed-{failures}'
        os.makedirs(folder)
        with open(f'{folder}/said', 'w') as f:
            f.write(f'{what}: {fault}: {text}\n{ended}\n\n{ended.out}\n{ended.err}')
        if os.path.isdir(self.out):
            shutil.copytree(self.out, f'{folder}/out')

    def check_log(self, ended, expected, misread=False):
        """What the process that just ended has logged: where it went on, the same bits from there. Its last step, or None.
        misread: it could not read the newest checkpoint, and may have taken an older one."""
        try:
            log, self.log_end = records(self.out, self.log_end)
        except ValueError:
            self.bad('wrong', 'log.jsonl has a line that is no JSON', ended)
            self.log_end = os.path.getsize(f'{self.out}/log.jsonl')
            return None
        step = None
        for r in log:
            if r['type'] == 'header':
                if r['step'] < (expected or 0) and not (misread and 'trying an older checkpoint' in ended.err):
                    self.bad('lost', f'goes on at step {r["step"]}, not {expected}', ended)
                elif r['step'] > (expected or 0):
                    self.bad('wrong', f'goes on at step {r["step"]}, and the newest whole checkpoint is {expected}', ended)
            elif r['type'] in ('step', 'val'):
                step = r['step']
                if facts(r) != self.reference[r['type'], step]:
                    self.bad('wrong', f'step {step}: {facts(r)}, undisturbed {self.reference[r["type"], step]}', ended)
                    break
        return step

    def check_saved(self, ended, step, expected, fault):
        """What was said to be saved is there, and work of no more than two intervals is gone."""
        said = [int(n) for n in re.findall(r'saved \S*/step_(\d+)', ended.out)]
        whole = newest_whole(self.out)
        least = max(said + [expected or 0, (step or 0) - 2 * EVERY])
        if (whole or 0) < least:
            self.bad('lost', f'newest whole checkpoint {whole}, at least {least} expected', ended, fault)
        return whole

    def check_end(self, ended):
        """All steps are done: the last checkpoint is the reference's."""
        ours, theirs = files_of(f'{self.out}/step_{STEPS:08d}'), files_of(self.last)
        different = [name for name in theirs if name != 'trainer_state.json' and (ours or {}).get(name) != theirs[name]]
        if different or not is_whole(f'{self.out}/step_{STEPS:08d}'):
            self.bad('wrong', f'the last checkpoint differs in {different or "its checksums"}', ended)
        self.begin()

    def suffer(self, kind, phase):
        """One process with this fault. 1 if it struck."""
        fault = self.now = FAULT(kind, phase, self.ranks, self.stage)
        when, who, first, last, delay = PHASES.get(phase, ('load', 'zero', 0, 0, 0))
        rank = rng.randrange(self.ranks) if who == 'any' else 0
        if (when, rank > 0, self.stage) in silent:
            rank = 0
        if phase == 'resume' and rank:
            first = 1                                   # only rank 0 verifies before it loads
        what, victim = 0, rng.randrange(self.ranks)
        word = kind.split()[0]
        if word == 'kill':
            what = signal.SIGKILL
            victim = {'one': victim, 'all': RANKS, 'mpirun': MPIRUN}[kind.split()[3]]
        elif word in ('TERM', 'USR1', 'INT', 'HUP', 'SIGSTOP'):
            what = getattr(signal, word if word == 'SIGSTOP' else 'SIG' + word)
            victim = LAUNCHER if 'run.sh' in kind else victim
        elif word in ('one', 'from'):
            what, victim = -(errno.EIO if 'EIO' in kind else errno.ENOSPC), word == 'from'
        strike = (rank, when, rng.randint(first, last), rng.randint(0, delay), int(what), int(victim)) if what else None
        if not steps_in(self.out) and phase in ('verify', 'resume'):
            return 0
        if kind in DAMAGES:
            return self.damage(fault)
        expected = newest_whole(self.out)
        filler = f'{work}/disk/filler'
        if kind == 'full disk':
            fill(filler, rng.randrange(int(2.5 * self.size)))
        ended = run(self.ranks, self.stage, self.out, TIMEOUT if word == 'SIGSTOP' else PATIENCE, strike)
        if os.path.exists(filler):
            os.remove(filler)
        struck = ended.struck or (kind == 'full disk' and 'No space left' in ended.err)
        if not struck and strike and rank:
            silent.add((when, True, self.stage))
        step = self.check_log(ended, expected, kind == 'one read fails, EIO')
        if not struck:
            if word == 'SIGSTOP' and re.search(r'waited \d+ s for ', ended.err):
                pass                                    # a busy machine: --timeout is short here
            elif ended.code != 0 and step is None:
                self.bad('lost', f'cannot go on: exit status {ended.code}: {ended.err[-300:]}', ended)
            elif ended.code != 0:
                self.bad('unclear', f'exit status {ended.code} without a fault: {ended.err[-300:]}', ended)
            elif newest_whole(self.out) == STEPS:
                self.check_end(ended)
            return 0
        counts[fault]['count'] += 1
        slowest[kind] = max(slowest[kind], ended.after)
        whole = self.check_saved(ended, step, expected, fault)
        self.check_bounds(ended, fault, TIMEOUT if word == 'SIGSTOP' else PATIENCE)
        self.check_words(ended, fault, word, step, whole)
        self.fault = fault
        if ended.code == 0 and whole == STEPS:
            self.check_end(ended)
        return 1

    def check_bounds(self, ended, fault, timeout):
        hang = 25 if 'mpirun hangs' in ended.err else 0         # after which dev/run.sh ends it
        if ended.code is None or ended.left or ended.after > timeout + GRACE + hang + (60 if timeout == PATIENCE else 0):
            self.bad('unbounded', f'exit status {ended.code} {ended.after:.1f} s after the strike, ranks {ended.left} left',
                     ended, fault)

    def check_words(self, ended, fault, word, step, whole):
        errors = re.findall(r'^error: .*', ended.err, re.M)
        different = {re.sub(r'rank \d+: |waited .* in .*: one is|\S*/\S*', '', line) for line in errors}
        if len(different) > 1:                          # that several ranks say the same is none of it
            self.bad('unclear', f'{len(different)} different lines of error: {errors}', ended, fault)
        if ended.code in (0, None):
            return
        if word == 'SIGSTOP' and not (errors and re.search(r'waited \d+ s for ', errors[0])):
            self.bad('unclear', f'no line says what was waited for: {ended.err[-300:]}', ended, fault)
        elif word in ('one', 'from', 'full') and not errors:
            self.bad('unclear', f'exit status {ended.code} and no line of error: {ended.err[-300:]}', ended, fault)
        elif word == 'kill' and self.ranks > 1 and fault.kind != 'kill -9 of mpirun' \
                and not (errors or 'exited on signal 9' in ended.err):
            self.bad('unclear', f'exit status {ended.code}, nobody says why: {ended.err[-300:]}', ended, fault)
        elif word in ('TERM', 'USR1', 'INT', 'HUP') and step is not None:
            self.bad('lost', f'exit status {ended.code} though begun, newest checkpoint {whole}: {ended.err[-300:]}',
                     ended, fault)

    def damage(self, fault):
        """Damages a file of the newest checkpoint, or one of each, and starts once more, up to a TERM."""
        steps = steps_in(self.out)
        if not steps:
            return 0
        every = fault.kind == 'all checkpoints damaged'
        for step in steps if every else steps[-1:]:
            folder = f'{self.out}/step_{step:08d}'
            name = rng.choice(sorted(os.listdir(folder)))
            damage_file(f'{folder}/{name}', rng.choice(DAMAGES[:4]) if every else fault.kind)
        expected, self.fault = newest_whole(self.out), fault
        counts[fault]['count'] += 1
        ended = run(self.ranks, self.stage, self.out, PATIENCE, (0, 'log', 8, 0, int(signal.SIGTERM), 0))
        step = self.check_log(ended, expected)
        self.check_bounds(ended, fault, PATIENCE)
        if expected is None:                            # it must not start over silently, nor load what is damaged
            if ended.code == 0 or len(re.findall('^error: .*no whole checkpoint', ended.err, re.M)) != 1:
                self.bad('wrong', f'no checkpoint is whole: exit status {ended.code}: {ended.err[-300:]}', ended)
            self.begin()
            return 1
        if steps[-1] != expected and f'step_{steps[-1]:08d}' not in ended.err:
            self.bad('unclear', f'nothing names the damaged checkpoint: {ended.err[-300:]}', ended)
        if ended.code != 0:
            self.bad('lost', f'cannot go on: exit status {ended.code}: {ended.err[-300:]}', ended)
        whole = self.check_saved(ended, step, expected, fault)
        if ended.code == 0 and whole == STEPS:
            self.check_end(ended)
        return 1


def damage_file(path, kind):
    with open(path, 'rb') as f:
        data = bytearray(f.read())
    if kind == 'missing file':
        os.remove(path)
        return
    if kind == 'flipped bit':
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 'truncated file':
        del data[rng.randrange(len(data)):]
    else:
        data += bytes(rng.randint(1, 5000))
    with open(path, 'wb') as f:
        f.write(data)


def fill(path, room):
    """A file that leaves `room` bytes of its disk."""
    info = os.statvfs(os.path.dirname(path))
    with open(path, 'wb') as f:
        f.truncate(0)
        os.posix_fallocate(f.fileno(), 0, max(info.f_bavail * info.f_bsize - room, 1))


# ---- the campaign
def table(rows, head):
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return lines + ['| ' + ' | '.join(str(x) for x in row) + ' |' for row in rows]


def report(seconds):
    results = ('count', 'lost', 'wrong', 'unbounded', 'unclear')

    def sums(key):
        grouped = {}
        for fault, c in counts.items():
            k = key(fault)
            ranks, stages, total = grouped.setdefault(k, (set(), set(), collections.Counter()))
            ranks.add(fault.ranks)
            stages.add(fault.stage)
            total.update(c)
        return grouped

    def spread(numbers):
        return ', '.join(map(str, sorted(numbers)))
    with open('/proc/cpuinfo') as f:
        cpu = next((line.split(':', 1)[1].strip() for line in f if line.startswith('model name')), 'unknown CPU')
    order = list(KINDS)
    by_phase = sorted(sums(lambda f: (f.kind, f.phase)).items(),
                      key=lambda item: (order.index(item[0][0]), (ALL + WRITES + ['any', 'at rest']).index(item[0][1])))
    rows = [[kind, phase, spread(ranks), spread(stages)] + [total[r] for r in results]
            for (kind, phase), (ranks, stages, total) in by_phase]
    by_ranks = sorted(sums(lambda f: (f.ranks, f.stage)).items())
    total = sums(lambda f: 0)[0][2] if counts else collections.Counter()
    command = 'dev/faults.py ' + ' '.join(word for word in sys.argv[1:])
    text = ['# Faults', '', 'Written by `dev/faults.py`, whose head says what the columns mean.', '',
            f'`{command}` on {os.cpu_count()} cores of {cpu}: {total["count"]} faults in {seconds / 60:.0f} minutes: '
            + ', '.join(f'{total[r]} {r}' for r in results[1:]) + '.', '',
            'Longest time from a strike to the end of all: ' +
            ', '.join(f'{kind} {slowest[kind]:.1f} s' for kind in order if slowest[kind] > 1)
            + f' (--timeout {TIMEOUT} for SIGSTOP).', '']
    text += table([[ranks, stage] + [c[r] for r in results] for (ranks, stage), (_, _, c) in by_ranks],
                  ('ranks', 'ZeRO stage') + results) + ['']
    text += table(rows, ('fault', 'phase', 'ranks', 'stages') + results)
    text += [''] + [f'- {line.splitlines()[0][:200]}' for line in said] if said else []
    if args.report:
        with open(args.report, 'w') as f:
            f.write('\n'.join(text) + '\n')
    return total


def main():
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))         # reports what was done by then
    if os.path.exists(work) and not (os.path.exists(f'{work}/.faults') or os.path.exists(f'{work}/faults.so')):
        sys.exit(f'error: --work {args.work} is there and is not of an earlier campaign; name another')
    if os.path.ismount(f'{work}/disk'):
        subprocess.run(['umount', '-l', f'{work}/disk'])
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(f'{work}/disk')
    open(f'{work}/.faults', 'w').close()                # the folder is ours
    write_data()
    subprocess.run([os.environ.get('CC', 'cc'), '-O2', '-shared', '-fPIC', 'dev/faults.c', '-o', f'{work}/faults.so', '-ldl',
                    '-pthread'], check=True)
    shutil.copy(args.trainer, f'{work}/trainer')        # a campaign is long: they may change meanwhile
    shutil.copy('dev/run.sh', f'{work}/run.sh')
    args.trainer = f'{work}/trainer'
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=256m', 'tmpfs', f'{work}/disk']
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    kinds = [k for k in KINDS if mounted or k != 'full disk']
    if not mounted:
        print('skipped: real full disks (mounting a tmpfs needs root); ENOSPC comes from dev/faults.c')
    pairs = [(kind, phase) for kind in kinds for phase in KINDS[kind][2]
             if all(word in f'{kind}, {phase}' for word in args.only)]
    weights = [KINDS[kind][0] / len(KINDS[kind][2]) for kind, _ in pairs]
    if not pairs:
        sys.exit(f'faults: no fault has {args.only} in its name')
    begun, done, tried = time.time(), 0, 0
    try:
        chains = [Chain(ranks, stage) for ranks in args.ranks for stage in args.stages]
        while done < args.count and tried < 10 * args.count and time.time() - begun < args.seconds and not stopped:
            kind, phase = rng.choices(pairs, weights)[0]
            fit = [c for c in chains if c.ranks >= KINDS[kind][1]]
            if fit:
                done += rng.choices(fit, [1 / c.ranks for c in fit])[0].suffer(kind, phase)
            tried += 1
            if tried % 100 == 0:
                print(f'{done} of {args.count} faults after {time.time() - begun:.0f} s', flush=True)
        for chain in chains:                            # what the last faults left goes on to its end
            if chain.fault and steps_in(chain.out):
                expected = newest_whole(chain.out)
                ended = run(chain.ranks, chain.stage, chain.out, PATIENCE)
                chain.check_log(ended, expected)
                chain.check_end(ended)
    finally:
        if mounted:
            subprocess.run(['umount', '-l', f'{work}/disk'])
    total = report(time.time() - begun)
    bad = sum(total[r] for r in ('lost', 'wrong', 'unbounded', 'unclear'))
    print(f'faults: {total["count"]} in {time.time() - begun:.0f} s: {total["lost"]} lost, {total["wrong"]} wrong, '
          f'{total["unbounded"]} unbounded, {total["unclear"]} unclear' + (f'; see {args.work}/failed-*' if bad else ''))
    print(f'{total["count"] - min(bad, total["count"])} passed, {bad} failed')
    sys.exit(bad > 0 or (done < args.count and args.seconds == 1e9) or not done)


main()
