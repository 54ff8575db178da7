"""Compile: every kernel by NVRTC, where its wheel is installed, without a GPU: no spills, no stack, few registers; and
the cache of what was compiled."""

import os
import re
import subprocess
import sys
import threading
from importlib import resources
from itertools import product
from typing import NamedTuple

import pytest

from cconv import BackendUnavailable
from cconv.gpu import compile
from cconv.planning import cuda, plan, specs, tensors

#: From the A100's to the newest workstation cards'.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
#: The one that `make test` compiles for; `make test-all` has them all.
FIRST = "sm_90"
#: Registers of a multiprocessor, and static shared memory of a block.
REGISTERS, SHARED_BYTES = 65536, 48 << 10


#: dtype -> T.
TYPES = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat"}


def variants(dtype: str, every: bool = False):
    """(file, macros) of what programs compile: every tile, and every form of the others; all activations if `every`,
    else the one with the most code, and for depthwise kernels with code of their own those with the least too."""
    plain = {"T": TYPES[dtype], "ACTIVATE": "cc_none"}
    activations = ("none", *specs.ACTIVATIONS) if every else ("gelu",)
    # What comes before a convolution is a ReLU, and so are most that follow one.
    forms = [(name, 0) for name in activations] + [(name, 1) for name in (("none", "relu") if every else ("relu",))]
    for (activation, before), tile in product(forms, cuda.TILES[dtype]):
        sizes = dict(zip(("OUTPUTS", "PIXELS", "ROWS", "COLUMNS"), tile, strict=True))
        code = {"ACTIVATE": f"cc_{activation}", "DEPTH": cuda.STEP, "PREACTIVATED": before}
        yield "conv.cu", plain | sizes | code
    # With these ptxas has spilled float32 and float16 where it did not with more code.
    least = () if every or dtype == "float64" else ("none", "relu")
    for activation in (*activations, *least):
        known = plain | {"ACTIVATE": f"cc_{activation}"}
        for kernel, stride in product(cuda.known_kernels(dtype), cuda.KNOWN_STRIDES):
            strip = cuda.strip(kernel, stride)
            yield "depthwise.cu", known | {"R": kernel, "S": kernel, "STRIDE": stride, "STRIP": strip}
        if activation not in least:
            yield "depthwise.cu", known | {"R": 0}
    for average in (0, 1):
        yield "pool.cu", plain | {"AVERAGE": average}
    for activation in ("none", *specs.ACTIVATIONS):
        yield "pointwise.cu", plain | {"ACTIVATE": f"cc_{activation}"}
    for function in ("ramp", "clip", "gelu_tanh", "swish"):
        yield "pointwise.cu", plain | {"FUNCTION": f"cc_{function}"}
    for kind, swapped in product(tensors.ARITHMETIC, (0, 1) if every else (1,)):
        yield "arithmetic.cu", plain | {"KIND": f"cc_{kind}", "SWAPPED": swapped}
    for file in ("tensors.cu", "matmul.cu", "pack.cu"):
        yield file, plain


VARIANTS = tuple(one for dtype in TYPES for one in variants(dtype))


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def usage(log: str) -> dict[str, Usage]:
    """What a log of `--ptxas-options=-v` says of every kernel."""
    found = {}
    name, stack, spills = None, 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name, stack, spills = match[1], 0, 0
        elif match := _STACK.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            found[name] = Usage(int(match[1]), stack, spills, int(shared[1]) if shared else 0)
            name = None
    return found


@pytest.fixture(scope="session")
def nvrtc(lacking):
    try:
        return compile.nvrtc()
    except BackendUnavailable as error:
        lacking(str(error))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CCONV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _used(nvrtc, name, macros, arch) -> dict:
    _, log = nvrtc.compile(
        compile.text(name, macros), name, {compile.HEADER: compile.source(compile.HEADER)}, compile.options(arch)
    )
    return usage(log)


def _label(macros) -> str:
    return "-".join(str(value) for value in macros.values())


def kernels(name: str) -> set[str]:
    """What a file's kernels are called."""
    return set(re.findall(r"^CC_KERNEL\(.*\) (\w+)\(const", compile.source(name), re.M))


def _check(nvrtc, name, macros, arch):
    used = _used(nvrtc, name, macros, arch)
    assert used.keys() == kernels(name)
    for kernel, one in used.items():
        assert one.spill_bytes == 0, (kernel, one)
        assert one.stack_bytes == 0, (kernel, one)
        assert one.shared_bytes <= SHARED_BYTES, (kernel, one)
    # Two blocks of other kernels, one of a multiplication's, which hides waiting by its own products, or of doubles.
    if name == "conv.cu":
        threads = macros["OUTPUTS"] // macros["ROWS"] * (macros["PIXELS"] // macros["COLUMNS"])
        assert used["conv"].registers * threads <= REGISTERS
    else:
        blocks = 1 if macros["T"] == "double" else 2
        assert all(blocks * 256 * one.registers <= REGISTERS for one in used.values()), used


@pytest.mark.parametrize(("name", "macros"), VARIANTS, ids=lambda v: v if isinstance(v, str) else _label(v))
def test_kernels_fit_the_registers_of_one_target(nvrtc, name, macros):
    _check(nvrtc, name, macros, FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("T", TYPES.values())
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != FIRST])
def test_kernels_fit_the_registers_of_all_others(nvrtc, arch, T):
    for name, macros in VARIANTS:
        if macros["T"] == T:
            _check(nvrtc, name, macros, arch)


def test_every_file_of_kernels_is_compiled():
    files = {file.name for file in (resources.files("cconv.gpu") / "kernels").iterdir() if file.name.endswith(".cu")}
    for dtype in TYPES:
        assert {name for name, _ in variants(dtype)} == files
    assert all(kernels(name) for name in files)


def test_every_kernel_that_is_asked_for_can_be_compiled_ahead(host, device, monkeypatch):
    """By the same name: the cubins that on_device.py compiles are those that programs look for."""
    asked = set()

    def kernel(name, entry, macros):
        asked.add((name, tuple(sorted(macros.items()))))
        return lambda *_: None

    monkeypatch.setattr(device, "kernel", kernel)
    twin = host.HostTwin(device)
    for dtype in TYPES:
        for spec in (
            specs.conv((100, 64, 64), (100, 100, 5, 5), activation="relu", dtype=dtype),
            specs.conv((8, 9, 9), (8, 1, 3, 3), groups=8, padding=1, activation="silu", dtype=dtype),
            specs.conv((8, 9, 9), (8, 1, 2, 3), groups=8, dtype=dtype), specs.pool("max", (3, 8, 8), 2, dtype=dtype),
            specs.pointwise((3, 4, 5), activation="gelu", dtype=dtype), tensors.SoftmaxSpec(5, 1, dtype),
            tensors.FunctionSpec("clip", 9, (0.0, 1.0), dtype), tensors.matmul((3, 4), (4, 5), dtype=dtype),
            tensors.arithmetic("sub", (3, 5), (5,), swapped=True, dtype=dtype),
            tensors.move((9,), (9,), [tensors.Axis(9, 1, 1)], dtype=dtype),
        ):  # fmt: skip
            twin.prepare(plan.single(spec, twin.machine()))
    ahead = {(name, tuple(sorted(m.items()))) for dtype in TYPES for name, m in variants(dtype, every=True)}
    assert len(asked) == 10 * len(TYPES)  # several of them by one source and its macros
    assert asked <= ahead


def test_a_planted_spill_is_found(nvrtc):
    """Trust check: a thread's tile that cannot fit."""
    tile = {"OUTPUTS": 128, "PIXELS": 64, "ROWS": 16, "COLUMNS": 8, "DEPTH": 8, "PREACTIVATED": 0}
    found = _used(nvrtc, "conv.cu", {"T": "float", "ACTIVATE": "cc_none"} | tile, "sm_90")["conv"]
    assert found.spill_bytes > 0 or found.stack_bytes > 0


def test_a_kernel_that_leaves_no_room_for_a_second_block_is_found(nvrtc):
    """Trust check: four rows of 7x7 at stride 2, for which planning has one."""
    strip = {"R": 7, "S": 7, "STRIDE": 2, "STRIP": 4}
    with pytest.raises(AssertionError, match=r"registers=1[3-9]"):
        _check(nvrtc, "depthwise.cu", {"T": "float", "ACTIVATE": "cc_none"} | strip, "sm_100")


def test_subnormal_numbers_are_not_flushed(nvrtc):
    """Flushing would give other instructions; last of an option's values counts."""
    headers, text = {compile.HEADER: compile.source(compile.HEADER)}, compile.text("matmul.cu", {"T": "float"})
    ours = compile.options("sm_90")
    codes = [
        nvrtc.compile(text, "matmul.cu", headers, options)[0]
        for options in (ours, (*ours, "--ftz=false"), (*ours, "--ftz=true"))
    ]
    assert codes[0] == codes[1] != codes[2]


def test_an_error_in_a_source_is_a_compile_error_with_its_line(nvrtc):
    with pytest.raises(compile.CompileError, match=r"broken.cu\(2\): error"):
        nvrtc.compile('#line 1 "broken.cu"\nint a;\nnonsense\n', "broken.cu", {}, compile.options("sm_90"))


class TestCache:
    """A cubin is compiled once."""

    PACK = ("pack.cu", {"T": "float", "ACTIVATE": "cc_none"}, "sm_90")

    @pytest.fixture
    def compiled(self, nvrtc, monkeypatch):
        """The calls of NVRTC."""
        calls = []
        original = compile.Nvrtc.compile

        def counted(self, *arguments):
            calls.append(arguments[1])
            return original(self, *arguments)

        monkeypatch.setattr(compile.Nvrtc, "compile", counted)
        return calls

    def test_the_second_time_nothing_is_compiled(self, cache, compiled):
        first = compile.cubin(*self.PACK)
        assert first[:4] == b"\x7fELF"
        assert compile.cubin(*self.PACK) == first
        assert compiled == ["pack.cu"]
        (kept,) = cache.iterdir()
        assert kept.read_bytes()[: len(first)] == first

    @pytest.mark.parametrize("left", [0, 20, -1])
    def test_a_damaged_file_is_compiled_again(self, cache, compiled, left):
        first = compile.cubin(*self.PACK)
        (kept,) = cache.iterdir()
        kept.write_bytes(kept.read_bytes()[:left])
        assert compile.cubin(*self.PACK) == first
        assert compile.cubin(*self.PACK) == first
        assert compiled == ["pack.cu"] * 2

    @pytest.mark.parametrize("variable", ["CCONV_CACHE_DIR", "XDG_CACHE_HOME"])
    def test_where_nothing_can_be_written_it_is_compiled_all_the_same(self, tmp_path, compiled, monkeypatch, variable):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.delenv("CCONV_CACHE_DIR", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
        assert compile.cubin(*self.PACK) == compile.cubin(*self.PACK)
        assert compiled == ["pack.cu"] * 2

    def test_other_users_may_read_it(self, cache, compiled):
        before = os.umask(0o022)
        try:
            compile.cubin(*self.PACK)
        finally:
            os.umask(before)
        (kept,) = cache.iterdir()
        assert kept.stat().st_mode & 0o777 == 0o644

    def test_everything_that_it_depends_on_is_in_its_name(self, cache, compiled, monkeypatch):
        name, macros, arch = self.PACK
        found = {
            compile.cubin(*self.PACK), compile.cubin(name, macros | {"T": "double"}, arch),
            compile.cubin(name, macros, "sm_80"),
        }  # fmt: skip
        assert len(found) == 3
        for changed in (compile.HEADER, name):
            original = compile.source
            monkeypatch.setattr(compile, "source", lambda file, o=original, c=changed: o(file) + "\n" * (file == c))
            compile.cubin(*self.PACK)
        monkeypatch.setattr(compile, "OPTIONS", (*compile.OPTIONS, "--fmad=true"))
        compile.cubin(*self.PACK)
        monkeypatch.setattr(compile.nvrtc(), "version", "13.99")
        compile.cubin(*self.PACK)
        assert len(list(cache.iterdir())) == len(compiled) == 7

    def test_threads_that_want_the_same_wait_for_the_first(self, cache, compiled):
        threads = [threading.Thread(target=compile.cubin, args=self.PACK) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert compiled == ["pack.cu"]

    def test_processes_that_want_the_same_leave_one_file_that_is_whole(self, cache, nvrtc):
        code = f"import sys; from cconv.gpu import compile; sys.stdout.buffer.write(compile.cubin(*{self.PACK!r}))"
        processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
        first, *others = (process.communicate(timeout=120)[0] for process in processes)
        assert first[:4] == b"\x7fELF"
        assert set(others) == {first}
        (kept,) = cache.iterdir()
        assert compile.read(kept) == first

    def test_a_failed_write_leaves_nothing_and_stops_nobody(self, cache, compiled, monkeypatch):
        def failing(*_):
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", failing)
        assert compile.cubin(*self.PACK)[:4] == b"\x7fELF"
        assert list(cache.iterdir()) == []


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Whoever reads while it is written has the old one, whole."""
    path, seen, sync = tmp_path / "kept.cubin", [], os.fsync

    def spied(fd):
        sync(fd)
        seen.append(compile.read(path))

    monkeypatch.setattr(os, "fsync", spied)
    for content in (b"old", b"new"):
        compile.write(path, content)
    assert (seen, compile.read(path)) == ([None, b"old"], b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_the_log_of_ptxas_is_understood():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'conv' for 'sm_90'
ptxas info    : Function properties for conv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 207 registers, used 1 barriers, 16 bytes cumulative stack size, 16384 bytes smem
ptxas info    : Compiling entry function 'pack' for 'sm_90'
ptxas info    : Function properties for pack
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
"""
    assert usage(log) == {"conv": (207, 16, 12, 16384), "pack": (28, 0, 0, 0)}
