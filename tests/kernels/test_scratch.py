"""Scratch: what a run needs besides its arrays is bounded, however odd the layer.

In: layers with one size huge.  Out: the bytes that the compiled steps ask for, below a limit that is stated here.
"""

import numpy as np
import pytest
from cconv.cpu._winograd import WinogradConvolution

from cconv.cpu._conv import Convolution
from cconv.cpu._depthwise import DepthwiseConvolution
from cconv.planning import Depthwise, Direct, Winograd, algorithm

STEPS = {Direct: Convolution, Depthwise: DepthwiseConvolution, Winograd: WinogradConvolution}
#: Bytes of scratch of a thread: a tile of input of at most 64 MiB and what its sums need.
MOST = 80 << 20

#: name -> x, weight and the rest of a Layer.
ODD = {
    "huge dilation": ((1, 64, 2100, 2100), (64, 64, 3, 3), {"dilation": (1000, 1000)}),
    "huge dilation of one axis": ((1, 256, 9, 60_000), (64, 256, 3, 3), {"dilation": (1, 20_000)}),
    "huge stride": ((1, 64, 3000, 3000), (64, 64, 3, 3), {"stride": (999, 999)}),
    "huge padding": ((1, 64, 8, 8), (64, 64, 3, 3), {"padding": (4000, 4000, 4000, 4000)}),
    "one row": ((1, 64, 1, 1_000_000), (64, 64, 1, 3), {"padding": (0, 1, 0, 1)}),
    "one column": ((1, 64, 1_000_000, 1), (64, 64, 3, 1), {"padding": (1, 0, 1, 0)}),
    "one long row of pixels": ((1, 64, 1, 1_000_000), (64, 64, 1, 1), {}),
    "huge kernel": ((1, 3, 1500, 1500), (16, 3, 501, 501), {}),
    "window as large as the image": ((64, 64, 50, 50), (512, 64, 50, 50), {}),
    "many inputs": ((1, 60_000, 56, 56), (64, 60_000, 3, 3), {"padding": (1, 1, 1, 1)}),
    "many inputs of one pixel": ((64, 200_000, 1, 1), (8, 200_000, 1, 1), {}),
    "many outputs": ((1, 64, 56, 56), (100_000, 64, 3, 3), {"padding": (1, 1, 1, 1)}),
    "many of both": ((1, 16_384, 30, 30), (16_384, 16_384, 3, 3), {"padding": (1, 1, 1, 1)}),
    "large image": ((1, 64, 8000, 8000), (64, 64, 3, 3), {"padding": (1, 1, 1, 1)}),
    "many groups": ((1, 60_000, 56, 56), (60_000, 1, 3, 3), {"groups": 60_000, "padding": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layers_need_bounded_scratch(grid, isa, dtype, name):
    x, weight, options = ODD[name]
    for threads in (1, 16):
        layer = grid.Layer(x, weight, threads=threads, **options)
        spec, machine = layer.spec(dtype, "auto", "high"), layer.machine(isa)
        asked = [(images, packs) for images in (1, 64) for packs in (False, True)]
        ways = {tiling for images, packs in asked for tiling in algorithm.candidates(spec, machine, images, packs)}
        for tiling in ways:
            step = STEPS[type(tiling)](spec, tiling, isa)
            for images in (1, 64):
                need = step.scratch_bytes(images, threads)
                assert need <= MOST * threads, f"{need / 2**20:.0f} MiB for {threads} threads by {tiling}"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_is_planned_is_enough(grid, isa, dtype, threads):
    """Odd layers, smaller, run: the sanitizers see what would be too little."""
    layers = (
        grid.Layer((1, 3, 9, 300), (4, 3, 2, 2), dilation=(7, 250), threads=threads),
        grid.Layer((1, 400, 3, 60), (5, 400, 3, 3), l2_bytes=1 << 10, threads=threads),
        grid.Layer((31, 300, 2, 2), (9, 300, 2, 2), threads=threads),
        grid.Layer((2, 2, 1, 3000), (3, 2, 1, 3), threads=threads),
        grid.Layer((2, 2, 3000, 1), (3, 2, 3, 1), threads=threads),
    )
    for layer in layers:
        given = grid.operands(layer, dtype, lambda shape: np.random.default_rng(0).integers(-2, 3, shape))
        want = grid.exact(layer, given)
        for tiling in grid.direct_tilings(layer, isa, dtype):
            with grid.Threads(threads):
                np.testing.assert_array_equal(grid.run(grid.program(layer, isa, dtype, tiling, given), given), want)
