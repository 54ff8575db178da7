"""Builtin: the registry of models that need no file.

In: a name and a seed.  Out: a Graph.

Filter banks and the texture model carry their weights. The architectures of architectures.py carry none: theirs are
drawn by He's rule on the first run, so they cost and run like the trained networks, and recognise nothing.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np

from .. import filters, init
from . import architectures, texture
from .architectures import ARCHITECTURES, Chain, Source
from .graph import Graph


def he_parameters(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """A constant drawn from the seed and its layer's name, so that the order of drawing does not matter."""
    layer, _, word = name.rpartition(".")
    if len(shape) == 1:
        return np.full(shape, word in ("weight", "running_var"), np.float32)
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{layer}".encode()).digest()[:16])
    return init.he_normal(shape, own_seed)


# Filter banks and the texture model ---------------------------------------------------------------------------------
# None of them pads: a frame of zeros around a picture would be its strongest edge.


def _given(weights: dict[str, np.ndarray]) -> Source:
    return lambda name, shape: weights[name].astype(np.float32)


def _bank(name: str, source: Source) -> Graph:
    weight = filters.bank(name)
    chain = Chain(_given({"conv.weight": weight}))
    chain.conv("conv", len(weight), weight.shape[-1])
    return chain.graph(name, f"A bank of {len(weight)} filters: {filters.BANKS[name][0]}.")


def _texture(source: Source) -> Graph:
    edges = filters.bank("edges")
    combinations = np.stack(list(texture.combinations().values()))
    chain = Chain(_given({"level1.conv.weight": edges, "level2.conv.weight": combinations}))
    chain.conv("level1.conv", len(edges), edges.shape[-1])
    rectified = chain.add("level1.relu", "Relu")
    chain.add("level1.pool", "MaxPool", kernel_size=2)
    chain.conv("level2.conv", len(combinations), texture.SIZE)
    top = chain.add("level2.relu", "Relu")
    return chain.graph("texture", "Two levels: edges, then stripes, corners and discs.", (rectified, top))


def _drawn(name: str, source: Source) -> Graph:
    return architectures.build(name, source, "drawn at random")


#: THE REGISTRY: name -> source of the constants -> graph. What carries its own constants asks the source for none.
MODELS: dict[str, Callable[[Source], Graph]] = {
    **{name: partial(_bank, name) for name in filters.names()},
    "texture": _texture,
    **{name: partial(_drawn, name) for name in ARCHITECTURES},
}


def model_names() -> tuple[str, ...]:
    """The names that :func:`cconv.load` knows.

    Examples
    --------
    >>> "vgg16" in model_names()
    True
    """
    return tuple(MODELS)


def make(name: str, seed: int) -> Graph:
    """A built-in's graph; KeyError for an unknown name."""
    return MODELS[name](partial(he_parameters, seed=seed))
