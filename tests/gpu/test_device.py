"""Device: on a real GPU, where there is one: the grid, the tensors' tests, and what only a device has: `pytest -m gpu`.

The tests of tests/backends run there too, by their `twin` and `backend`. What these files check on the host device is
checked here on the real one, with the cubins that users get.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cconv
from cconv import backend as backends

pytestmark = pytest.mark.gpu

REASON = backends.available()["gpu"]


class OnDevice:
    """cconv.gpu by the names that the CPU's tests use, NumPy in and out."""

    name = "gpu"

    def __init__(self):
        self._twin = backends.get("gpu")

    def machine_of(self, isa: str, threads: int):
        return self._twin.machine()

    def build(self, plan, weights):
        return _Program(self._twin, self._twin.build(plan, weights))


class _Program:
    def __init__(self, twin, program):
        self._twin, self._program, self.plan = twin, program, program.plan

    def run(self, inputs, outputs=None, cancel=None) -> list:
        given = [self._twin.asarray(x) for x in inputs]
        written = None if outputs is None else [self._twin.asarray(np.ascontiguousarray(out)) for out in outputs]
        results = [self._twin.to_numpy(y) for y in self._program.run(given, written, cancel)]
        if outputs is None:
            return results
        for out, result in zip(outputs, results, strict=True):
            out[...] = result.reshape(out.shape)
        return outputs


@pytest.fixture(scope="session")
def on_device():
    if REASON:
        pytest.skip(REASON)
    return OnDevice()


@pytest.fixture(scope="session")
def device_grid(borrow, on_device):
    return borrow("kernels/grid.py", cpu=on_device, ISAS=("device",))


@pytest.mark.parametrize("family", ["dense", "pointwise", "depthwise", "grouped", "deep", "one pixel"])
@pytest.mark.parametrize("chunk", range(3))
def test_every_tile_of_a_layer_is_exact(borrow, device_grid, family, chunk, dtype):
    exact = borrow("kernels/test_exact.py")
    exact.test_every_direct_way_to_compute_a_layer_is_exact(device_grid, lambda items: items, family, chunk, dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_windows(borrow, device_grid, dtype, value):
    borrow("kernels/test_nan.py").test_direct_sums_confine_what_is_not_finite(device_grid, "device", dtype, value)


def test_tensors_agree_with_the_reference(borrow, on_device, dtype, rng):
    """tests/kernels/test_tensors.py, one call of each of its tests after the other."""
    module = borrow("kernels/test_tensors.py", cpu=on_device)
    for name in module.MOVES:
        module.test_moves_put_every_element_where_the_reference_does("device", dtype, name, rng)
    module.test_several_moves_fill_one_value("device", dtype, rng)
    for function in module.FUNCTIONS:
        module.test_functions_are_their_formulas("device", dtype, *function, 1000, rng)
    module.test_nan_passes_through("device", dtype)
    for kind in module.tensors.ARITHMETIC:
        for shapes in module.SPREAD:
            module.test_arithmetic_spreads_as_numpy_spreads("device", dtype, kind, shapes, rng)
    for channels, inner in ((1, 1), (1000, 1), (5, 3), (64, 17)):
        for far in (0, 1e4):
            module.test_softmax_is_a_distribution_however_large_its_operands("device", dtype, channels, inner, far, rng)
    for beta in (0.5, 0.75, 1.3):
        module.test_lrn_sums_over_the_channels_around("device", dtype, 5, beta, rng)
    module.test_resizing_blends_neighbours("device", dtype, rng)
    for left, right in (((5, 7), (7, 9)), ((2, 3, 4, 5), (5, 6)), ((1, 70, 200), (200, 90))):
        module.test_matrices_multiply_as_numpys("device", dtype, left, right, rng)


def test_results_are_the_same_from_run_to_run(on_device, normal):
    twin = backends.get("gpu")
    x, weight = twin.asarray(normal((33, 100, 20, 20))), twin.asarray(normal((100, 100, 5, 5)))
    layer = cconv.Conv2d(weight, padding=2)
    first = twin.to_numpy(layer(x))
    for _ in range(20):
        assert twin.to_numpy(layer(x)).tobytes() == first.tobytes()
    assert twin.to_numpy(layer(x[5:6])).tobytes() == first[5:6].tobytes()


def test_the_host_device_computes_the_same_bits(device, host, on_device, normal):
    """The shim models the device: the same sums in the same order, fused alike."""
    from cconv.planning import plan, specs
    from cconv.weights import Weights

    x, weight = normal((3, 40, 9, 10)), normal((50, 40, 3, 3))
    made = plan.single(specs.conv(x.shape[1:], weight.shape, padding=1), on_device.machine_of("", 1))
    weights = [Weights(lambda _: (weight, None)) for _ in range(2)]
    results = [
        twin.build(made, w).run([x])[0] for twin, w in zip((on_device, host.HostTwin(device)), weights, strict=True)
    ]
    assert results[0].tobytes() == results[1].tobytes()


def test_a_forked_child_is_refused(on_device):
    """In a process of its own: a fork of one with threads is a warning from Python 3.12 on."""
    code = """
import os, cconv
twin = cconv.backend.get("gpu")
twin.machine()
child = os.fork()
if child == 0:
    try:
        twin.machine()
    except cconv.BackendUnavailable:
        os._exit(0)
    os._exit(1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_runs_on_any_stream_at_once(on_device, whole):
    """Its tables and packed weights, made on one stream, are complete for every other, and outlive what reads them."""
    import cupy

    twin = backends.get("gpu")
    x, weight = whole((4, 64, 40, 41)), whole((96, 64, 3, 3))
    want = cconv.conv2d(x, weight)
    for _ in range(10):
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
        given, layer = twin.asarray(x), cconv.Conv2d(twin.asarray(weight))
        twin.synchronize()
        results = []
        for stream in streams:
            with stream:
                results.append(layer(given))
        del layer
        cupy.full((1 << 20,), cupy.nan, "float32")  # what takes memory that was given back
        for stream, result in zip(streams, results, strict=True):
            stream.synchronize()
            np.testing.assert_array_equal(twin.to_numpy(result), want)


def test_threads_share_a_layer(on_device, whole):
    twin = backends.get("gpu")
    x, weight = whole((2, 32, 20, 21)), whole((40, 32, 3, 3))
    layer, want = cconv.Conv2d(twin.asarray(weight)), cconv.conv2d(x, weight)
    with ThreadPoolExecutor(8) as threads:
        for got in threads.map(lambda _: twin.to_numpy(layer(twin.asarray(x))), range(40)):
            np.testing.assert_array_equal(got, want)


def test_too_large_an_array_is_out_of_memory_and_the_device_goes_on(on_device, whole):
    twin = backends.get("gpu")
    x, weight = (twin.asarray(np.ones(shape, np.float32)) for shape in ((1, 1, 1 << 10, 1 << 10), (1 << 19, 1, 1, 1)))
    with pytest.raises(cconv.OutOfMemory):  # 2 TiB
        cconv.conv2d(x, weight)
    assert twin.to_numpy(cconv.conv2d(twin.asarray(np.ones((1, 1, 2, 2), np.float32)), weight[:1])).sum() == 4


@pytest.fixture
def many(on_device):
    """Images of float16, 2^31 + 2^29 elements in all; the last ones' elements have places beyond 32 bits."""
    import cupy

    if cupy.cuda.runtime.memGetInfo()[0] < 40 << 30:
        pytest.skip("expected 40 GiB of free memory on the GPU")
    x = cupy.zeros((5, 32, 4096, 4096), cupy.float16)
    x[-1, -1, -3:, -3:], x[0, 0, 0, 0], x[4, 0, 0, 0] = 2, 3, 5
    yield x
    del x
    cupy.get_default_memory_pool().free_all_blocks()


def test_elements_beyond_32_bits_are_read_and_written_in_their_places(many):
    """Every way to find a place: one convolution's image and map, a depthwise strip, a pool, elements one by one."""
    import cupy

    dense = cconv.conv2d(many, cupy.ones((32, 32, 1, 1), cupy.float16))
    assert (int(dense[4, 31, -1, -1]), int(dense[4, 31, 0, 0]), int(dense[0, 5, 0, 0])) == (2, 5, 3)
    assert cupy.count_nonzero(dense) == 32 * (9 + 1 + 1)
    del dense
    strips = cconv.conv2d(many, cupy.ones((32, 1, 3, 3), cupy.float16), padding=1, groups=32)
    assert (int(strips[4, 31, -2, -2]), int(strips[4, 0, 1, 1])) == (18, 5)
    assert cupy.count_nonzero(strips) == 4 * 4 + 4 + 4
    del strips
    pooled = cconv.max_pool2d(many, 2, 1, padding=(1, 0, 0, 1))
    assert pooled.shape == many.shape
    assert int(pooled[4, 31, -1, -1]) == 2
    assert cupy.count_nonzero(pooled) == 3 * 4 + 2 + 2
    del pooled
    for activation, least in (("relu", 2), ("sigmoid", 0.88)):
        found = cconv.activate(many, activation)
        assert float(found[4, 31, -1, -1]) >= least
        assert float(found[4, 0, 0, 0]) > float(found[0, 0, 0, 0]) > float(found[1, 0, 0, 0])
        del found


def test_cuda_arrays_come_in_by_dlpack(on_device, whole):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    x, weight = whole((2, 3, 8, 9)), whole((4, 3, 3, 3))
    got = cconv.conv2d(torch.from_numpy(x).cuda(), torch.from_numpy(weight).cuda())
    np.testing.assert_array_equal(backends.get("gpu").to_numpy(got), cconv.conv2d(x, weight))
