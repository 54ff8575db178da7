"""Cost: the only FLOP rules. What an operator costs is a function of shapes alone, in exact Python ints.

In: specs, or the sizes of an operator that has no spec.  Out: Cost, per `n` images.

Counted on the graph as given, before folding, fusion or padding to blocks; padded positions count as positions.
"""

from dataclasses import dataclass
from math import prod
from numbers import Real

from ..errors import ArgumentError
from .shapes import integer
from .specs import CHW, ITEMSIZE, Activation, ConvSpec, PointwiseSpec, PoolSpec
from .tensors import (
    ARITHMETIC,
    FUNCTIONS,
    ArithmeticSpec,
    FunctionSpec,
    LrnSpec,
    MatMulSpec,
    MoveSpec,
    ResizeSpec,
    SoftmaxSpec,
    Spec,
)

#: Operations per element: + - * / exp erf tanh count 1 each; comparisons, max, min, abs and negation count 0.
ACTIVATION_FLOPS = {
    "relu": 0,
    "relu6": 0,
    "leaky_relu": 1,  # slope * x
    "sigmoid": 3,  # 1 / (1 + exp(-x))
    "silu": 4,  # x * sigmoid(x)
    "hardswish": 3,  # x * clip(x + 3) / 6
    "tanh": 1,
    "gelu": 5,  # 0.5 * x * (1 + erf(x / sqrt 2))
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a computation costs, in exact integers; costs add, and `cost * n` is n of them.

    Attributes
    ----------
    macs : int
        Multiply-accumulates: N*K*P*Q*(C/G)*R*S for a convolution, N*in*out for a dense layer.
    flops_other : int
        Everything that is not a multiply-accumulate: bias, batch norm, pooling sums, activations.
    bytes : int
        Inputs + weights + outputs, each once.
    """

    macs: int = 0
    flops_other: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """2 * macs: one multiplication and one addition each."""
        return 2 * self.macs

    def __add__(self, other: "Cost") -> "Cost":
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.macs + other.macs, self.flops_other + other.flops_other, self.bytes + other.bytes)

    def __radd__(self, other) -> "Cost":
        return self if other == 0 else NotImplemented  # so that sum() works

    def __mul__(self, times: int) -> "Cost":
        if not isinstance(times, int):
            return NotImplemented
        return Cost(self.macs * times, self.flops_other * times, self.bytes * times)

    __rmul__ = __mul__

    def as_dict(self) -> dict[str, int]:
        return {"macs": self.macs, "flops": self.flops, "flops_other": self.flops_other, "bytes": self.bytes}


def _activation(elements: int, activation: Activation | None) -> int:
    return elements * ACTIVATION_FLOPS[activation.name] if activation else 0


def conv(spec: ConvSpec, n: int) -> Cost:
    """macs = N*K*P*Q*(C/G)*R*S; other: 1 per output for a bias, 1 for a residual, and the activation."""
    outputs = n * spec.K * spec.P * spec.Q
    inputs = n * spec.C * spec.H * spec.W
    weights = spec.K * spec.depth + (spec.K if spec.bias else 0)
    moved = inputs + weights + outputs + (outputs if spec.residual else 0)
    other = outputs * (int(spec.bias) + int(spec.residual)) + _activation(outputs, spec.activation)
    return Cost(outputs * spec.depth, other, moved * ITEMSIZE[spec.dtype])


def pool(spec: PoolSpec, n: int) -> Cost:
    """An average: the positions it divides by, per output (sums and the division); a maximum compares: 0."""
    other = n * spec.C * sum(spec.rows.extent) * sum(spec.columns.extent) if spec.kind == "average" else 0
    return Cost(0, other, n * (spec.C * spec.H * spec.W + prod(spec.output)) * ITEMSIZE[spec.dtype])


def pointwise(spec: PointwiseSpec, n: int) -> Cost:
    """A sum: 1 per element; and the activation."""
    elements = n * spec.C * spec.H * spec.W
    other = (elements if spec.add else 0) + _activation(elements, spec.activation)
    return Cost(0, other, elements * (3 if spec.add else 2) * ITEMSIZE[spec.dtype])


def batch_norm(elements: int, channels: int, dtype: str) -> Cost:
    """2 per element (a multiplication and an addition); scale and shift are 2 weights per channel."""
    return Cost(0, 2 * elements, (2 * elements + 2 * channels) * ITEMSIZE[dtype])


def conv_transpose(image: CHW, weight: tuple[int, ...], output: CHW, n: int, *, bias: bool) -> Cost:
    """macs = N*C*H*W*(K/G)*R*S, as of the convolution whose gradient it is: the input's H and W; 1 per bias."""
    inputs, outputs, products = n * prod(image), n * prod(output), prod(weight[1:])
    moved = inputs + prod(weight) + (output[0] if bias else 0) + outputs
    return Cost(inputs * products, outputs * int(bias), moved * ITEMSIZE["float32"])


def moved(read: int, written: int, dtype: str = "float32") -> Cost:
    """Nothing is computed: so many elements are read and written."""
    return Cost(0, 0, (read + written) * ITEMSIZE[dtype])


def move(spec: MoveSpec, n: int) -> Cost:
    return moved(n * spec.source, n * spec.target, spec.dtype)


def arithmetic(spec: ArithmeticSpec, n: int) -> Cost:
    """+ - * / and PRelu's slope: 1 per element; max and min: 0. A constant operand is read once."""
    outputs = n * prod(spec.output)
    moved = n * spec.x_size + (1 if spec.constant else n) * spec.other_size + outputs
    other = outputs * ARITHMETIC[spec.kind] + _activation(outputs, spec.activation)
    return Cost(0, other, moved * ITEMSIZE[spec.dtype])


def function(spec: FunctionSpec, n: int) -> Cost:
    """clip: 0; ramp: 2 (scale and shift); swish: 5; GELU by tanh: 9; per element."""
    return Cost(0, n * spec.size * FUNCTIONS[spec.kind], 2 * n * spec.size * ITEMSIZE[spec.dtype])


def softmax(spec: SoftmaxSpec, n: int) -> Cost:
    """4 per element: less the maximum, exp, sum, division."""
    elements = n * spec.C * spec.inner
    return Cost(0, 4 * elements, 2 * elements * ITEMSIZE[spec.dtype])


def lrn(spec: LrnSpec, n: int) -> Cost:
    """size + 4 per element: a square, size - 1 sums, scale, bias, power, division."""
    elements = n * spec.C * spec.inner
    return Cost(0, (spec.size + 4) * elements, 2 * elements * ITEMSIZE[spec.dtype])


def resize(spec: ResizeSpec, n: int) -> Cost:
    """A weighted sum of the neighbours, 2 along each axis that changes: 7 per output in two dimensions, 3 in one."""
    neighbours = 2 ** sum(len(axis.low) != size for axis, size in ((spec.rows, spec.H), (spec.columns, spec.W)))
    outputs = n * prod(spec.output)
    moved = n * spec.C * spec.H * spec.W + outputs
    return Cost(0, (2 * neighbours - 1) * outputs, moved * ITEMSIZE[spec.dtype])


def matmul(spec: MatMulSpec, n: int) -> Cost:
    """macs = products of matrices * M*K*N."""
    outputs = n * prod(spec.output)
    moved = n * spec.x_size + (1 if spec.constant else n) * spec.other_size + outputs
    return Cost(outputs * spec.K, 0, moved * ITEMSIZE[spec.dtype])


_RULES = {
    ConvSpec: conv,
    PoolSpec: pool,
    PointwiseSpec: pointwise,
    MoveSpec: move,
    ArithmeticSpec: arithmetic,
    FunctionSpec: function,
    SoftmaxSpec: softmax,
    LrnSpec: lrn,
    ResizeSpec: resize,
    MatMulSpec: matmul,
}


def of(spec: Spec, n: int = 1) -> Cost:
    """The cost of one operator on `n` images."""
    return _RULES[type(spec)](spec, n)


def estimate(
    cost: Cost, samples: int = 1, *, macs_per_s: float | None = None, flops_per_s: float | None = None
) -> float:
    """Seconds that `samples` times `cost` takes at a given rate: either of macs or of flops (= 2 * macs), not both.

    Examples
    --------
    >>> layer = Cost(macs=1_024_000_000)
    >>> round(estimate(layer, 10 * 1_000_000, macs_per_s=0.15e12) / 3600, 2)
    18.96
    """
    if (macs_per_s is None) == (flops_per_s is None):
        raise ArgumentError("estimate: expected exactly one of macs_per_s and flops_per_s")
    unit, rate = (cost.macs, macs_per_s) if flops_per_s is None else (cost.flops, flops_per_s)
    if isinstance(rate, bool) or not isinstance(rate, Real) or not rate > 0:
        raise ArgumentError(f"estimate: expected a rate above 0, got {rate!r}")
    return unit * integer(samples, "samples", 0, 2**63) / rate
