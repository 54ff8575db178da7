"""Graph: a network as data. Named layers in an order in which every one comes after its inputs; no arrays.

In: nodes from builtin.py (later from a file).  Out: Graph, and the values in which run.py describes one.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import ModelError
from ..planning import Cost, specs

#: The name under which a graph's nodes refer to the image.
INPUT = "input"
#: Characters of an unknown name that are compared and shown: it may come from anywhere and have any length.
SHOWN = 100


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    Attributes
    ----------
    name : str
    operator : str
        A name in layers.OPERATORS: ONNX's.
    inputs : tuple of str
        Names of earlier nodes, or INPUT.
    weight : tuple of int, optional
        Shape of what is learned: Conv (K, C/groups, R, S), Gemm (K, features), BatchNormalization (C,).
    bias : bool
    options : mapping
        Keyword arguments of the operator's spec (cconv.planning.specs): stride, padding, ...
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    weight: tuple[int, ...] | None = None
    bias: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in order, the size of image they are made for, and the layers that are asked for by default."""

    name: str
    description: str
    input_shape: specs.CHW
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def __post_init__(self):
        known = {INPUT}
        for node in self.nodes:
            if missing := [name for name in node.inputs if name not in known]:
                raise ModelError(f"layer {node.name!r}: expected inputs that come before it, got {', '.join(missing)}")
            if node.name in known:
                raise ModelError(f"layer {node.name!r}: expected a name of its own, got one that is taken")
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
        Names of the layers it reads; "input" is the image.
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
