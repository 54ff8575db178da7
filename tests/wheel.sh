#!/bin/sh
# The built wheel, in a fresh environment, tested from an empty folder: what a user of `pip install cconv` gets.
# In: PYTHON with the dev extra.  Out: exit code 0 if the sdist and the wheel are whole and the library's tests pass.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$root" && "${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== sdist, and the wheel built from it"
"$python" -m build --outdir "$work/dist" "$root"

echo "== a fresh environment with numpy alone"
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --disable-pip-version-check -q "$work"/dist/*.whl
mkdir "$work/empty"
cd "$work/empty"
"$work/env/bin/python" -c '
import importlib.metadata as metadata
assert {d.metadata["Name"] for d in metadata.distributions()} <= {"cconv", "numpy", "pip", "setuptools"}
import numpy as np, cconv
assert cconv.conv2d(np.ones((1, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32))[0, 0, 0, 0] == 27
'
"$work/env/bin/python" -c 'from cconv.gpu import compile; assert "conv(const Conv p)" in compile.source("conv.cu")'
"$work/env/bin/cconv" info
"$work/env/bin/cconv" cost vgg16 | tail -n 2

echo "== the library's tests against it"
"$work/env/bin/python" -m pip install --disable-pip-version-check -q "$(echo "$work"/dist/*.whl)[batch,ledger,model]" \
    'pytest>=8.4,<10' 'pytest-xdist>=3.8,<4' 'hypothesis>=6.130,<7' 'scikit-image>=0.25,<1' 'matplotlib>=3.9,<4'
for part in conftest.py cases.py postgresql.py planning kernels backends models ledger; do cp -r "$root/tests/$part" .; done
cp "$root/pyproject.toml" .
tests() { "$work/env/bin/python" -m pytest -q --cconv-from "$work/env" planning kernels backends models ledger "$@"; }
tests -n auto -m "not slow and not alone and not postgresql"
tests -m "not slow and alone and not postgresql"
