"""What the tests in Python of the trainers share: tiny data and models, running a trainer, comparing gradients, counting.

A test is a function test_NAME(trainer, folder) that raises Failed, or Absent when something that it needs is not here.
TRAINER is a program, or a command in quotes that ends with one (`ptxcpu --race -- build/train_litespark_ptx`). Python's own
library only.
"""
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time

TARGET, START = 0x80000000, 0x40000000
top = tempfile.mkdtemp(prefix='litespark_')


class Failed(Exception):
    pass


class Absent(Exception):
    pass


def check(truth, text):
    if not truth:
        raise Failed(text)


def near(what, got, want, tolerance=1e-5):
    check(abs(got - want) <= tolerance * max(abs(want), 1e-30), f'{what}: {got!r}, expected {want!r}')


# ---- rows with flags
def document(prompt, answer):
    """Words of a document of which the answer is trained; nothing predicts a document's first token."""
    words = list(prompt) + [t | TARGET for t in answer]
    words[0] = words[0] & ~TARGET | START
    return words


def row(documents, S):
    words = [w for d in documents for w in d]
    assert len(words) <= S + 1, (len(words), S)
    return words + [START] * (S + 1 - len(words))


def shards(folder, stage, S, V, rows, n_documents, n_shards=1):
    """Writes rows to shards of `folder`; returns the pattern."""
    os.makedirs(folder, exist_ok=True)
    for i in range(n_shards):
        with open(f'{folder}/train_{i:03}.ds', 'wb') as f:
            for words in rows[i::n_shards]:
                f.write(struct.pack(f'<{S + 1}I', *words))
    with open(f'{folder}/metadata.json', 'w') as f:
        json.dump({'dataset': 'test', 'tokenizer': 'none', 'vocab_size': V, 'sequence_length': S, 'token_size_bytes': 4,
                   'stage': stage, 'documents_per_row': n_documents}, f)
    return f'{folder}/train_*.ds'


class Noise:
    """Numbers of a linear congruential generator: the same everywhere."""
    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n

    def tokens(self, n, V):
        return [3 + self.below(V - 3) for _ in range(n)]


# ---- running a trainer
class Run:
    def __init__(self, trainer, *args, ranks=1, ok=True, threads=1):
        command = trainer + [str(a) for a in args] + ['--threads', str(threads)]
        if ranks > 1:
            command = ['mpirun', '--allow-run-as-root', '--oversubscribe', '--bind-to', 'none', '-np', str(ranks)] + command
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        self.text, self.rc = done.stdout, done.returncode
        if ok:
            check(self.rc == 0, f'exit status {self.rc} of {" ".join(command)}:\n{self.text[-2000:]}')

    def refused(self, *words):
        check(self.rc == 1, f'exit status {self.rc}, expected 1:\n{self.text[-1000:]}')
        for word in words:
            check(word in self.text, f'{word!r} is not in the message:\n{self.text[-1000:]}')


def tensors(path):
    with open(path, 'rb') as f:
        n = struct.unpack('<Q', f.read(8))[0]
        header = json.loads(f.read(n))
        data = f.read()
    found = {}
    for name, t in header.items():
        if name != '__metadata__':
            begin, end = t['data_offsets']
            found[name] = struct.unpack(f'<{(end - begin) // 4}f', data[begin:end])
    return found


def norms(grads):
    return {name: math.sqrt(sum(x * x for x in t)) for name, t in grads.items() if name != 'loss'}


def gradients(trainer, *args, ranks=1):
    path = tempfile.mktemp(dir=top, suffix='.safetensors')
    Run(trainer, *args, '--dump-grads', path, ranks=ranks)
    return tensors(path)


def log_of(out, kind='step'):
    with open(f'{out}/log.jsonl') as f:
        return [r for r in map(json.loads, f) if r['type'] == kind]


def compare_grads(what, got, want, tolerance=1e-5):
    """The largest difference of a tensor, relative to its length."""
    near(f'{what}, loss', got['loss'][0], want['loss'][0], tolerance)
    worst = 0
    check(list(got) == list(want), f'{what}: tensors {list(got)}, expected {list(want)}')
    for name in want:
        size = math.sqrt(sum(x * x for x in want[name]))
        difference = math.sqrt(sum((x - y)**2 for x, y in zip(got[name], want[name])))
        check(difference <= tolerance * size + 1e-9, f'{what}, {name}: differs by {difference / (size or 1):.1e}')
        worst = max(worst, difference / (size or 1))
    return worst


def model(folder, family='llama', **keys):
    """config.json of a small model; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = f'{folder}/c.json'
    with open(path, 'w') as f:
        json.dump({'model_type': family, 'vocab_size': 96, 'num_hidden_layers': 2, 'hidden_size': 32, 'num_attention_heads': 4,
                   'num_key_value_heads': 2, 'intermediate_size': 64, 'max_position_embeddings': 512,
                   'tie_word_embeddings': False, 'rms_norm_eps': 1e-5, 'rope_theta': 1e4, 'bos_token_id': None,
                   'eos_token_id': None, 'initializer_range': 0.1, **keys}, f)
    return path


# ---- tiny data of the stages
def sft_documents(n, seed=5, most=14, V=96):
    noise = Noise(seed)
    return [document(noise.tokens(1 + noise.below(8), V), noise.tokens(1 + noise.below(most), V)) for _ in range(n)]


def pairs(n, seed=9, most=9, V=96):
    noise = Noise(seed)
    found = []
    for _ in range(n):
        prompt = noise.tokens(1 + noise.below(5), V)
        found.append([document(prompt, noise.tokens(1 + noise.below(most), V)) for _ in range(2)])
    return found


def packed(groups, S):
    """Rows of whole groups of documents (first fit); the most documents of a row."""
    rows = []
    for group in groups:
        n = sum(map(len, group))
        for r in rows:
            if sum(map(len, r)) + n <= S + 1:
                r.extend(group)
                break
        else:
            rows.append(list(group))
    return [row(r, S) for r in rows], max(map(len, rows))


def alone(groups, S):
    return [row(g, S) for g in groups], max(map(len, groups))


# ---- the program of a file of tests
def main(tests, usage):
    """Runs the tests (names and functions) of each trainer of the command line; exit status 1 if one fails."""
    trainers, words = [], []
    for a in sys.argv[1:]:
        if os.access(a.split()[-1], os.X_OK) and os.path.isfile(a.split()[-1]):
            trainers.append([os.path.abspath(w) if os.path.isfile(w) else w for w in a.split()])
        else:
            words.append(a)
    if not trainers:
        sys.exit(usage)
    for name, value in (('OMP_WAIT_POLICY', 'passive'), ('EMU_THREADS', '1'), ('OMPI_MCA_mpi_yield_when_idle', '1'),
                        ('OMPI_MCA_btl_vader_single_copy_mechanism', 'none'), ('PTXCPU_DEVICES', '8')):
        os.environ.setdefault(name, value)
    counts = {'passed': 0, 'failed': 0, 'skipped': 0}
    for trainer in trainers:
        for name, test in list(tests.items()):
            if not name.startswith('test_') or (words and not any(w in name for w in words)):
                continue
            folder = tempfile.mkdtemp(dir=top)
            title, begin = f'{name[5:]} ({os.path.basename(trainer[-1])})', time.time()
            try:
                said = test(trainer, folder)
                counts['passed'] += 1
                print(f'ok    {title} ({time.time() - begin:.1f} s){": " + said if said else ""}', flush=True)
            except Absent as e:
                counts['skipped'] += 1
                print(f'skipped: {title}: {e}', flush=True)
            except (Failed, OSError, KeyError, IndexError, TypeError, subprocess.SubprocessError) as e:
                counts['failed'] += 1
                print(f'FAIL  {title}: {type(e).__name__}: {str(e)[-1500:]}', flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(top, ignore_errors=True)
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    sys.exit(1 if counts['failed'] else 0)
