"""Guard: nothing reads or writes outside its arrays, with pages around them that end the program that touches one.

In: guarded.py, run by every instruction set.  Out: its exit code, and the layer at which it ended.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).with_name("guarded.py")
#: Layers of a family, each by every tiling and at both ends of its pages.
LAYERS = {
    "dense": 40,
    "pointwise": 40,
    "depthwise": 50,
    "grouped": 25,
    "deep": 8,
    "one pixel": 20,
    "winograd": 10,
    "pools": 60,
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pages are protected by mprotect")


def _run(tmp_path, *arguments) -> tuple[subprocess.CompletedProcess, str]:
    log = tmp_path / "run"
    done = subprocess.run([sys.executable, GUARDED, *map(str, arguments), log], capture_output=True, text=True)
    return done, log.read_text() if log.exists() else "before the first run"


@pytest.mark.parametrize("family", LAYERS)
def test_nothing_outside_an_array_is_read_or_written(isa, dtype, family, tmp_path, request):
    count = max(2, LAYERS[family] // request.config.getoption("--one-in"))
    done, last = _run(tmp_path, isa, dtype, family, 7, count)
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr}"


def test_a_touch_of_the_guard_is_seen(tmp_path):
    done, last = _run(tmp_path, "touch")
    assert last == "the planted run"
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS, 1)
    assert done.returncode != 1 or "AddressSanitizer" in done.stderr
