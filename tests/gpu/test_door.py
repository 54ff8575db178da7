"""Door: the gpu twin before there is a GPU: what it touches, when, from which process, and what it says."""

import inspect
import os
import subprocess
import sys
import textwrap

import pytest

from cconv import BackendUnavailable
from cconv.gpu import device as real


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
        use.check()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    use.check()


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


def test_with_cupy_and_no_gpu_the_twin_says_so():
    pytest.importorskip("cupy")
    text = _fresh("""
        import cconv, cupy
        if cupy.cuda.is_available():
            print("a GPU works here")
        try:
            cconv.backend.get("gpu").machine()
        except cconv.BackendUnavailable as error:
            print(error)
    """)
    assert "expected a CUDA device and its driver" in text or "a GPU works here" in text


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
