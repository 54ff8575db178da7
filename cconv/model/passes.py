"""Passes: from the layers that are asked for to the operations that must run.

In: inferred nodes and the layers whose maps are kept.  Out: planning's Operations and what their weights are made of.

prune    only what the asked layers depend on
fold     BatchNormalization, and arithmetic with a number per channel, into the convolution before it
fuse     Add and activations into the convolution before them, as its residual and activation; x * sigmoid(x) is SiLU;
         a batch norm and its ReLU that stand alone into the 1x1 convolution behind them

Something takes in what is beside it only if nobody else reads its map and nobody asked for it. Costs are counted
elsewhere, on the graph as given: nothing in here changes a bill.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np

from .. import backend
from ..errors import ModelError
from ..planning import ArithmeticSpec, ConvSpec, Operation, PointwiseSpec, Spec, specs, tensors
from .graph import Constant, Node, Shape
from .layers import Inferred
from .operators import Affine, Key, Part, Recipe

#: One per channel, or one for all.
Numbers = np.ndarray | float

#: Arithmetic that is linear in its first operand.
_LINEAR = ("add", "sub", "mul", "div")


class Lowered(NamedTuple):
    """What planning.plan.make takes, and where everything is found."""

    operations: tuple[Operation, ...]
    inputs: dict[int, Shape]
    #: layer -> value that holds its map.
    values: dict[str, int]
    #: Operation.weights -> its recipe.
    recipes: dict[str, Recipe]


@dataclass
class _Draft:
    """An operation that may still take in what follows it."""

    spec: Spec
    inputs: list[Key]
    output: Key
    recipe: Recipe | None = None
    times: int = 1
    #: What differs from the spec once all is taken in: a spec has many fields, and is made anew only once.
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def residual(self) -> bool:
        return self.changes.get("residual", self.spec.residual)

    @property
    def activation(self) -> specs.Activation | None:
        return self.changes.get("activation", self.spec.activation)

    def final(self, **changes) -> Spec:
        changes |= self.changes
        return replace(self.spec, **changes) if changes else self.spec


def prune(nodes: Sequence[Node], layers: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes that the layers depend on, themselves included, in order."""
    needed = set(layers)
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return tuple(node for node in nodes if node.name in needed)


class _Lowering:
    """The drafts so far, in the order in which they run; one that gives a whole value has that value's key."""

    def __init__(self, inferred: dict[str, Inferred], image: str, layers: tuple[str, ...]):
        self.drafts: dict[Key, _Draft] = {}
        #: layer without an operation of its own -> where its map is.
        self.source: dict[Key, Key] = {image: image}
        read: list[Key] = []
        for name, (node, value, result) in inferred.items():
            if value.constant is None:
                self.source[name] = name if result.parts else self.source[node.inputs[0]]
                read += [self._at(key) for part in result.parts for key in part.reads]
        self._readers = Counter(read)
        self._kept = {self.source[name] for name in layers}

    def _at(self, key: Key) -> Key:
        return self.source.get(key, key)

    def _open_conv(self, key: Key, readers: int = 1) -> _Draft | None:
        """The convolution that gives this map, if it may take in all its readers."""
        draft = self.drafts.get(key)
        if draft is None or not isinstance(draft.spec, ConvSpec) or key in self._kept or self._readers[key] > readers:
            return None
        return draft

    def _take_in(self, before: Key, name: Key, **changes) -> None:
        """The draft that gave `before` now gives `name`, at the end of the order, where all its inputs exist."""
        draft = self.drafts[name] = self.drafts.pop(before)
        draft.output = name
        draft.changes |= changes

    def add(self, item: Inferred) -> None:
        parts = item.result.parts
        writers = Counter([part.output for part in parts]) if len(parts) > 1 else {}
        for i, part in enumerate(parts):
            reads = [self._at(read) for read in part.reads]
            whole = writers.get(part.output, 1) == 1
            if not (whole and (self._fold(part, reads[0]) or self._silu(part, reads) or self._fuse(part, reads))):
                key = part.output if whole else (part.output, i)
                self.drafts[key] = self._preactivated(_Draft(part.spec, reads, part.output, part.recipe, part.times))

    def _preactivated(self, draft: _Draft) -> _Draft:
        """The draft, with the batch norm and ReLU before it if it is a convolution that reads each pixel once."""
        spec, norm = draft.spec, self._open_conv(draft.inputs[0])
        if norm is None or not isinstance(spec, ConvSpec) or not spec.may_be_preactivated:
            return draft
        same = (norm.spec.K, norm.spec.P * norm.spec.Q, norm.times) == (spec.C, spec.H * spec.W, draft.times)
        rectified = norm.activation == specs.Activation("relu") and not norm.residual
        if norm.recipe.form != "ones" or not same or not rectified:
            return draft
        del self.drafts[draft.inputs[0]]
        recipe = draft.recipe._replace(before=norm.recipe.affines)
        return _Draft(spec, norm.inputs, draft.output, recipe, draft.times, {"preactivated": True})

    def _fold(self, part: Part, before: Key) -> bool:
        """Into the convolution before, if the part is linear per channel and nothing else has been taken in since."""
        conv = self._open_conv(before)
        if conv is None or conv.residual or conv.activation is not None:
            return False
        affine = _affine(part, conv)
        if affine is None:
            return False
        conv.recipe = conv.recipe._replace(affines=(*conv.recipe.affines, affine))
        self._take_in(before, part.output, bias=True)
        return True

    def _silu(self, part: Part, reads: list[Key]) -> bool:
        """x * sigmoid(x), as files write it before they have a word for it."""
        if not isinstance(part.spec, ArithmeticSpec) or part.spec.kind != "mul" or len(reads) != 2:
            return False
        for x, gate in (reads, reads[::-1]):
            before = self.drafts.get(gate)
            alone = gate not in self._kept and self._readers[gate] == 1
            if alone and before and isinstance(before.spec, PointwiseSpec) and before.inputs == [x]:
                if before.activation != specs.Activation("sigmoid"):
                    continue
                del self.drafts[gate]
                conv = self._open_conv(x, readers=2)
                silu = {"activation": specs.Activation("silu")}
                if conv and conv.activation is None:
                    self._take_in(x, part.output, **silu)
                else:
                    self.drafts[part.output] = _Draft(before.spec, [x], part.output, changes=silu)
                return True
        return False

    def _fuse(self, part: Part, reads: list[Key]) -> bool:
        if not isinstance(part.spec, PointwiseSpec):
            return False
        if part.spec.add:
            for before, other in (reads, reads[::-1]):
                conv = self._open_conv(before)
                if conv and not conv.residual and conv.activation is None:
                    conv.inputs = [*conv.inputs, other]
                    self._take_in(before, part.output, residual=True)
                    return True
            return False
        before = self._open_conv(reads[0]) or self._open_sum(reads[0])
        if before is None or before.activation is not None:
            return False
        self._take_in(reads[0], part.output, activation=part.spec.activation)
        return True

    def _open_sum(self, key: Key) -> _Draft | None:
        draft = self.drafts.get(key)
        is_sum = draft is not None and isinstance(draft.spec, PointwiseSpec)
        return draft if is_sum and key not in self._kept and self._readers[key] == 1 else None


def _affine(part: Part, conv: _Draft) -> Affine | None:
    """A part as what a convolution can fold: a batch norm, or arithmetic with one number per channel of its maps."""
    spec = part.spec
    if part.recipe is not None and part.recipe.form == "ones":
        same = (spec.K, spec.P * spec.Q, part.times) == (conv.spec.K, conv.spec.P * conv.spec.Q, conv.times)
        return part.recipe.affines[0] if same else None
    if not isinstance(spec, ArithmeticSpec) or not spec.constant or spec.kind not in _LINEAR:
        return None
    if spec.swapped and spec.kind == "div":
        return None
    maps = conv.times, conv.spec.K, conv.spec.P * conv.spec.Q
    if spec.other_size not in (1, conv.spec.K) or spec.x_size != prod(maps):
        return None
    if spec.loops != tensors.arithmetic(spec.kind, maps, (spec.other_size, 1)).loops:
        return None
    return Affine(spec.kind, part.recipe.constants[:1], swapped=spec.swapped)


def lower(
    inferred: dict[str, Inferred], image: str, shape: Shape, layers: tuple[str, ...], precision: str = "highest"
) -> Lowered:
    """The operations that give the maps of `layers`; `inferred` holds just the nodes that these need."""
    lowering = _Lowering(inferred, image, layers)
    for item in inferred.values():
        if item.value.constant is None:
            lowering.add(item)
    for name in layers:
        # A layer that only renames the image: a copy, so that a result is never the caller's own array.
        if lowering.source[name] == image:
            lowering.drafts[name] = _Draft(specs.pointwise(tensors.row(prod(shape))), [image], name)
            lowering.source[name] = name
    number: dict[Key, int] = {image: 0}
    operations, recipes = [], {}
    for draft in lowering.drafts.values():
        key = draft.recipe.key if draft.recipe else None
        if key:
            recipes[key] = draft.recipe
        output = number.setdefault(draft.output, len(number))
        own = isinstance(draft.spec, ConvSpec) and draft.spec.precision != precision
        spec = draft.final(precision=precision) if own else draft.final()
        operations.append(Operation(spec, tuple(number[i] for i in draft.inputs), output, key, draft.times))
    values = {name: number[lowering.source[name]] for name in layers}
    return Lowered(tuple(operations), {0: shape}, values, recipes)


def _floats(constant: Constant) -> np.ndarray:
    return np.asarray(constant.read(), np.float32)


def _own(constant: Constant | None) -> np.ndarray | None:
    """A copy: what every run reads as it is must not stay in a file, which may change."""
    return None if constant is None else np.array(constant.read(), np.float32)


def _as_given(recipe: Recipe) -> tuple:
    weight, bias = recipe.constants
    return _floats(weight).reshape(recipe.shape), _own(bias)


def _gemm(recipe: Recipe) -> tuple:
    """alpha * weight as (K, features), and beta * bias."""
    (weight, bias), (turned, alpha, beta) = recipe.constants, recipe.options
    weight = _floats(weight) if turned else _floats(weight).T
    if alpha != 1:
        weight = weight * np.float32(alpha)
    if bias is not None:
        bias = np.broadcast_to(_floats(bias).ravel() * np.float32(beta), (recipe.shape[0],))
    return weight.reshape(recipe.shape), bias


def _transposed(recipe: Recipe) -> tuple:
    """(C, K/G, R, S), turned round, as (K, C/G, R, S)."""
    (weight, bias), (groups,) = recipe.constants, recipe.options
    outputs, depth, *kernel = recipe.shape
    weight = _floats(weight).reshape(groups, depth, outputs // groups, *kernel)
    weight = weight.swapaxes(1, 2)[..., ::-1, ::-1].reshape(recipe.shape)
    return weight, _own(bias)


_FORMS = {
    "as given": _as_given,
    "gemm": _gemm,
    "transposed": _transposed,
    "ones": lambda recipe: (np.ones(recipe.shape, np.float32), None),
}


def _scale_and_shift(affine: Affine) -> tuple[Numbers, Numbers]:
    """a and b, so that what is folded is a * y + b per channel, in float64."""
    arrays = [np.asarray(constant.read(), np.float64).ravel() for constant in affine.constants]
    match affine.kind:
        case "BatchNormalization":
            scale, shift, mean, variance = arrays
            factor = scale / np.sqrt(variance + affine.epsilon)
            return factor, shift - mean * factor
        case "add":
            return 1.0, arrays[0]
        case "sub":
            return (-1.0, arrays[0]) if affine.swapped else (1.0, -arrays[0])
        case "mul":
            return arrays[0], 0.0
        case "div":
            return 1.0 / arrays[0], 0.0
    raise ModelError(f"expected something linear to fold, got {affine.kind}")


def _composed(affines: tuple[Affine, ...], shift: Numbers) -> tuple[Numbers, Numbers]:
    """All of them after y + shift, as one scale and one shift."""
    scale = 1.0
    for affine in affines:
        a, b = _scale_and_shift(affine)
        scale, shift = scale * a, shift * a + b
    return scale, shift


def _per_channel(numbers: Numbers, channels: int, dtype: type) -> np.ndarray:
    spread = np.empty(channels, dtype)
    spread[:] = numbers
    return spread


def arrays(recipe: Recipe) -> tuple:
    """An operation's (weight, bias) in float32, and (scale, shift) of its input as (2, C) where it is preactivated.

    Folding is exact algebra, because a convolution is linear."""
    weight, bias = _FORMS[recipe.form](recipe)
    if not recipe.affines and not recipe.before:
        return weight, bias
    outputs, inputs = recipe.shape[:2]
    with np.errstate(all="ignore"):  # a file may hold any numbers: what they give is what it asks for
        if recipe.affines:
            scale, shift = _composed(recipe.affines, 0.0 if bias is None else bias.astype(np.float64))
            # In NumPy, which needs an array of doubles for it, this took as long as packing.
            weight = backend.get("cpu").scaled(weight, _per_channel(scale, outputs, np.float64))
            bias = _per_channel(shift, outputs, np.float32)
        if not recipe.before:
            return weight, bias
        before = [_per_channel(numbers, inputs, np.float32) for numbers in _composed(recipe.before, 0.0)]
        return weight, bias, np.array(before)
