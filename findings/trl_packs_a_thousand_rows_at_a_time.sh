#!/usr/bin/env bash
# TRL 1.16.0: best-fit packing (packing=True, strategy "bfd") sees 1,000 rows at a time, so the order of the file decides how
# many packs there are.
# pack_dataset goes through datasets.map, which hands it batches of 1,000 rows; each batch is packed by itself. A file that is
# sorted by length, or by source, is packed worse than the same rows mixed, whatever the size of the pack.
# Seen: 1,000 rows of 5 tokens then 1,000 of 3, packs of 8: 1,500 packs; the same rows in turn: 1,000.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from datasets import Dataset, disable_progress_bars
from trl.data_utils import pack_dataset
disable_progress_bars()
counts = {}
for name, lengths in ("sorted by length", [5] * 1000 + [3] * 1000), ("alternating", [5, 3] * 1000):
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    counts[name] = len(pack_dataset(rows, seq_length=8, strategy="bfd"))
    print(name, "| 1000 rows of 5 and 1000 of 3 tokens |", counts[name], "packs of 8")
expected = counts == {"sorted by length": 1500, "alternating": 1000}
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
