"""Limits: what a caller says of its own runs: how many threads they take, and when they end.

In: contexts and flags, in this process and in scripts.  Out: threads, times, and the same answers.
"""

import contextlib
import threading

import numpy as np
import pytest

import cconv
from cconv.cpu._team import limit

pytestmark = pytest.mark.alone


class TestLimit:
    """`limit_threads`: of the calling thread, within a context."""

    @pytest.mark.usefixtures("proc")
    def test_a_limit_of_one_takes_no_helper(self, process):
        process("""
cconv.set_num_threads(3)
big, x = layer(64, 56)
before = tasks()
with cconv.limit_threads(1):
    want = big(x)
    cconv.conv2d(x, np.ones((512, 64, 3, 3), np.float32))  # whose weights are packed by threads
assert tasks() == before
with cconv.limit_threads(2):
    computes_until(big, x, before + 1)
    assert np.array_equal(big(x), want)
assert settled() == before + 1
computes_until(big, x, before + 2)
assert np.array_equal(big(x), want)
""")

    @pytest.mark.usefixtures("proc")
    @pytest.mark.timed  # a sanitizer's runs take longer than a helper stays awake
    def test_short_runs_wake_no_helper_under_a_limit_either(self, process):
        """As without one: a single short run takes one thread, however many it may have."""
        process("""
cconv.set_num_threads(3)
short, x = layer(16, 24)
before = tasks()
with cconv.limit_threads(2):
    for _ in range(5):
        short(x)
        time.sleep(0.01)
    assert tasks() == before
    computes_until(short, x, before + 1)
""")

    def test_it_is_the_threads_own_and_ends_with_its_context(self):
        seen = {}

        def other():
            seen["other"] = limit()

        with cconv.limit_threads(3):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            seen["own"] = limit()
        assert (seen, limit()) == ({"other": 0, "own": 3}, 0)
        with contextlib.suppress(KeyError), cconv.limit_threads(3):
            raise KeyError
        assert limit() == 0

    def test_of_nested_ones_the_least_holds(self):
        with cconv.limit_threads(3):
            with cconv.limit_threads(1), cconv.limit_threads(1024):
                assert limit() == 1
            with cconv.limit_threads(1024):
                assert limit() == 3
            assert limit() == 3
        assert limit() == 0

    def test_it_changes_no_bit_and_no_plan(self):
        rng = np.random.default_rng(0)
        model = cconv.load("texture")
        x = rng.standard_normal((3, 3, 65, 47)).astype(np.float32)
        want, held = model.run(x)["level2.relu"], len(model._programs)
        for count in (1, 2, 5):
            with cconv.limit_threads(count):
                assert np.array_equal(model.run(x)["level2.relu"], want)
                assert cconv.get_num_threads() == cconv.show_config()["threads"]
        assert len(model._programs) == held

    @pytest.mark.parametrize("count", [0, -1, 1025, 1.0, True, None, "2"])
    def test_anything_but_a_number_of_threads_is_refused(self, count):
        with pytest.raises(cconv.ArgumentError, match="limit_threads: expected an integer from 1 to 1024, got"):
            cconv.limit_threads(count)


class TestCancelFlag:
    """`cancel_flag`: what a run looks at between its steps."""

    def test_it_is_set_until_it_is_cleared(self):
        flag = cconv.cancel_flag()
        assert flag.is_set() is False
        flag.set()
        flag.set()
        assert flag.is_set() is True
        flag.clear()
        assert flag.is_set() is False

    def test_a_run_ends_between_two_steps_and_harms_no_later_one(self, process):
        process("""
model = cconv.load("vgg16")
x = np.random.default_rng(0).random((4, 3, 224, 224), dtype=np.float32)
model.run(x[:1])
flag = cconv.cancel_flag()
def alone():
    began = time.perf_counter()
    model.run(x, cancel=flag)
    return time.perf_counter() - began
whole = alone()
threading.Timer(whole / 10, flag.set).start()
began = time.perf_counter()
try:
    model.run(x, cancel=flag)
    raise SystemExit("it was not cancelled")
except cconv.Cancelled:
    assert time.perf_counter() - began < 0.7 * whole
flag.clear()
assert np.array_equal(model.run(x[:1], cancel=flag)["classifier.6"], model.run(x[:1])["classifier.6"])
""")

    def test_a_run_looks_at_it_without_the_gil(self, process):
        """It goes on to its end while another thread has the GIL; with an event it waits before its first step. (A
        helper, if it had one, would go on alone in both.)"""
        process("""
import sys

cconv.set_num_threads(1)
model = cconv.load("resnet18")
x = np.random.default_rng(0).random((4, 3, 224, 224), dtype=np.float32)
model.run(x)
began = time.perf_counter()
model.run(x)
whole = time.perf_counter() - began

def left(cancel):
    # What a run takes once the GIL is free again that was taken from it for three times what it takes in all.
    started = threading.Semaphore(0)
    def compute():
        started.release()
        model.run(x, cancel=cancel)
    thread = threading.Thread(target=compute)
    thread.start()
    started.acquire()
    end = time.perf_counter() + 3 * whole
    while time.perf_counter() < end:
        pass
    began = time.perf_counter()
    thread.join()
    return (time.perf_counter() - began) / whole

sys.setswitchinterval(100)  # whoever has the GIL keeps it
event, flag = left(threading.Event()), left(cconv.cancel_flag())
assert flag < event / 2, (flag, event)
""")
