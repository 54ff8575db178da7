"""The NumPy twin: every operator in float64, written to be read. Oracle, fallback and specification at once.

In: a Plan and Weights.  Out: a Program with the same run() as the other twins'; its results are float64.
"""

import math

import numpy as np

from .errors import Cancelled
from .planning import (
    Activation,
    ArithmeticSpec,
    ConvSpec,
    FunctionSpec,
    LrnSpec,
    Machine,
    MatMulSpec,
    MoveSpec,
    Plan,
    PointwiseSpec,
    PoolSpec,
    ResizeSpec,
    SoftmaxSpec,
)
from .weights import Weights

name = "reference"
dtypes = ("float32", "float64")

_erf = np.vectorize(math.erf, otypes=[np.float64])

#: One line per activation: the formula.
FORMULAS = {
    "relu": lambda x, alpha: np.maximum(x, 0),
    "relu6": lambda x, alpha: np.clip(x, 0, 6),
    "leaky_relu": lambda x, alpha: np.where(x < 0, alpha * x, x),
    "sigmoid": lambda x, alpha: 1 / (1 + np.exp(-x)),
    "silu": lambda x, alpha: x / (1 + np.exp(-x)),
    "hardswish": lambda x, alpha: x * np.clip(x + 3, 0, 6) / 6,
    "tanh": lambda x, alpha: np.tanh(x),
    "gelu": lambda x, alpha: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
}


def machine() -> Machine:
    return Machine(
        isa="numpy", vector_bytes=8, tile_rows=1, tile_vectors=1, pixel_vectors=(1,), threads=1, l2_bytes=1 << 20
    )


def asarray(array) -> np.ndarray:
    return np.asarray(array)


def to_numpy(array: np.ndarray) -> np.ndarray:
    return array


def synchronize() -> None:
    """Nothing to wait for."""


def activate(x: np.ndarray, activation: Activation | None) -> np.ndarray:
    if activation is None:
        return x
    with np.errstate(over="ignore"):  # exp(-x) may be infinite: 1 / (1 + inf) is the right 0
        return FORMULAS[activation.name](x, activation.alpha)


def preactivate(x_nchw, scale_shift_c) -> np.ndarray:
    """max(scale[c] * x + shift[c], 0)."""
    scale, shift = scale_shift_c.astype(np.float64)[:, :, None, None]
    return activate(x_nchw * scale + shift, Activation("relu"))


def conv(x_nchw, weight_kcrs, bias_k, residual_nkpq, spec: ConvSpec) -> np.ndarray:
    """y[n,k,p,q] = activation(sum over c,r,s of x[n,c,p*stride+r*dilation-pad,...] * w[k,c,r,s] + bias + residual)."""
    top, left, bottom, right = spec.padding
    padded = np.pad(x_nchw.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    weight = weight_kcrs.astype(np.float64)
    n, depth, outputs = len(x_nchw), spec.C // spec.groups, spec.K // spec.groups
    y_nkpq = np.zeros((n, spec.K, spec.P, spec.Q))
    for g in range(spec.groups):
        channels, maps = slice(g * depth, (g + 1) * depth), slice(g * outputs, (g + 1) * outputs)
        for r in range(spec.R):
            for s in range(spec.S):
                row, column = r * spec.dilation[0], s * spec.dilation[1]
                rows = slice(row, row + (spec.P - 1) * spec.stride[0] + 1, spec.stride[0])
                columns = slice(column, column + (spec.Q - 1) * spec.stride[1] + 1, spec.stride[1])
                pixels = padded[:, channels, rows, columns].reshape(n, depth, -1)
                y_nkpq[:, maps] += (weight[maps, :, r, s] @ pixels).reshape(n, outputs, spec.P, spec.Q)
    if bias_k is not None:
        y_nkpq += bias_k.astype(np.float64)[:, None, None]
    if residual_nkpq is not None:
        y_nkpq += residual_nkpq
    return activate(y_nkpq, spec.activation)


def pool(x_nchw, spec: PoolSpec) -> np.ndarray:
    """Maximum, or sum over the window divided by its extent."""
    y = np.empty((len(x_nchw), *spec.output))
    for p, (top, bottom) in enumerate(zip(spec.rows.start, spec.rows.stop, strict=True)):
        for q, (left, right) in enumerate(zip(spec.columns.start, spec.columns.stop, strict=True)):
            window = x_nchw[:, :, top : bottom : spec.rows.step, left : right : spec.columns.step].astype(np.float64)
            if spec.kind == "max":
                y[:, :, p, q] = window.max(axis=(2, 3))
            else:
                y[:, :, p, q] = window.sum(axis=(2, 3)) / (spec.rows.extent[p] * spec.columns.extent[q])
    return y


def pointwise(x_nchw, other, spec: PointwiseSpec) -> np.ndarray:
    x = x_nchw.astype(np.float64)
    return activate(x + other if spec.add else x, spec.activation)


#: One line per kind of arithmetic.
ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "prelu": lambda x, slope: np.where(x < 0, slope * x, x),
}
#: One line per function with parameters.
FUNCTIONS = {
    "ramp": lambda x, scale, shift, low, high: np.clip(scale * x + shift, low, high),
    "clip": lambda x, low, high: np.clip(x, low, high),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "swish": lambda x, alpha: x / (1 + np.exp(-alpha * x)),
}


def _places(loops, begin: int, step) -> np.ndarray:
    """Where each position of nested loops lies: begin + the sum of step(loop, i) over the loops."""
    at = np.array(begin)
    for loop in loops:
        at = at[..., None] + step(loop)
    return at


def move(x, y, spec: MoveSpec) -> np.ndarray:
    """y[n, places in y] = x[n, places in x]; `y` is what other moves have written, or None."""
    x = x.reshape(-1, spec.source)
    if y is None:
        y = np.full((len(x), spec.target), 0.0 if spec.fill is None else spec.fill)
    read = _places(spec.axes, spec.begin, lambda a: np.arange(a.count) * a.source if a.table is None else a.table)
    written = _places(spec.axes, spec.at, lambda a: np.arange(a.count) * a.target)
    y = y.reshape(len(x), spec.target)
    y[:, written] = x[:, read]
    return y


def arithmetic(x, other, spec: ArithmeticSpec) -> np.ndarray:
    x = x.reshape(-1, spec.x_size)[:, _places(spec.loops, 0, lambda loop: np.arange(loop.count) * loop.x)]
    other = np.asarray(other, np.float64).reshape(-1, spec.other_size)
    other = other[:, _places(spec.loops, 0, lambda loop: np.arange(loop.count) * loop.other)]
    with np.errstate(divide="ignore", invalid="ignore"):  # x / 0 is infinite, 0 / 0 no number, and no error
        return activate(ARITHMETIC[spec.kind](*((other, x) if spec.swapped else (x, other))), spec.activation)


def function(x, spec: FunctionSpec) -> np.ndarray:
    with np.errstate(over="ignore"):
        return FUNCTIONS[spec.kind](x.astype(np.float64), *spec.parameters)


def softmax(x, spec: SoftmaxSpec) -> np.ndarray:
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def lrn(x, spec: LrnSpec) -> np.ndarray:
    """ONNX's window: floor((size - 1) / 2) channels before, ceil((size - 1) / 2) behind."""
    x = x.astype(np.float64)
    before, behind = (spec.size - 1) // 2, spec.size // 2
    sums = np.stack([(x[:, max(0, c - before) : c + behind + 1] ** 2).sum(axis=1) for c in range(spec.C)], axis=1)
    return x / (spec.bias + spec.alpha / spec.size * sums) ** spec.beta


def resize(x, spec: ResizeSpec) -> np.ndarray:
    x, rows, columns = x.astype(np.float64), spec.rows, spec.columns
    w = np.array(rows.weight)[:, None]
    x = x[:, :, rows.low] * (1 - w) + x[:, :, rows.high] * w
    w = np.array(columns.weight)
    return x[..., columns.low] * (1 - w) + x[..., columns.high] * w


def matmul(x, other, spec: MatMulSpec) -> np.ndarray:
    x = x.reshape(-1, spec.x_size // (spec.M * spec.K), spec.M, spec.K).astype(np.float64)
    other = np.asarray(other, np.float64).reshape(-1, spec.other_size // (spec.K * spec.N), spec.K, spec.N)
    which = [_places(spec.batch, 0, lambda loop, f=field: np.arange(loop.count) * getattr(loop, f)).ravel()
             for field in ("x", "other")]  # fmt: skip
    return x[:, which[0]] @ other[:, which[1]]


class Program:
    """A plan with its weights, ready to run."""

    def __init__(self, plan: Plan, weights: Weights):
        self.plan = plan
        self._weights = weights

    def run(self, inputs, outputs=None, cancel=None) -> list[np.ndarray]:
        """Run on N images; see cconv.cpu.Program.run, whose contract this shares."""
        plan = self.plan
        values = dict(zip(plan.inputs, inputs, strict=True))
        for step in plan.steps:
            if cancel is not None and cancel.is_set():
                raise Cancelled("the run was cancelled before it ended")
            operation = step.operation
            x, *rest = (values[v] for v in operation.inputs)
            weight = bias = None
            before = ()
            if operation.weights is not None:
                weight, bias, *before = self._weights.derived(operation.weights, name, lambda arrays: arrays)
            second = rest[0] if rest else weight
            x = x.reshape(-1, *operation.spec.image)
            match operation.spec:
                case ConvSpec() as spec:
                    residual = rest[0].reshape(-1, *spec.output) if rest else None
                    result = conv(preactivate(x, *before) if spec.preactivated else x, weight, bias, residual, spec)
                case PoolSpec() as spec:
                    result = pool(x, spec)
                case PointwiseSpec() as spec:
                    result = pointwise(x, second.reshape(x.shape) if rest else None, spec)
                case MoveSpec() as spec:
                    result = move(x, values.get(operation.output), spec)
                case ArithmeticSpec() as spec:
                    result = arithmetic(x, second, spec)
                case FunctionSpec() as spec:
                    result = function(x, spec)
                case SoftmaxSpec() as spec:
                    result = softmax(x, spec)
                case LrnSpec() as spec:
                    result = lrn(x, spec)
                case ResizeSpec() as spec:
                    result = resize(x, spec)
                case MatMulSpec() as spec:
                    result = matmul(x, second, spec)
            values[operation.output] = result.reshape(-1, *operation.spec.output)
        results = [values[v] for v in plan.outputs]
        if outputs is None:
            return results
        for given, result in zip(outputs, results, strict=True):
            given[...] = result
        return list(outputs)


def build(plan: Plan, weights: Weights) -> Program:
    return Program(plan, weights)
