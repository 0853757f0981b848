#!/usr/bin/env bash
# safetensors 0.8.0, numpy: save_file takes a transposed array and writes its values in the order of memory under the shape of
# the transpose. Nothing is said; the file is valid; the values are in the wrong places. 0.7.0 wrote them right, and
# safetensors.torch refuses such a tensor by name.
# A weight that a converter turns with .T, because one library stores (in, out) and another (out, in), is such an array, and so
# is what scikit-learn returns in Fortran's order. The shapes fit, so the model loads, and computes nonsense.
# Reported as safetensors/safetensors issue 825, open in September 2026.
# Seen: w = [[0 1 2] [3 4 5]]; w.T saved and loaded is [[0 1] [2 3] [4 5]] with 0.8.0, [[0 3] [1 4] [2 5]] with 0.7.0.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/save.py" <<'PY'
import sys
import numpy as np
from safetensors.numpy import load_file, save_file
w = np.arange(6, dtype=np.float32).reshape(2, 3)
seen = []
for name, array in ("w.T", w.T), ("w.T in C order", np.ascontiguousarray(w.T)):
    save_file({"w": array}, sys.argv[1])
    loaded = load_file(sys.argv[1])["w"]
    seen.append(np.array_equal(loaded, array))
    print(sys.argv[2], name, "loaded", *loaded.astype(int).tolist(), "right" if seen[-1] else "wrong")
sys.exit(seen != [sys.argv[2] == "0.7.0", True])
PY
status=0
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q safetensors==$version numpy==2.4.6
    "$folder/$version/bin/python" "$folder/save.py" "$folder/w.safetensors" $version || status=1
done
if [ $status = 0 ]; then echo "as stated"; else echo "changed"; fi
exit $status
