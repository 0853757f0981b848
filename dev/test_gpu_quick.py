#!/usr/bin/env python3
"""`make test-gpu-quick`: dev/gpu_quick.sh where no GPU is. The trainer is the emulated one with small shapes; nvidia-smi, ncu,
compute-sanitizer, the benches and torch are stand-ins, first on PATH, that print what the real ones print."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
TOP = tempfile.mkdtemp()
FAKE, BIN, BARE = f"{TOP}/fake", f"{TOP}/bin", f"{TOP}/bare"
counts = {"ok": 0, "FAIL": 0}


def ended(pid, seconds=10):
    """1 if the process is gone or only waits to be collected; a killed one may take a moment."""
    for _ in range(seconds * 20):
        try:
            if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] in "ZX":
                return 1
        except (FileNotFoundError, ProcessLookupError):
            return 1
        time.sleep(0.05)
    return 0


def check(name, ok, what=""):
    counts["ok" if ok else "FAIL"] += 1
    print(f"{'ok  ' if ok else 'FAIL'}  {name}" + ("" if ok else f": {str(what)[:1500]}"), flush=True)


def script(path, text):
    with open(path, "w") as f: f.write("#!/bin/sh\n" + text)
    os.chmod(path, 0o755)


def rows_of(out):
    try:
        with open(f"{out}/results.jsonl") as f: return [json.loads(x) for x in f.read().split("\n")[:-1]]
    except OSError:
        return []


def start(out, parts, path=f"{FAKE}:{os.environ['PATH']}", **env):
    env = {"OUT": out, "PARTS": parts, "PATH": path, "BIN": BIN, "CUDA_TRAINER": "build/train_litespark_emu", "TINY": "1", "TMPDIR": TOP, "PYTHONPATH": f"{TOP}/no_torch",
           "EMU_THREADS": "1", "OMP_NUM_THREADS": "1", "HOME": TOP} | env
    return subprocess.Popen(["/bin/sh", "dev/gpu_quick.sh"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    text = process.communicate(timeout=600)[0]
    return process.returncode, text


def run(out, parts, **more):
    status, text = finish(start(out, parts, **more))
    rows = rows_of(out)
    with open(f"{out}/summary.md") if os.path.exists(f"{out}/summary.md") else open(os.devnull) as f: summary = f.read()
    return status, text, rows, {r["part"]: r["end"] for r in rows if "end" in r}, summary


for folder in (FAKE, BIN, BARE, f"{TOP}/no_torch"): os.makedirs(folder)
with open(f"{TOP}/no_torch/torch.py", "w") as f: f.write("raise ImportError('none', name='torch')\n")
script(f"{FAKE}/nvidia-smi", """case $1 in
    --query-gpu=*) echo 'NVIDIA Pretence, 580.1, 9.0, 143771 MiB, 5 MiB, 345 MHz, 1980 MHz, 2619 MHz, 3201 MHz, 75.1 W, 700.00 W, 30, Enabled, Disabled' ;;
    *) echo '    Clocks | "graphics": 345 MHz' ;;
esac
""")
script(f"{FAKE}/ncu", """while [ "$1" != --log-file ]; do shift; done
cat >"$2" <<'END'
==PROF== Connected to process 7 (/x/train_litespark_cuda)
==PROF== Disconnected from process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","t","h","void attention_forward_kernel1<128>(__nv_bfloat16 *, float *)","1","13","(128, 1, 1)","(8, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","1,500"
"1","7","t","h","void attention_forward_kernel1<128>(__nv_bfloat16 *, float *)","1","13","(128, 1, 1)","(8, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","us","2.5"
"2","7","t","h","nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT","1","13","(384, 1, 1)","(8, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","usecond","10.00"
END
""")
script(f"{FAKE}/compute-sanitizer", """tool=$2
shift 4
"$@" || exit 1
case $tool in
    memcheck) echo '========= ERROR SUMMARY: 0 errors' ;;
    racecheck) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' ;;
esac
""")
TABLE = """
%s  B 8 T 2048 H 16 K 2 D 128 bf16   floor 69.49 us (FLOP-bound)   NVIDIA Pretence, driver 13000
 #  idea                                                         error of allowed              median us        p10..p90            GB/s  TFLOP/s %% floor  regs    smem  spill
 1  K and V take turns: one lands while the other works          out 1.2e-03 of 2.4e-03           229.50     228.10..231.00        731.2   299.57    30.3   168  104448      0  <- shipped  <- best
"""
for op in ("attention_forward", "attention_backward"): script(f"{BIN}/{op}", f"case \"$*\" in '--time '[0-9]*) ;; *) exit 2 ;; esac\ncat <<'END'{TABLE % op}END\n")
for name in ("train_litespark", "train_litespark_double", "test_cuda"): os.symlink(os.path.abspath(f"build/{name}"), f"{BIN}/{name}")
with open(f"{BIN}/commit", "w") as f: f.write("abc1234\n")

try:
    # every part, over the emulation
    status, text, rows, ends, summary = run(f"{TOP}/all", "facts proof vocabulary sanitizer training kernels attention hf benchmark", PROOF_WORDS="d104", PROOF_CASES="d104", DEADLINE="600",
                                            LIMITS="proof=100 vocabulary=100 sanitizer=100 training=200")     # a busy machine
    of = lambda part: [r for r in rows if r["part"] == part and "end" not in r]
    check("all parts end", status == 0 and list(ends) == "facts proof vocabulary sanitizer training kernels attention hf benchmark".split(), (status, ends, text[-1500:]))
    check("hf is skipped and says why", ends.get("hf") == "skipped: torch cannot be imported", ends)
    check("benchmark, too", ends.get("benchmark") == "skipped: torch cannot be imported", ends)
    check("the others are done", all(ends.get(p) == "done" for p in "facts proof vocabulary sanitizer training kernels attention".split()), ends)
    check("facts", {"part": "facts", "name": "power.limit", "value": "700.00 W"} in rows and {"part": "facts", "name": "commit", "value": "abc1234"} in rows, of("facts"))
    check("proof in both forms", {(r["mlp"], r["says"]) for r in of("proof")} == {("auto", "ok"), ("auto", "end"), ("passes", "ok"), ("passes", "end")}, of("proof"))
    check("V = 151,936 as the twin has it", [r["says"] for r in of("vocabulary")] == ["ok", "ok"], of("vocabulary"))
    check("sanitizer", [(r["tool"], r["says"]) for r in of("sanitizer")] == [("memcheck", "ok"), ("racecheck", "ok")], of("sanitizer"))
    trained = of("training")
    check("training rows", len(trained) == 11 and all(r.get("tokens_per_sec", 0) > 0 and r["loss"] > 0 and "says" not in r for r in trained)
          and {"3B, whole", "15M", "100M", "3B L 4", "llama3.2-1B L 4"} == {r["name"] for r in trained} and {"passes", "products"} <= {r["mlp"] for r in trained}, trained)
    attention = [r for r in of("kernels") if r["kernel"] == "attention_forward"]
    check("kernels beside the model", len(attention) == 2 and attention[0]["launches"] == 2 and attention[0]["us"] == 4 and "modelled_us" in attention[0]
          and any(r["kernel"] == "cuBLASLt" and r["us"] == 10 for r in of("kernels")), of("kernels"))
    check("attention benches", [(r["name"], r.get("us"), r.get("tflops")) for r in of("attention")] ==
          [("attention_forward", 229.5, 299.57), ("torch", None, None), ("attention_backward", 229.5, 299.57)], of("attention"))
    wanted = ["# gpu-quick: NVIDIA Pretence", "| power.limit | 700.00 W |", "| proof, --mlp passes | 2 | 0 | 0 | yes |", "| hf | skipped: torch cannot be imported |",
              "| passes | attention_forward | 2 | 4.0 |", "| litespark | attention_forward, kernel 1 | B 8 T 2048 H 16 K 2 D 128 bf16 | 229.5 | 299.57 |", "| 3B, whole |", "racecheck | 1 | 0 | 0 | yes |"]
    check("the summary", all(x in summary for x in wanted), [x for x in wanted if x not in summary] + [summary])
    check("it is also printed last", text.endswith(summary), text[-500:])
    check("nothing is left in the temporary folder", not [x for x in os.listdir(TOP) if x.startswith("tmp.")], os.listdir(TOP))

    # a part that hangs, with a child in another process group that ignores SIGTERM
    hang = f"{TOP}/hang"
    os.makedirs(hang)
    script(f"{hang}/nvidia-smi", f"exec python3 -c \"import os, signal, time; os.setpgid(0, 0); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                                 f"open('{TOP}/pid', 'w').write(str(os.getpid())); time.sleep(500)\"\n")
    script(f"{BIN}/fails", "echo 'ok    first: fine'\necho 'FAIL  second: says \"no\" \\\\ to'\necho '1 passed, 1 failed'\nexit 1\n")
    os.remove(f"{BIN}/test_cuda")
    os.rename(f"{BIN}/fails", f"{BIN}/test_cuda")
    out, began = f"{TOP}/killed", time.time()
    p = start(out, "facts proof", path=f"{hang}:{os.environ['PATH']}", LIMITS="facts=3", GRACE="1")
    early = False
    while p.poll() is None and not early and time.time() - began < 60:
        seen = rows_of(out)
        early = any(r.get("name") == "machine" for r in seen) and not any("end" in r for r in seen)
        time.sleep(0.05)
    status, text = finish(p)
    rows = rows_of(out)
    ends = {r["part"]: r["end"] for r in rows if "end" in r}
    check("rows are written as they come", early, rows)
    check("a part that hangs is killed at its limit", ends.get("facts") == "killed at its limit of 3 s", ends)
    check("and leaves its rows", sum(r["part"] == "facts" and "name" in r for r in rows) == 3, rows)
    check("and no process", ended(open(f"{TOP}/pid").read()))
    check("and the next part goes on", ends.get("proof") == "done" and sum(r.get("says") == "FAIL" for r in rows) == 2, rows)
    check("a FAIL is in the summary and in the exit status", status == 1 and '    proof: FAIL: second: says "no" \\ to' in open(f"{out}/summary.md").read(), (status, text))

    # a machine without python3 and without libcublasLt
    for name in "sh bash date timeout setsid mktemp sed awk tr grep head tail nproc uname cat dirname mv mkdir rm sleep".split():
        if shutil.which(name): os.symlink(shutil.which(name), f"{BARE}/{name}")
    shutil.copy(f"{FAKE}/nvidia-smi", BARE)
    status, text, rows, ends, summary = run(f"{TOP}/bare_out", "facts proof training", path=BARE)
    check("without python3: facts and proof", "gpu-quick: no python3: facts and proof only" in text and ends == {"facts": "done", "proof": "done", "training": "skipped: no python3"}, (ends, text))
    check("and a summary all the same", "700.00 W" in summary and "skipped: no python3" in summary, summary)
    script(f"{BARE}/ldd", "echo '	libcublasLt.so.99 => not found'\n")
    status, text, rows, ends, summary = run(f"{TOP}/cublas_out", "facts proof", path=BARE)
    check("without libcublasLt", "no libcublasLt.so.99 in the usual places" in text and ends == {"facts": "done", "proof": "skipped: no libcublasLt.so.99 in the usual places"}, (ends, text))

    # what no longer fits; bad input; a second run into the same folder
    status, text, rows, ends, summary = run(f"{TOP}/cublas_out", "facts", DEADLINE="6")
    check("past the deadline", status == 0 and ends == {"facts": "skipped: the deadline of 6 s"}, (ends, text))
    run(f"{TOP}/cublas_out", "facts", DEADLINE="6")
    for name, word in (("results.jsonl", "no libcublasLt.so.99"), ("log.txt", "==== facts")):
        with open(f"{TOP}/cublas_out/before_{name}") as f: before = f.read()
        check(f"a third run keeps the first one's {name}", word in before, before)
    status, text, _, _, _ = run(f"{TOP}/bad", "facts prof")
    check("an unknown part is refused in one line", status == 2 and text.startswith("error: PARTS: no part 'prof': choose of facts proof") and text.count("\n") == 1, text)
finally:
    shutil.rmtree(TOP, ignore_errors=True)
print(f"{counts['ok']} passed, {counts['FAIL']} failed")
sys.exit(counts["FAIL"] > 0)
