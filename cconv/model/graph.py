"""Graph: a network as data. Named layers in an order in which every one comes after its inputs, and named constants.

In: nodes from builtin.py or a file.  Out: Graph, and the values in which run.py describes one.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..errors import ModelError
from ..images import Preprocessing
from ..planning import Cost

#: The name under which a graph's nodes refer to the image, unless a file has another.
INPUT = "input"
#: Characters of an unknown name that are compared and shown: it may come from anywhere and have any length.
SHOWN = 100


Shape = tuple[int, ...]


@lru_cache(maxsize=64)
def _name(dtype: np.dtype) -> str:
    """NumPy makes it anew every time, which takes longer than the rest of a constant."""
    return dtype.name


class Constant(NamedTuple):
    """An array that no image changes: weights, or numbers that shapes are made of.

    Attributes
    ----------
    key : str
        What tells it from others of its graph: its name.
    shape : tuple of int
    read : function without arguments
        Gives the array; called when a program is built, not before.
    dtype : str
    """

    key: str
    shape: Shape
    read: Callable[[], np.ndarray]
    dtype: str = "float32"

    @classmethod
    def of(cls, array: np.ndarray, key: str | None = None) -> "Constant":
        """An array that is there already; without a key it is known by its contents."""
        if key is None:
            key = f"{array.dtype}{array.shape}{array.tobytes().hex()}"
        return cls(key, array.shape, lambda: array, _name(array.dtype))


@dataclass(frozen=True)
class Node:
    """One operator of a graph, and the tensor that it gives: they share a name.

    Attributes
    ----------
    name : str
    operator : str
        A name in layers.OPERATORS: ONNX's.
    inputs : tuple of str
        Names of earlier nodes, of constants, or the graph's input; "" for an operand that is left out.
    options : mapping
        ONNX's attributes; of convolutions and pools in the words of cconv.planning.specs: stride, padding, ...
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in order, their constants, what the graph is made for, and the layers that are asked for by default.

    Attributes
    ----------
    input_shape : tuple of int
        Of one image, without the batch axis: (C, H, W) mostly.
    constants : mapping of str to Constant
    input : str
        The image's name.
    batch : int
        Images that one run of the graph takes: 1, unless a file is made for more.
    forget : function without arguments
        Gives back the memory that reading constants took.
    preprocessing : Preprocessing, optional
        What a picture goes through before the graph takes it.
    inferred : mapping of str to layers.Inferred
        What every node is on an image of `input_shape`, where a reader has found it out already.
    """

    name: str
    description: str
    input_shape: Shape
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    input: str = INPUT
    batch: int = 1
    forget: Callable[[], None] = lambda: None
    preprocessing: Preprocessing | None = None
    inferred: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        known = {"", self.input, *self.constants}
        for node in self.nodes:
            if missing := [name for name in node.inputs if name not in known]:
                raise ModelError(
                    f"layer {node.name[:SHOWN]!r}: expected inputs that come before it, "
                    f"got {', '.join(missing)[:SHOWN]}"
                )
            if node.name in known:
                raise ModelError(
                    f"layer {node.name[:SHOWN]!r}: expected a name of its own, got one that is empty or taken"
                )
            known.add(node.name)
        self.checked(self.outputs)

    def checked(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The names of layers, each once; a ModelError that lists the closest names for one that is unknown."""
        if isinstance(layers, str):
            raise ModelError(f"layers: expected a list of layer names, got the string {layers[:SHOWN]!r}")
        if not isinstance(layers, Iterable):
            raise ModelError(f"layers: expected a list of layer names, got {type(layers).__name__}")
        layers = tuple(layers)
        if odd := next((type(name).__name__ for name in layers if not isinstance(name, str)), None):
            raise ModelError(f"layers: expected layer names that are strings, got {odd}")
        names = [node.name for node in self.nodes]
        known = set(names)
        asked = tuple(dict.fromkeys(layers))
        if not asked:
            raise ModelError(f"layers: expected at least one layer of {self.name}, got none")
        for name in asked:
            if name not in known:
                close = difflib.get_close_matches(name[:SHOWN], names, n=5, cutoff=0.3) or names[:5]
                raise ModelError(
                    f"layers: expected names of {self.name}'s {len(names)} layers, got {name[:SHOWN]!r}; "
                    f"the closest are {', '.join(close)}"
                )
        return asked


@dataclass(frozen=True, slots=True)
class Layer:
    """What a model says of one of its layers.

    Attributes
    ----------
    name, operator : str
    inputs : tuple of str
        Names of the layers it reads, and of the image; constants are not among them.
    output_shape : tuple of int
        As `Model.run` returns it: with N where the image shape has one.
    parameters : int
        Learned numbers; the running mean and variance of a batch norm are not learned.
    cost : Cost
        For the same number of images as `output_shape`.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    output_shape: tuple[int, ...]
    parameters: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The exact cost of a run: of each layer that must run, by name and in order, and of all."""

    layers: dict[str, Cost]

    @property
    def total(self) -> Cost:
        return sum(self.layers.values(), Cost())
