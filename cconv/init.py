"""Init: initial weights whose spread keeps the scale of the signal through many layers.

In: a weight's shape and a seed.  Out: float32 arrays; the same seed gives the same numbers.

A weight (K, C, R, S), or (K, features), has fan_in = C*R*S products per output and fan_out = K*R*S outputs per input.

    rule    variance                keeps the scale of                               source
    lecun   1 / fan_in              the maps, for layers without rectification       LeCun et al. 1998, section 4.6
    glorot  2 / (fan_in + fan_out)  maps and gradients about equally (also: Xavier)  Glorot & Bengio 2010, eq. 12, 16
    he      2 / fan_in              the maps after ReLU, which drops half of them    He et al. 2015, eq. 10

`*_normal` draws from N(0, variance), `*_uniform` from [-sqrt(3 * variance), sqrt(3 * variance)).
"""

import math
from math import prod

import numpy as np

from .errors import ArgumentError
from .planning import shapes


def fans(shape) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (K, C/groups, R, S) or (K, features).

    For a grouped convolution fan_out counts K*R*S as if groups were 1, as PyTorch's initialisers do.

    Examples
    --------
    >>> fans((64, 3, 7, 7))
    (147, 3136)
    """
    outputs, *depth = shapes.shape(shape, "shape", (2, 4), "(K, C/groups, R, S) or (K, features)")
    return prod(depth), outputs * prod(depth[1:])


def _normal(shape, variance: float, seed) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal(tuple(shape), dtype=np.float32)
    weight *= np.float32(math.sqrt(variance))
    return weight


def _uniform(shape, variance: float, seed) -> np.ndarray:
    weight = np.random.default_rng(seed).random(tuple(shape), dtype=np.float32)
    weight -= np.float32(0.5)
    weight *= np.float32(2 * math.sqrt(3 * variance))
    return weight


def he_normal(shape, seed=0) -> np.ndarray:
    """N(0, 2 / fan_in): He et al. 2015 (arXiv:1502.01852), for layers followed by ReLU.

    Parameters
    ----------
    shape : tuple of int
        (K, C/groups, R, S), or (K, features) for a dense layer.
    seed : int, sequence of int, or numpy.random.Generator

    Returns
    -------
    array of that shape, float32

    Raises
    ------
    ShapeError
        For any other rank, or a size below 1.

    Examples
    --------
    >>> round(float(he_normal((64, 32, 3, 3)).std()), 3), round((2 / (32 * 9)) ** 0.5, 3)
    (0.083, 0.083)
    """
    return _normal(shape, 2 / fans(shape)[0], seed)


def he_uniform(shape, seed=0) -> np.ndarray:
    """Uniform within sqrt(6 / fan_in) of zero; see :func:`he_normal`."""
    return _uniform(shape, 2 / fans(shape)[0], seed)


def glorot_normal(shape, seed=0) -> np.ndarray:
    """N(0, 2 / (fan_in + fan_out)): Glorot & Bengio 2010 (AISTATS), for tanh and the like; also called Xavier."""
    return _normal(shape, 2 / sum(fans(shape)), seed)


def glorot_uniform(shape, seed=0) -> np.ndarray:
    """Uniform within sqrt(6 / (fan_in + fan_out)) of zero; see :func:`glorot_normal`."""
    return _uniform(shape, 2 / sum(fans(shape)), seed)


def lecun_normal(shape, seed=0) -> np.ndarray:
    """N(0, 1 / fan_in): LeCun, Bottou, Orr & Müller 1998, "Efficient BackProp"."""
    return _normal(shape, 1 / fans(shape)[0], seed)


def lecun_uniform(shape, seed=0) -> np.ndarray:
    """Uniform within sqrt(3 / fan_in) of zero; see :func:`lecun_normal`."""
    return _uniform(shape, 1 / fans(shape)[0], seed)


def normal(shape, std: float, seed=0) -> np.ndarray:
    """N(0, std**2), whatever the fans: to see what a wrong scale does."""
    fans(shape)
    if not 0 <= std < math.inf:
        raise ArgumentError(f"std: expected a finite number >= 0, got {std!r}")
    return _normal(shape, std * std, seed)


def constant(shape, value: float = 0.0) -> np.ndarray:
    """One value everywhere: every filter of a layer then stays the same filter."""
    fans(shape)
    return np.full(tuple(shape), value, np.float32)
