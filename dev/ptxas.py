#!/usr/bin/env python3
"""Registers, shared memory and spills of every kernel: reads what `nvcc -Xptxas -v` printed.

    make ptxas                                              builds for sm_80 and sm_90a and prints the table
    dev/ptxas.py [--markdown] sm_80=FILE sm_90a=FILE...     prints it from saved output; --markdown: as dev/results/ptxas.md

Exit status 1 when a kernel spills registers, when ptxas made wgmma serial or ignored setmaxnreg, or a file names no kernel.
Of these ptxas tells as a note, which no -Werror stops: notes and warnings are printed below the table. Shared memory is the
static part; what a launch adds (dynamic) is not known to the compiler.
"""
import re
import subprocess
import sys

HEAD = """# CUDA kernels: what the compiler reports

%s, -O3: registers per thread, bytes of static shared memory and bytes of spilled registers (stores/loads) of every
kernel. Shared memory that a launch adds (dynamic) is in section 5 of [SPEED.md](../SPEED.md). `make ptxas` prints the
table of the present source and ends with status 1 if a kernel spills; it does not write this file, which is renewed by

    make ptxas && python3 dev/ptxas.py --markdown sm_80=build/ptxas_sm_80.txt \\
        sm_90a=build/ptxas_sm_90a.txt > dev/results/ptxas.md
"""


def parse(text, arch):
    """Of what was compiled for arch {mangled name: (registers, static shared bytes, spill store bytes, spill load bytes)}"""
    kernels, name, spills = {}, None, (0, 0)
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '([^']+)' for '(\w+)'", line):
            name, spills = m.group(1) if m.group(2) == arch else None, (0, 0)
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(m.group(1)), int(m.group(2))
        elif (m := re.search(r"Used (\d+) registers", line)) and name:
            smem = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            kernels[name] = (int(m.group(1)), int(smem.group(1)) if smem else 0) + spills
            name = None
    return kernels


def remarks(text):
    """What ptxas says besides the figures, each once: lines with a code "(C7510)", and warnings."""
    found = re.findall(r"^ptxas (?:info|warning)\s*:\s*(?:\([^)]*\) )*?(\(C\d+\).*)$|^ptxas warning\s*:\s*(.*)$", text, re.M)
    return list(dict.fromkeys((a or b).strip() for a, b in found))


def demangle(names):
    """Short readable names; c++filt where there is one (binutils, or the CUDA toolkit's cu++filt)."""
    for tool in ("c++filt", "cu++filt"):
        try:
            out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True,
                                 check=True).stdout.splitlines()
            return dict(zip(names, map(shorten, out)))
        except (OSError, subprocess.CalledProcessError):
            pass
    return {n: n for n in names}


def shorten(name):
    depth = 0
    for i, c in enumerate(name):            # drop the arguments, keep the template's
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ").replace("__nv_bfloat16", "bf16")


def nvcc_version():
    try:
        out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        out = ""
    m = re.search(r"release ([0-9.]+)", out)
    return "nvcc " + (m.group(1) if m else "(version unknown)")


def main(args):
    markdown = "--markdown" in args
    files = [a.split("=", 1) for a in args if "=" in a]
    if not files:
        print(__doc__)
        return 2
    tables, notes = {}, []
    for arch, path in files:
        try:
            with open(path, errors="replace") as f: text = f.read()
        except OSError as e:
            print(f"ptxas: cannot read {path}: {e.strerror}")
            return 1
        notes += [f"{arch}: {x}" for x in remarks(text)]
        tables[arch] = parse(text, arch)
        if not tables[arch]:
            print(f"ptxas: no kernel for {arch} in {path}: {text.strip().splitlines()[-1] if text.strip() else 'empty'}")
            return 1
    names = demangle(sorted({k for t in tables.values() for k in t}))
    head = ["kernel"] + [f"{arch} {what}" for arch in tables for what in ("registers", "shared B",
                                                                          "spill st/ld B")]
    rows = []
    for mangled in sorted(names, key=lambda n: names[n]):
        row = [names[mangled]]
        for t in tables.values():
            regs, smem, store, load = t.get(mangled, ("-", "-", "-", "-"))
            row += [str(regs), str(smem), f"{store}/{load}"]
        rows.append(row)
    if markdown:
        print(HEAD % nvcc_version())
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for r in rows:
            print("| " + " | ".join(["`" + r[0] + "`"] + r[1:]) + " |")
    else:
        width = [max(len(r[i]) for r in [head] + rows) for i in range(len(head))]
        for r in [head] + rows:
            print(" | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, width))))
    for mangled, short in names.items():
        notes = [re.sub(rf"\b{re.escape(mangled)}\b", short, x) for x in notes]
    for x in notes: print(("\n" if markdown else "") + f"note: {x}")
    spilling = [f"{names[k]} on {arch}" for arch, t in tables.items() for k, v in t.items() if v[2] or v[3]]
    print(("\n" if markdown else "") + f"{len(rows)} kernels, {len(spilling)} spill"
          + (": " + ", ".join(spilling) if spilling else ""))
    slow = [x for x in notes if re.search("wgmma.*serialized|setmaxnreg.*ignored", x, re.I)]
    if slow: print(f"{len(slow)} of the notes: wgmma without overlap, or registers that stay where they were")
    return 1 if spilling or slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
