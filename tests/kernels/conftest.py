"""Conftest: what the tests of the kernels share: grid.py, an instruction set to run it on, and processes for scripts.

In: grid.py, prelude.py.  Out: fixtures `grid`, the module, `isa`, every instruction set that this processor runs, and
`process`, which runs a script.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


def _load_grid():
    """By its path: under --import-mode=importlib test files cannot import each other by name."""
    spec = importlib.util.spec_from_file_location("convolution_grid", Path(__file__).with_name("grid.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRID = _load_grid()


@pytest.fixture(scope="session")
def grid():
    return GRID


@pytest.fixture(params=GRID.ISAS)
def isa(request):
    return request.param


@pytest.fixture
def sampled(request):
    """f(items): all of them, or as few as --one-in says."""
    step = request.config.getoption("--one-in")
    return lambda items: list(items)[::step]


@pytest.fixture
def process():
    """f(script): runs it, behind prelude.py, in a process of its own, where it must end well."""
    prelude = Path(__file__).with_name("prelude.py").read_text()

    def run(script: str, *, timeout: float = 120) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", prelude + script], capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def proc():
    """/proc, in which scripts count threads."""
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
