"""Texture: the weights of the two-level model's second level, designed by hand.

In: nothing.  Out: ten named combinations of edges, each (8, 5, 5), over the maps of the bank "edges".

Level 1 finds edges in eight directions, rectifies them (an edge is there or it is not: no negative evidence from the
opposite direction) and pools 2x2 (an edge may be a pixel off). Level 2 adds up what belongs together in a window of 5x5
pooled positions, 14x14 pixels of the picture, and subtracts what speaks against it:

    stripes   edges along one line, both from dark to bright and back; against: all other directions
    corner    two edges that meet and end; against: their continuation beyond the corner, and clutter
    disc      edges on a circle, bright inside (or all outside); against: the circle the other way round, and clutter

As in level 1 what speaks for it sums to 1 and what speaks against it to -1, so that the same edges everywhere answer
nothing. Clutter is every edge in the window, -1 in all: a lone edge has some of what a corner or a disc has, and
without it would answer too.
"""

import math

import numpy as np

from ..filters import EDGE_ANGLES

SIZE = 5
#: In pooled positions: the rim of a disc of radius 3 pixels.
RADIUS = 1.5
MAPS = {angle: index for index, angle in enumerate(EDGE_ANGLES.values())}


def _balanced(weights: np.ndarray) -> np.ndarray:
    positive = np.maximum(weights, 0)
    negative = np.maximum(-weights, 0)
    return positive / positive.sum() - negative / negative.sum()


def _against_clutter(weights: np.ndarray) -> np.ndarray:
    return _balanced(weights) - 1 / weights.size


def directions(wanted: tuple[int, ...], against: tuple[int, ...]) -> np.ndarray:
    """Edges towards the wanted angles anywhere in the window, against those towards others."""
    weights = np.zeros((len(MAPS), SIZE, SIZE))
    weights[[MAPS[a] for a in wanted]] = 1
    weights[[MAPS[a] for a in against]] = -1
    return _balanced(weights)


def corner(angle: int) -> np.ndarray:
    """A bright right angle that opens towards a diagonal `angle`: its two sides leave the middle along the axes."""
    weights = np.zeros((len(MAPS), SIZE, SIZE))
    middle = SIZE // 2
    for side, across in ((angle - 45, angle + 45), (angle + 45, angle - 45)):
        # Along each side, the edge is bright towards the other one.
        step = round(math.sin(math.radians(side))), round(math.cos(math.radians(side)))
        for distance in range(1, middle + 1):
            weights[MAPS[across % 360], middle + distance * step[0], middle + distance * step[1]] = 1
            weights[MAPS[across % 360], middle - distance * step[0], middle - distance * step[1]] = -1
    return _against_clutter(weights)


def disc(bright: bool) -> np.ndarray:
    """A circle of edges around the middle, bright inside, against the same circle bright outside; or the reverse."""
    axis = np.arange(SIZE) - SIZE // 2
    x, y = np.meshgrid(axis, axis)
    weights = np.zeros((len(MAPS), SIZE, SIZE))
    for angle, index in MAPS.items():
        # An edge that is bright towards `angle` lies on the other side of a bright disc.
        rim_x, rim_y = -RADIUS * math.cos(math.radians(angle)), -RADIUS * math.sin(math.radians(angle))
        near = np.maximum(1 - np.abs(x - rim_x), 0) * np.maximum(1 - np.abs(y - rim_y), 0)
        weights[index] += near
        weights[MAPS[(angle + 180) % 360]] -= near
    return _against_clutter(weights if bright else -weights)


def combinations() -> dict[str, np.ndarray]:
    """The second level's filters by name, each (8, 5, 5)."""
    lines = {"vertical": 0, "rising": 45, "horizontal": 90, "falling": 135}
    made = {}
    for name, angle in lines.items():
        wanted = (angle, angle + 180)
        made[f"stripes-{name}"] = directions(wanted, tuple(a for a in MAPS if a not in wanted))
    for name, angle in EDGE_ANGLES.items():
        if angle % 90 == 45:
            made[f"corner-{name}"] = corner(angle)
    made["disc-bright"] = disc(True)
    made["disc-dark"] = disc(False)
    return made
