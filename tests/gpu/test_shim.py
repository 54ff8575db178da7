"""Shim: the tester tested: what it must find is planted, and found."""

import ctypes
import re
import subprocess
import sys

import numpy as np
import pytest

from cconv import reference
from cconv.gpu import compile, launch
from cconv.planning import plan, specs, tensors
from cconv.weights import Weights

#: A kernel that turns the elements of a block round by way of shared memory.
TURN = """
#define THREADS 64
struct Turn {
    const float *x;
    float *y;
    int count;
};
CC_KERNEL(THREADS) turn(const Turn p) {
    CC_SHARED(float, room, [THREADS]);
    const int t = cc_thread();
    if (BEFORE) cc_barrier();
    room[t] = p.x[cc_block() * THREADS + t];
    BARRIER;
    p.y[cc_block() * THREADS + t] = room[THREADS - 1 - t];
}
"""
PARAMETERS = np.dtype([("x", "u8"), ("y", "u8"), ("count", "i4")], align=True)


def _library(host, folder, barrier: str, before: str = "0", flags=None):
    macros = f"#define T float\n#define BARRIER {barrier}\n#define BEFORE {before}\n"
    text = f'{macros}#include "{compile.HEADER}"\n{TURN}'
    return host.library(text, "turn", folder, flags or host.FLAGS)


def _turned(host, library, seed: int, blocks: int = 3):
    x, y = np.arange(64 * blocks, dtype=np.float32), np.full(64 * blocks, np.nan, np.float32)
    parameters = np.zeros((), PARAMETERS)
    parameters["x"], parameters["y"] = x.ctypes.data, y.ctypes.data
    error = host.run(library, parameters, blocks, 64, seed)
    return error, y, x.reshape(blocks, 64)[:, ::-1].ravel()


@pytest.mark.parametrize("switch", [(), ("-DSHIM_UCONTEXT",)], ids=["own", "ucontext"])
def test_a_kernel_with_its_barrier_is_right_in_every_order(host, scratch, switch):
    library = _library(host, scratch, "cc_barrier()", flags=host.FLAGS + switch)
    for seed in range(20):
        error, got, want = _turned(host, library, seed)
        assert error is None
        np.testing.assert_array_equal(got, want)


def test_a_missing_barrier_is_seen(host, scratch):
    """As NaN: what was not written yet is no number of the block before."""
    library = _library(host, scratch, "(void)0")
    for seed in range(5):
        error, got, _ = _turned(host, library, seed)
        assert error is None
        assert np.isnan(got).any()


@pytest.mark.parametrize("barrier", ["if (t < 32) cc_barrier()", "if (t == 7) return; cc_barrier()"])
def test_a_barrier_that_not_all_threads_reach_is_an_error(host, scratch, barrier):
    error, *_ = _turned(host, _library(host, scratch, barrier), 1)
    assert error == "a barrier that not all threads of a block reach"


def test_every_run_has_another_order(host, scratch):
    """Without the barrier a run's result is its order."""
    library = _library(host, scratch, "(void)0")
    assert len({_turned(host, library, seed)[1].tobytes() for seed in range(10)}) > 5


#: Every source that has a kernel, and what it cannot be compiled without.
SOURCES = {
    "conv.cu": {"OUTPUTS": 64, "PIXELS": 32, "ROWS": 4, "COLUMNS": 4, "DEPTH": 8, "PREACTIVATED": 0},
    "depthwise.cu": {"R": 0}, "pack.cu": {}, "pool.cu": {"AVERAGE": 0}, "pointwise.cu": {}, "tensors.cu": {},
    "arithmetic.cu": {"KIND": "cc_add", "SWAPPED": 0}, "matmul.cu": {},
}  # fmt: skip


def test_structs_are_read_as_the_compiler_lays_them_out(host, scratch):
    """Every member of every struct, where the compiler has it and as large; launches compare the sizes of the whole."""
    seen = 0
    for file, macros in SOURCES.items():
        text = compile.source(file)
        for name in re.findall(r"^struct (?:alignas\(16\) )?(\w+) {", text, re.M):
            found = launch.struct(file, name)
            asked = ", ".join(f"__builtin_offsetof({name}, {m}), sizeof({name}::{m})" for m in found.names)
            whole = f"{compile.text(file, {'T': 'float', 'ACTIVATE': 'cc_none'} | macros)}\n"
            whole += f"const size_t all[] = {{{asked}}};\n"
            whole += 'extern "C" void places(size_t *to) { memcpy(to, all, sizeof all); }\n'
            entry = re.search(r"^CC_KERNEL\(.+\) (\w+)\(const", text, re.M)[1]
            places = np.zeros(2 * len(found.names), np.uintp)
            host.library(whole, entry, scratch, (*host.FLAGS, "-O0")).places(ctypes.c_void_p(places.ctypes.data))
            want = [number for m in found.names for number in (found.fields[m][1], found.fields[m][0].itemsize)]
            assert places.tolist() == want, (file, name)
            seen += len(want)
    assert seen > 100


def test_a_wrong_index_is_found_by_the_address_sanitizer(host, scratch, sanitize):
    """In a process of its own, since that ends it; needs the sanitizer's library loaded before Python."""
    if not sanitize:
        pytest.skip("without --sanitize")
    for planted in ("float *r = room; r[t + 1] = 0", "p.y[cc_block() * THREADS + t + 64] = 0"):
        library = _library(host, scratch, f"cc_barrier(); {planted}", flags=host.FLAGS + host.SANITIZE)
        code = f"""
import ctypes, numpy as np
library = ctypes.CDLL({library._name!r})
library.room.restype = ctypes.c_size_t
stacks = np.empty(library.room(), np.uint8)
x, y = np.ones(192, np.float32), np.ones(192, np.float32)
parameters = np.array((x.ctypes.data, y.ctypes.data, 0), np.uint64)
library.run(ctypes.c_void_p(parameters.ctypes.data), ctypes.c_longlong(3), 64, ctypes.c_uint64(1),
            ctypes.c_void_p(stacks.ctypes.data))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode != 0, planted
        assert "AddressSanitizer" in done.stderr, planted


BARRIERS = [
    *(("conv.cu", i) for i in range(2)), *(("matmul.cu", i) for i in range(2)), ("pool.cu", 0),
    *(("tensors.cu", i) for i in range(4)),
]  # fmt: skip


def test_every_barrier_is_in_the_list():
    for file in SOURCES:
        assert compile.source(file).count("cc_barrier();") == sum(name == file for name, _ in BARRIERS), file


def _results(host, folder, file: str):
    """A few runs of the kernel of a file that has barriers, and what is right."""
    if file == "conv.cu":
        spec = specs.conv((20, 6, 7), (18, 20, 3, 3), padding=1)
    elif file == "matmul.cu":
        spec = tensors.matmul((30, 70), (70, 20), constant=True)
    elif file == "pool.cu":
        spec = specs.adaptive_pool("max", (3, 20, 20), (1, 1))
    else:
        spec = tensors.SoftmaxSpec(300, 1, "float32")
    twin, rng = host.HostTwin(host.HostDevice(folder)), np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, *spec.image)).astype(np.float32)
    if file == "tensors.cu":
        x.reshape(2, -1)[:, 1] = 200  # of a maximum or a sum that lacks it e^200 or 1 / 0 comes
    weight = rng.integers(-3, 4, (18, 20, 3, 3) if file == "conv.cu" else (70, 20)).astype(np.float32)
    weights = [Weights(lambda _: (weight, None)) for _ in range(2)]
    want = reference.build(plan.single(spec, reference.machine()), weights[0]).run([x])[0]
    program = twin.build(plan.single(spec, twin.machine()), weights[1])
    return [program.run([x])[0].reshape(want.shape) for _ in range(5)], want


@pytest.mark.parametrize(("file", "which"), BARRIERS)
def test_a_barrier_taken_from_a_kernel_is_missed(host, scratch, monkeypatch, file, which):
    """Every barrier of these kernels is needed, and the shim would tell."""
    original = compile.source

    def without(name: str) -> str:
        text = original(name)
        if name != file:
            return text
        parts = text.split("cc_barrier();")
        return "cc_barrier();".join(parts[: which + 1]) + ";" + "cc_barrier();".join(parts[which + 1 :])

    results, want = _results(host, scratch, file)
    assert all(np.allclose(got, want, 1e-6, 1e-6) for got in results)
    assert len({got.tobytes() for got in results}) == 1
    monkeypatch.setattr(compile, "source", without)
    results, want = _results(host, scratch, file)
    assert not all(np.allclose(got, want, 1e-6, 1e-6) for got in results)
