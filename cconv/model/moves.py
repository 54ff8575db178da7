"""Moves: the operators that only rearrange, repeat or leave out elements, and interpolation between them.

In: a Node and Values.  Out: a Result. A Reshape moves nothing: its result is its operand, seen in another shape.
"""

import math
from collections.abc import Sequence
from math import prod

from ..errors import ArgumentError, ModelError, ShapeError
from ..planning import ResizeSpec, cost, tensors
from .graph import Node, Shape
from .operators import Part, Result, Rule, Value, axis_of, size

Axis = tensors.Axis
#: ONNX's number of float32.
FLOAT = 1


def _axes(node: Node, given: Value | None, rank: int) -> list[int] | None:
    """Axes from an operand, or from the attribute of older opsets."""
    axes = _numbers(node, given, "axes")
    return None if axes is None else [axis_of(axis, rank) for axis in axes]


def _numbers(node: Node, given: Value | None, word: str) -> list | None:
    return node.options.get(word) if given is None else given.numbers()


# Other shapes of the same elements -----------------------------------------------------------------------------------


def same(node: Node, x: Value, *others: Value | None) -> Result:
    """Identity and Dropout: the operand under another name."""
    return Result(x.shape)


def cast(node: Node, x: Value) -> Result:
    if node.options.get("to") != FLOAT:
        raise ModelError(f"expected a cast of maps to float32, got one to ONNX's type {node.options.get('to')}")
    return Result(x.shape)


def flatten(node: Node, x: Value) -> Result:
    axis = node.options.get("axis", 1)
    axis = axis if axis == len(x.shape) else axis_of(axis, len(x.shape))
    return Result((prod(x.shape[:axis]), prod(x.shape[axis:])))


def reshape(node: Node, x: Value, shape: Value | None = None) -> Result:
    """0 keeps a size, unless allowzero; -1 is what is left."""
    wanted = [int(n) for n in _numbers(node, shape, "shape") or ()]
    if not node.options.get("allowzero"):
        wanted = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(wanted)]
    known = prod(n for n in wanted if n != -1)
    if wanted.count(-1) == 1 and known > 0 and size(x) % known == 0:
        wanted[wanted.index(-1)] = size(x) // known
    if min(wanted, default=1) < 1 or prod(wanted) != size(x):
        raise ShapeError(f"shape: expected {size(x)} elements as in {x.shape}, got {tuple(wanted)!s:.200}")
    return Result(tuple(wanted))


def squeeze(node: Node, x: Value, axes: Value | None = None) -> Result:
    over = _axes(node, axes, len(x.shape))
    over = [i for i, n in enumerate(x.shape) if n == 1] if over is None else over
    if any(x.shape[axis] != 1 for axis in over):
        raise ShapeError(f"axes: expected axes of size 1, got {over} of {x.shape}")
    return Result(tuple(n for i, n in enumerate(x.shape) if i not in over))


def unsqueeze(node: Node, x: Value, axes: Value | None = None) -> Result:
    given = _numbers(node, axes, "axes") or []
    rank = len(x.shape) + len(given)
    new = {axis_of(axis, rank) for axis in given}
    if len(new) != len(given):
        raise ShapeError(f"axes: expected axes that differ, got {given}")
    rest = iter(x.shape)
    return Result(tuple(1 if i in new else next(rest) for i in range(rank)))


# One move ------------------------------------------------------------------------------------------------------------


def moved(node: Node, x: Value, shape: Sequence[int], axes: Sequence[Axis], **places) -> Result:
    """A tensor of which every element is an element of x, or filled in."""
    spec = tensors.move(x.shape, tuple(shape), axes, **places)
    return Result(tuple(shape), (Part(spec, (node.inputs[0],), node.name),), lambda n: cost.of(spec, n))


def _into(shape: Shape, steps: Sequence[int], tables: dict[int, tuple] | None = None) -> list[Axis]:
    """The loops over a whole result in C order: how far each goes in x."""
    tables = tables or {}
    return [
        Axis(count, step, to, tables.get(i))
        for i, (count, step, to) in enumerate(zip(shape, steps, tensors.strides(shape), strict=True))
    ]


def transpose(node: Node, x: Value) -> Result:
    rank = len(x.shape)
    order = [axis_of(axis, rank) for axis in node.options.get("perm", range(rank)[::-1])]
    if sorted(order) != list(range(rank)):
        raise ShapeError(f"perm: expected every axis of {x.shape} once, got {order}")
    steps, shape = tensors.strides(x.shape), [x.shape[axis] for axis in order]
    return moved(node, x, shape, _into(tuple(shape), [steps[axis] for axis in order]))


def sliced(node: Node, x: Value, *given: Value | None) -> Result:
    """Starts, ends, axes and steps, as Python's slices cut them."""
    starts, ends, axes, steps = (*given, None, None, None, None)[:4]
    begins, stops = _numbers(node, starts, "starts"), _numbers(node, ends, "ends")
    if begins is None or stops is None:
        raise ArgumentError("expected starts and ends")
    over = _axes(node, axes, len(x.shape)) or list(range(len(begins)))
    paces = [1] * len(begins) if steps is None else steps.numbers()
    if not len(begins) == len(stops) == len(over) == len(paces) or 0 in paces or len(over) > len(x.shape):
        raise ShapeError(f"expected as many starts, ends, axes and steps, got {begins}, {stops}, {over}, {paces}")
    shape, pace, begin, own = list(x.shape), [1] * len(x.shape), 0, tensors.strides(x.shape)
    for axis, first, last, step in zip(over, begins, stops, paces, strict=True):
        places = range(*slice(int(first), int(last), int(step)).indices(x.shape[axis]))
        shape[axis], pace[axis] = len(places), step
        begin += own[axis] * (places[0] if places else 0)
    shape = tensors.checked(shape)
    return moved(node, x, shape, _into(shape, [s * p for s, p in zip(own, pace, strict=True)]), begin=begin)


def split(node: Node, x: Value, sizes: Value | None = None) -> Result:
    """The part `index` of `count` parts; every part is a node of its own."""
    axis = axis_of(node.options.get("axis", 0), len(x.shape))
    index, count = node.options["index"], node.options["count"]
    parts = _numbers(node, sizes, "split")
    if parts is None:
        each = -(-x.shape[axis] // count)
        parts = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
        if each * count != x.shape[axis] and "num_outputs" not in node.options:
            raise ShapeError(f"expected {count} equal parts, got {x.shape[axis]} of {x.shape}")
    if len(parts) != count or min(parts) < 1 or sum(parts) != x.shape[axis]:
        raise ShapeError(f"split: expected {count} parts of {x.shape[axis]}, got {parts}")
    shape = tuple(parts[index] if i == axis else n for i, n in enumerate(x.shape))
    own = tensors.strides(x.shape)
    return moved(node, x, shape, _into(shape, own), begin=own[axis] * sum(parts[:index]))


def concat(node: Node, *values: Value) -> Result:
    """Several moves into one tensor; constants among the operands are not supported."""
    if "axis" not in node.options or not values:
        raise ArgumentError("expected an axis and operands")
    first = values[0].shape
    axis = axis_of(node.options["axis"], len(first))
    for value in values:
        if value.constant is not None:
            raise ModelError("expected operands of Concat that all depend on the image, or none")
        if len(value.shape) != len(first) or any(
            a != b for i, (a, b) in enumerate(zip(value.shape, first, strict=True)) if i != axis
        ):
            raise ShapeError(f"expected shapes that differ along axis {axis} only, got {first} and {value.shape}")
    along = sum(value.shape[axis] for value in values)
    shape = tensors.checked([along if i == axis else n for i, n in enumerate(first)])
    to, parts, at = tensors.strides(shape), [], 0
    for i, value in enumerate(values):
        own = tensors.strides(value.shape)
        axes = [Axis(count, step, far) for count, step, far in zip(value.shape, own, to, strict=True)]
        spec = tensors.move(value.shape, shape, axes, at=at)
        parts.append(Part(spec, (node.inputs[i],), node.name))
        at += to[axis] * value.shape[axis]
    # Every element is read once and written once, in however many moves.
    return Result(shape, tuple(parts), lambda n: cost.moved(n * prod(shape), n * prod(shape)))


def pad(
    node: Node, x: Value, pads: Value | None = None, value: Value | None = None, axes: Value | None = None
) -> Result:
    rank = len(x.shape)
    given = _numbers(node, pads, "pads")
    over = _axes(node, axes, rank)
    over = list(range(rank)) if over is None else over
    if given is None or len(given) != 2 * len(over):
        raise ShapeError(f"pads: expected two numbers for each of {len(over)} axes, got {given}")
    before, behind = [0] * rank, [0] * rank
    for i, axis in enumerate(over):
        before[axis], behind[axis] = int(given[i]), int(given[len(over) + i])
    shape = tensors.checked([b + n + a for b, n, a in zip(before, x.shape, behind, strict=True)])
    mode, own, to = node.options.get("mode", b"constant"), tensors.strides(x.shape), tensors.strides(shape)
    if mode != b"constant":
        tables = {
            i: tuple(own[i] * place for place in _mirrored(mode, x.shape[i], before[i], shape[i]))
            for i in range(rank) if before[i] or behind[i]
        }  # fmt: skip
        return moved(node, x, shape, _into(shape, own, tables))
    fill = float(node.options.get("value", 0.0)) if value is None else float(value.number())
    begin, at, inner = 0, 0, []
    for i, n in enumerate(x.shape):
        count = min(n, n + behind[i]) - max(0, -before[i])
        if count < 1:
            raise ShapeError(f"pads: expected to leave something of {x.shape}, got {given}")
        begin, at = begin + own[i] * max(0, -before[i]), at + to[i] * max(0, before[i])
        inner.append(Axis(count, own[i], to[i]))
    return moved(node, x, shape, inner, begin=begin, at=at, fill=fill)


def _mirrored(mode: bytes, n: int, before: int, count: int) -> list[int]:
    """Where each place of a padded axis is read."""
    places = range(-before, count - before)
    match mode:
        case b"edge":
            return [min(max(i, 0), n - 1) for i in places]
        case b"wrap":
            return [i % n for i in places]
        case b"reflect":
            period = max(1, 2 * (n - 1))
            return [min(i % period, period - i % period) if n > 1 else 0 for i in places]
    raise ArgumentError(f"mode: expected constant, edge, reflect or wrap, got {mode!r:.40}")


def gather(node: Node, x: Value, indices: Value) -> Result:
    """Elements of x along an axis, at places that do not depend on the image."""
    axis = axis_of(node.options.get("axis", 0), len(x.shape))
    n, own = x.shape[axis], tensors.strides(x.shape)
    if indices.constant is None:
        raise ModelError("expected indices that do not depend on the image as an operand of Gather")
    tensors.checked(indices.shape)
    places = indices.constant.read().ravel().tolist()
    if not all(isinstance(i, int) and -n <= i < n for i in places):
        raise ShapeError(f"indices: expected integers from {-n} to {n - 1}, got others")
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    loops = (*x.shape[:axis], len(places), *x.shape[axis + 1 :])
    tensors.checked(loops)
    spec = tensors.move(x.shape, shape, _into(loops, own, {axis: tuple(own[axis] * (i % n) for i in places)}))
    return Result(shape, (Part(spec, (node.inputs[0],), node.name),), lambda images: cost.of(spec, images))


def depth_to_space(node: Node, x: Value) -> Result:
    if len(x.shape) != 4:
        raise ShapeError(f"x: expected a tensor (N, C, H, W), got shape {x.shape}")
    block, (n, c, h, w) = node.options.get("blocksize"), x.shape
    if not isinstance(block, int) or block < 1 or c % block**2:
        raise ShapeError(f"blocksize: expected one whose square divides {c} channels, got {block!r:.40}")
    k, maps = c // block**2, h * w
    match node.options.get("mode", b"DCR"):
        case b"DCR":  # channel = (row of the block, column, k)
            down, across, channel = block * k * maps, k * maps, maps
        case b"CRD":  # channel = (k, row of the block, column)
            down, across, channel = block * maps, maps, block**2 * maps
        case mode:
            raise ArgumentError(f"mode: expected DCR or CRD, got {mode!r:.40}")
    axes = _into((n, k, h, block, w, block), (c * maps, channel, w, down, 1, across))
    return moved(node, x, (n, k, h * block, w * block), axes)


# Resize --------------------------------------------------------------------------------------------------------------


def _position(mode: bytes) -> Rule:
    """Where output i of `out` lies among n inputs, `scale` apart."""
    match mode:
        case b"half_pixel":
            return lambda i, n, out, scale: (i + 0.5) / scale - 0.5
        case b"half_pixel_symmetric":
            return lambda i, n, out, scale: n / 2 * (1 - out / (scale * n)) + (i + 0.5) / scale - 0.5
        case b"pytorch_half_pixel":
            return lambda i, n, out, scale: (i + 0.5) / scale - 0.5 if out > 1 else 0.0
        case b"align_corners":  # the length before it is rounded down
            return lambda i, n, out, scale: i * (n - 1) / (_length(n, out, scale) - 1) if out > 1 else 0.0
        case b"asymmetric":
            return lambda i, n, out, scale: i / scale
    raise ModelError(f"expected a coordinate_transformation_mode that is supported, got {mode!r:.40}")


def _length(n: int, out: int, scale: float) -> float:
    return out if abs(scale * n - out) < 1e-9 * out else scale * n


_ROUNDING = {
    b"round_prefer_floor": lambda at: math.ceil(at - 0.5),
    b"round_prefer_ceil": lambda at: math.floor(at + 0.5),
    b"floor": math.floor,
    b"ceil": math.ceil,
}


def _sizes(node: Node, x: Value, scales: Value | None, sizes: Value | None) -> tuple[list[int], list[float]]:
    """The result's shape, and how many times larger each axis is."""
    rank = len(x.shape)
    over = _axes(node, None, rank)
    over = list(range(rank)) if over is None else over
    shape, scale = list(x.shape), [1.0] * rank
    given = None if sizes is None or not size(sizes) else sizes.numbers()
    factors = given is None and (node.options.get("scales") if scales is None else scales.numbers())
    if len(given or factors or ()) != len(over) or min(given or factors) <= 0:
        raise ShapeError(f"expected a size or scale above 0 for each of {len(over)} axes, got {given or factors}")
    if not given:
        for axis, factor in zip(over, factors, strict=True):
            scale[axis] = factor
            shape[axis] = min(math.floor(x.shape[axis] * factor), 2**40)
        return shape, scale
    policy = node.options.get("keep_aspect_ratio_policy", b"stretch")
    ratios = [wanted / x.shape[axis] for axis, wanted in zip(over, given, strict=True)]
    for axis, wanted, ratio in zip(over, given, ratios, strict=True):
        if policy == b"stretch":
            shape[axis], scale[axis] = wanted, ratio
        else:
            scale[axis] = min(ratios) if policy == b"not_larger" else max(ratios)
            shape[axis] = math.floor(scale[axis] * x.shape[axis] + 0.5)
    return shape, scale


def resize(node: Node, x: Value, *given: Value | None) -> Result:
    """Nearest neighbour along any axes, or linear interpolation of maps."""
    _, scales, sizes = (*given, None, None, None)[:3]
    shape, scale = _sizes(node, x, scales if scales is not None and size(scales) else None, sizes)
    shape = tensors.checked(shape)
    position = _position(node.options.get("coordinate_transformation_mode", b"half_pixel"))
    if node.options.get("antialias") or node.options.get("exclude_outside"):
        raise ModelError("expected a Resize without antialias and exclude_outside")
    changed = [i for i, (a, b) in enumerate(zip(shape, x.shape, strict=True)) if a != b or scale[i] != 1]
    at = {i: [position(p, x.shape[i], shape[i], scale[i]) for p in range(shape[i])] for i in changed}
    own = tensors.strides(x.shape)
    match node.options.get("mode", b"nearest"):
        case b"nearest":
            nearest = node.options.get("nearest_mode", b"round_prefer_floor")
            if nearest not in _ROUNDING:
                raise ArgumentError(f"nearest_mode: expected a known one, got {nearest!r:.40}")
            tables = {
                i: tuple(own[i] * min(max(_ROUNDING[nearest](p), 0), x.shape[i] - 1) for p in places)
                for i, places in at.items()
            }
            return moved(node, x, shape, _into(shape, own, tables))
        case b"linear":
            return _linear(node, x, shape, at)
        case mode:
            raise ModelError(f"expected a Resize that is nearest or linear, got {mode!r:.40}")


def _linear(node: Node, x: Value, shape: Shape, at: dict[int, list[float]]) -> Result:
    rank = len(x.shape)
    if rank < 2 or any(axis < rank - 2 for axis in at):
        raise ModelError(f"expected a linear Resize of the last two axes, got {x.shape} to {shape}")
    blends = []
    for axis in (rank - 2, rank - 1):
        places = [min(max(p, 0.0), x.shape[axis] - 1.0) for p in at.get(axis, map(float, range(shape[axis])))]
        low = tuple(math.floor(p) for p in places)
        high = tuple(min(i + 1, x.shape[axis] - 1) for i in low)
        blends.append(tensors.Blend(low, high, tuple(p - i for p, i in zip(places, low, strict=True))))
    before = prod(x.shape[:-2])
    spec = ResizeSpec(before, *x.shape[-2:], *blends, "float32")
    return Result(shape, (Part(spec, (node.inputs[0],), node.name),), lambda n: cost.of(spec, n))
