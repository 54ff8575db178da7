"""Blocking: how Winograd's tiles are cut into blocks and panels into groups changes no bit of a result.

In: a layer with more tiles than vectors, and one with fewer; every transform, in blockings that the planner may choose.
Out: results compared as bytes with those of the planner's own blocking.
"""

from dataclasses import replace

import numpy as np
import pytest

from cconv.planning import Winograd

LAYERS = [
    ((3, 20, 21, 23), (37, 20, 3, 3), {}),
    ((2, 33, 6, 7), (33, 33, 3, 3), {}),
    ((1, 17, 18, 11), (18, 17, 5, 5), {}),
    ((2, 17, 19, 22), (18, 17, 3, 3), {"stride": (2, 2)}),
    ((2, 16, 19, 22), (17, 16, 3, 3), {"dilation": (2, 3)}),
]


def _blockings(tiling, lanes: int):
    """Blocks of a thread; one block that threads share; several at a time, in rounds."""
    whole = 3 * 21 * 23  # more tiles than any layer has
    for tiles, group, held, fused in (
        (lanes, 1, 0, False),
        (2 * lanes, 2, 0, False),
        (whole, tiling.panels, 1, False),
        (whole, 1, 1, True),
        (whole, 2, 1, True),
        (lanes, 1, 2, False),
        (lanes, 2, 2, True),
    ):
        yield replace(tiling, tiles=tiles, group=min(group, tiling.panels), held=held, fused=fused)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_blocking_changes_a_bit(grid, isa, dtype, threads):
    lanes = grid.Layer(*LAYERS[0][:2]).machine(isa).vector_bytes // np.dtype(dtype).itemsize
    rounds = 0
    for x, weight, options in LAYERS:
        layer = grid.Layer(x, weight, padding=(1, 1, 1, 1), activation="relu", bias=True, residual=True, **options)
        given = grid.operands(layer, dtype, np.random.default_rng(2).standard_normal)
        tilings = grid.winograd_tilings(layer, isa, dtype, "high")
        with grid.Threads(threads):
            for tiling in filter(lambda tiling: isinstance(tiling, Winograd), tilings):
                want = grid.run(grid.program(layer, isa, dtype, tiling, given, "high"), given)
                for other in _blockings(tiling, lanes):
                    got = grid.run(grid.program(layer, isa, dtype, other, given, "high"), given)
                    assert got.tobytes() == want.tobytes(), f"{x} {weight} {other}"
                    rounds += other.held == 2
    assert rounds, "some blockings go in rounds"
