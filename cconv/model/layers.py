"""Layers: THE OPERATOR TABLE. What each operator is to planning; shape, cost and execution all follow from that.

In: nodes and the size of an image.  Out: what each is on such an image: its value, operations, cost.
One entry per operator, named as in ONNX. Its rule is in rules.py or moves.py; on operands that no image changes, every
operator that folding.py knows is folded instead, and costs nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from ..errors import ArgumentError, CconvError, ModelError, ShapeError
from ..planning import Cost
from . import folding, moves, rules
from .graph import SHOWN, Constant, Graph, Node, Shape
from .operators import Result, Rule, Value

#: operator -> (rule, fewest operands, most operands).
OPERATORS: dict[str, tuple[Rule, int, int]] = {
    "Conv": (rules.conv, 2, 3),
    "ConvTranspose": (rules.conv_transpose, 2, 3),
    "Gemm": (rules.gemm, 2, 3),
    "MatMul": (rules.matmul, 2, 2),
    "BatchNormalization": (rules.batch_norm, 5, 5),
    "LRN": (rules.lrn, 1, 1),
    "Softmax": (rules.softmax, 1, 1),
    "MaxPool": (rules.pool("max"), 1, 1),
    "AveragePool": (rules.pool("average"), 1, 1),
    "GlobalMaxPool": (rules.global_pool("max"), 1, 1),
    "GlobalAveragePool": (rules.global_pool("average"), 1, 1),
    # Not ONNX's: torch's AdaptiveAvgPool2d, for which ONNX has no operator.
    "AdaptiveAveragePool": (rules.adaptive_pool, 1, 1),
    "ReduceMean": (rules.reduce_mean, 1, 2),
    "Add": (rules.arithmetic("add"), 2, 2),
    "Sub": (rules.arithmetic("sub"), 2, 2),
    "Mul": (rules.arithmetic("mul"), 2, 2),
    "Div": (rules.arithmetic("div"), 2, 2),
    "PRelu": (rules.prelu, 2, 2),
    "Sum": (rules.summed, 1, 1 << 16),
    "Relu": (rules.activation("relu"), 1, 1),
    "LeakyRelu": (rules.activation("leaky_relu"), 1, 1),
    "Sigmoid": (rules.activation("sigmoid"), 1, 1),
    "Tanh": (rules.activation("tanh"), 1, 1),
    "HardSwish": (rules.activation("hardswish"), 1, 1),
    "HardSigmoid": (rules.hard_sigmoid, 1, 1),
    "Swish": (rules.swish, 1, 1),
    "Gelu": (rules.gelu, 1, 1),
    "Clip": (rules.clip, 1, 3),
    "Concat": (moves.concat, 1, 1 << 16),
    "Split": (moves.split, 1, 2),
    "Slice": (moves.sliced, 1, 5),
    "Pad": (moves.pad, 1, 4),
    "Gather": (moves.gather, 2, 2),
    "Transpose": (moves.transpose, 1, 1),
    "DepthToSpace": (moves.depth_to_space, 1, 1),
    "Resize": (moves.resize, 1, 4),
    "Upsample": (moves.resize, 1, 3),
    "Reshape": (moves.reshape, 1, 2),
    "Flatten": (moves.flatten, 1, 1),
    "Squeeze": (moves.squeeze, 1, 2),
    "Unsqueeze": (moves.unsqueeze, 1, 2),
    "Dropout": (moves.same, 1, 3),
    "Identity": (moves.same, 1, 1),
    "Cast": (moves.cast, 1, 1),
}


#: What Python says of options of other types than a rule expects: a file may hold anything.
_MISFITS = (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError, ZeroDivisionError)


class Inferred(NamedTuple):
    """A node on an image of known size."""

    node: Node
    value: Value
    result: Result

    def cost(self, n: int) -> Cost:
        """Of n runs."""
        return self.result.cost(n)


def check(graph: Graph) -> None:
    """A ModelError unless every operator is known and has as many operands as it needs."""
    known = tuple(dict.fromkeys((*OPERATORS, *folding.FOLD, *folding.OF_SHAPES)))
    for node in graph.nodes:
        if node.operator not in known:
            raise ModelError(
                f"layer {node.name[:SHOWN]!r}: expected an operator of {', '.join(known)}, "
                f"got {node.operator[:SHOWN]!r}"
            )
        if node.operator in OPERATORS:
            _, fewest, most = OPERATORS[node.operator]
            if not fewest <= len(node.inputs) <= most or "" in node.inputs[:1]:
                wanted = fewest if fewest == most else f"{fewest} to {most}"
                raise ModelError(
                    f"layer {node.name[:SHOWN]!r}: expected {wanted} inputs for {node.operator}, got {len(node.inputs)}"
                )


def verify(graph: Graph, file: str) -> Graph:
    """The same graph, with what was inferred; a ModelError unless it can be run on images of its own size."""
    try:
        check(graph)
        return replace(graph, inferred=infer(graph, graph.nodes, graph.input_shape))
    except ModelError:
        raise
    except CconvError as error:
        raise ModelError(f"{file[:SHOWN]}: {error}") from None


def infer(graph: Graph, nodes: Sequence[Node], image: Shape) -> dict[str, Inferred]:
    """Every node's value and operations for images of that shape; errors name the layer at which one does not fit."""
    values: dict[str, Value | None] = {"": None, graph.input: Value((graph.batch, *image))}
    values.update({name: Value(constant.shape, constant) for name, constant in graph.constants.items()})
    inferred = {}
    for node in nodes:
        operands = [values[name] for name in node.inputs]
        try:
            value, result = _inferred(node, operands)
        except (ShapeError, ArgumentError, ModelError) as error:
            raise _at_layer(error, node, image) from None
        except _MISFITS as error:
            error = ModelError(
                f"expected options that fit the operator, got {dict(node.options)!s:.200}: {error!s:.200}"
            )
            raise _at_layer(error, node, image) from None
        values[node.name] = value
        inferred[node.name] = Inferred(node, value, result)
    return inferred


def _inferred(node: Node, operands: list[Value | None]) -> tuple[Value, Result]:
    given = [value for value in operands if value is not None]
    if node.operator in folding.OF_SHAPES:
        array = folding.of_shape(node.operator, node.options, given[0].shape)
    elif all(value.constant is not None for value in given):
        arrays = [None if value is None else value.constant.read() for value in operands]
        array = folding.fold(node.operator, node.options, arrays)
    elif node.operator in OPERATORS:
        result = OPERATORS[node.operator][0](node, *operands)
        return Value(result.shape), result
    else:
        raise ModelError(f"expected operands of {node.operator} that do not depend on the image")
    return Value(array.shape, Constant.of(array, None if prod(array.shape) < 1 << 12 else node.name)), Result(
        array.shape
    )


def _at_layer(error: CconvError, node: Node, image: Shape) -> CconvError:
    return type(error)(f"layer {node.name[:SHOWN]!r} ({node.operator}) on an image of {image}: {error}")
