"""NaN: what is not finite is data. Direct sums keep it in the windows that hold it, Winograd in its tile.

In: layers of grid.py with one number spoiled, by every tiling on every instruction set.
Out: which outputs it reached; all others are bit for bit what they were.
"""

import numpy as np
import pytest

import cconv

PLAIN = {"activation": None, "bias": False, "residual": False, "layout": "plain", "preactivated": False}


def _reached(grid, layer, spot) -> np.ndarray:
    """Outputs whose window holds the spot."""
    mark = np.zeros(layer.x)
    mark[spot] = 1
    return grid.exact(layer, grid.Operands(mark, np.ones(layer.weight), None, None)) > 0


def _spot(rng, shape) -> tuple[int, ...]:
    return tuple(int(rng.integers(n)) for n in shape)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_direct_sums_confine_what_is_not_finite(grid, isa, dtype, value):
    rng = np.random.default_rng(2)
    seen = 0
    for family in grid.FAMILIES:
        for layer in grid.layers(family, 21, 8):
            layer = grid.replace(layer, **PLAIN)
            given = grid.operands(layer, dtype, lambda shape: rng.integers(1, 5, shape))
            spot = _spot(rng, layer.x)
            spoiled = grid.Operands(given.x.copy(), given.weight, None, None)
            spoiled.x[spot] = value
            reached, clean = _reached(grid, layer, spot), grid.exact(layer, given)
            seen += reached.any()
            for tiling in grid.direct_tilings(layer, isa, dtype):
                with grid.Threads(layer.threads):
                    got = grid.run(grid.program(layer, isa, dtype, tiling, given), spoiled)
                what = f"{spot} of {layer} in {dtype} on {isa} by {tiling}"
                assert np.array_equal(got[~reached], clean[~reached]), f"spread from {what}"
                assert np.array_equal(got[reached], np.full(reached.sum(), value), equal_nan=True), f"lost from {what}"
    assert seen > 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_winograd_confines_what_is_not_finite_to_its_tile(grid, isa, dtype, value):
    rng = np.random.default_rng(4)
    for layer in grid.winograd_layers(9, 6):
        layer = grid.replace(layer, **PLAIN)
        given = grid.operands(layer, dtype, rng.standard_normal)
        spot = _spot(rng, layer.x)
        spoiled = grid.Operands(given.x.copy(), given.weight, None, None)
        spoiled.x[spot] = value
        reached = _reached(grid, layer, spot)
        for tiling in grid.winograd_tilings(layer, isa, dtype, "high"):
            built = grid.program(layer, isa, dtype, tiling, given, "high")
            with grid.Threads(layer.threads):
                clean, got = grid.run(built, given), grid.run(built, spoiled)
            may = _tile_of(layer, (tiling.rows, tiling.columns), spot, clean.shape)
            what = f"{spot} of {layer} in {dtype} on {isa} by {tiling}"
            assert not (reached & ~may).any()
            assert got[~may].tobytes() == clean[~may].tobytes(), f"spread from {what}"
            assert not np.isfinite(got[reached]).any(), f"lost from {what}"


def _tile_of(layer, transforms, spot, shape) -> np.ndarray:
    """Outputs of the tiles whose input holds the spot."""
    may = np.zeros(shape, bool)
    axes = []
    for place, before, size, t, d in zip(
        spot[2:], layer.padding[:2], shape[2:], transforms, layer.dilation, strict=True
    ):
        first = [at // d // t.m * t.m * t.stride * d + at % d - before for at in range(size)]
        axes.append([place in range(begin, begin + t.alpha * d, d) for begin in first])
    may[spot[0]] = np.logical_and.outer(*axes)
    return may


def test_a_weight_that_is_not_finite_reaches_its_own_map_alone(grid, isa, dtype):
    rng = np.random.default_rng(6)
    layer = grid.Layer((2, 17, 9, 11), (35, 17, 3, 3), padding=(1, 1, 1, 1))
    given = grid.operands(layer, dtype, rng.standard_normal)
    spoiled = grid.Operands(given.x, given.weight.copy(), None, None)
    spoiled.weight[20, 3, 1, 1] = np.nan
    others = np.arange(35) != 20
    for tiling in (*grid.direct_tilings(layer, isa, dtype), *grid.winograd_tilings(layer, isa, dtype)):
        clean, got = (grid.run(grid.program(layer, isa, dtype, tiling, g), g) for g in (given, spoiled))
        assert np.isnan(got[:, 20]).all()
        assert got[:, others].tobytes() == clean[:, others].tobytes()


def test_algorithm_direct_keeps_a_nan_where_winograd_would_spread_it():
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((1, 64, 28, 28)), rng.standard_normal((64, 64, 3, 3))
    x, w = x.astype(np.float32), w.astype(np.float32)
    x[0, 5, 12, 12] = np.nan
    wrong = np.isnan(cconv.conv2d(x, w, padding=1, algorithm="direct"))
    expected = np.zeros((28, 28), bool)
    expected[11:14, 11:14] = True
    assert (wrong == expected).all()
    spread = np.isnan(cconv.conv2d(x, w, padding=1, algorithm="winograd", precision="high"))
    assert (spread >= expected).all()
    assert spread[0, 0].sum() > 9


def test_zeros_of_either_sign_are_zero(grid, isa, dtype):
    for layer in (
        grid.Layer((1, 4, 7, 19), (3, 4, 3, 3), padding=(1,) * 4),
        grid.Layer((1, 4, 7, 19), (4, 1, 3, 3), groups=4),
    ):
        given = grid.Operands(np.full(layer.x, -0.0, dtype), np.ones(layer.weight, dtype), None, None)
        for tiling in grid.direct_tilings(layer, isa, dtype):
            assert not grid.run(grid.program(layer, isa, dtype, tiling, given), given).any()
