"""Exact: direct convolutions of whole numbers have no rounding error, whatever the shape, on every instruction set.

In: the layers of grid.py by the thousand, each by every direct tiling on every instruction set.
Out: equality with the float64 reference, to the last bit, and nothing else written.
"""

import numpy as np
import pytest

#: Layers of a family in one test, and tests: 2520 layers in float32 and float64 are 5040 configurations on any machine.
CHUNK = 60
CHUNKS = {"dense": 14, "pointwise": 7, "depthwise": 10, "grouped": 6, "deep": 2, "one pixel": 3}


def _whole(rng):
    return lambda shape: rng.integers(-8, 9, shape)


def _check(grid, layer, isa, dtype, tiling, given, want):
    """One run into an array of NaN, its scratch full of NaN from the run before."""
    built = grid.program(layer, isa, dtype, tiling, given)
    with grid.Threads(layer.threads):
        grid.run(built, grid.replace(given, x=np.full(layer.x, np.nan, dtype)))
        out = np.full(want.shape, np.nan, dtype)
        assert grid.run(built, given, out) is out
    if not np.array_equal(out, want):
        wrong = np.argwhere(out != want)
        at = tuple(wrong[0])
        pytest.fail(
            f"{layer} in {dtype} on {isa} by {tiling}: {len(wrong)} of {want.size} outputs are wrong, the first at "
            f"{at}: expected {want[at]}, got {out[at]}"
        )


@pytest.mark.parametrize(("family", "chunk"), [(family, i) for family, n in CHUNKS.items() for i in range(n)])
def test_every_direct_way_to_compute_a_layer_is_exact(grid, sampled, family, chunk, dtype):
    rng = np.random.default_rng(chunk)
    reached = total = 0
    for layer in sampled(grid.layers(family, chunk, CHUNK)):
        given = grid.operands(layer, dtype, _whole(rng))
        want = grid.exact(layer, given)
        reached, total = reached + np.count_nonzero(want), total + want.size
        for isa in grid.ISAS:
            for tiling in grid.direct_tilings(layer, isa, dtype):
                _check(grid, layer, isa, dtype, tiling, given, want)
    # Trust check: zeros would be right for the wrong reason. Activations leave about half.
    assert reached > total / 4


@pytest.mark.parametrize("layout", ["plain", "wider maps", "one image", "channels last"])
@pytest.mark.parametrize("share", [0.5, 0.8], ids=["whole", "in pieces"])
@pytest.mark.parametrize("groups", [1, 3])
def test_an_image_that_is_a_tile_is_read_where_it_lies(grid, layout, share, groups, dtype):
    """Or packed, where it does not lie as the tile would."""
    rng = np.random.default_rng(groups)
    for size, threads in ((7, 1), (14, 2), (13, 3)):
        layer = grid.Layer(
            (2, 300 * groups, size, size), (11 * groups, 300, 1, 1), groups=groups, bias=True, residual=True,
            activation="relu", layout=layout, threads=threads,
            l2_bytes=int(300 * size * size * np.dtype(dtype).itemsize / share),
        )  # fmt: skip
        given = grid.operands(layer, dtype, _whole(rng))
        want = grid.exact(layer, given)
        for isa in grid.ISAS:
            found = [tiling for tiling in grid.direct_tilings(layer, isa, dtype) if tiling.lanes == "channels"]
            assert [(tiling.in_place, tiling.pieces > 1) for tiling in found] == [(True, share > 0.5)]
            _check(grid, layer, isa, dtype, found[0], given, want)


@pytest.mark.parametrize("layout", ["plain", "wider maps", "one image", "channels last"])
@pytest.mark.parametrize("groups", [1, 3])
def test_pieces_of_an_image_are_read_where_they_lie_by_few_panels_or_wide_vectors(grid, layout, groups, dtype):
    rng = np.random.default_rng(groups)
    for (height, width), threads in (((31, 29), 1), ((1, 900), 2), ((23, 41), 3)):
        layer = grid.Layer(
            (2, 100 * groups, height, width), (11 * groups, 100, 1, 1), groups=groups, bias=True, residual=True,
            activation="relu6", layout=layout, threads=threads,
        )  # fmt: skip
        given = grid.operands(layer, dtype, _whole(rng))
        want = grid.exact(layer, given)
        for isa in grid.ISAS:
            found = [tiling for tiling in grid.direct_tilings(layer, isa, dtype) if tiling.lanes == "channels"]
            few = found[0].panels <= 2 or layer.machine(isa).vector_bytes == 64
            assert [(t.in_place, t.tile_q < height * width) for t in found] == [(few, True)]
            _check(grid, layer, isa, dtype, found[0], given, want)


@pytest.mark.parametrize("layout", ["plain", "wider maps", "one image", "channels last"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_lanes_of_pixels_read_an_image_where_it_lies_if_they_end_in_registers(grid, layout, residual, dtype):
    """Rows of whole vectors, or rows whose last register tile overlaps the one before; neither looks beyond them."""
    rng = np.random.default_rng(3)
    for (height, width), threads in (((16, 20), 1), ((1, 2048), 2), ((9, 23), 3)):
        for activation, groups, channels in (("relu6", 1, 100), ("relu6", 2, 40), (("leaky_relu", 0.25), 3, 40)):
            layer = grid.Layer(
                (2, channels * groups, height, width), (29 * groups, channels, 1, 1), groups=groups, bias=True,
                residual=residual, activation=activation, layout=layout, threads=threads,
            )  # fmt: skip
            given = grid.operands(layer, dtype, _whole(rng))
            want = grid.exact(layer, given)
            for isa in grid.ISAS:
                found = [tiling for tiling in grid.direct_tilings(layer, isa, dtype) if tiling.lanes == "pixels"]
                fit = channels <= 64 or layer.machine(isa).vector_bytes == 64
                assert [t.in_place for t in found] == [activation == "relu6" and fit]
                _check(grid, layer, isa, dtype, found[0], given, want)


#: Image, kernel and the rest of a Layer, and the zeros that neighbouring rows share.
JOINED = {
    "one column between": ((28, 28), (3, 3), {"padding": (1, 1, 1, 1)}, 1),
    "a last tile of fewer rows": ((23, 27), (3, 3), {"padding": (1, 1, 1, 1)}, 1),
    "more padding on one side": ((9, 29), (3, 5), {"padding": (1, 3, 0, 1)}, 1),
    "no gap": ((9, 21), (3, 3), {"padding": (2, 2, 2, 2)}, 2),
    "more padding than a window reaches": ((9, 19), (3, 3), {"padding": (0, 5, 0, 4)}, 2),
    "no padding": ((12, 31), (3, 3), {}, 0),
    "dilation": ((12, 25), (3, 3), {"padding": (2, 2, 2, 2), "dilation": (1, 2)}, 2),
    "stride": ((21, 37), (3, 3), {"padding": (1, 1, 1, 1), "stride": (2, 2)}, 0),
    "stride down": ((21, 37), (3, 3), {"padding": (1, 1, 1, 1), "stride": (2, 1)}, 1),
}


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("how", [None, "relu", "relu6", ("leaky_relu", 0.5)])
def test_joined_rows_of_pixels_are_exact(grid, name, how, dtype):
    """Alone, with a residual, and with one that lies where the output does."""
    image, kernel, options, shared = JOINED[name]
    rng = np.random.default_rng(5)
    joined = 0
    for groups, outputs in ((1, 29), (3, 4)):
        layer = grid.Layer(
            (2, 3 * groups, *image), (outputs * groups, 3, *kernel), groups=groups, bias=True, activation=how,
            threads=2, **options,
        )  # fmt: skip
        for one in (layer, grid.replace(layer, residual=True)):
            given = grid.operands(one, dtype, _whole(rng))
            want = grid.exact(one, given)
            for isa in grid.ISAS:
                for tiling in (t for t in grid.direct_tilings(one, isa, dtype) if getattr(t, "joined", False)):
                    assert tiling.columns.shared == shared
                    joined += 1
                    _check(grid, one, isa, dtype, tiling, given, want)
                    if one.residual:
                        both = given.residual.copy()
                        built = grid.program(one, isa, dtype, tiling, given)
                        np.testing.assert_array_equal(grid.run(built, grid.replace(given, residual=both), both), want)
    assert joined


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_a_depthwise_map_of_several_strips_is_exact(grid, kernel, stride, residual, dtype):
    """Higher and wider than depthwise.inc.c copies at once; some with more padding than a filter needs."""
    rng = np.random.default_rng(kernel)
    same = (kernel // 2,) * 4
    sizes = (((65, 397), same), ((31, 205), (0, 0, 0, 0)), ((40, 401), (33, 1, 9, 40)), ((6, 250), (2, 1, 0, 3)))
    for (height, width), padding in sizes:
        layer = grid.Layer(
            (1, 2, height + kernel, width), (4, 1, kernel, kernel), (stride,) * 2, padding, (1, 1), 2, True, residual,
            "relu6", threads=2,
        )  # fmt: skip
        given = grid.operands(layer, dtype, _whole(rng))
        want = grid.exact(layer, given)
        for isa in grid.ISAS:
            (tiling,) = grid.direct_tilings(layer, isa, dtype)
            assert type(tiling).__name__ == "Depthwise"
            _check(grid, layer, isa, dtype, tiling, given, want)


def test_the_grid_has_thousands_of_different_layers_and_reaches_every_kernel(grid):
    found = [layer for family, n in CHUNKS.items() for i in range(n) for layer in grid.layers(family, i, CHUNK)]
    assert 2 * len(set(found)) >= 5000
    ways = {
        (type(tiling).__name__, getattr(tiling, "lanes", None), getattr(tiling, "flat", None),
         getattr(tiling, "across_images", None), getattr(tiling, "joined", None))
        for layer in found[::3] for tiling in grid.direct_tilings(layer, grid.ISAS[0], "float32")
    }  # fmt: skip
    lanes = {(name, lane) for name, lane, *_ in ways}
    assert lanes == {("Direct", "pixels"), ("Direct", "channels"), ("Depthwise", None)}
    for choice in (2, 3, 4):
        assert {way[choice] for way in ways if way[0] == "Direct"} == {False, True}
    assert {layer.layout for layer in found} == set(grid.LAYOUTS)


@pytest.mark.parametrize("layout", ["plain", "every other"])
def test_a_residual_that_is_also_the_output_is_read_before_it_is_written(grid, isa, dtype, layout):
    rng = np.random.default_rng(1)
    layer = grid.Layer((2, 6, 9, 37), (19, 6, 3, 3), padding=(1, 1, 1, 1), residual=True, layout=layout, threads=2)
    deep = grid.Layer((2, 6, 9, 37), (6, 1, 3, 3), padding=(1, 1, 1, 1), groups=6, residual=True, layout=layout)
    # Rows of whole vectors, and others, whose last register tile overlaps the one before.
    even = grid.Layer((2, 6, 9, 32), (19, 6, 3, 3), padding=(1, 1, 1, 1), residual=True, layout=layout, threads=2)
    flat, odd = (grid.Layer((2, 6, n, 19), (19, 6, 1, 1), residual=True, layout=layout, threads=2) for n in (16, 17))
    for one in (layer, deep, even, flat, odd):
        given = grid.operands(one, dtype, _whole(rng))
        want = grid.exact(one, given)
        for tiling in grid.direct_tilings(one, isa, dtype):
            both = given.residual.copy()
            grid.run(
                grid.program(one, isa, dtype, tiling, given), grid.Operands(given.x, given.weight, None, both), both
            )
            np.testing.assert_array_equal(both, want)
