"""Bits: for a given plan no bit of a result depends on the threads, on the size of the batch, or on the place in it.

In: layers of grid.py by every tiling, on real numbers, where another order of additions would show.
Out: results compared as bytes.
"""

import numpy as np
import pytest

from cconv.planning import algorithm

ACTIVATED = {"activation": "silu", "bias": True, "residual": False, "layout": "plain"}


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _layers(grid):
    """Layers of all kinds, some with enough tiles for five threads."""
    found = [layer for family in grid.FAMILIES for layer in grid.layers(family, 11, 4)]
    found += [
        grid.Layer((1, 5, 40, 41), (33, 5, 3, 3), padding=(1,) * 4, l2_bytes=1 << 12),
        grid.Layer((1, 8, 30, 30), (8, 1, 3, 3), padding=(1,) * 4, groups=8),
        grid.Layer((1, 100, 17, 19), (70, 100, 1, 1), l2_bytes=1 << 12),
        grid.Layer((1, 64, 5, 11), (130, 64, 3, 3)),
    ]
    for i, layer in enumerate(found):  # a machine of five threads has other parts
        yield grid.replace(layer, x=(1, *layer.x[1:]), threads=(1, 5)[i % 2], **ACTIVATED)


def _check_threads_and_batches(grid, layer, isa, dtype, tilings, precision):
    rng = np.random.default_rng(3)
    batch = grid.replace(layer, x=(5, *layer.x[1:]))
    given = grid.operands(batch, dtype, rng.standard_normal)
    for tiling in tilings:
        what = f"{layer} in {dtype} on {isa} by {tiling}"
        with grid.Threads(1):
            built = grid.program(layer, isa, dtype, tiling, given, precision)
            together = grid.run(built, given)
        for threads in (2, 3, 5):
            with grid.Threads(threads):  # which pack large weights together, too
                again = grid.program(layer, isa, dtype, tiling, given, precision)
                assert _same_bits(grid.run(again, given), together), f"{threads} threads: {what}"
        with grid.Threads(2):
            for i in (0, 3, 4):
                alone = grid.run(built, grid.replace(given, x=given.x[i : i + 1], residual=None))
                assert _same_bits(alone[0], together[i]), f"image {i} alone: {what}"
            order = [3, 0, 4]
            some = grid.run(built, grid.replace(given, x=given.x[order], residual=None))
            assert _same_bits(some, together[order]), f"another order: {what}"


def test_direct_results_do_not_depend_on_threads_batch_or_place(grid, isa, dtype, sampled):
    for layer in sampled(_layers(grid)):
        _check_threads_and_batches(grid, layer, isa, dtype, grid.direct_tilings(layer, isa, dtype), "highest")


def test_direct_results_do_not_depend_on_what_lies_in_the_lanes(grid, isa, dtype, sampled):
    """So that the choice between them may depend on the batch."""
    compared = 0
    for layer in sampled(_layers(grid)):
        given = grid.operands(layer, dtype, np.random.default_rng(4).standard_normal)
        tilings = [tiling for tiling in grid.direct_tilings(layer, isa, dtype) if hasattr(tiling, "lanes")]
        results = [grid.run(grid.program(layer, isa, dtype, tiling, given), given) for tiling in tilings]
        for tiling, result in zip(tilings, results, strict=True):
            assert _same_bits(result, results[0]), f"{layer} in {dtype} on {isa} by {tiling}"
        compared += len({tiling.lanes for tiling in tilings}) == 2
    assert compared


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_winograd_results_do_not_depend_on_threads_batch_or_place(grid, isa, dtype, precision, sampled):
    kernels = (3, 5) if precision == "highest" else (3, 5, 7)
    large = grid.Layer((1, 40, 9, 10), (50, 40, 3, 3), padding=(1,) * 4)
    for layer in sampled([*grid.winograd_layers(5, 4, kernels), large]):
        layer = grid.replace(layer, x=(1, *layer.x[1:]), **ACTIVATED)
        tilings = grid.winograd_tilings(layer, isa, dtype, precision)
        _check_threads_and_batches(grid, layer, isa, dtype, tilings, precision)


def test_threads_that_share_the_filters_of_few_outputs_leave_each_other_s_alone(grid, isa, dtype):
    """Fewer than a vector of doubles has room for; enough channels for threads to share them."""
    for outputs in (1, 2, 3):
        layer = grid.Layer((1, 2400 // outputs, 5, 6), (outputs, 2400 // outputs, 3, 3), padding=(1,) * 4)
        given = grid.operands(layer, dtype, np.random.default_rng(6).standard_normal)
        for tiling in algorithm.candidates(layer.spec(dtype, "winograd"), layer.machine(isa)):
            results = []
            for threads in (1, 2, 3):
                with grid.Threads(threads):
                    results.append(grid.run(grid.program(layer, isa, dtype, tiling, given), given))
            assert _same_bits(results[0], results[1]), f"{layer} in {dtype} on {isa} by {tiling}"
            assert _same_bits(results[0], results[2]), f"{layer} in {dtype} on {isa} by {tiling}"


def test_winograd_results_do_not_depend_on_blocks_or_on_what_lies_in_the_lanes(grid, isa, dtype, sampled):
    """So that the choice between them may depend on threads and batches."""
    compared = 0
    for layer in sampled(grid.winograd_layers(6, 8, (3, 5))):
        given = grid.operands(layer, dtype, np.random.default_rng(5).standard_normal)
        first = {}
        for tiling in grid.winograd_tilings(layer, isa, dtype):
            result = grid.run(grid.program(layer, isa, dtype, tiling, given), given)
            lanes, want = first.setdefault((tiling.rows, tiling.columns), (tiling.lanes, result))
            assert _same_bits(result, want), f"{layer} in {dtype} on {isa} by {tiling}"
            compared += lanes != tiling.lanes
    assert compared


def _outputs(shape, dtype):
    """Arrays full of NaN that begin a cache line, and some elements into one."""
    size = int(np.prod(shape))
    for skipped in (0, 1, 16):
        room = np.full(size + 64, np.nan, dtype)
        begin = -room.ctypes.data % 64 // room.itemsize + skipped
        yield room[begin : begin + size].reshape(shape)


def test_going_past_the_caches_changes_no_bit(grid, isa, dtype, activation):
    """Maps of whole cache lines, with rows of whole lines or not; then maps that are neither."""
    rng = np.random.default_rng(7)
    for size, kernel, padding in (((20, 32), 3, 1), ((14, 48), 1, 0), ((8, 22), 3, 1), ((9, 13), 1, 0)):
        layer = grid.Layer(
            (2, 20, *size), (33, 20, kernel, kernel), padding=(padding,) * 4, bias=True, activation=activation,
            threads=2,
        )  # fmt: skip
        given = grid.operands(layer, dtype, rng.standard_normal)
        tilings = list(grid.direct_tilings(layer, isa, dtype))
        if kernel == 3:
            tilings += grid.winograd_tilings(layer, isa, dtype)
        for tiling in tilings:
            near, far = (
                grid.program(layer, isa, dtype, grid.replace(tiling, far_images=images), given) for images in (3, 1)
            )
            want = grid.run(near, given)
            for out in _outputs(want.shape, dtype):
                assert grid.run(far, given, out) is out
                assert _same_bits(out, want), f"{layer} in {dtype} on {isa} by {tiling}"


def test_another_order_of_additions_would_be_seen(grid):
    """Trust check: sums in other chains have other bits."""
    layer = grid.Layer((1, 300, 6, 7), (8, 300, 3, 3))
    given = grid.operands(layer, "float32", np.random.default_rng(0).standard_normal)
    first = grid.direct_tilings(layer, grid.ISAS[0], "float32")[0]
    other = grid.replace(first, chains=first.chains + 1)
    results = [grid.run(grid.program(layer, grid.ISAS[0], "float32", t, given), given) for t in (first, other)]
    assert not _same_bits(*results)
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-3)
