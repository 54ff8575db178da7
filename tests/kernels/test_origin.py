"""Where the tested cconv came from: a checkout may not shadow the wheel that is under test."""

from pathlib import Path

import pytest

import cconv
from cconv.cpu import _core


def test_the_tested_package_is_the_one_that_was_built(request):
    expected = request.config.getoption("--cconv-from")
    if expected is None:
        pytest.skip("no --cconv-from: any cconv will do")
    for module in (cconv, _core):
        assert Path(module.__file__).resolve().is_relative_to(Path(expected).resolve())
