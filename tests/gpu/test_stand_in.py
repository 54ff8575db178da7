"""Stand-in: cconv/gpu/device.py itself, run without a GPU on a stand-in for CuPy: processes, memory, modules, streams.

In: stand_in.py in CuPy's place.  Out: what the tests of the kernels cannot see, since a HostDevice is another class.
"""

import os
import sys
import threading
import warnings

import numpy as np
import pytest

import cconv
from cconv import backend as backends
from cconv import ops
from cconv.gpu import compile
from cconv.gpu import device as real
from cconv.planning import plan, specs
from cconv.weights import Weights


@pytest.fixture
def planted(monkeypatch, stand_in, host, libraries, sanitize):
    """A StandIn in CuPy's place; nothing is known of a device yet."""
    found = stand_in.StandIn(host.HostDevice(libraries, sanitize=sanitize))
    for name in ("cupy", "cupyx"):
        monkeypatch.setitem(sys.modules, name, getattr(found, name))
    for module, name, value in (
        (real, "_device", None), (real, "_first_use", real.FirstUse()), (ops, "_made", {}),
        (compile, "nvrtc", lambda: None), (compile, "cubin", stand_in.cubin),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return found


@pytest.fixture
def gpu(planted):
    return backends.get("gpu")


def in_a_child(function) -> int:
    """How a forked child ends: 0 if it got what `function` expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_cupy_array_is_computed_where_it_lies_and_cupys_goes_out(gpu, whole):
    x, weight, bias = whole((2, 3, 6, 7)), whole((4, 3, 3, 3)), whole(4)
    given = [gpu.asarray(array) for array in (x, weight, bias)]
    got = cconv.conv2d(*given, activation="relu")
    assert type(got) is type(given[0])
    np.testing.assert_array_equal(gpu.to_numpy(got), cconv.conv2d(x, weight, bias, activation="relu"))
    turned = gpu.asarray(np.ascontiguousarray(x[..., ::-1]))[..., ::-1]
    np.testing.assert_array_equal(gpu.to_numpy(cconv.conv2d(turned, *given[1:])), cconv.conv2d(x, weight, bias))


def test_dlpack_comes_in_without_a_copy(gpu, planted, whole):
    class OnCuda:
        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

    x, weight = whole((1, 3, 6, 7)), whole((4, 3, 3, 3))
    assert gpu.asarray(OnCuda(x)).data.ptr == x.ctypes.data
    got = cconv.conv2d(OnCuda(x), OnCuda(weight))
    assert type(got) is planted.cupy.ndarray
    np.testing.assert_array_equal(gpu.to_numpy(got), cconv.conv2d(x, weight))


def test_a_layers_weights_are_there_before_any_stream_reads_them(gpu, planted, whole):
    gpu.synchronize()
    assert planted.waited == 1
    cconv.Conv2d(gpu.asarray(whole((4, 3, 3, 3))))
    assert planted.waited == 2
    place = cconv.device("cuda")
    before = planted.waited
    place.put(whole((1, 3, 6, 7)))
    assert planted.waited == before + 1


class TestProcesses:
    """CUDA belongs to the process that used it first."""

    def test_a_child_of_one_that_used_it_is_refused_whatever_it_calls(self, gpu, whole):
        x, weight = gpu.asarray(whole((1, 3, 6, 7))), gpu.asarray(whole((4, 3, 3, 3)))
        layer, spec = cconv.Conv2d(weight), specs.conv((3, 6, 7), (4, 3, 3, 3))
        layer(x)
        planned = plan.single(spec, gpu.machine())
        for call in (
            gpu.machine, gpu.synchronize, lambda: gpu.asarray(x), lambda: gpu.to_numpy(x),
            lambda: gpu.build(planned, Weights(lambda _: (weight, None))), lambda: layer(x),
            lambda: cconv.conv2d(x, weight), lambda: cconv.max_pool2d(x, 2), lambda: cconv.device("cuda"),
        ):  # fmt: skip

            def refused(call=call):
                with pytest.raises(cconv.BackendUnavailable, match=f"{os.getppid()}, .* forked"):
                    call()

            assert in_a_child(refused) == 0
        assert in_a_child(lambda: layer(x)) == 1  # trust check
        layer(x)

    def test_a_child_may_use_it_first_and_so_may_its_parent(self, gpu):
        assert in_a_child(gpu.machine) == 0
        assert gpu.machine().isa == "sm_90"


def test_another_device_than_the_first_is_refused(gpu, planted):
    x = gpu.asarray(np.ones((1, 1, 3, 3), np.float32))
    elsewhere = x.copy()
    elsewhere.device = planted.cupy.cuda.Device(1)
    with pytest.raises(cconv.ArgumentError, match="device 0, got one on device 1"):
        cconv.max_pool2d(elsewhere, 2)
    planted.present = 1
    with pytest.raises(cconv.BackendUnavailable, match=r"expected device 0, .* got 1"):
        cconv.max_pool2d(x, 2)


def test_a_device_that_is_too_old_is_refused(planted, stand_in):
    planted.cupy.cuda.Device = stand_in.StandIn(None, "70").cupy.cuda.Device
    with pytest.raises(cconv.BackendUnavailable, match="capability 75 or more, got sm_70"):
        backends.get("gpu").machine()


class TestMemory:
    """What a layer keeps is plain memory, for which the pool makes room if there is none."""

    @pytest.fixture
    def layer(self, gpu, whole):
        return cconv.Conv2d(gpu.asarray(whole((4, 3, 3, 3)))), gpu.asarray(whole((1, 3, 6, 7)))

    def test_the_pool_is_emptied_and_memory_asked_for_again(self, layer, planted):
        run, x = layer
        planted.refused = [2]
        run(x)
        assert (planted.freed, planted.refused) == (1, [])

    @pytest.mark.parametrize(
        ("refused", "error", "freed"), [([2, 2], cconv.OutOfMemory, 1), ([700], cconv.DeviceError, 0)]
    )
    def test_then_it_is_an_error_and_others_are_at_once(self, layer, planted, refused, error, freed):
        run, x = layer
        planted.refused = refused
        with pytest.raises(error, match="planted"):
            run(x)
        assert planted.freed == freed

    def test_a_copy_that_is_kept_is_no_memory_of_the_callers(self, gpu, planted):
        array = gpu.asarray(np.arange(6.0).reshape(2, 3))
        for given in (array, array[:, ::2], gpu.to_numpy(array)):
            kept = real.current().kept(given)
            want = given if isinstance(given, np.ndarray) else gpu.to_numpy(given)
            np.testing.assert_array_equal(gpu.to_numpy(kept), want)
            assert kept.array.flags.c_contiguous
            assert not np.shares_memory(kept.array, array.array)


def test_threads_load_a_kernel_once(gpu, planted, whole):
    x, weight = gpu.asarray(whole((1, 3, 6, 7))), gpu.asarray(whole((4, 3, 3, 3)))
    cconv.conv2d(x, weight)
    loaded, together = planted.loaded, threading.Barrier(4)

    def pool():
        together.wait(30)
        cconv.max_pool2d(x, 2)

    threads = [threading.Thread(target=pool) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert planted.loaded == loaded + 1


def test_images_go_through_page_locked_memory_on_three_streams_of_a_threads_own(gpu, planted, whole, monkeypatch):
    x, weight = whole((7, 3, 6, 7)), whole((4, 3, 3, 3))
    place = cconv.device("cuda")
    layer = cconv.Conv2d(place.put(weight))
    planted.pinned.clear()
    planted.streams.clear()
    monkeypatch.setattr(gpu, "chunk", lambda images: 2)
    monkeypatch.setattr(real.current(), "_own", threading.local())
    for _ in range(2):
        got = place.run(lambda part: {"y": layer(part)}, x)["y"]
        np.testing.assert_array_equal(got, cconv.conv2d(x, weight))
    assert len(planted.streams) == 3
    # Two rooms of two images, and the maps of every chunk.
    shapes = [array.shape for array in planted.pinned]
    assert shapes == 2 * [*[(2, 3, 6, 7)] * 2, *[(2, 4, 4, 5)] * 3, (1, 4, 4, 5)]
    other = threading.Thread(target=place.run, args=(lambda part: {"y": layer(part)}, x))
    other.start()
    other.join()
    assert len(planted.streams) == 6
