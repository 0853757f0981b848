#!/usr/bin/env python3
"""Moves kernels between train_litespark.cu and the benches in dev/, and prints what compiler and emulator say
of them.

    dev/kernels.py extract dev/OP.cu  the parts of the trainer that a bench needs, to standard output. What
                                      the bench (or bench.cuh) defines itself is only declared there, so the
                                      trainer's launchers start the bench's kernels
    dev/kernels.py check              every __global__ function of the trainer stands in a bench, with the
                                      same text; so do __device__ functions that a bench defines too
    dev/kernels.py sync               copies the trainer's text over functions of the same name in dev/*.cu
    dev/kernels.py counts LOG=REPORT... table: what OP --model N printed beside what ptxcpu --report counted
"""
import glob
import json
import os
import re
import sys

TRAINER = "train_litespark.cu"
LOOSE = (2, 3, 8)                   # sections of which extract takes what is used: vocabulary; ops; numbers


class Item:
    """One thing at file level: function, enum, struct, variable or macro. start, end: line numbers."""
    def __init__(self, text, code, start, end, section):
        self.text, self.code, self.start, self.end, self.section = text, code, start, end, section
        head = re.sub(r"__(launch_bounds|align|attribute)__\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", " ",
                      code)
        head = re.sub(r"^template\s*<[^>]*>\s*", "", head).strip()
        if m := re.match(r"#define\s+(\w+)", head):
            self.names = {m[1]}
        elif head.startswith("#"):
            self.names = set()
        elif re.match(r"(typedef\s+)?enum\b", head):
            self.names = set(re.findall(r"\w+", re.sub(r"=[^,}]*", "", head))) - {"enum", "typedef"}
        elif m := re.match(r"(?:typedef\s+)?struct\s+(\w+)", head):
            self.names = {m[1]} | set(re.findall(r"\}\s*(\w+)\s*;$", head))
        elif re.match(r"typedef\b", head):
            self.names = set(re.findall(r"(\w+)\s*;$", head))
        else:
            m = (re.search(r"(\w+)\s*\(", head.split("=")[0].split("{")[0]) or
                 re.search(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?:=|;|,|$)", head))
            self.names = {m[1]} - {"void"} if m else set()
        other = head.startswith(("#", "enum", "typedef", "struct"))
        self.is_function = not other and bool(re.search(r"\)\s*\{", code))
        self.is_device = self.is_function and bool(re.search(r"__(global|device)__", code.split("{")[0]))
        self.is_kernel = self.is_function and "__global__" in code.split("{")[0]

    def used(self):
        return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"twin::\w+", " ", self.code)))

    def declaration(self):
        return self.text[:body_at(self.text)].rstrip() + ";"


def body_at(text):
    """Where a function's body begins: the first brace outside parentheses (no comment before has one)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "{" and depth == 0:
            return i
    return len(text)


def strip(text):
    """Without comments, strings and character constants."""
    tokens = r'''//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+''' + "'"
    return re.sub(tokens, lambda m: '""' if m[0][0] in "\"'" else " ", text, flags=re.S)


def items_of(path):
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    out, section, at = [], 0, 0
    code = re.sub(r"^/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), "\n".join(lines), count=1, flags=re.S | re.M)
    bare = [strip(l) for l in code.split("\n")]
    while at < len(lines):
        if m := re.match(r"// ==== (\d+)\.", lines[at]):
            section = int(m[1])
        if not bare[at].strip():
            at += 1
            continue
        start, depth = at, 0
        if bare[at].startswith("#"):
            while lines[at].endswith("\\"):
                at += 1
        else:
            while True:
                depth += sum(bare[at].count(c) for c in "({") - sum(bare[at].count(c) for c in ")}")
                if depth == 0 and bare[at].rstrip().endswith((";", "}")):
                    break
                at += 1
        at += 1
        out.append(Item("\n".join(lines[start:at]), "\n".join(bare[start:at]), start, at, section))
    return out, lines


def extract(bench):
    """The includes of section 2, then what the bench uses of LOOSE: vocabulary, plumbing, and, as they stand,
    the verbs at the head of section 3 with their #ifdef; at last the ops."""
    items, lines = items_of(TRAINER)
    section = {int(m[1]): i for i, line in enumerate(lines) if (m := re.match(r"// ==== (\d+)\.", line))}
    shared = lines.index("// SHARED BEGIN")
    verbs = range(section[3], lines.index("#endif", section[3]) + 1)
    own, roots = set(), set()
    for path in (bench, "dev/bench.cuh"):
        for item in items_of(path)[0]:
            own |= item.names
            roots |= item.used()
    for item in items:
        if item.start in verbs:
            roots |= item.used()
    loose = [i for i in items if i.names and i.start not in verbs and
             (i.section in LOOSE and i.start > shared or i.code.startswith("#define"))]
    needed, todo = set(), roots
    while todo:
        found = [i for i in loose if i not in needed and i.names & todo]
        needed |= set(found)
        todo = set().union(*(i.used() for i in found if not i.names & own)) if found else set()

    def show(*sections):
        for item in sorted((i for i in needed if i.section in sections), key=lambda i: i.start):
            if item.names & own:
                print(item.declaration() if item.is_function else "")
            else:
                print(f"#line {item.start + 1} \"{TRAINER}\"\n{item.text}")

    print(f"// Written by dev/kernels.py from {TRAINER} for {bench}.\n#pragma once")
    print("\n".join(lines[section[2]:shared]))
    show(*range(3), *range(4, 100))             # the vocabulary, then the plumbing (macros from anywhere)
    print(f"#line {verbs.start + 1} \"{TRAINER}\"")
    print("\n".join(lines[verbs.start:verbs.stop]))
    show(3)


def benches():
    return sorted(p for p in glob.glob("dev/*.cu"))


def by_name(items):
    out = {}
    for item in items:
        if item.is_device:
            for name in item.names:
                out.setdefault(name, []).append(item)
    return out


def check():
    trainer, bad, homes = by_name(items_of(TRAINER)[0]), 0, {}
    for path in benches():
        for name, items in by_name(items_of(path)[0]).items():
            if name not in trainer:
                continue
            homes.setdefault(name, []).append(path)
            for item in items:
                if item.text not in [t.text for t in trainer[name]]:
                    bad += 1
                    theirs = trainer[name][0].text.split("\n")
                    mine = item.text.split("\n")
                    n = next((k for k, (a, b) in enumerate(zip(mine, theirs)) if a != b),
                             min(len(mine), len(theirs)))
                    there = f"{TRAINER}:{trainer[name][0].start + n + 1}"
                    print(f"{path}:{item.start + n + 1}: {name} is not what stands at {there} (make sync "
                          f"copies the trainer's)")
    for name, items in trainer.items():
        if any(i.is_kernel for i in items) and name not in homes:
            bad += 1
            print(f"{TRAINER}:{items[0].start + 1}: {name} is in no bench of dev/")
    return bad


def sync():
    trainer = by_name(items_of(TRAINER)[0])
    for path in benches():
        items, lines = items_of(path)
        changed = 0
        for item in reversed([i for i in items if i.is_device]):
            theirs = [t for n in item.names for t in trainer.get(n, [])]
            if len(theirs) == 1 and theirs[0].text != item.text:
                lines[item.start:item.end] = theirs[0].text.split("\n")
                changed += 1
        if changed:
            with open(path, "w", encoding="utf-8") as f:
                f.write("\n".join(lines))
            print(f"{path}: {changed} functions from {TRAINER}")
    return 0


def table(head, rows):
    width = [max(len(str(r[i])) for r in [head] + rows) for i in range(len(head))]
    for r in [head] + rows:
        cells = [str(x).ljust(w) if i == 1 else str(x).rjust(w) for i, (x, w) in enumerate(zip(r, width))]
        print("  ".join(cells).rstrip())


def counts(pairs):
    """One row per variant: compulsory and all sectors in MB, shared-memory conflicts, time and its limit."""
    head = ["#", "idea", "MB once", "MB all", "bank", "occupancy", "us", "limit", "regs", "smem", "spill"]
    tables = {}
    for pair in pairs:
        log, report = pair.split("=", 1)
        with open(log) as f:
            line = next((l for l in f if l.startswith("model|")), None)
        if not line or not os.path.exists(report):
            print(f"FAIL {log}: no counts")
            return 1
        _, number, idea, shape, mbytes, floor = line.strip().split("|")
        title = f"{shape}   compulsory {float(mbytes):.2f} MB, floor {float(floor):.2f} us"
        rows = tables.setdefault(title, [])
        with open(report) as f:
            kernels = json.load(f)["kernels"]
        longest = max(kernels, key=lambda k: k["model"]["estimate_us_per_launch"] * k["launches"])
        banks = [k[x]["bank_conflict_factor"] for k in kernels for x in ("shared_loads", "shared_stores")]
        banks = [b for b in banks if b]
        rows.append([number, idea, f"{sum(k['dram_bytes_compulsory'] or 0 for k in kernels) / 1e6:.2f}",
                     f"{sum(k['dram_bytes_all_sectors'] for k in kernels) / 1e6:.2f}",
                     f"{max(banks):.2f}" if banks else "-",
                     f"{min(k['theoretical_occupancy'] for k in kernels):.2f}",
                     f"{sum(k['model']['estimate_us_per_launch'] * k['launches'] for k in kernels):.2f}",
                     longest["model"]["limit"],
                     max(k["registers"] for k in kernels),
                     max(k["dynamic_smem"] + k["static_smem"] for k in kernels),
                     sum(max(0, k["spill_store_bytes"]) + max(0, k["spill_load_bytes"]) for k in kernels)])
    for title, rows in tables.items():
        print(title)
        table(head, rows)
    return 0


def main(args):
    if args[:1] == ["extract"] and len(args) == 2:
        return extract(args[1])
    if args == ["check"]:
        return 1 if check() else 0
    if args == ["sync"]:
        return sync()
    if args[:1] == ["counts"]:
        return counts(args[1:])
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
