"""Filters: banks of named detectors over colour images, each computed from a formula.

In: a bank's name.  Out: weights (K, 3, R, S), float32, and the names of its K filters.

A detector's weights sum to zero, so a flat picture answers 0, and its positive weights sum to 1: on images in [0, 1]
the answers lie in [-1, 1], and 1 is reached by just one picture, 1 where the weights are positive and 0 where they are
negative. The detectors of form weigh red, green and blue alike; the opponents weigh them against each other, so that
their weights sum to zero at every pixel and any grey picture answers 0.

    x grows to the right (index S), y downwards (index R); an angle is that of the way from dark to bright:

                  270 bright-above
                         |
    180 bright-left  ----+----  0 bright-right      45 is bright-below-right
                         |
                  90 bright-below
"""

import math
from functools import cache

import numpy as np

from .errors import ModelError

RED, GREEN, BLUE = range(3)

#: The eight edge detectors, every 45 degrees.
EDGE_ANGLES = {
    "bright-right": 0,
    "bright-below-right": 45,
    "bright-below": 90,
    "bright-below-left": 135,
    "bright-left": 180,
    "bright-above-left": 225,
    "bright-above": 270,
    "bright-above-right": 315,
}
#: Radii in pixels of the discs that the blob detectors look for.
BLOB_RADII = {"small": 1.5, "large": 3.0}
#: Wavelength in pixels of the stripes that the Gabor filters look for, and their orientations.
GABOR_WAVELENGTH = 8.0
GABOR_ORIENTATIONS = 8


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each tap of a (size, size) kernel, from its middle."""
    axis = np.arange(size) - (size - 1) / 2
    return np.meshgrid(axis, axis)


def _balanced(kernel: np.ndarray, window: np.ndarray | float = 1.0) -> np.ndarray:
    """The kernel with its mean over `window` taken away and its positive weights summing to 1."""
    window = np.broadcast_to(window, kernel.shape)
    kernel = kernel - window * (kernel.sum() / window.sum())
    return kernel / kernel[kernel > 0].sum()


def _over_luminance(kernel: np.ndarray) -> np.ndarray:
    """(R, S) as (3, R, S): a third of it on each colour."""
    return np.stack([kernel / 3] * 3)


def edge(angle: float, size: int = 5, sigma: float = 1.0) -> np.ndarray:
    """A step from dark to bright towards `angle` in degrees: the derivative of a Gaussian, (size, size)."""
    x, y = _grid(size)
    along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    # Rounding leaves crumbs where the line of the edge passes: exactly 0, so that no picture depends on them.
    along[np.abs(along) < 1e-9] = 0
    return _balanced(along * np.exp(-(x**2 + y**2) / (2 * sigma**2)))


def blob(radius: float, size: int = 13) -> np.ndarray:
    """A bright disc of that radius on a dark ground: the negative Laplacian of a Gaussian of sigma = radius/sqrt(2).

    That sigma puts the change of sign on the disc's rim (Lindeberg 1998, "Feature detection with automatic scale
    selection").
    """
    x, y = _grid(size)
    squared = (x**2 + y**2) / radius**2
    gaussian = np.exp(-squared)
    return _balanced((1 - squared) * gaussian, gaussian)


def gabor(angle: float, odd: bool, wavelength: float = GABOR_WAVELENGTH, size: int = 13) -> np.ndarray:
    """Stripes across `angle`: a wave under a Gaussian window, with a crest (even) or a step up (odd) in the middle.

    The wave is a cosine or sine of 2 pi / wavelength (Daugman 1985, "Uncertainty relation for resolution in space").
    """
    x, y = _grid(size)
    along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    window = np.exp(-(x**2 + y**2) / (2 * (0.4 * wavelength) ** 2))
    wave = np.sin if odd else np.cos
    return _balanced(window * wave(2 * math.pi * along / wavelength), window)


def opponent(colour: int, size: int = 5, sigma: float = 1.0) -> np.ndarray:
    """One colour against the mean of the two others, seen through a Gaussian: (3, size, size)."""
    x, y = _grid(size)
    window = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    against = np.where(np.arange(3) == colour, 1.0, -0.5)
    return against[:, None, None] * (window / window.sum())


def _edges(select) -> dict[str, np.ndarray]:
    return {name: _over_luminance(edge(angle)) for name, angle in EDGE_ANGLES.items() if select(angle)}


def _blobs() -> dict[str, np.ndarray]:
    kernels = {size: _over_luminance(blob(radius)) for size, radius in BLOB_RADII.items()}
    # The dark disc's kernel is the same with the signs turned; its positive weights sum to 1 too.
    return {f"{tone}-{size}": sign * kernels[size] for tone, sign in (("bright", 1), ("dark", -1)) for size in kernels}


def _gabors() -> dict[str, np.ndarray]:
    angles = [180 * i / GABOR_ORIENTATIONS for i in range(GABOR_ORIENTATIONS)]
    return {
        f"{'odd' if odd else 'even'}-{angle:g}": _over_luminance(gabor(angle, odd))
        for odd in (False, True) for angle in angles
    }  # fmt: skip


#: bank -> what it looks for, and what makes its filters by name.
BANKS = {
    "edges": ("edges in eight directions", lambda: _edges(lambda angle: True)),
    "edges_vertical": ("vertical edges, bright on the right or on the left", lambda: _edges(lambda a: a % 180 == 0)),
    "edges_horizontal": ("horizontal edges, bright below or above", lambda: _edges(lambda a: a % 180 == 90)),
    "edges_diagonal": ("diagonal edges in four directions", lambda: _edges(lambda a: a % 90 == 45)),
    "blobs": ("bright and dark discs of two sizes", _blobs),
    "green_opponent": ("green against red and blue", lambda: {"green": opponent(GREEN)}),
    "blue_opponent": ("blue against red and green", lambda: {"blue": opponent(BLUE)}),
    "gabor": ("stripes in eight directions, even and odd", _gabors),
}


@cache
def _made(name: str) -> dict[str, np.ndarray]:
    if name not in BANKS:
        raise ModelError(f"bank: expected one of {', '.join(BANKS)}, got {name!r}")
    return BANKS[name][1]()


def names() -> tuple[str, ...]:
    """The banks."""
    return tuple(BANKS)


def bank(name: str) -> np.ndarray:
    """The weights of a bank: (K, 3, R, S) float32, for images in [0, 1].

    Raises
    ------
    ModelError
        For an unknown name; the text lists the known ones.

    Examples
    --------
    >>> bank("edges").shape
    (8, 3, 5, 5)
    """
    return np.stack(list(_made(name).values())).astype(np.float32)


def labels(name: str) -> tuple[str, ...]:
    """The names of a bank's K filters, in order.

    Examples
    --------
    >>> labels("edges_vertical")
    ('bright-right', 'bright-left')
    """
    return tuple(_made(name))
