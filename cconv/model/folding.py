"""Folding: what does not depend on the image is computed once, by NumPy: shapes mostly, and weights that are made.

In: an operator's name, its options and arrays.  Out: an array, of bounded size.
Shape arithmetic is exact: integers stay integers.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from ..errors import ModelError, ShapeError
from .graph import Shape

#: Elements of an array that is computed, and of one number repeated, which takes no memory until it is packed.
MOST_COMPUTED, MOST_REPEATED = 1 << 24, 1 << 29
#: ONNX's numbers of the element types that are folded.
TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16,
    11: np.float64,
}  # fmt: skip


def _bounded(shape: Shape, most: int) -> Shape:
    if min(shape, default=0) < 0 or prod(shape) > most:
        raise ShapeError(f"expected a constant of at most {most} elements, got shape {shape!s:.200}")
    return shape


def _numbers(given, options, word):
    return options.get(word) if given is None else given.ravel().tolist()


def _axes(given, options, rank: int) -> tuple[int, ...] | None:
    axes = _numbers(given, options, "axes")
    return None if axes is None else tuple(axis % rank if -rank <= axis < rank else rank for axis in axes)


def _constant_of_shape(options, shape):
    value = options.get("value")
    value = np.zeros(1, np.float32) if value is None else value
    sizes = tuple(shape.ravel().tolist())
    return np.broadcast_to(value.reshape(()), _bounded(sizes, MOST_REPEATED))


def _slice(options, x, starts=None, ends=None, axes=None, steps=None):
    begins, stops = _numbers(starts, options, "starts"), _numbers(ends, options, "ends")
    over = _axes(axes, options, x.ndim) or range(len(begins))
    paces = [None] * len(begins) if steps is None else steps.ravel().tolist()
    cut = [slice(None)] * x.ndim
    for axis, begin, end, pace in zip(over, begins, stops, paces, strict=True):
        cut[axis] = slice(begin, end, pace)
    return x[tuple(cut)]


def _split(options, x, sizes=None):
    axis, index, count = options.get("axis", 0), options["index"], options["count"]
    parts = _numbers(sizes, options, "split") or [-(-x.shape[axis] // count)] * count
    begin = sum(parts[:index])
    return x.take(range(begin, min(begin + parts[index], x.shape[axis])), axis)


def _reshape(options, x, shape=None):
    wanted = _numbers(shape, options, "shape")
    if not options.get("allowzero"):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _squeeze(options, x, axes=None):
    return x.squeeze(_axes(axes, options, x.ndim))


def _unsqueeze(options, x, axes=None):
    given = _numbers(axes, options, "axes")
    return np.expand_dims(x, tuple(given))


def _divide(options, a, b):
    """Of integers, rounded towards zero."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(b)
    return (np.sign(a) * np.sign(b) * quotient).astype(a.dtype)


def _cast(options, x):
    if options.get("to") not in TYPES:
        raise ModelError(f"expected a cast to one of the types {', '.join(map(str, TYPES))}, got {options.get('to')}")
    return x.astype(TYPES[options["to"]])


def _clip(options, x, low=None, high=None):
    low = options.get("min", -np.inf) if low is None else low
    return np.clip(x, low, options.get("max", np.inf) if high is None else high).astype(x.dtype)


def _expand(options, x, shape):
    sizes = np.broadcast_shapes(x.shape, tuple(shape.ravel().tolist()))
    return np.broadcast_to(x, _bounded(sizes, MOST_REPEATED))


def _range(options, start, limit, step):
    _bounded((int(max(0, -((start - limit) // step))),), MOST_COMPUTED)
    return np.arange(start.item(), limit.item(), step.item(), start.dtype)


def _reduced(function: Callable) -> Callable:
    def fold(options, x, axes=None):
        return function(x, axis=_axes(axes, options, x.ndim), keepdims=bool(options.get("keepdims", 1))).astype(x.dtype)

    return fold


def _elementwise(function: Callable) -> Callable:
    return lambda options, *operands: function(*operands)


#: operator -> function of its options and arrays (None for an operand that is left out).
FOLD: dict[str, Callable] = {
    "Add": _elementwise(np.add),
    "Cast": _cast,
    "Ceil": _elementwise(np.ceil),
    "Clip": _clip,
    "Concat": lambda options, *arrays: np.concatenate(arrays, options["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Div": _divide,
    "Dropout": lambda options, x, *_: x,
    "Equal": _elementwise(np.equal),
    "Expand": _expand,
    "Flatten": lambda options, x: x.reshape(prod(x.shape[: options.get("axis", 1)]), -1),
    "Floor": _elementwise(np.floor),
    "Gather": lambda options, x, indices: np.take(x, indices, options.get("axis", 0)),
    "Identity": lambda options, x: x,
    "Max": _elementwise(np.maximum),
    "Min": _elementwise(np.minimum),
    "Mod": _elementwise(np.mod),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Range": _range,
    "ReduceMean": _reduced(np.mean),
    "ReduceProd": _reduced(np.prod),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Transpose": lambda options, x: x.transpose(options.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(np.where),
}
#: Operators of which the shape of the operand is enough.
OF_SHAPES = ("Shape", "Size")


def of_shape(operator: str, options, shape: Shape) -> np.ndarray:
    if operator == "Size":
        return np.array(prod(shape), np.int64)
    return np.array(shape[slice(options.get("start", 0), options.get("end"))], np.int64)


def fold(operator: str, options, arrays: list) -> np.ndarray:
    """The result of an operator on constants; ModelError or ShapeError if it has none here."""
    if operator not in FOLD:
        raise ModelError(f"expected an operand that depends on the image, or an operator that folds, for {operator}")
    shapes = [array.shape for array in arrays if array is not None]
    if operator not in _VIEWS:
        # As many as a file really holds may always be computed; a number that is repeated is no array yet.
        held = max((array.size for array in arrays if array is not None and 0 not in array.strides), default=0)
        _bounded((_elements(operator, shapes),), max(MOST_COMPUTED, held))
    try:
        with np.errstate(all="ignore"):
            result = np.asarray(FOLD[operator](options, *arrays))
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"expected operands that fit {operator}, got shapes {shapes}: {error!s:.200}") from None
    return result


#: What takes no memory of its own, or bounds itself.
_VIEWS = frozenset(
    (
        "Identity",
        "Dropout",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Transpose",
        "ConstantOfShape",
        "Expand",
        "Range",
    )
)


def _elements(operator: str, shapes: list[Shape]) -> int:
    """At most how many elements a result has."""
    if operator == "Concat":
        return sum(map(prod, shapes))
    if operator == "Gather":
        return prod(shapes[0]) * max(1, prod(shapes[1]))
    try:
        return prod(np.broadcast_shapes(*shapes)) if operator in _SPREAD else prod(shapes[0])
    except ValueError:
        raise ShapeError(f"expected shapes that spread over each other, got {shapes!s:.200}") from None


_SPREAD = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Equal", "Where"))
