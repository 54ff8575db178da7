"""Layers: THE OPERATOR TABLE. What each operator is to planning; shape, cost and execution all follow from that.

In: a Node and the maps it reads.  Out: its spec (what runs), its value (what is reported) and its Cost.
One entry per operator, named as in ONNX. An operator without a spec only gives its input another shape or name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..errors import ArgumentError, CconvError, ModelError, ShapeError
from ..planning import ConvSpec, Cost, PointwiseSpec, PoolSpec, Spec, cost, specs
from .graph import INPUT, Graph, Node

CHW = specs.CHW
Shape = tuple[int, ...]


class Value(NamedTuple):
    """A layer's result for one image: the shape that is reported, and the (C, H, W) map as which it is stored."""

    shape: Shape
    stored: CHW


def _conv(node: Node, maps: list[CHW]) -> ConvSpec:
    return specs.conv(maps[0], node.weight, bias=node.bias, **node.options)


def _gemm(node: Node, maps: list[CHW]) -> ConvSpec:
    """A dense layer is a convolution whose kernel covers the whole map: (K, features) seen as (K, C, H, W)."""
    outputs, features = node.weight
    if features != prod(maps[0]):
        raise ShapeError(f"x: expected {features} features, got {prod(maps[0])} in maps of {maps[0]}")
    return specs.conv(maps[0], (outputs, *maps[0]), bias=node.bias)


def _batch_norm(node: Node, maps: list[CHW]) -> ConvSpec:
    """y = x * a[c] + b[c]: a depthwise 1x1 convolution with bias, where it cannot be folded into the one before."""
    channels = maps[0][0]
    if node.weight != (channels,):
        raise ShapeError(f"x: expected {node.weight[0]} channels, got {channels}")
    return specs.conv(maps[0], (channels, 1, 1, 1), groups=channels, bias=True)


def _add(node: Node, maps: list[CHW]) -> PointwiseSpec:
    if maps[0] != maps[1]:
        raise ShapeError(f"x: expected two maps of one shape, got {maps[0]} and {maps[1]}")
    return specs.pointwise(maps[0], add=True)


def _pool(kind: str) -> Callable[[Node, list[CHW]], PoolSpec]:
    return lambda node, maps: specs.pool(kind, maps[0], **node.options)


def _global_pool(kind: str) -> Callable[[Node, list[CHW]], PoolSpec]:
    return lambda node, maps: specs.adaptive_pool(kind, maps[0], (1, 1))


def _adaptive_pool(node: Node, maps: list[CHW]) -> PoolSpec:
    return specs.adaptive_pool("average", maps[0], node.options["output_size"])


def _activation(name: str) -> Callable[[Node, list[CHW]], PointwiseSpec]:
    return lambda node, maps: specs.pointwise(maps[0], activation=(name, node.options.get("alpha")))


def _cost_of_spec(value: Value, spec: Spec | None, n: int) -> Cost:
    return cost.of(spec, n) if spec else Cost()


def _cost_of_batch_norm(value: Value, spec: ConvSpec, n: int) -> Cost:
    """Counted as what it is in the graph, not as the convolution that may carry it out."""
    return cost.batch_norm(n * prod(value.stored), spec.C, spec.dtype)


def _weight_and_bias(node: Node) -> int:
    return prod(node.weight) + (node.weight[0] if node.bias else 0)


@dataclass(frozen=True, slots=True)
class Operator:
    """One row of the table; the defaults are an operator with one input, no weights and a spec that says everything."""

    spec: Callable[[Node, list[CHW]], Spec] | None
    inputs: int = 1
    #: The reported shape, from that of the first input and the stored map.
    shape: Callable[[Shape, CHW], Shape] = lambda given, stored: stored
    cost: Callable[[Value, Spec | None, int], Cost] = _cost_of_spec
    parameters: Callable[[Node], int] = lambda node: 0


def _as_given(given: Shape, stored: CHW) -> Shape:
    return given


def _flat(given: Shape, stored: CHW) -> Shape:
    return (prod(stored),)


OPERATORS: dict[str, Operator] = {
    "Conv": Operator(_conv, parameters=_weight_and_bias),
    "Gemm": Operator(_gemm, shape=_flat, parameters=_weight_and_bias),
    "BatchNormalization": Operator(
        _batch_norm, shape=_as_given, cost=_cost_of_batch_norm, parameters=lambda node: 2 * node.weight[0]
    ),
    "MaxPool": Operator(_pool("max")),
    "AveragePool": Operator(_pool("average")),
    "GlobalMaxPool": Operator(_global_pool("max")),
    "GlobalAveragePool": Operator(_global_pool("average")),
    # Not ONNX's: torch's AdaptiveAvgPool2d, for which ONNX has no operator.
    "AdaptiveAveragePool": Operator(_adaptive_pool),
    "Add": Operator(_add, inputs=2, shape=_as_given),
    "Relu": Operator(_activation("relu"), shape=_as_given),
    "LeakyRelu": Operator(_activation("leaky_relu"), shape=_as_given),
    "Sigmoid": Operator(_activation("sigmoid"), shape=_as_given),
    "Tanh": Operator(_activation("tanh"), shape=_as_given),
    "HardSwish": Operator(_activation("hardswish"), shape=_as_given),
    "Gelu": Operator(_activation("gelu"), shape=_as_given),
    "Flatten": Operator(None, shape=_flat),
    "Dropout": Operator(None, shape=_as_given),
    "Identity": Operator(None, shape=_as_given),
}


class Inferred(NamedTuple):
    """A node on an image of known size."""

    node: Node
    spec: Spec | None
    value: Value

    def cost(self, n: int) -> Cost:
        return OPERATORS[self.node.operator].cost(self.value, self.spec, n)


def check(graph: Graph) -> None:
    """A ModelError unless every operator is in the table and has as many inputs as it needs."""
    for node in graph.nodes:
        if node.operator not in OPERATORS:
            raise ModelError(
                f"layer {node.name!r}: expected an operator of {', '.join(OPERATORS)}, got {node.operator!r}"
            )
        if len(node.inputs) != OPERATORS[node.operator].inputs:
            raise ModelError(
                f"layer {node.name!r}: expected {OPERATORS[node.operator].inputs} inputs for {node.operator}, "
                f"got {len(node.inputs)}"
            )


def infer(nodes: tuple[Node, ...], image: CHW) -> dict[str, Inferred]:
    """Every node's spec and value for a (C, H, W) image; errors name the layer at which it does not fit."""
    values = {INPUT: Value(image, image)}
    inferred = {}
    for node in nodes:
        operator = OPERATORS[node.operator]
        given = [values[name] for name in node.inputs]
        try:
            spec = operator.spec(node, [value.stored for value in given]) if operator.spec else None
        except (ShapeError, ArgumentError) as error:
            raise _at_layer(error, node, image) from None
        stored = spec.output if spec else given[0].stored
        values[node.name] = Value(operator.shape(given[0].shape, stored), stored)
        inferred[node.name] = Inferred(node, spec, values[node.name])
    return inferred


def _at_layer(error: CconvError, node: Node, image: CHW) -> CconvError:
    return type(error)(f"layer {node.name!r} on an image of {image}: {error}")
