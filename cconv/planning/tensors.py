"""Tensors: specs of the operators that are neither convolution, pool nor activation, on tensors of any rank.

In: shapes of one run.  Out: MoveSpec, ArithmeticSpec, FunctionSpec, SoftmaxSpec, LrnSpec, ResizeSpec, MatMulSpec, or a
typed error; and Spec, whatever a plan can hold. Like those of specs.py they carry no array.

Operands lie in C order. Where a tensor's axes do not matter it is seen as one long row, (1, 1, elements).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import NamedTuple

from ..errors import ShapeError
from .shapes import LARGEST
from .specs import CHW, Activation, ConvSpec, PointwiseSpec, PoolSpec

Shape = tuple[int, ...]

#: kind -> operations per element (cost.py counts with it); the formulas are in reference.py and kernels/tensors.inc.c.
ARITHMETIC = {"add": 1, "sub": 1, "mul": 1, "div": 1, "max": 0, "min": 0, "prelu": 1}
#: The same for functions of one operand: ramp is clip(scale * x + shift, low, high).
FUNCTIONS = {"ramp": 2, "clip": 0, "gelu_tanh": 9, "swish": 5}


#: Loops of a nest, once those that are one long loop are one.
MOST_LOOPS = 8


class Axis(NamedTuple):
    """One loop of a move: position i is read `i * source` (or `table[i]`) elements further on, written `i * target`."""

    count: int
    source: int
    target: int
    table: tuple[int, ...] | None = None


class Stride(NamedTuple):
    """One loop of an operator on two operands: how far apart its positions lie in each; 0 repeats one element."""

    count: int
    x: int
    other: int


def row(elements: int) -> CHW:
    return 1, 1, elements


def strides(shape: Shape) -> Shape:
    """Elements from one position of an axis to the next, in C order."""
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()


def _nest(loops: list) -> tuple:
    if len(loops) > MOST_LOOPS:
        raise ShapeError(f"expected at most {MOST_LOOPS} axes that do not join, got {len(loops)}")
    return tuple(loops)


def checked(shape: Sequence[int]) -> Shape:
    """A result's shape; ShapeError for one that is empty or larger than 32-bit tables hold."""
    if min(shape, default=1) < 1 or prod(shape) > LARGEST:
        raise ShapeError(f"expected a result of 1 to {LARGEST} elements, got shape {tuple(shape)!s:.200}")
    return tuple(shape)


@dataclass(frozen=True, slots=True)
class MoveSpec:
    """Elements of x go to their places in y; several moves may fill one y. Places that none writes get `fill`."""

    source: int
    target: int
    axes: tuple[Axis, ...]
    begin: int
    at: int
    fill: float | None
    dtype: str

    @property
    def image(self) -> CHW:
        return row(self.source)

    @property
    def output(self) -> CHW:
        return row(self.target)

    @property
    def whole(self) -> bool:
        """Whether x becomes the elements of y from `at` on, as it is."""
        as_it_is = self.axes == (Axis(self.source, 1, 1),) or self.source == 1
        return as_it_is and self.begin == 0 and self.fill is None


def move(
    source: Shape, target: Shape, axes: Sequence[Axis], *, begin=0, at=0, fill: float | None = None, dtype="float32"
) -> MoveSpec:
    """The spec of a move between two tensors; loops that are one long loop are made one."""
    joined: list[Axis] = []
    for axis in axes:
        if axis.table is not None and _is_even(axis.table):
            begin += axis.table[0]
            axis = Axis(axis.count, axis.table[1] - axis.table[0] if axis.count > 1 else 0, axis.target)
        if axis.count == 1:
            continue
        outer = joined[-1] if joined else None
        plain = outer is not None and outer.table is None and axis.table is None
        if plain and (outer.source, outer.target) == (axis.source * axis.count, axis.target * axis.count):
            joined[-1] = Axis(outer.count * axis.count, axis.source, axis.target)
        else:
            joined.append(axis)
    return MoveSpec(prod(source), prod(checked(target)), _nest(joined) or (Axis(1, 1, 1),), begin, at, fill, dtype)


def _is_even(table: tuple[int, ...]) -> bool:
    """Whether a table is one begin and one step."""
    return all(b - a == table[1] - table[0] for a, b in pairwise(table))


@dataclass(frozen=True, slots=True)
class ArithmeticSpec:
    """y = activation(x <kind> other), both spread over y's axes as NumPy spreads them."""

    kind: str
    loops: tuple[Stride, ...]
    x_size: int
    other_size: int
    #: Whether `other` is a weight and not a second operand.
    constant: bool
    #: Whether it is other <kind> x.
    swapped: bool
    activation: Activation | None
    dtype: str

    @property
    def image(self) -> CHW:
        return row(self.x_size)

    @property
    def second(self) -> CHW | None:
        return None if self.constant else row(self.other_size)

    @property
    def output(self) -> CHW:
        return row(prod(loop.count for loop in self.loops))


def spread(*given: Shape) -> Shape:
    """The shape that NumPy gives operands of these shapes."""
    rank = max(map(len, given))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in given]
    sizes = []
    for column in zip(*padded, strict=True):
        others = {size for size in column if size != 1}
        if len(others) > 1:
            raise ShapeError(f"expected shapes that spread over each other, got {' and '.join(map(str, given))}")
        sizes.append(others.pop() if others else 1)
    return checked(sizes)


def arithmetic(
    kind: str, x: Shape, other: Shape, *, constant=False, swapped=False, activation=None, dtype="float32"
) -> ArithmeticSpec:
    shape = spread(x, other)
    apart = []  # of each operand, from one position of an axis to the next
    for given in (x, other):
        own = (step if size > 1 else 0 for size, step in zip(given, strides(given), strict=True))
        apart.append((*[0] * (len(shape) - len(given)), *own))
    loops: list[Stride] = []
    for count, *steps in zip(shape, *apart, strict=True):
        if count == 1:
            continue
        if loops and (loops[-1].x, loops[-1].other) == (steps[0] * count, steps[1] * count):
            loops[-1] = Stride(loops[-1].count * count, *steps)
        else:
            loops.append(Stride(count, *steps))
    return ArithmeticSpec(
        kind, _nest(loops) or (Stride(1, 1, 1),), prod(x), prod(other), constant, swapped, activation, dtype
    )


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """y = kind(x), element by element, with parameters: a function that no convolution takes in."""

    kind: str
    size: int
    parameters: tuple[float, ...]
    dtype: str

    @property
    def image(self) -> CHW:
        return row(self.size)

    @property
    def output(self) -> CHW:
        return row(self.size)


@dataclass(frozen=True, slots=True)
class SoftmaxSpec:
    """y[c, i] = exp(x[c, i]) / sum over c of exp(x[c, i])."""

    C: int
    inner: int
    dtype: str

    @property
    def image(self) -> CHW:
        return self.C, 1, self.inner

    @property
    def output(self) -> CHW:
        return self.C, 1, self.inner


@dataclass(frozen=True, slots=True)
class LrnSpec:
    """y[c] = x[c] / (bias + alpha / size * sum of x[i]^2 over the `size` channels around c) ^ beta."""

    C: int
    inner: int
    size: int
    alpha: float
    beta: float
    bias: float
    dtype: str

    @property
    def image(self) -> CHW:
        return self.C, 1, self.inner

    @property
    def output(self) -> CHW:
        return self.C, 1, self.inner


class Blend(NamedTuple):
    """Along one axis, output i is (1 - weight[i]) * x[low[i]] + weight[i] * x[high[i]]."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    weight: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ResizeSpec:
    """Linear interpolation of maps, down and across."""

    C: int
    H: int
    W: int
    rows: Blend
    columns: Blend
    dtype: str

    @property
    def image(self) -> CHW:
        return self.C, self.H, self.W

    @property
    def output(self) -> CHW:
        return self.C, len(self.rows.low), len(self.columns.low)


@dataclass(frozen=True, slots=True)
class MatMulSpec:
    """y[b] = x[b] @ other[b] for matrices (M, K) and (K, N); `batch` are the loops over b, in matrices."""

    batch: tuple[Stride, ...]
    M: int
    K: int
    N: int
    x_size: int
    other_size: int
    constant: bool
    dtype: str

    @property
    def matrices(self) -> int:
        return prod(loop.count for loop in self.batch)

    @property
    def image(self) -> CHW:
        return row(self.x_size)

    @property
    def second(self) -> CHW | None:
        return None if self.constant else row(self.other_size)

    @property
    def output(self) -> CHW:
        return row(self.matrices * self.M * self.N)


def matmul(x: Shape, other: Shape, *, constant=False, dtype="float32") -> MatMulSpec:
    """The spec of x (..., M, K) @ other (..., K, N), both of rank 2 or more."""
    if x[-1] != other[-2]:
        raise ShapeError(f"expected matrices (M, K) and (K, N), got {x} and {other}")
    batch = arithmetic("add", (*x[:-2], 1), (*other[:-2], 1)).loops
    if len(batch) == MOST_LOOPS:
        raise ShapeError(f"expected fewer than {MOST_LOOPS} axes of matrices that do not join, got {len(batch)}")
    checked((*spread((*x[:-2], 1), (*other[:-2], 1)), x[-2], other[-1]))
    return MatMulSpec(batch, x[-2], x[-1], other[-1], prod(x), prod(other), constant, dtype)


Spec = (
    ConvSpec | PoolSpec | PointwiseSpec | MoveSpec | ArithmeticSpec | FunctionSpec | SoftmaxSpec | LrnSpec | ResizeSpec
    | MatMulSpec
)  # fmt: skip
