"""Winograd: every transform on every instruction set stays within the documented error, and within its own tile.

In: the layers of grid.py and others, by every transform with both kinds of lanes, in blocks that threads share and in
blocks of their own.  Out: errors against the float64 reference below docs/api.md's bound; and for whole numbers that
are small enough, results that differ from the exact ones by rounding alone.
"""

import itertools

import numpy as np
import pytest

from cconv.planning import algorithm, winograd
from cconv.planning.specs import as_activation
from cconv.reference import activate

#: precision -> L2 error relative to the result's, largest error relative to its RMS.
BOUNDS = {"highest": (2e-6, 2e-5), "high": (1e-3, np.inf)}
CHUNKS, LAYERS = 3, 14


def allowed(layer, dtype: str, precision: str) -> tuple[float, float]:
    """docs/api.md's bounds."""
    depth = np.prod(layer.weight[1:])
    factor = max(1.0, np.sqrt(depth / 2304)) if precision == "highest" else 1.0
    return tuple(bound * factor * (2.0**-29 if dtype == "float64" else 1.0) for bound in BOUNDS[precision])


class Truth:
    """What a layer of float32 or float64 must give, and how far from it an image may be."""

    def __init__(self, grid, layer, dtype, given, zero_mean):
        self.layer, self.dtype = layer, dtype
        # The reference twin's own rounding is as large as that of the float64 kernels.
        oracle = grid.exact if dtype == "float32" else grid.precise
        plain = grid.replace(layer, activation=None)
        self.want = result = oracle(plain, given)
        if layer.activation is not None:
            self.want = activate(result, as_activation(layer.activation))
        if not zero_mean:
            sizes = (None if a is None else np.abs(a) for a in (given.x, given.weight, given.bias, given.residual))
            result = grid.exact(plain, grid.Operands(*sizes))
        self.rms = [float(np.sqrt(np.mean(image**2))) for image in result]

    def check(self, got, precision: str, what: str) -> None:
        """An error within the bound, image by image: relative to the sum itself, or to that of all magnitudes."""
        most_l2, most = allowed(self.layer, self.dtype, precision)
        for image, (error, rms) in enumerate(zip(np.abs(got - self.want).astype(np.float64), self.rms, strict=True)):
            where = f"image {image} of {self.layer} in {self.dtype} {what}"
            l2, peak = np.sqrt(np.mean(error**2)) / rms, error.max() / rms
            assert l2 <= most_l2, f"L2 error {l2:.2e} of {most_l2:.2e}, {where}"
            assert peak <= most, f"largest error {peak:.2e} of {most:.2e}, {where}"


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_transform_in_every_kind_of_block_stays_within_the_bound(grid, sampled, chunk, precision, dtype):
    rng = np.random.default_rng(chunk)
    for layer in sampled(grid.winograd_layers(chunk, LAYERS)):
        if not winograd_transforms(layer, precision):
            continue
        given = grid.operands(layer, dtype, rng.standard_normal)
        # A handful of outputs may all lie near zero by chance: their own size is then no measure.
        zero_mean = np.prod(layer.spec(dtype).output) >= 256
        truth = Truth(grid, layer, dtype, given, zero_mean)
        for isa in grid.ISAS:
            for tiling in grid.winograd_tilings(layer, isa, dtype, precision):
                with grid.Threads(layer.threads):
                    out = np.full((layer.x[0], *layer.spec(dtype).output), np.nan, dtype)
                    built = grid.program(layer, isa, dtype, tiling, given, precision)
                    grid.run(built, given, out)
                    if given.residual is not None:  # where the output is, too
                        both = given.residual.copy(order="C")
                        grid.run(built, grid.replace(given, residual=both), both)
                        assert np.array_equal(both, out), f"{layer} in {dtype} on {isa} by {tiling}"
                truth.check(out, precision, f"on {isa} by {tiling}")


def winograd_transforms(layer, precision: str) -> set:
    """The tiles, with their taps and stride, that meet a layer's precision."""
    channels, size = layer.weight[1:3]
    kind = size, layer.stride[0]
    tiles = {tile: [winograd.transform(m, *kind) for m in tile] for tile in winograd.TILES[kind]}
    return {(*tile, *kind) for tile, pair in tiles.items() if winograd.within(*pair, precision, channels)}


def test_the_layers_reach_every_transform_and_both_kinds_of_blocks(grid):
    tried = {
        (precision, tile)
        for precision in BOUNDS for chunk in range(CHUNKS) for layer in grid.winograd_layers(chunk, LAYERS)
        for tile in winograd_transforms(layer, precision)
    }  # fmt: skip
    assert {tile for _, tile in tried} == {(*tile, *kind) for kind, tiles in winograd.TILES.items() for tile in tiles}
    assert {("highest", (3, 4, 5, 1)), ("highest", (4, 4, 3, 2))} <= tried
    assert {precision for precision, _ in tried} == set(BOUNDS)
    layers = [layer for chunk in range(CHUNKS) for layer in grid.winograd_layers(chunk, LAYERS) if layer.weight[2] == 3]
    assert {layer.dilation for layer in layers} > {(1, 1), (2, 2)}
    tilings = [t for layer in layers for t in grid.winograd_tilings(layer, grid.ISAS[0], "float32")]
    assert {tiling.lanes for tiling in tilings} == {"pixels", "channels"}
    assert len({tiling.tiles for tiling in tilings}) > 4
    assert max(tiling.panels for tiling in tilings) > 1


def _data(rng, layer, family: str) -> tuple:
    """x and weight of one family that is not white noise."""
    n, c, h, w = layer.x
    k = layer.weight[0]
    taps = layer.weight[2:]
    if family == "positive":
        return rng.random(layer.x), rng.random(layer.weight)
    if family == "constant":
        return np.full(layer.x, 0.3), np.full(layer.weight, 0.7)
    if family == "repeated channels":  # equal products leave equal errors in every channel
        image, kernel = rng.standard_normal((n, 1, h, w)), rng.standard_normal((k, 1, *taps))
        return np.repeat(image, c, axis=1), np.repeat(kernel, c, axis=1)
    if family == "alternating":
        signs = (-1.0) ** np.add.outer(np.arange(h), np.arange(w))
        return np.broadcast_to(signs * 1.1, layer.x), np.abs(rng.standard_normal(layer.weight))
    if family == "rectified":
        return np.maximum(rng.standard_normal(layer.x), 0), rng.standard_normal(layer.weight)
    x = np.zeros(layer.x)  # "spike"
    x[:, :, h // 2, w // 2] = rng.standard_normal((n, c))
    return x, rng.standard_normal(layer.weight)


FAMILIES = ("positive", "constant", "repeated channels", "alternating", "rectified", "spike")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "stride"), winograd.TILES)
@pytest.mark.parametrize("channels", [16, 200])
def test_any_data_stays_within_the_bound_of_its_magnitudes(grid, dtype, family, size, stride, channels):
    layer = grid.Layer((1, channels, 11, 13), (17, channels, size, size), (stride, stride), (size // 2,) * 4)
    rng = np.random.default_rng(channels)
    x, weight = _data(rng, layer, family)
    given = grid.Operands(np.ascontiguousarray(x, dtype), weight.astype(dtype), None, None)
    truth = Truth(grid, layer, dtype, given, False)
    met = [precision for precision in BOUNDS if winograd_transforms(layer, precision)]
    assert "high" in met
    for isa, precision in itertools.product(grid.ISAS, met):
        for tiling in algorithm.candidates(layer.spec(dtype, "winograd", precision), layer.machine(isa)):
            got = grid.run(grid.program(layer, isa, dtype, tiling, given, precision), given)
            truth.check(got, precision, f"on {isa} by {tiling}, {family}")


@pytest.mark.parametrize(("channels", "outputs", "size", "kernel", "stride", "dilation"), [
    (16, 16, 30, 3, 1, 1), (64, 64, 28, 3, 1, 1), (256, 32, 14, 3, 1, 1), (512, 32, 7, 3, 1, 1), (100, 20, 20, 5, 1, 1),
    (140, 16, 12, 5, 1, 1), (24, 40, 16, 7, 1, 1), (128, 32, 28, 3, 2, 1), (64, 32, 28, 5, 2, 1),
    (256, 32, 14, 3, 1, 2),
])  # fmt: skip
def test_what_auto_takes_meets_the_precision(grid, dtype, channels, outputs, size, kernel, stride, dilation):
    """And whatever it could have taken, white data and the worst kind: one pattern in all channels."""
    layer = grid.Layer(
        (2, channels, size, size + 1), (outputs, channels, kernel, kernel), (stride, stride),
        (kernel // 2 * dilation,) * 4, (dilation, dilation),
    )  # fmt: skip
    rng = np.random.default_rng(channels)
    white = grid.operands(layer, dtype, rng.standard_normal)
    x, weight = _data(rng, layer, "repeated channels")
    repeated = grid.Operands(np.ascontiguousarray(x, dtype), weight.astype(dtype), None, None)
    for given, zero_mean in ((white, True), (repeated, False)):
        truth = Truth(grid, layer, dtype, given, zero_mean)
        for isa, precision in itertools.product(grid.ISAS, BOUNDS):
            spec, machine = layer.spec(dtype, "auto", precision), layer.machine(isa)
            candidates = algorithm.candidates(spec, machine, 2)
            assert algorithm.choose(spec, machine, 2) in candidates
            for tiling in candidates:
                got = grid.run(grid.program(layer, isa, dtype, tiling, given, precision), given)
                truth.check(got, precision, f"on {isa} by {tiling}")


def test_a_depth_beyond_2304_has_the_bound_of_its_own_and_meets_it(grid, isa):
    layer = grid.Layer((1, 700, 12, 10), (16, 700, 3, 3), padding=(1,) * 4)
    given = grid.operands(layer, "float32", np.random.default_rng(0).standard_normal)
    assert allowed(layer, "float32", "highest")[0] == pytest.approx(2e-6 * np.sqrt(6300 / 2304))
    truth = Truth(grid, layer, "float32", given, True)
    for tiling in grid.winograd_tilings(layer, isa, "float32"):
        got = grid.run(grid.program(layer, isa, "float32", tiling, given), given)
        truth.check(got, "highest", f"on {isa} by {tiling}")


def test_a_wrong_result_is_not_within_the_bound(grid):
    """Trust check: one output in a thousand, wrong by a ten-thousandth, is seen."""
    layer = grid.Layer((1, 16, 10, 10), (10, 16, 3, 3), padding=(1,) * 4)
    given = grid.operands(layer, "float32", np.random.default_rng(0).standard_normal)
    got = grid.exact(layer, given).astype(np.float32)
    truth = Truth(grid, layer, "float32", given, True)
    truth.check(got, "highest", "as it is")
    got[0, 3, 4, 5] += 1e-4 * np.sqrt(np.mean(got**2))
    with pytest.raises(AssertionError, match="error"):
        truth.check(got, "highest", "spoiled")
