"""The NumPy twin: every operator in float64, written to be read. Oracle, fallback and specification at once.

In: a Plan and Weights.  Out: a Program with the same run() as the other twins'; its results are float64.
"""

import math

import numpy as np

from .errors import Cancelled
from .planning import Activation, ConvSpec, Machine, Plan, PointwiseSpec, PoolSpec
from .weights import Weights

name = "reference"

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
            second = rest[0] if rest else None
            x = x.reshape(len(x), *plan.values[operation.inputs[0]])
            match operation.spec:
                case ConvSpec() as spec:
                    weight, bias = self._weights.derived(operation.weights, name, lambda arrays: arrays)
                    result = conv(x, weight, bias, second, spec)
                case PoolSpec() as spec:
                    result = pool(x, spec)
                case PointwiseSpec() as spec:
                    result = pointwise(x, second, spec)
            values[operation.output] = result
        results = [values[v] for v in plan.outputs]
        if outputs is None:
            return results
        for given, result in zip(outputs, results, strict=True):
            given[...] = result
        return list(outputs)


def build(plan: Plan, weights: Weights) -> Program:
    return Program(plan, weights)
