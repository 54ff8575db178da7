"""Team: one for the process whoever calls, as large as was asked for, in nobody's way.

In: scripts, each in a process of its own, because a team lives as long as its process.  Out: what they assert.
"""

import math
import threading

import numpy as np
import pytest

import cconv
from cconv.cpu.threads import _quota

pytestmark = pytest.mark.alone


@pytest.mark.usefixtures("proc")
def test_eight_callers_share_one_team(process):
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


@pytest.mark.usefixtures("proc")
def test_a_team_has_as_many_threads_as_were_asked_for(process):
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


@pytest.mark.usefixtures("proc")
def test_tiny_calls_start_no_thread(process):
    process("""
cconv.set_num_threads(2)
tiny, x = layer(8, 16)
before = tasks()
for _ in range(1000):
    tiny(x)
assert tasks() == before
""")


@pytest.mark.usefixtures("proc")
def test_no_signal_goes_to_the_team(process):
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


def test_other_threads_run_while_one_computes(process):
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
def test_eight_callers_are_not_slower_in_total_than_one(process, channels, size, calls):
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


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_a_cgroup_of_either_version_says_how_many_processors_it_may_use(tmp_path, files, processors):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == processors
