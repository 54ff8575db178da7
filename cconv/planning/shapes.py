"""Shapes: the one output-size formula, and what turns a user's stride, padding and kernel into numbers.

In: Python ints, tuples and the words "same" and "valid".  Out: tuples of ints, or a ShapeError.
"""

import operator
from typing import NamedTuple

from ..errors import ArgumentError, ShapeError

Pair = tuple[int, int]
#: Strides, dilations, padding and padded images end here, so that the kernels' 32-bit tables hold them.
LARGEST = 2**31 - 1
#: Rows or columns of pooling windows: each is an entry of a table.
MOST_WINDOWS = 1 << 20
#: (top, left, bottom, right): ONNX's order for a 2-D image.
Padding = tuple[int, int, int, int]


class Window(NamedTuple):
    """One row or column of pooling windows along one axis: output i covers input start..stop-1 in steps of `step`.

    Before they are clipped, windows have `taps` positions and begin at i * stride - before; a stride of 0 says that
    they follow no such rule."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    #: How many positions output i divides by in an average.
    extent: tuple[int, ...]
    step: int
    stride: int = 0
    before: int = 0
    taps: int = 0


def integer(value, name: str, minimum: int, maximum: int = LARGEST) -> int:
    """`value` as an int from `minimum` to `maximum`; a bool or a float is a ShapeError."""
    if type(value) is int and minimum <= value <= maximum:  # most are
        return value
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ShapeError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    if not minimum <= number <= maximum:
        bound = f">= {minimum}" if number < minimum else f"<= {maximum}"
        raise ShapeError(f"{name}: expected an integer {bound}, got {number if abs(number) < 10**40 else 'a huge one'}")
    return number


def pair(value, name: str, minimum: int) -> Pair:
    """An int, or a (height, width) pair, as a pair."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ShapeError(f"{name}: expected an integer or a pair (height, width), got {value!r}")
        return integer(value[0], name, minimum), integer(value[1], name, minimum)
    number = integer(value, name, minimum)
    return number, number


def shape(value, name: str, rank: int | tuple[int, ...], axes: str) -> tuple[int, ...]:
    """A shape of the given rank with every size >= 1; `axes` names them in the message."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    try:
        sizes = tuple(value)
    except TypeError:
        raise ShapeError(f"{name}: expected a shape {axes}, got {value!r}") from None
    if len(sizes) not in ranks:
        raise ShapeError(f"{name}: expected {' or '.join(map(str, ranks))} axes {axes}, got shape {sizes}")
    if all(type(size) is int and 0 < size < 2**63 for size in sizes):  # most are, and the text below takes longer
        return sizes
    return tuple(integer(size, f"{name} {sizes}: every size", 1, 2**63 - 1) for size in sizes)


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """How many windows fit: the one output-size formula. 0 or less when none does.

    ``(size + pad - dilation*(kernel - 1) - 1) // stride + 1``, with `pad` the sum of both sides; `ceil_mode` rounds
    up instead (`pooling_window` then drops a last window that would begin beyond the image).
    """
    reach = size + pad - dilation * (kernel - 1) - 1
    return (-(-reach // stride) if ceil_mode else reach // stride) + 1


def padding(value, size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    """(top, left, bottom, right) from an int, a pair, four numbers, "valid" or "same".

    "same" gives ceil(size / stride) outputs; the extra row and column, if any, go to the end (ONNX's SAME_UPPER).
    """
    if isinstance(value, str):
        if value == "valid":
            return 0, 0, 0, 0
        if value != "same":
            raise ArgumentError(
                f'padding: expected an integer, a pair, four integers, "valid" or "same", got {value!r}'
            )
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
        ]
        top, left = total[0] // 2, total[1] // 2
        return top, left, total[0] - top, total[1] - left
    if isinstance(value, (tuple, list)) and len(value) == 4:
        top, left, bottom, right = (integer(v, "padding", 0) for v in value)
        return top, left, bottom, right
    if isinstance(value, (tuple, list)) and len(value) != 2:
        raise ShapeError(
            f"padding: expected an integer, a pair (height, width) or (top, left, bottom, right), got {value!r}"
        )
    height, width = pair(value, "padding", 0)
    return height, width, height, width


def _check_windows(count: int) -> None:
    if count > MOST_WINDOWS:
        raise ShapeError(f"x: expected at most {MOST_WINDOWS} pooling windows a side, got {count}")


def pooling_window(
    size: int,
    kernel: int,
    stride: int,
    before: int,
    after: int,
    dilation: int,
    ceil_mode: bool,
    count_include_pad: bool,
) -> Window:
    """The windows of a pooling layer along one axis, clipped to the image."""
    count = output_size(size, kernel, stride, before + after, dilation, ceil_mode)
    if ceil_mode and count > 0 and (count - 1) * stride >= size + before:
        count -= 1
    _check_windows(count)
    start, stop, extent = [], [], []
    for i in range(count):
        first = i * stride - before
        end = first + dilation * (kernel - 1) + 1
        inside = first if first >= 0 else first + -(first // dilation) * dilation
        last = min(end, size)
        start.append(inside)
        stop.append(last)
        padded_end = min(end, size + after)
        taps = -(-(padded_end - first) // dilation) if count_include_pad else -(-(last - inside) // dilation)
        extent.append(taps)
        if inside >= last:
            raise ShapeError(
                f"padding: window {i} of {count} holds only padding (size {size}, kernel {kernel}, stride {stride}, "
                f"padding {before} and {after}, dilation {dilation}); expected padding smaller than the kernel"
            )
    return Window(tuple(start), tuple(stop), tuple(extent), dilation, stride, before, kernel)


def adaptive_window(size: int, outputs: int) -> Window:
    """The windows that cut `size` positions into `outputs` parts: floor(i*size/outputs) to ceil((i+1)*size/outputs)."""
    _check_windows(outputs)
    start = tuple(i * size // outputs for i in range(outputs))
    stop = tuple(-(-(i + 1) * size // outputs) for i in range(outputs))
    return Window(start, stop, tuple(b - a for a, b in zip(start, stop, strict=True)), 1)
