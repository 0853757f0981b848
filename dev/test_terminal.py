#!/usr/bin/env python3
"""`make test-terminal`: what a run prints on a terminal, where one live line stands in place of the lines of steps, and what it
prints into a pipe. The terminal is a pty; a small model of one keeps what would be seen. Words choose tests by name.

    dev/test_terminal.py build/train_litespark build/train_litespark_emu [word ...]
"""
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time

import harness
from harness import Absent, check as expect

DEV = os.path.dirname(os.path.abspath(__file__))
FIXTURE = f"{DEV}/fixture/llama"
STEP = re.compile(r"step \d+/\d+ \| loss \d+\.\d{4} \| lr \d\.\d\de-\d\d \| grad_norm \d+\.\d{3} \| \d+\.\d ms \| \d+ tok/s \| mfu \S+ \(causal \S+\) \| "
                  r"\S+ J/token \| eta .+")
BAR = re.compile(r"step \d+/\d+ \[=*>? *\] loss \d+\.\d{4} \| \d+ tok/s \| (mfu \d+% \| )?eta .+")


def is_emulated(trainer):
    return "emu" in os.path.basename(trainer[0])


class Screen:
    """Lines as a terminal of so many columns shows them; shown: what every change of the last line left there."""

    def __init__(self, columns):
        self.columns, self.lines, self.at, self.shown, self.wrapped = columns, [""], 0, [], 0

    def feed(self, text):
        for part in re.findall(r"\r|\n|\033\[K|[^\r\n\033]+|\033", text):
            if part == "\r":
                self.at = 0
            elif part == "\n":
                self.lines.append("")
                self.at = 0
            elif part == "\033[K":
                self.lines[-1] = self.lines[-1][:self.at]
                if self.lines[-1]:
                    self.shown.append(self.lines[-1])
            else:
                expect(part != "\033", "an escape sequence that is not \\033[K")
                line = self.lines[-1]
                self.lines[-1] = line[:self.at] + part + line[self.at + len(part):]
                self.at += len(part)
                self.wrapped += bool(re.match(r"step \d+/\d+ [\[|]", self.lines[-1])) and len(self.lines[-1]) >= self.columns


def command(trainer, out, more, batch=None):
    batch = batch or "--batch-size 2 --total-batch-tokens " + ("32" if is_emulated(trainer) else "3200")      # an update of some 30 ms or more
    return [*trainer, "--config", f"{FIXTURE}/config.json", "--train-data", f"{FIXTURE}/tokens.bin", "--val-data", f"{FIXTURE}/tokens.bin",
            *f"--seq-len 16 {batch} --threads 1 --sample-tokens 4 --out".split(), out, *more.split()]


def on_terminal(words, columns=80, after=None, seconds=200, **env):
    """Runs the command on a pty. after: (text, [seconds, signal] ...): these signals once that text has come. (status, Screen)"""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(words, stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", **env}, start_new_session=True)
    os.close(side)
    screen, raw, end = Screen(columns), "", time.time() + seconds
    while time.time() < end:
        if select.select([main], [], [], 0.05)[0]:
            try:
                text = os.read(main, 65536).decode()
            except OSError:                     # all who had the terminal have ended
                break
            if not text:
                break
            raw += text
            screen.feed(text)
        if after and after[0] in raw:
            for pause, number in after[1:]:
                time.sleep(pause)
                process.send_signal(number)
            after = None
    else:
        process.kill()
    os.close(main)
    screen.raw = raw
    return process.wait(), screen


def live_lines(screen):
    """The live lines as shown; none of them may have scrolled up or been wrapped."""
    left = [line for line in screen.lines if "[=" in line or re.match(r"step \d+/\d+ [\[|]", line)]
    expect(not left, f"a live line stayed: {left}")
    expect(not screen.wrapped, "a live line has as many columns as the terminal, or more")
    return [s for s in screen.shown if re.match(r"step \d+/\d+", s)]


def test_one_line_on_a_terminal(trainer, out):
    status, screen = on_terminal(command(trainer, out, "--steps 60 --val-every 20 --checkpoint-every 30 --sample-every 30"))
    expect(status == 0, screen.lines)
    live = live_lines(screen)
    bad = [s for s in live if not BAR.fullmatch(s) or len(s) > 79]
    expect(len(live) > 3 and not bad, f"{len(live)} live lines, {bad}")
    expect(live[-1].count("=") > live[0].count("="), live)
    text = "\n".join(screen.lines)
    for what, n in (("| val loss", 3), ("| saved ", 2), ("\nend | 60 steps", 1)):
        expect(text.count(what) == n, f"{text.count(what)} times '{what}', not {n}: {text}")
    expect(screen.lines[-1] == "", "the last line has no end")


def test_narrow_terminal(trainer, out):
    for columns in (60, 24):
        status, screen = on_terminal(command(trainer, f"{out}{columns}", "--steps 30 --val-every 0 --sample-every 0"), columns)
        live = live_lines(screen)
        expect(status == 0 and len(live) > 1 and all(len(s) < columns for s in live), live)


def test_log_every(trainer, out):
    status, screen = on_terminal(command(trainer, out, "--steps 60 --val-every 0 --sample-every 0 --log-every 25"))
    steps = [int(re.match(r"step (\d+)/", s)[1]) for s in live_lines(screen)]
    expect(status == 0 and steps and set(steps) <= {1, 25, 50, 60}, steps)


def test_plain_lines_in_a_pipe_and_on_a_dumb_terminal(trainer, out):
    more = "--steps 6 --val-every 3 --sample-every 0 --checkpoint-every 0"
    r = subprocess.run(command(trainer, out, more), capture_output=True, text=True)
    lines = [line for line in r.stdout.split("\n") if re.match(r"step \d+/", line)]
    expect(r.returncode == 0 and len(lines) == 6 and all(STEP.fullmatch(line) for line in lines), r.stdout + r.stderr)
    expect("\033" not in r.stdout and "\r" not in r.stdout, "control characters in a pipe")
    status, screen = on_terminal(command(trainer, out + "2", more), TERM="dumb")
    lines = [line for line in screen.lines if re.match(r"step \d+/", line)]
    expect(status == 0 and "\033" not in screen.raw and len(lines) == 6 and all(STEP.fullmatch(line) for line in lines), screen.lines)


def test_signals_end_it_cleanly(trainer, out):
    more = "--steps 1000000 --val-every 0 --sample-every 0 --checkpoint-every 0"
    for number in (signal.SIGTERM, signal.SIGINT):
        status, screen = on_terminal(command(trainer, f"{out}{number}", more), after=("] loss", (0.3, number)))
        expect(status == 0 and live_lines(screen), screen.lines)
        expect(screen.lines[-2].startswith("stopped by a signal") and screen.lines[-1] == "", screen.lines[-3:])


def test_second_interrupt_leaves_a_line_of_its_own(trainer, out):
    if is_emulated(trainer):
        raise Absent("the text is shared: tested on the CPU trainer")
    # inside a long micro-step, which the process is held in until the second signal
    words = command(trainer, out, "--steps 100000 --val-every 0 --sample-every 0", batch="--batch-size 32768")
    status, screen = on_terminal(words, after=("] loss", (0.1, signal.SIGINT), (0.02, signal.SIGSTOP), (1.2, signal.SIGINT), (0.0, signal.SIGCONT)))
    expect(status == 128 + signal.SIGINT and screen.lines[-1] == "" and BAR.fullmatch(screen.lines[-2]), screen.lines[-3:])


def test_skipped_steps_and_errors_stand_above_it(trainer, out):
    status, screen = on_terminal(command(trainer, out, "--steps 100 --val-every 0 --sample-every 0 --lr 1000 --weight-decay 1000 --warmup-steps 0 --checkpoint-every 0"))
    skipped = [line for line in screen.lines if " | skipped | " in line]
    expect(status == 1 and len(skipped) >= 5 and live_lines(screen) is not None, screen.lines)
    expect(screen.lines[-2].startswith("error: step ") and screen.lines[-1] == "", screen.lines[-3:])


def test_ranks(trainer, out):
    if not shutil.which("mpirun"):
        raise Absent("apt-get install openmpi-bin libopenmpi-dev")
    batch = "--batch-size 1 --total-batch-tokens 32" if is_emulated(trainer) else None
    words = [f"{DEV}/run.sh", "-np", "2", "--oversubscribe", *command(trainer, out, batch=batch, more="--steps 40 --val-every 20 --sample-every 0 --checkpoint-every 0")]
    if subprocess.run([*words[:4], *trainer, "--help"], capture_output=True).returncode:
        raise Absent("this build has no MPI")
    status, screen = on_terminal(words)
    expect(status == 0 and len(live_lines(screen)) > 1, screen.lines)
    expect("\n".join(screen.lines).count("| val loss") == 2, screen.lines)
    r = subprocess.run([w.replace(out, out + "2") for w in words], capture_output=True, text=True)
    lines = [line for line in r.stdout.split("\n") if re.match(r"step \d+/", line)]
    expect(r.returncode == 0 and len(lines) == 40 and "\033" not in r.stdout, r.stdout[:1000] + r.stderr)


def run(test):
    return lambda trainer, folder: test(trainer, f"{folder}/out")


harness.main({name: run(test) for name, test in list(globals().items()) if name.startswith("test_")}, __doc__)
