"""Memory: what results and scratch lie in is used again, never while anybody refers to it, and has a limit.

In: results of many sizes, kept and dropped.  Out: their numbers, addresses, and what lies idle.
"""

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import cconv

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_idle():
    """Each test begins with an empty pool and leaves the default limit."""
    gc.collect()
    cconv.set_pool_limit(0)
    cconv.set_pool_limit(None)
    yield
    cconv.set_pool_limit(None)


def idle() -> int:
    return cconv.show_config()["pool_idle_bytes"]


def address(array) -> int:
    return array.__array_interface__["data"][0]


def copied(nbytes: int, value: float = 1.0) -> np.ndarray:
    """A result of so many bytes that holds one value."""
    return cconv.activate(np.full((1, 1, nbytes // 4), value, np.float32), "relu")


@pytest.mark.parametrize("nbytes", [4096, 5000, 65536, MIB, 2 * MIB, 3 * MIB + 4, 20 * MIB])
def test_the_memory_of_a_dropped_result_is_the_next_ones(nbytes):
    first = copied(nbytes)
    place = address(first)
    assert place % 64 == 0
    del first
    assert nbytes <= idle() <= nbytes * 1.125
    second = copied(nbytes, 2.0)
    assert address(second) == place
    assert idle() == 0
    assert (second == 2).all()


def test_big_results_begin_at_a_huge_page():
    for nbytes in (2 * MIB, 5 * MIB, 33 * MIB):
        assert address(copied(nbytes)) % (2 * MIB) == 0


VIEWS = {
    "index": lambda y: y[0, 0],
    "stride": lambda y: y.reshape(-1)[::7],
    "transpose": lambda y: y.T[5:],
    "type": lambda y: y.view(np.int32),
    "memoryview": memoryview,
    "asarray": np.asarray,
    "dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_keeps_the_memory(view):
    result = copied(MIB, 3.0)
    place, kept = address(result), view(result)
    before = np.array(kept)
    del result
    gc.collect()
    others = [copied(MIB, 4.0) for _ in range(3)]
    assert place not in [address(other) for other in others]
    assert np.array_equal(np.array(kept), before)
    del kept
    gc.collect()
    assert address(copied(MIB, 5.0)) == place


def test_results_that_are_referred_to_never_share_memory(rng):
    kept = {}
    for turn in range(600):
        value = float(turn + 1)
        kept[turn] = copied(4 * int(rng.integers(1, 1 << rng.integers(1, 20))), value)
        if len(kept) > 12:
            del kept[int(rng.choice(list(kept)))]
        if turn % 20 == 0:
            for number, result in kept.items():
                assert (result == number + 1).all()


def test_results_may_be_dropped_by_any_thread():
    handed = [copied(MIB, float(i + 1)) for i in range(8)]
    places = {address(result) for result in handed}
    threads = [threading.Thread(target=handed.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert idle() == 8 * MIB
    again = [copied(MIB) for _ in range(8)]
    assert {address(result) for result in again} == places


def test_what_lies_idle_has_a_limit_and_the_oldest_goes_first():
    cconv.set_pool_limit(5 * MIB)
    results = [copied(n * MIB) for n in (1, 2, 3)]
    for result in [weakref.ref(r) for r in results]:
        assert result() is not None
        del results[0]
    assert idle() == 5 * MIB  # the first went when the third came
    cconv.set_pool_limit(3 * MIB)
    assert idle() == 3 * MIB
    copied(8 * MIB)
    assert idle() == 3 * MIB, "what is larger than the limit pushes nothing out"
    cconv.set_pool_limit(0)
    assert idle() == 0
    copied(MIB)
    assert idle() == 0


@pytest.mark.parametrize("limit", [-1, 2**70, 1.5, "many", True, (), np.float64(3)], ids=repr)
def test_a_limit_that_is_none_is_refused_and_changes_nothing(limit):
    cconv.set_pool_limit(123)
    with pytest.raises(cconv.ArgumentError, match="set_pool_limit: expected an integer"):
        cconv.set_pool_limit(limit)
    assert cconv.show_config()["pool_limit_bytes"] == 123
    cconv.set_pool_limit(np.int64(456))
    assert cconv.show_config()["pool_limit_bytes"] == 456
    cconv.set_pool_limit(None)
    assert cconv.show_config()["pool_limit_bytes"] == 256 * MIB


def test_a_layer_takes_all_its_memory_from_the_pool_and_gives_the_scratch_back(normal):
    layer = cconv.Conv2d(normal((32, 32, 3, 3)), padding=1)
    x, y = normal((2, 32, 60, 60)), None
    for _ in range(3):
        y = layer(x)
    settled = idle()
    assert settled > 0
    for _ in range(20):
        y = layer(x)
        assert idle() == settled
    del y
    assert idle() > settled


def test_a_model_gives_its_arena_back(normal):
    model, x = cconv.load("texture"), normal((3, 96, 96))
    for _ in range(2):
        model.run(x, ["level2.relu"])
    settled = idle()
    for _ in range(5):
        model.run(x, ["level2.relu"])
        assert idle() == settled


def test_packing_weights_on_every_call_leaves_nothing_behind(normal):
    x, weight = normal((1, 64, 12, 12)), normal((64, 64, 3, 3))
    with cconv.limit_threads(1):  # how much scratch so short a run takes depends on whether it wakes a helper
        for _ in range(2):
            cconv.conv2d(x, weight)
        settled = idle()
        for _ in range(10):
            cconv.conv2d(x, weight)
        assert idle() == settled
    gone = weakref.ref(weight)
    del weight
    assert gone() is None, "the function keeps no weights"


def process(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of the process")
def test_fresh_pages_are_touched_once():
    process("""
import resource
import numpy as np, cconv
layer = cconv.Conv2d(np.ones((64, 16, 1, 1), np.float32))
x = np.ones((4, 16, 200, 200), np.float32)
for _ in range(3):
    y = layer(x)  # 41 MB, twice: the old result is referred to until the new one is there
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    y = layer(x)
assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads how the process maps its memory")
def test_a_network_is_packed_into_small_pages_which_the_system_may_join_later():
    process("""
import re
import numpy as np, cconv
from cconv.weights import Weights
def mappings(flag):  # so many of 2 MB and more have it; those of stacks do, too
    found = re.findall(r"Size: +([0-9]+) kB.*?VmFlags:([a-z ]+)", open("/proc/self/smaps").read(), re.S)
    return sum(int(size) >= 2048 and flag in flags.split() for size, flags in found)
cconv.set_num_threads(1)  # whose stack is there already
before, derived, small = mappings("nh"), Weights.derived, []
def watched(self, name, form, make):
    def look(arrays):
        made = make(arrays)
        small.append(mappings("nh") - before)
        return made
    return derived(self, name, form, look)
Weights.derived = watched
cconv.load("vgg16").run(np.ones((3, 32, 32), np.float32), ["features.10"])
assert small == [1] * 5, small
assert mappings("nh") == before
assert mappings("hg") >= 1
def fails(self, name, form, make):
    if len(small) == 8:
        raise MemoryError("planted")
    return watched(self, name, form, make)
Weights.derived = fails
try:
    cconv.load("vgg16").run(np.ones((3, 32, 32), np.float32), ["features.10"])
except MemoryError:
    pass
assert small == [1] * 8, small
assert mappings("nh") == before
""")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_what_cannot_be_allocated_is_a_memory_error_and_nothing_is_lost():
    process("""
import resource
import numpy as np, cconv
mib = 1 << 20
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
rng = np.random.default_rng(0)
weight = rng.standard_normal((64, 16, 3, 3)).astype(np.float32)
layer = cconv.Conv2d(weight, padding=1)
small = rng.standard_normal((1, 16, 50, 50)).astype(np.float32)
want = layer(small)
big = np.zeros((1, 16, 1000, 1000), np.float32)
for again in range(3):
    resource.setrlimit(resource.RLIMIT_AS, (used() + 100 * mib, resource.RLIM_INFINITY))
    many = np.broadcast_to(small, (1 << 19, *small.shape[1:]))
    calls = lambda: layer(big), lambda: cconv.conv2d(big, weight, padding=1), lambda: layer(many)
    for call in calls:
        try:
            call()
        except MemoryError as error:
            assert "allocate" in str(error)
        else:
            raise AssertionError("there cannot be so much memory")
    assert np.array_equal(layer(small), want)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert np.array_equal(layer(big)[0, 0], np.zeros((1000, 1000), np.float32))
""")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_idle_memory_makes_way_for_what_is_needed():
    process("""
import resource
import numpy as np, cconv
mib = 1 << 20
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
cconv.activate(np.zeros((1, 150 * mib // 4, 1), np.float32), "relu")
assert cconv.show_config()["pool_idle_bytes"] >= 150 * mib
x = np.zeros((1, 200 * mib // 4, 1), np.float32)
resource.setrlimit(resource.RLIMIT_AS, (used() + 100 * mib, resource.RLIM_INFINITY))
assert not cconv.activate(x, "relu").any()
""")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_begins_with_nothing_idle_and_keeps_what_is_referred_to():
    process("""
import os
import numpy as np, cconv
def copied(value):
    return cconv.activate(np.full((1, 1, 1 << 20), value, np.float32), "relu")
kept, dropped = copied(1.0), copied(2.0)
del dropped
assert cconv.show_config()["pool_idle_bytes"] > 0
child = os.fork()
if child == 0:
    assert cconv.show_config()["pool_idle_bytes"] == 0
    assert (kept == 1).all()
    del kept
    assert (copied(3.0) == 3).all()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (kept == 1).all() and (copied(4.0) == 4).all()
""")


def test_results_may_outlive_everything_else():
    process("""
import atexit, sys
import numpy as np, cconv
class Holder:
    pass
holder = Holder()
holder.self, holder.result = holder, cconv.activate(np.ones((1, 1, 1 << 20), np.float32), "relu")
sys.modules["somewhere"] = holder
atexit.register(lambda: cconv.activate(holder.result, "relu").sum())
""")


def test_packed_weights_that_a_cycle_holds_are_given_back_once():
    """Each is a piece of a network's one block; the collector takes pieces apart before it frees them."""
    model = cconv.load("texture")
    x = np.ones((1, *model.input_shape), np.float32)
    expected = model(x)
    ring = [*model.weights._derived.values()]
    assert len(ring) > 1
    ring.append(ring)
    del model, ring
    gc.collect()
    others = [copied(1 << n) for n in range(12, 21) for _ in range(4)]
    for name, maps in cconv.load("texture")(x).items():
        np.testing.assert_array_equal(maps, expected[name])
    assert all((other == 1).all() for other in others)
