"""Door: the gpu twin before there is a GPU: what it touches, when, from which process, and what it says."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from cconv import BackendUnavailable, DeviceError, OutOfMemory
from cconv.gpu import device as real
from cconv.gpu import launch


def _fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_twin_loads_neither_cupy_nor_cuda():
    assert (
        _fresh("""
        import sys
        import cconv.gpu
        libraries = open("/proc/self/maps").read() if sys.platform == "linux" else ""
        print(sorted({"cupy", "cuda"} & set(sys.modules)), "libcuda" in libraries, "nvrtc" in libraries)
    """)
        == "[] False False"
    )


def test_the_first_process_may_go_on_and_a_forked_child_may_not():
    use = real.FirstUse()
    use.check()
    use.record()
    use.check()
    child = os.fork()
    if child == 0:
        try:
            use.check()
        except BackendUnavailable as error:
            os._exit(0 if str(os.getppid()) in str(error) and "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_that_is_the_first_to_use_it_may():
    use = real.FirstUse()
    child = os.fork()
    if child == 0:
        use.record()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    use.record()


def test_a_program_asks_on_every_run(machine_twin, device, monkeypatch, whole):
    from cconv.planning import plan, specs
    from cconv.weights import Weights

    spec = specs.conv((2, 5, 5), (3, 2, 3, 3))
    program = machine_twin.build(
        plan.single(spec, machine_twin.machine()), Weights(lambda _: (whole((3, 2, 3, 3)), None))
    )

    def refuse():
        raise BackendUnavailable("gpu: forked")

    monkeypatch.setattr(device, "check", refuse)
    with pytest.raises(BackendUnavailable, match="forked"):
        program.run([whole((1, 2, 5, 5))])


def test_without_cupy_the_twin_says_what_to_install():
    text = _fresh("""
        import sys
        sys.modules["cupy"] = None  # as if it were not installed
        import cconv
        try:
            cconv.backend.get("gpu").machine()
        except cconv.BackendUnavailable as error:
            print(error)
    """)
    assert "expected CuPy (pip install 'cconv[gpu]')" in text


#: What cconv.gpu asks of CuPy before it has found a device.
CUPY = """
    import os, sys, types
    class CUDARuntimeError(RuntimeError):
        status = 35
    def is_available():
        if FAILS:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: planted")
        return False
    runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError)
    sys.modules["cupy"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=is_available, runtime=runtime))
    import cconv
    def asked():
        try:
            cconv.backend.get("gpu").machine()
        except cconv.BackendUnavailable as error:
            return str(error)
"""


@pytest.mark.parametrize(
    ("fails", "says"), [(0, "expected a CUDA device and its driver"), (1, "got: cudaErrorInsufficientDriver: planted")]
)
def test_without_a_gpu_the_twin_says_so_and_to_a_forked_child_too(fails, says):
    """Nothing has been used then, so nothing is refused because of a fork."""
    text = _fresh(
        CUPY.replace("FAILS", str(fails))
        + """
    print(asked(), flush=True)
    child = os.fork()
    if child == 0:
        print(asked(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    """
    )
    first, second = text.splitlines()
    assert says in first
    assert first == second


def test_errors_of_cuda_are_cconvs():
    """Out of memory by either interface; all others are the device's end."""

    class CudaError(RuntimeError):
        def __init__(self, status: int):
            self.status = status

    class PoolError(MemoryError):
        pass

    cuda = SimpleNamespace(
        memory=SimpleNamespace(OutOfMemoryError=PoolError), runtime=SimpleNamespace(CUDARuntimeError=CudaError),
        driver=SimpleNamespace(CUDADriverError=CudaError),
    )  # fmt: skip
    device = object.__new__(real.Device)
    device._cupy = SimpleNamespace(cuda=cuda)
    for raised, expected in (
        (PoolError("planted"), OutOfMemory), (CudaError(2), OutOfMemory), (CudaError(700), DeviceError),
        (ValueError(), ValueError),
    ):  # fmt: skip
        with pytest.raises(expected), device.errors():
            raise raised


#: What device.py and feeding.py call of CuPy's, and the parameters that they give by name.
CALLED = {
    "ndarray.set": "stream", "ndarray.get": "stream out blocking", "ndarray": "memptr", "ndarray.data": "",
    "ndarray.device": "", "empty": "", "asarray": "", "from_dlpack": "", "ascontiguousarray": "", "asnumpy": "",
    "get_default_memory_pool": "", "cuda.is_available": "", "cuda.Memory": "", "cuda.MemoryPointer": "",
    "cuda.MemoryPointer.copy_from_device_async": "", "cuda.Stream": "non_blocking", "cuda.Stream.record": "",
    "cuda.Stream.wait_event": "", "cuda.Stream.synchronize": "", "cuda.Event.synchronize": "",
    "cuda.get_current_stream": "", "cuda.Device.compute_capability": "", "cuda.Device.attributes": "",
    "cuda.Device.synchronize": "", "cuda.runtime.getDevice": "", "cuda.runtime.CUDARuntimeError": "",
    "cuda.driver.CUDADriverError": "", "cuda.memory.OutOfMemoryError": "", "cuda.function.Module.load": "cubin",
    "cuda.function.Module.get_function": "",
}  # fmt: skip


def _names(module, before: str = ""):
    """Of all that a namespace has, in full."""
    for name, value in vars(module).items():
        yield from _names(value, f"{before}{name}.") if isinstance(value, SimpleNamespace) else [before + name]


def test_the_stand_in_of_the_tests_has_nothing_else(stand_in):
    found = set(_names(stand_in.StandIn(None).cupy))
    assert {name for name in found if not any(f"{called}.".startswith(f"{name}.") for called in CALLED)} == set()
    assert len(found) > 15


def test_cupy_passes_a_struct_by_value():
    """The address that a launch gets is the one of the struct itself."""
    function = pytest.importorskip("cupy.cuda.function")
    parameters = np.zeros((), launch.parameters("conv.cu", "conv"))
    assert function.CNumpyArray(parameters).ptr == parameters.ctypes.data


@pytest.mark.parametrize("name", CALLED)
def test_the_cupy_that_is_installed_has_what_the_device_calls(name):
    found = pytest.importorskip("cupy")
    for part in name.split("."):
        found = getattr(found, part)
    for parameter in CALLED[name].split():
        assert re.search(rf"\b{parameter}\b", found.__doc__), found.__doc__


def test_the_host_device_of_the_tests_has_the_methods_of_the_real_one(host):
    def methods(kind) -> dict:
        return {
            name: list(inspect.signature(f).parameters) for name, f in vars(kind).items()
            if inspect.isfunction(f) and not name.startswith("_")
        }  # fmt: skip

    assert methods(host.HostDevice) == methods(real.Device)


def test_the_host_twin_of_the_tests_has_the_names_of_the_real_one(host):
    from cconv import gpu

    for name in gpu.__all__:
        assert hasattr(host.HostTwin, name)
