"""Specs: what is asked, as frozen values for one image. The number of images, N, comes at run time.

In: shapes and the options of the public API.  Out: ConvSpec, PoolSpec, PointwiseSpec, or a typed error.
A spec carries no array and no choice of how; planning/algorithm.py makes the plan from it.
"""

from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from ..errors import ArgumentError, DTypeError, ShapeError
from . import shapes
from .shapes import Padding, Pair, Window

CHW = tuple[int, int, int]

PRECISIONS = ("highest", "high", "medium")
#: The last two on a GPU alone: kept in 16 bits, computed in float32.
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

#: name -> default of its one parameter (None: it has none). The formulas are in reference.py and kernels/finish.inc.c.
ACTIVATIONS = {
    "relu": None,
    "relu6": None,
    "leaky_relu": 0.01,
    "sigmoid": None,
    "silu": None,
    "hardswish": None,
    "tanh": None,
    "gelu": None,
}


class Activation(NamedTuple):
    """An activation by name; `alpha` is leaky_relu's slope below zero and 0 for the others."""

    name: str
    alpha: float = 0.0


def as_activation(value) -> Activation | None:
    """None, a name, or ("leaky_relu", slope), as an Activation."""
    if value is None:
        return None
    name, alpha = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {value!r}")
    default = ACTIVATIONS[name]
    if default is None:
        if alpha:
            raise ArgumentError(f"activation: {name} takes no parameter, got {alpha!r}")
        return Activation(name)
    if alpha is None:
        return Activation(name, default)
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not abs(alpha) <= 1e30:
        raise ArgumentError(f"activation: expected a finite number as the slope of {name}, got {alpha!r:.40}")
    return Activation(name, float(alpha))


def checked_dtype(name: str, known: tuple[str, ...] = tuple(ITEMSIZE)) -> str:
    """A supported element type's name, else a DTypeError with a hint."""
    if name not in known:
        hint = "; integers are not converted silently: use x.astype(numpy.float32)" if "int" in name else ""
        raise DTypeError(f"dtype: expected one of {', '.join(known)}, got {name}{hint}")
    return name


def checked_precision(name: str) -> str:
    if name not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(PRECISIONS)}, got {name!r:.100}")
    return name


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """y = activation(conv(x, weight) + bias + residual) on one (C, H, W) image; made by `conv`.

    `preactivated`: instead of x it reads max(scale[c] * x + shift[c], 0), a batch norm and a ReLU; only where
    `may_be_preactivated` says so.
    """

    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int
    bias: bool
    residual: bool
    activation: Activation | None
    dtype: str
    precision: str
    algorithm: str
    preactivated: bool = False

    @property
    def may_be_preactivated(self) -> bool:
        """Whether it is a 1x1 kernel on neighbouring pixels: each is then read once for many outputs."""
        plain = self.R, self.S, *self.stride, *self.padding, self.groups
        return plain == (1, 1, 1, 1, 0, 0, 0, 0, 1) and self.P * self.Q > 1

    @property
    def depth(self) -> int:
        """n = (C/G)*R*S: how many products are summed for one output."""
        return self.C // self.groups * self.R * self.S

    @property
    def image(self) -> CHW:
        return self.C, self.H, self.W

    @property
    def second(self) -> CHW | None:
        return self.output if self.residual else None

    @property
    def output(self) -> CHW:
        return self.K, self.P, self.Q


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Maximum or average over windows of one (C, H, W) image; made by `pool` or `adaptive_pool`."""

    kind: str  # "max" or "average"
    C: int
    H: int
    W: int
    rows: Window
    columns: Window
    dtype: str

    @property
    def image(self) -> CHW:
        return self.C, self.H, self.W

    @property
    def output(self) -> CHW:
        return self.C, len(self.rows.start), len(self.columns.start)


@dataclass(frozen=True, slots=True)
class PointwiseSpec:
    """y = activation(x [+ other]) on one (C, H, W) image."""

    C: int
    H: int
    W: int
    add: bool
    activation: Activation | None
    dtype: str

    @property
    def image(self) -> CHW:
        return self.C, self.H, self.W

    @property
    def second(self) -> CHW | None:
        return self.image if self.add else None

    @property
    def output(self) -> CHW:
        return self.image


def conv(
    image: CHW,
    weight: tuple[int, ...],
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    bias=False,
    residual=False,
    activation=None,
    dtype="float32",
    precision="highest",
    algorithm="auto",
) -> ConvSpec:
    """The spec of the convolution of a (C, H, W) image with a (K, C/groups, R, S) weight, or a typed error."""
    channels, height, width = shapes.shape(image, "x (channels, height, width)", 3, "(C, H, W)")
    outputs, depth, rows, columns = shapes.shape(weight, "weight", 4, "(K, C/groups, R, S)")
    groups = shapes.integer(groups, "groups", 1)
    if channels % groups or outputs % groups:
        raise ShapeError(f"groups: expected a divisor of C={channels} and K={outputs}, got {groups}")
    if depth * groups != channels:
        raise ShapeError(
            f"x: expected {depth * groups} input channels, {depth} of weight {tuple(weight)} times groups={groups}, "
            f"got {channels}"
        )
    strides = shapes.pair(stride, "stride", 1)
    dilations = shapes.pair(dilation, "dilation", 1)
    pads = shapes.padding(padding, (height, width), (rows, columns), strides, dilations)
    top, left, bottom, right = pads
    out = (
        shapes.output_size(height, rows, strides[0], top + bottom, dilations[0]),
        shapes.output_size(width, columns, strides[1], left + right, dilations[1]),
    )
    if max(height + top + bottom, width + left + right) > shapes.LARGEST:
        raise ShapeError(f"padding: expected a padded image of at most {shapes.LARGEST} rows and columns, got {pads}")
    if min(out) < 1:
        raise ShapeError(
            f"weight: expected a kernel no larger than the padded image, got {rows}x{columns} with dilation "
            f"{dilations} on {height}x{width} with padding {pads}"
        )
    return ConvSpec(
        channels, height, width, outputs, rows, columns, *out, strides, pads, dilations, groups,
        bool(bias), bool(residual), as_activation(activation), checked_dtype(dtype), checked_precision(precision),
        algorithm,
    )  # fmt: skip


def pool(
    kind: str,
    image: CHW,
    kernel_size,
    *,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    count_include_pad=True,
    dtype="float32",
) -> PoolSpec:
    """The spec of a max or average pooling; `stride` defaults to the kernel size."""
    channels, height, width = shapes.shape(image, "x (channels, height, width)", 3, "(C, H, W)")
    kernel = shapes.pair(kernel_size, "kernel_size", 1)
    strides = kernel if stride is None else shapes.pair(stride, "stride", 1)
    dilations = shapes.pair(dilation, "dilation", 1)
    top, left, bottom, right = shapes.padding(padding, (height, width), kernel, strides, dilations)
    rows, columns = (
        shapes.pooling_window(size, k, s, before, after, d, bool(ceil_mode), bool(count_include_pad))
        for size, k, s, before, after, d in zip(
            (height, width), kernel, strides, (top, left), (bottom, right), dilations, strict=True
        )
    )
    if not rows.start or not columns.start:
        raise ShapeError(
            f"kernel_size: expected a window no larger than the padded image, got {kernel} with dilation {dilations} "
            f"on {height}x{width} with padding {(top, left, bottom, right)}"
        )
    return PoolSpec(kind, channels, height, width, rows, columns, checked_dtype(dtype))


def adaptive_pool(kind: str, image: CHW, outputs: Pair, *, dtype="float32") -> PoolSpec:
    """The spec of a pooling to a fixed (P, Q) map; (1, 1) is global pooling."""
    channels, height, width = shapes.shape(image, "x (channels, height, width)", 3, "(C, H, W)")
    rows, columns = shapes.pair(outputs, "output_size", 1)
    return PoolSpec(
        kind, channels, height, width, shapes.adaptive_window(height, rows), shapes.adaptive_window(width, columns),
        checked_dtype(dtype),
    )  # fmt: skip


def pointwise(image: CHW, *, add=False, activation=None, dtype="float32") -> PointwiseSpec:
    """The spec of an activation, or of a sum of two images and an activation."""
    sizes = shapes.shape(image, "x (channels, height, width)", 3, "(C, H, W)")
    return PointwiseSpec(*sizes, bool(add), as_activation(activation), checked_dtype(dtype))
