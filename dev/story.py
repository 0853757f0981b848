#!/usr/bin/env python3
"""The text of the two trainers: what they share, and that they tell one story.

    dev/story.py sync     copies every region SHARED BEGIN .. SHARED END of train_litespark.c into train_litespark.cu
    dev/story.py check    the regions are equal; both files have the same sections and define the same functions in sections 3 to 6;
                          no line is wider than 110 columns
"""
import re
import sys

from kernels import items_of

C, CU = "train_litespark.c", "train_litespark.cu"
REGION = re.compile(r"^// SHARED BEGIN\n.*?^// SHARED END\n", re.M | re.S)
WIDTH = 110

# Functions of sections 3 to 6 that one file has and the other has not, and why.
ONLY = {
    C: {"exp_x": "vector code; the GPU has an instruction", "sqrt_x": "float or double",
        "min_int": "CUDA has min", "store_matrix": "the .cu's types round", "round_bf16": "likewise",
        "rotate_head": "a loop of its own there", "attention_mask": "mask_scores, on fragments",
        "fold_row": "vector code", "min_int": "min() there",
        "matmul_naive": "the reference", "take_x": "take() knows the type"},
    CU: {"matmul": "cuBLASLt; the .c's is in section 16", "with_precision": "bf16 or float: templates, where the twin rounds",
         "copy_to_host": "another memory", "copy_from_host": "another memory", "copy_staged": "another memory", "feed_at": "another memory",
         "feed_batch": "another memory", "feed_weights": "another memory", "take_sums": "another memory",
         "sort_rows": "no atomics in the embedding's gradient", "update_units": "types of m and v", "write_state": "another memory", "convert": "the wire's type",
         "sum_over_ranks": "the wire's type", "gather_start": "the next unit comes while this one computes",
         "add_sum": "sums on the device", "column_sums": "sums over blocks", "partial_blocks": "sums over blocks", "group_parts": "blocks on SMs", "part_sums": "blocks on SMs", "add_parts": "blocks on SMs",
         "lanes_per_head": "threads of a head", "matmul_plan": "cuBLASLt", "matrix_layout": "cuBLASLt",
         "cuda_check": "CUDA", "launch_kernel": "CUDA", "device_attribute": "CUDA", "with_width": "widths compiled", "with_wgmma_width": "widths compiled",
         "choose_kernels": "devices differ", "mlp_forward_passes": "two forms", "mlp_forward_products": "two forms",
         "mlp_backward_passes": "two forms", "mlp_backward_products": "two forms",
         "mlp_forward_wgmma": "sm_90a", "mlp_backward_wgmma": "sm_90a", "rows_map": "sm_90a", "product_blocks": "sm_90a",
         "attention_forward_f32": "fp32", "attention_forward_mma": "two forms", "attention_forward_wgmma": "two forms",
         "attention_backward_f32": "fp32", "attention_backward_mma": "two forms", "attention_backward_wgmma": "two forms",
         "has_wgmma": "sm_90a", "tensor_map": "sm_90a", "head_map": "sm_90a", "heads_together": "sm_90a"},
}


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def sync():
    mine = REGION.findall(read(C))
    text = read(CU)
    if len(REGION.findall(text)) != len(mine):
        print(f"{CU} has {len(REGION.findall(text))} shared regions, {C} has {len(mine)}: write the empty marks first")
        return 1
    regions = iter(mine)
    changed = REGION.sub(lambda m: next(regions), text)
    if changed != text:
        with open(CU, "w", encoding="utf-8") as f:
            f.write(changed)
    return 0


def functions(path, device=False):
    """Of sections 3 to 6: functions by name, without what only a GPU runs unless `device`."""
    return {n for i in items_of(path)[0] if i.section in (3, 4, 5, 6) and i.is_function and (device or not i.is_device)
            for n in i.names}


def check():
    bad = []
    texts = {path: read(path) for path in (C, CU)}
    regions = {path: REGION.findall(t) for path, t in texts.items()}
    if not regions[C] or regions[C] != regions[CU]:
        which = next((i + 1 for i, (a, b) in enumerate(zip(regions[C], regions[CU])) if a != b), "one")
        bad.append(f"the shared regions of the trainers differ, in region {which} (make sync copies the .c's)")
    for path, t in texts.items():
        for i, line in enumerate(t.split("\n")):
            if len(line) > WIDTH:
                bad.append(f"{path}:{i + 1}: {len(line)} columns, more than {WIDTH}")
    sections = {path: re.findall(r"^// ==== (\d+\. [^:=]*)", t, re.M) for path, t in texts.items()}
    for a, b in zip(sections[C][:15], sections[CU][:15]):
        if a.split(".")[0] != b.split(".")[0]:
            bad.append(f"section {a!r} of {C} is {b!r} in {CU}")
    for mine, other in ((C, CU), (CU, C)):
        alone = functions(mine) - functions(other, device=True)
        for name in sorted(alone - set(ONLY[mine])):
            bad.append(f"{name} is defined in sections 3 to 6 of {mine} and not of {other} (exceptions: ONLY in dev/story.py)")
        for name in sorted(set(ONLY[mine]) - alone):
            bad.append(f"dev/story.py: {name} is no exception of {mine}")
    print("\n".join(bad), end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["sync"], ["check"]):
        print(__doc__)
        sys.exit(2)
    sys.exit(sync() if sys.argv[1] == "sync" else check())
