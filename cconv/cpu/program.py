"""Program: which compiled kernel computes each step of a plan, and what it packs.

In: a Plan and Weights.  Out: a Geometry, the plan compiled, and with weights a Program, ready to run (_program.pyx).
"""

from collections.abc import Callable
from math import prod

import numpy as np

from ..planning import (
    ArithmeticSpec,
    ConvSpec,
    Depthwise,
    Direct,
    FunctionSpec,
    LrnSpec,
    MatMulSpec,
    MoveSpec,
    Plan,
    PointwiseSpec,
    PoolSpec,
    ResizeSpec,
    SoftmaxSpec,
    Winograd,
    cost,
)
from . import threads
from ._conv import Convolution
from ._depthwise import DepthwiseConvolution
from ._maps import Pointwise, Pooling
from ._program import Geometry, Program, Step
from ._tensors import Arithmetic, Function, Lrn, MatMul, Moving, Resizing, Softmax
from ._winograd import WinogradConvolution

__all__ = ["Program", "prepare"]

#: How many operations of a convolution take as long as one element of a map that is read or written, and as one
#: operation that is done number by number.
ELEMENT, ALONE = 25, 100

_CONVOLUTIONS = {Direct: Convolution, Depthwise: DepthwiseConvolution, Winograd: WinogradConvolution}


def _never(x) -> bool:
    return False


def _aligned(x) -> bool:
    return x.flags.aligned


def _rows_join(x) -> bool:
    """Whether an image can be read as one long row."""
    return x.flags.aligned and (x.shape[2] == 1 or x.strides[2] == x.shape[3] * x.strides[3])


def _rows_in_one_piece(x) -> bool:
    return x.flags.aligned and x.strides[3] == x.itemsize and x.strides[2] % x.itemsize == 0


def _conv(step, isa: str) -> tuple:
    spec, tiling, name = step.operation.spec, step.tiling, step.operation.weights
    kernel = _CONVOLUTIONS[type(tiling)](spec, tiling, isa)
    # The packed form depends on these alone, so programs for other image sizes share it.
    form = "cpu", isa, tiling.packing, spec.groups

    def pack(arrays: tuple, room) -> tuple:
        weight, bias, *before = arrays
        # Not copied where they lie at an odd byte of a file: that took half of a network's first run.
        given = [np.asarray(array, order="C") for array in (weight, *before)]
        packed = kernel.pack(given[0], threads.get_num_threads(), *given[1:], room=room)
        if bias is not None and not (bias.flags.c_contiguous and bias.flags.aligned):
            bias = np.require(bias, requirements="CA")  # takes a microsecond even where there is nothing to do
        return packed, bias

    reads = _rows_in_one_piece
    if isinstance(tiling, Direct):
        reads = _rows_join if tiling.flat else _aligned
    work = tiling.executed_flops + ELEMENT * (spec.C * spec.H * spec.W + prod(spec.output))
    return kernel, reads, lambda weights, room: weights.derived(name, form, lambda arrays: pack(arrays, room)), work


def _pool(step, isa: str) -> tuple:
    spec = step.operation.spec
    rows, columns = (
        sum(-(-(stop - start) // axis.step) for start, stop in zip(axis.start, axis.stop, strict=True))
        for axis in (spec.rows, spec.columns)
    )
    return Pooling(spec, isa), _never, None, ALONE * spec.C * rows * columns


def _pointwise(step, isa: str) -> tuple:
    spec = step.operation.spec
    return Pointwise(spec, isa), _never, None, ELEMENT * prod(spec.output) + ALONE * cost.of(spec).flops_other


def _tensors(kernel: type) -> Callable:
    """A step of planning.tensors, whose kernel may read a constant as it is."""

    def make(step, isa: str) -> tuple:
        spec, name = step.operation.spec, step.operation.weights
        billed = cost.of(spec)
        work = billed.flops + ELEMENT * (prod(spec.image) + prod(spec.output)) + ALONE * billed.flops_other
        return kernel(spec, isa), _never, name and (lambda weights, _: weights.derived(name, "cpu", _plain)), work

    return make


def _plain(arrays: tuple) -> tuple:
    """A copy of a constant, which may lie in a file that others change."""
    return np.array(arrays[0], order="C"), None


_KINDS = {
    ConvSpec: _conv,
    PoolSpec: _pool,
    PointwiseSpec: _pointwise,
    MoveSpec: _tensors(Moving),
    ArithmeticSpec: _tensors(Arithmetic),
    FunctionSpec: _tensors(Function),
    SoftmaxSpec: _tensors(Softmax),
    LrnSpec: _tensors(Lrn),
    ResizeSpec: _tensors(Resizing),
    MatMulSpec: _tensors(MatMul),
}


def prepare(plan: Plan) -> Geometry:
    """The plan compiled for its machine: `prepare(plan)(weights)` is a Program."""
    threads.get_num_threads()  # known from here on, or refused
    steps, work = [], 0
    for index, step in enumerate(plan.steps):
        operation = step.operation
        spec = operation.spec
        kernel, reads, pack, own = _KINDS[type(spec)](step, plan.machine.isa)
        places = tuple(arena.offsets.get(operation.output, -1) for arena in (plan.arena, plan.alone))
        steps.append(
            Step(
                kernel, reads, pack, operation.inputs, operation.output, spec.image, spec.output, operation.times,
                places, index in plan.moot,
            )
        )  # fmt: skip
        work += own * operation.times
    return Geometry(plan, steps, work)
