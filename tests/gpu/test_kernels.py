"""Kernels: the GPU's sources on the host, through the very tests of the CPU's kernels, and what is theirs alone.

In: tests/kernels, with every tile of every layer.  Out: exactness, confinement of NaN, bits that depend on nothing.
"""

from itertools import product

import numpy as np
import pytest

from cconv.planning import cuda, specs

#: Layers of a family in one test, of the grid's.
CHUNK = 60


@pytest.fixture(scope="session")
def exact(borrow):
    return borrow("kernels/test_exact.py")


def _family(exact, grid, sampled, family, chunk, dtype):
    exact.test_every_direct_way_to_compute_a_layer_is_exact(grid, sampled, family, chunk, dtype)


@pytest.mark.parametrize("family", ["dense", "pointwise", "depthwise", "grouped", "deep", "one pixel"])
def test_every_tile_of_a_layer_is_exact(exact, grid, sampled, family, dtype):
    _family(exact, grid, sampled, family, 0, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "pointwise", "depthwise", "grouped", "deep", "one pixel"])
def test_every_tile_of_many_layers_is_exact(exact, grid, sampled, family, dtype):
    _family(exact, grid, sampled, family, 1, dtype)


def test_a_residual_that_is_also_the_output_is_read_before_it_is_written(exact, grid, isa, dtype):
    exact.test_a_residual_that_is_also_the_output_is_read_before_it_is_written(grid, isa, dtype, "plain")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_windows(borrow, grid, isa, dtype, value, monkeypatch):
    module = borrow("kernels/test_nan.py")
    layers = grid.layers
    monkeypatch.setattr(grid, "layers", lambda family, seed, count: list(layers(family, seed, count))[::2])
    module.test_direct_sums_confine_what_is_not_finite(grid, isa, dtype, value)


def test_zeros_of_either_sign_are_zero(borrow, grid, isa, dtype):
    borrow("kernels/test_nan.py").test_zeros_of_either_sign_are_zero(grid, isa, dtype)


def test_no_bit_depends_on_the_tile_the_batch_or_the_place(grid, isa, dtype):
    """Nor on the order in which blocks and threads run, which is another one every time."""
    rng = np.random.default_rng(5)
    for layer in (
        grid.Layer((5, 30, 7, 9), (40, 30, 3, 3), padding=(1,) * 4, bias=True, activation="silu"),
        grid.Layer((5, 700, 3, 3), (20, 700, 1, 1), bias=True),
        grid.Layer((5, 6, 11, 12), (34, 3, 3, 2), groups=2, stride=(2, 1), activation="gelu"),
    ):
        given = grid.operands(layer, dtype, rng.standard_normal)
        results = set()
        for tiling in grid.direct_tilings(layer, isa, dtype):
            built = grid.program(layer, isa, dtype, tiling, given)
            together = grid.run(built, given)
            results.add(together.tobytes())
            for i in (0, 3):
                alone = grid.run(built, grid.Operands(given.x[i : i + 1], given.weight, given.bias, None))
                assert alone[0].tobytes() == together[i].tobytes()
        assert len(results) == 1


def test_a_depthwise_kernel_known_ahead_agrees_with_the_general_one(grid, isa, dtype):
    rng = np.random.default_rng(6)
    heights = {16: 19, 37: 17, 40: 21}  # a strip's last rows are there, or not, with vectors and without
    for kernel, stride, kind, width in product((3, 5, 7), (1, 2), ("even", "uneven", "beyond"), heights):
        half = kernel // 2
        # The last: whole vectors of outputs have their inputs behind the end of a row.
        padding = {"even": (half,) * 4, "uneven": (1, 2, 3, 0), "beyond": (half, half, half, half + 4 * stride)}[kind]
        layer = grid.Layer((2, 3, heights[width], width), (6, 1, kernel, kernel), (stride,) * 2, padding, groups=3,
                           bias=True, residual=True, activation="relu6")  # fmt: skip
        given = grid.operands(layer, dtype, lambda shape: rng.integers(-4, 5, shape))
        tilings = grid.direct_tilings(layer, isa, dtype)
        assert [tiling.known for tiling in tilings] == [True, False]
        for tiling in tilings:
            np.testing.assert_array_equal(
                grid.run(grid.program(layer, isa, dtype, tiling, given), given), grid.exact(layer, given)
            )


def test_arrays_may_begin_anywhere(grid, isa, dtype):
    """Where a vector does not, nothing is loaded or stored as one."""
    rng = np.random.default_rng(9)

    def shifted(array):
        room = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
        room[...] = array
        return room

    for layer in (
        grid.Layer((2, 5, 9, 12), (40, 5, 3, 3), padding=(1,) * 4, bias=True, residual=True),
        grid.Layer((2, 3, 9, 16), (3, 1, 3, 3), padding=(1,) * 4, groups=3, residual=True),
    ):
        given = grid.operands(layer, dtype, lambda shape: rng.integers(-4, 5, shape))
        want = grid.exact(layer, given)
        for which in ("x", "residual", "out"):
            moved = given if which == "out" else grid.replace(given, **{which: shifted(getattr(given, which))})
            for tiling in grid.direct_tilings(layer, isa, dtype):
                out = np.full(want.shape, np.nan, dtype)
                out = shifted(out) if which == "out" else out
                grid.run(grid.program(layer, isa, dtype, tiling, moved), moved, out)
                np.testing.assert_array_equal(out, want)


def test_a_depthwise_kernel_of_several_chains_is_exact(grid, isa, dtype):
    """121 and 240 products; a chain has 96."""
    rng = np.random.default_rng(8)
    for rows, columns in ((11, 11), (16, 15)):
        layer = grid.Layer((2, 2, 18, 19), (4, 1, rows, columns), padding=(5,) * 4, groups=2, bias=True)
        given = grid.operands(layer, dtype, lambda shape: rng.integers(-4, 5, shape))
        for tiling in grid.direct_tilings(layer, isa, dtype):
            got = grid.run(grid.program(layer, isa, dtype, tiling, given), given)
            np.testing.assert_array_equal(got, grid.exact(layer, given))


def test_the_grid_reaches_every_tile(grid, isa):
    """Trust check: what planning can choose is what the tests have run."""
    for dtype in specs.ITEMSIZE:
        found = {
            tiling.label for family in grid.FAMILIES for layer in grid.layers(family, 0, CHUNK)
            for tiling in grid.direct_tilings(layer, isa, dtype)
        }  # fmt: skip
        assert found == {f"direct {o}x{p}" for o, p, *_ in cuda.TILES[dtype]} | {"direct depthwise"}


def test_a_batch_norm_and_relu_before_a_1x1_convolution_ride_along(grid, isa, dtype):
    rng = np.random.default_rng(7)
    layer = grid.Layer((2, 19, 5, 7), (40, 19, 1, 1), bias=True, activation="relu", preactivated=True)
    given = grid.operands(layer, dtype, lambda shape: rng.integers(-4, 5, shape))
    want = grid.exact(layer, given)
    assert np.count_nonzero(want) > want.size / 4
    for tiling in grid.direct_tilings(layer, isa, dtype):
        np.testing.assert_array_equal(grid.run(grid.program(layer, isa, dtype, tiling, given), given), want)
