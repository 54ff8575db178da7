#!/bin/sh
# The compiled core under AddressSanitizer and UndefinedBehaviorSanitizer, on every ISA that this processor has.
# In: PYTHON with the dev extra.  Out: exit code 0 if no test fails and no sanitizer speaks.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$root" && "${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== a build with sanitizers"
"$python" -m build --sdist --outdir "$work" "$root" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
CFLAGS="$flags" LDFLAGS="$flags" "$python" -m pip install --disable-pip-version-check -q --no-deps \
    --target "$work/site" "$work"/*.tar.gz

for module in "$work"/site/cconv/cpu/*.so; do
    nm -D "$module" | grep -q __asan_ || { echo "$module is not instrumented" >&2; exit 1; }
done

echo "== tests"
mkdir "$work/empty"
cd "$work/empty"
for part in conftest.py cases.py kernels backends gpu; do cp -r "$root/tests/$part" .; done
cp "$root/pyproject.toml" .
# Python itself leaks on purpose at exit; libgomp's threads are never joined.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export PYTHONPATH="$work/site" PYTHONMALLOC=malloc
# The GPU kernels, compiled for the host with the same sanitizers: every case, every kernel and tile on a few layers.
"$python" -m pytest -q -n auto -m "not slow" --cconv-from "$work/site" --one-in 5 --sanitize --need-compilers \
    -o cache_dir="$work/cache" \
    gpu/test_shim.py gpu/test_kernels.py gpu/test_tensors.py gpu/test_operators.py gpu/test_half.py \
    -k "wrong_index or whole_numbers or every_tile or rides or ride_along or known_ahead or several_chains or any_float \
        or anywhere or finite or pools or windows or several_steps or wide_softmax or (test_tensors and not spreads) \
        or (spreads and add)"
# Of the generated layers one in five: all of them would take half an hour, and each reaches every kernel anyway.
tests() { "$python" -m pytest -q --cconv-from "$work/site" --one-in 5 -p no:cacheprovider kernels backends "$@"; }
tests -n auto -m "not slow and not alone"
tests -m "not slow and alone and not timed"
