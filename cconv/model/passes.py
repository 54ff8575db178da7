"""Passes: from the layers that are asked for to the operations that must run.

In: inferred nodes and the layers whose maps are kept.  Out: planning's Operations and what their weights are made of.

prune    only what the asked layers depend on
fold     BatchNormalization into the convolution before it
fuse     Add and activations into the convolution before them, as its residual and activation

A convolution takes in what follows it only if nobody else reads its map and nobody asked for it. Costs are counted
elsewhere, on the graph as given: nothing in here changes a bill.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from ..errors import ModelError
from ..planning import ConvSpec, Operation, PointwiseSpec, Spec, specs
from .graph import INPUT, Node
from .layers import Inferred


class Recipe(NamedTuple):
    """What a convolution's arrays are made of: a layer's own, seen in a shape, and a batch norm folded into them."""

    layer: Node | None
    shape: tuple[int, ...]
    batch_norm: Node | None = None

    @property
    def key(self) -> str:
        return repr((self.layer and self.layer.name, self.shape, self.batch_norm and self.batch_norm.name))


class Lowered(NamedTuple):
    """What planning.plan.make takes, and where everything is found."""

    operations: tuple[Operation, ...]
    inputs: dict[int, specs.CHW]
    #: layer -> value that holds its map.
    values: dict[str, int]
    #: Operation.weights -> its recipe.
    recipes: dict[str, Recipe]


@dataclass
class _Draft:
    """An operation that may still take in what follows it."""

    spec: Spec
    inputs: list[str]
    recipe: Recipe | None = None


def prune(nodes: tuple[Node, ...], layers: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes that the layers depend on, themselves included, in order."""
    needed = set(layers)
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return tuple(node for node in nodes if node.name in needed)


class _Lowering:
    """The drafts so far, keyed by the layer whose map they give, in the order in which they run."""

    def __init__(self, inferred: dict[str, Inferred], layers: tuple[str, ...]):
        self.drafts: dict[str, _Draft] = {}
        #: layer without an operation of its own -> where its map is.
        self.source = {INPUT: INPUT}
        for name, (node, spec, _) in inferred.items():
            self.source[name] = name if spec else self.source[node.inputs[0]]
        self._readers = Counter(
            self.source[read] for node, spec, _ in inferred.values() if spec for read in node.inputs
        )
        self._kept = {self.source[name] for name in layers}

    def _open_conv(self, name: str) -> _Draft | None:
        """The convolution that gives this map, if it may take in the map's only reader."""
        draft = self.drafts.get(name)
        if draft is None or draft.recipe is None or name in self._kept or self._readers[name] > 1:
            return None
        return draft

    def _take_in(self, before: str, name: str, **changes) -> None:
        """The draft that gave `before` now gives `name`, at the end of the order, where all its inputs exist."""
        self.drafts[name] = replace(self.drafts.pop(before), **changes)

    def add(self, item: Inferred) -> None:
        node, spec, _ = item
        reads = [self.source[name] for name in node.inputs]
        if node.operator == "BatchNormalization":
            self._batch_norm(node, spec, reads[0])
        elif isinstance(spec, ConvSpec):
            recipe = Recipe(node, (spec.K, spec.C // spec.groups, spec.R, spec.S))
            self.drafts[node.name] = _Draft(spec, reads, recipe)
        elif isinstance(spec, PointwiseSpec):
            self._pointwise(node, spec, reads)
        elif spec:
            self.drafts[node.name] = _Draft(spec, reads)

    def _batch_norm(self, node: Node, spec: ConvSpec, before: str) -> None:
        conv = self._open_conv(before)
        if conv and conv.recipe.batch_norm is None and not conv.spec.residual and conv.spec.activation is None:
            recipe = conv.recipe._replace(batch_norm=node)
            self._take_in(before, node.name, spec=replace(conv.spec, bias=True), recipe=recipe)
        else:
            self.drafts[node.name] = _Draft(spec, [before], Recipe(None, (spec.C, 1, 1, 1), node))

    def _pointwise(self, node: Node, spec: PointwiseSpec, reads: list[str]) -> None:
        if spec.add:
            for before, other in (reads, reads[::-1]):
                conv = self._open_conv(before)
                if conv and not conv.spec.residual and conv.spec.activation is None:
                    fused = replace(conv.spec, residual=True)
                    return self._take_in(before, node.name, spec=fused, inputs=[*conv.inputs, other])
        else:
            before = self._open_conv(reads[0]) or self._open_sum(reads[0])
            if before and before.spec.activation is None:
                return self._take_in(reads[0], node.name, spec=replace(before.spec, activation=spec.activation))
        self.drafts[node.name] = _Draft(spec, reads)
        return None

    def _open_sum(self, name: str) -> _Draft | None:
        draft = self.drafts.get(name)
        is_sum = draft is not None and isinstance(draft.spec, PointwiseSpec)
        return draft if is_sum and name not in self._kept and self._readers[name] == 1 else None


def lower(inferred: dict[str, Inferred], image: specs.CHW, layers: tuple[str, ...]) -> Lowered:
    """The operations that give the maps of `layers`; `inferred` holds just the nodes that these need."""
    lowering = _Lowering(inferred, layers)
    for item in inferred.values():
        lowering.add(item)
    for name in layers:
        # A layer that only renames the image: a copy, so that a result is never the caller's own array.
        if lowering.source[name] == INPUT:
            lowering.drafts[name] = _Draft(specs.pointwise(image), [INPUT])
            lowering.source[name] = name
    number = {name: value for value, name in enumerate((INPUT, *lowering.drafts))}
    operations, recipes = [], {}
    for name, draft in lowering.drafts.items():
        key = draft.recipe.key if draft.recipe else None
        if key:
            recipes[key] = draft.recipe
        operations.append(Operation(draft.spec, tuple(number[i] for i in draft.inputs), number[name], key))
    values = {name: number[lowering.source[name]] for name in layers}
    return Lowered(tuple(operations), {number[INPUT]: image}, values, recipes)


def arrays(recipe: Recipe, parameters: Callable[[Node], tuple]) -> tuple:
    """A convolution's (weight, bias) from its recipe and the layers' own arrays, in float32.

    y = (conv(x) + bias - mean) * scale / sqrt(variance + epsilon) + shift is one convolution, because it is linear.
    """
    if recipe.layer is None:
        weight, bias = np.ones(recipe.shape, np.float32), None
    else:
        weight, bias = parameters(recipe.layer)
        if weight.size != prod(recipe.shape):
            raise ModelError(f"layer {recipe.layer.name!r}: expected weights of {recipe.shape}, got {weight.shape}")
        weight = weight.reshape(recipe.shape)
    if recipe.batch_norm is None:
        return weight, bias
    scale, shift, mean, variance = (a.astype(np.float64) for a in parameters(recipe.batch_norm))
    factor = scale / np.sqrt(variance + recipe.batch_norm.options.get("epsilon", 1e-5))
    shift = shift + ((0 if bias is None else bias) - mean) * factor
    weight = (weight * factor[:, None, None, None]).astype(np.float32)
    return weight, shift.astype(np.float32)
