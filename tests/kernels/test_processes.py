"""Processes: right answers and no hang in children, forked or not, and a clean end.

In: scripts, each in a process of its own that has children.  Out: what they assert.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.alone
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PARENT = """
cconv.set_num_threads(3)
big, x = layer(64, 56)
want = big(x)

def right():
    for _ in range(3):
        assert np.array_equal(big(x), want)
"""


@forks
@pytest.mark.usefixtures("proc")
def test_a_forked_child_has_a_team_of_its_own(process):
    process(
        PARENT
        + """
def work():
    assert tasks() == 1
    right()
    computes_until(big, x, 3)
    assert ended_well(child(right)), "a child of a child"
for pid in [child(work) for _ in range(3)]:
    assert ended_well(pid)
right()
"""
    )


@forks
def test_a_child_forked_while_others_compute_computes_too(process):
    process(
        PARENT
        + """
stop = threading.Event()
def busy():
    while not stop.is_set():
        big(x)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    assert ended_well(child(right))
stop.set()
for thread in threads:
    thread.join()
"""
    )


@forks
def test_workers_of_a_parent_that_has_computed_serve_from_a_thread(process):
    """As a server does that loads its application before it forks: every worker computes on a thread of its own."""
    process(
        PARENT
        + """
def serve():
    together(1, lambda i: right())
    together(4, lambda i: right())
for pid in [child(serve) for _ in range(4)]:
    assert ended_well(pid)
"""
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_computes(method, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(f"""
import multiprocessing
import numpy as np
import cconv

WEIGHT = np.ones((64, 64, 3, 3), np.float32)

def total(value):
    return float(cconv.conv2d(np.full((1, 64, 40, 40), value, np.float32), WEIGHT, algorithm="direct").max())

if __name__ == "__main__":
    cconv.set_num_threads(2)
    want = [total(i) for i in range(6)]
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(total, range(6)) == want
    assert [total(i) for i in range(6)] == want
""")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_ends_while_a_daemon_thread_computes(process):
    process(
        """
cconv.set_num_threads(3)
big, x = layer(64, 56)
kept = [big(x)]
def for_ever():
    while True:
        kept[:] = [big(x), big(x)]
for _ in range(3):
    threading.Thread(target=for_ever, daemon=True).start()
time.sleep(0.3)
""",
        timeout=30,
    )
