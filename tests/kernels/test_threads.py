"""Threads: one team for the process whoever calls, right answers, no hang after a fork, and a clean end.

In: scripts, each in a process of its own, because a team lives as long as its process.  Out: what they assert.
"""

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

import cconv
from cconv.cpu._team import limit

PRELUDE = """
import os, sys, threading, time
import numpy as np
import cconv

def layer(channels, size, kernel=3):
    rng = np.random.default_rng(channels)
    weight = rng.integers(-3, 4, (channels, channels, kernel, kernel)).astype(np.float32)
    made = cconv.Conv2d(weight, padding=kernel // 2, algorithm="direct")
    return made, rng.integers(-3, 4, (1, channels, size, size)).astype(np.float32)

def together(count, work):
    failed = []
    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed

def tasks():
    return len(os.listdir("/proc/self/task"))

def computes_until(made, x, count):
    # A caller that is done before the others come does not wait for them, so a team may fill up in several calls.
    end = time.monotonic() + 30
    while tasks() != count:
        assert time.monotonic() < end, (tasks(), count)
        made(x)

def settled():
    # A thread that was joined leaves /proc a moment later.
    time.sleep(0.2)
    return tasks()
"""

pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def process(script: str, *, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + script], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@linux
def test_eight_callers_share_one_team():
    process("""
cconv.set_num_threads(2)
big, x = layer(64, 56)
before = tasks()
want = big(x)
assert tasks() == before + 1, "the caller works itself: a team of two is one thread more"
most = 0
def call(i):
    global most
    for _ in range(10):
        assert np.array_equal(big(x), want)
        most = max(most, tasks())
together(8, call)
assert most <= before + 8 + 1, most - before
assert settled() == before + 1
""")


@linux
def test_a_team_has_as_many_threads_as_were_asked_for():
    process("""
big, x = layer(64, 56)
cconv.set_num_threads(1)
before = tasks()
want = big(x)
assert tasks() == before
for count in (5, 3, 2, 4):
    cconv.set_num_threads(count)
    for _ in range(3):
        assert np.array_equal(big(x), want)
assert settled() <= before + 4
together(4, lambda i: [big(x) for _ in range(5)])
assert settled() <= before + 4
""")


@linux
def test_tiny_calls_start_no_thread():
    process("""
cconv.set_num_threads(2)
tiny, x = layer(8, 16)
before = tasks()
for _ in range(1000):
    tiny(x)
assert tasks() == before
""")


@linux
def test_no_signal_goes_to_the_team():
    process("""
cconv.set_num_threads(3)
known = set(os.listdir("/proc/self/task"))
big, x = layer(64, 56)
computes_until(big, x, len(known) + 2)
team = set(os.listdir("/proc/self/task")) - known
for task in team:
    status = open(f"/proc/self/task/{task}/status").read()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert blocked & 1 << 1 and blocked & 1 << 14, "SIGINT and SIGTERM"
""")


def test_callers_of_different_layers_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (16, 30), (32, 14), (48, 40), (64, 56), (24, 100), (3, 9), (100, 28)]
    layers = [cconv.Conv2d(rng.standard_normal((c, c, 3, 3)).astype(np.float32), padding=1) for c, _ in sizes]
    images = [rng.standard_normal((2, c, size, size)).astype(np.float32) for c, size in sizes]
    want = [layer(x) for layer, x in zip(layers, images, strict=True)]
    wrong = []

    def call(first):
        for turn in range(24):
            i = (first + turn) % len(layers)
            if not np.array_equal(layers[i](images[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_run_while_one_computes():
    process("""
big, x = layer(128, 112)
x = np.concatenate([x] * 8)
big(x)
running = threading.Event()
def compute():
    running.set()
    big(x)
worker = threading.Thread(target=compute)
worker.start()
running.wait()
turns = 0
while worker.is_alive():
    time.sleep(0.001)
    turns += 1
assert turns > 5, turns
""")


@pytest.mark.timed
@pytest.mark.parametrize(("channels", "size", "calls"), [(8, 16, 8000), (32, 28, 800), (64, 56, 80)])
def test_eight_callers_are_not_slower_in_total_than_one(channels, size, calls):
    """The machine may be shared: the best of several rounds counts, with a margin for its noise."""
    process(f"""
made, x = layer({channels}, {size})
def seconds(count):
    began = time.perf_counter()
    together(count, lambda i: [made(x) for _ in range({calls} // count)])
    return time.perf_counter() - began
seconds(8), seconds(1)
ratio = 9
for _ in range(25):
    ratio = min(ratio, seconds(8) / seconds(1))
    if ratio < 1.05:
        break
assert ratio < 1.25, ratio
""")


FORK = """
def child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid

def ended_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

cconv.set_num_threads(3)
big, x = layer(64, 56)
want = big(x)

def right():
    for _ in range(3):
        assert np.array_equal(big(x), want)
"""
forks = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")


@forks
@linux
def test_a_forked_child_has_a_team_of_its_own():
    process(
        FORK
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
def test_a_child_forked_while_others_compute_computes_too():
    process(
        FORK
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
def test_workers_of_a_parent_that_has_computed_serve_from_a_thread():
    """As a server does that loads its application before it forks: every worker computes on a thread of its own."""
    process(
        FORK
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


def test_the_interpreter_ends_while_a_daemon_thread_computes():
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


class TestLimit:
    """`limit_threads`: of the calling thread, within a context."""

    @linux
    def test_a_limit_of_one_takes_no_helper(self):
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

    @linux
    @pytest.mark.timed  # a sanitizer's runs take longer than a helper stays awake
    def test_short_runs_wake_no_helper_under_a_limit_either(self):
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

    def test_a_run_ends_between_two_steps_and_harms_no_later_one(self):
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

    def test_a_run_looks_at_it_without_the_gil(self):
        """It goes on to its end while another thread has the GIL; with an event it waits before its first step. (A
        helper, if it had one, would go on alone in both.)"""
        process("""
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
