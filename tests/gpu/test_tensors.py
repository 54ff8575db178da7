"""Tensors: tests/kernels/test_tensors.py, all of it, on the GPU's kernels run on the host."""

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("gpu_tensors", Path(__file__).parents[1] / "kernels/test_tensors.py")
_MODULE = sys.modules["gpu_tensors"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
globals().update({name: value for name, value in vars(_MODULE).items() if name.startswith("test_")})


@pytest.fixture(autouse=True)
def _on_the_host_device(machine_twin, monkeypatch):
    monkeypatch.setattr(_MODULE, "cpu", machine_twin)
