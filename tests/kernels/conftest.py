"""Conftest: what the tests of the kernels share: grid.py, and an instruction set to run it on.

In: grid.py.  Out: fixtures `grid`, the module, and `isa`, every instruction set that this processor runs.
"""

import importlib.util
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
