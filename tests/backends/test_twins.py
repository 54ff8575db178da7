"""Twins: cpu, gpu and reference are one interface; arrays choose; nothing is probed before it is used."""

import inspect
import subprocess
import sys
import threading

import numpy as np
import pytest

import cconv
from cconv import backend as backends
from cconv.planning import Machine, plan, specs
from cconv.weights import Weights

NAMES = ("machine", "asarray", "to_numpy", "build", "synchronize")


def _signature(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_agree(name):
    first, *others = (_signature(getattr(backends.get(twin), name)) for twin in backends.NAMES)
    for other in others:
        assert other == first


def test_each_twin_knows_its_name():
    assert [backends.get(name).name for name in backends.NAMES] == list(backends.NAMES)


def test_programs_run_alike(twin):
    program = backends.get("reference").Program.run
    assert _signature(type(_program(twin)).run) == _signature(program)


def _program(twin, **options):
    spec = specs.conv((3, 8, 8), (4, 3, 3, 3), **options)
    weights = Weights(lambda _: (np.ones((4, 3, 3, 3), np.float32), None))
    return twin.build(plan.single(spec, twin.machine()), weights)


def test_a_program_fills_outputs_that_are_given(twin, whole):
    x = twin.asarray(whole((2, 3, 8, 8)))
    program = _program(twin)
    expected = twin.to_numpy(program.run([x])[0])
    out = twin.asarray(np.zeros(expected.shape, np.float32))
    assert program.run([x], [out])[0] is out
    twin.synchronize()
    np.testing.assert_array_equal(twin.to_numpy(out), expected)


@pytest.mark.parametrize("make", [threading.Event, cconv.cancel_flag])
def test_a_set_cancel_flag_stops_a_program(twin, make):
    flag = make()
    program = _program(twin)
    x = twin.asarray(np.ones((1, 3, 8, 8), np.float32))
    program.run([x], cancel=flag)
    flag.set()
    with pytest.raises(cconv.Cancelled):
        program.run([x], cancel=flag)


def test_a_machine_describes_itself(twin):
    machine = twin.machine()
    assert isinstance(machine, Machine)
    assert machine == twin.machine()
    assert min(machine.vector_bytes, machine.tile_rows, machine.tile_vectors, machine.threads, machine.l2_bytes) >= 1


def test_numpy_arrays_belong_to_the_cpu():
    x = np.zeros(3)
    twin, array = backends.of(x)
    assert twin.name == "cpu"
    assert array is x


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(cconv.ArgumentError, match=r"cpu, gpu, reference.*'tpu'"):
        backends.get("tpu")


class TestGpuDoor:
    """Where no GPU works, every name of the gpu twin says so."""

    @pytest.fixture
    def gpu(self):
        if not backends.available()["gpu"]:
            pytest.skip("a GPU works here")
        return backends.get("gpu")

    def test_every_name_raises_backend_unavailable(self, gpu):
        arguments = {
            "machine": (),
            "asarray": (np.zeros(1),),
            "to_numpy": (np.zeros(1),),
            "build": (None, None),
            "synchronize": (),
        }
        for name in NAMES:
            with pytest.raises(cconv.BackendUnavailable, match="gpu"):
                getattr(gpu, name)(*arguments[name])

    def test_a_cuda_array_is_refused_and_not_moved(self, gpu):
        class OnCuda:
            def __dlpack_device__(self):
                return 2, 0

            def __dlpack__(self, **_):
                raise AssertionError("nothing may be moved silently")

        with pytest.raises(cconv.BackendUnavailable, match="gpu"):
            cconv.conv2d(OnCuda(), np.ones((1, 1, 1, 1), np.float32))


@pytest.mark.parametrize(("kind", "owner"), [(1, "cpu"), (3, "cpu"), (2, "gpu"), (13, "gpu"), (10, None)])
def test_dlpacks_kinds_of_memory_have_their_twins(kind, owner, monkeypatch):
    """Pinned memory is the host's; managed memory the device's. What a library raises is a DTypeError."""
    shared, fails = np.arange(6.0), []

    class Foreign:
        def __dlpack_device__(self):
            return kind, 0

        def __dlpack__(self, **options):
            if fails:
                raise RuntimeError("planted: requires grad")
            return shared.__dlpack__(**options)

    monkeypatch.setattr(backends.get("gpu"), "asarray", lambda array: np.from_dlpack(array))
    if owner is None:
        with pytest.raises(cconv.DTypeError, match="weight: expected a NumPy, CuPy or DLPack array, got Foreign"):
            backends.of(Foreign(), "weight")
        return
    twin, array = backends.of(Foreign())
    assert twin.name == owner
    np.testing.assert_array_equal(array, shared)
    fails.append(True)
    with pytest.raises(cconv.DTypeError, match=r"weight: expected an array that DLPack can share, .*requires grad"):
        backends.of(Foreign(), "weight")


def _fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_importing_cconv_loads_no_extra_and_touches_no_device():
    """Nor what the standard library has of mail and archives, which took a third of the time."""
    run = _fresh(
        "import sys, numpy; before = set(sys.modules); import cconv;"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "cconv" in loaded
    assert not loaded & {"cupy", "PIL", "tqdm", "flask", "onnx", "sqlalchemy", "torch", "scipy", "email", "zipfile"}


def test_a_forked_child_computes_too():
    """libgomp's threads do not survive a fork: a child that waits for them would hang."""
    run = _fresh("""
import os, sys, warnings
import numpy as np
import cconv
warnings.simplefilter("ignore")
x, w = np.ones((4, 64, 40, 40), np.float32), np.ones((64, 64, 3, 3), np.float32)
expected = cconv.conv2d(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(cconv.conv2d(x, w), expected) else 3)
assert np.array_equal(cconv.conv2d(x, w), expected)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("isa", ["", "generic", "avx2", "avx512", "altivec"])
def test_an_instruction_set_can_be_forced_and_an_impossible_one_is_a_clear_error(isa):
    run = _fresh(f"""
import os
os.environ["CCONV_ISA"] = {isa!r}
import numpy as np
import cconv
try:
    y = cconv.conv2d(np.ones((1, 3, 9, 9), np.float32), np.ones((20, 3, 3, 3), np.float32))
    assert (y == 27).all()
    print("isa", cconv.backend.get("cpu").machine().isa)
except cconv.BackendUnavailable as error:
    print("refused", error)
""")
    assert run.returncode == 0, run.stderr
    verdict, _, text = run.stdout.strip().partition(" ")
    if isa == "altivec":
        assert verdict == "refused"
        assert "CCONV_ISA" in text
        assert "altivec" in text
    elif verdict == "isa":
        assert text == isa or not isa
    else:
        assert isa in text
