"""Program: a plan with packed weights, ready to run on the CPU.

In: a Plan and Weights; then images.  Out: maps. Every step is one call into the compiled core.
"""

import threading
from math import prod

import numpy as np

from ..errors import Cancelled
from ..planning import ConvSpec, Depthwise, Direct, Plan, PointwiseSpec, PoolSpec, Winograd, cost
from ..weights import Weights
from . import threads
from ._conv import Convolution, DepthwiseConvolution
from ._core import Buffer
from ._maps import Pointwise, Pooling
from ._winograd import WinogradConvolution

#: Bytes of scratch that a thread keeps between runs.
SCRATCH_KEPT = 64 << 20


class _Scratch(threading.local):
    """Scratch of the calling thread, kept for its next run, and grown when that needs more and not too much."""

    buffer = Buffer(0)

    def of(self, nbytes: int) -> Buffer:
        if nbytes > SCRATCH_KEPT:
            return Buffer(nbytes)
        if self.buffer.nbytes < nbytes:
            self.buffer = Buffer(nbytes)
        return self.buffer


_scratch = _Scratch()


_CONVOLUTIONS = {Direct: Convolution, Depthwise: DepthwiseConvolution, Winograd: WinogradConvolution}


class _ConvStep:
    def __init__(self, step, isa: str, weights: Weights):
        spec, key = step.operation.spec, step.operation.weights
        self.kernel = _CONVOLUTIONS[type(step.tiling)](spec, step.tiling, isa)
        self.tiling = step.tiling
        # The packed form depends on these alone, so programs for other image sizes share it.
        self.packed, self.bias = weights.derived(key, ("cpu", isa, step.tiling.packing, spec.groups), self._pack)
        self.flops = step.tiling.executed_flops

    def _pack(self, arrays: tuple) -> tuple:
        weight, bias = arrays
        packed = self.kernel.pack(np.require(weight, requirements="CA"))
        return packed, None if bias is None else np.require(bias, requirements="CA")

    def run(self, x, second, y, count: int, scratch: Buffer) -> None:
        aligned = x.flags.aligned
        if isinstance(self.tiling, Direct):
            if self.tiling.flat and x.strides[2] != x.shape[3] * x.strides[3] and x.shape[2] > 1:
                aligned = False  # rows that do not join: a copy is one long row
        elif x.strides[3] != x.itemsize or x.strides[2] % x.itemsize:
            aligned = False
        self.kernel.run(
            x if aligned else x.copy(order="C"), self.packed, self.bias,
            None if second is None else np.require(second, requirements="CA"), y, count, scratch,
        )  # fmt: skip


class _PoolStep:
    def __init__(self, step, isa: str, weights: Weights):
        spec = step.operation.spec
        self.kernel = Pooling(spec, isa)
        self.flops = spec.C * spec.H * spec.W

    def run(self, x, second, y, count: int, scratch: Buffer) -> None:
        self.kernel.run(np.require(x, requirements="CA"), y, count, scratch)


class _PointwiseStep:
    def __init__(self, step, isa: str, weights: Weights):
        self.kernel = Pointwise(step.operation.spec, isa)
        self.flops = cost.of(step.operation.spec).flops_other + prod(step.operation.spec.output)

    def run(self, x, second, y, count: int, scratch: Buffer) -> None:
        other = None if second is None else np.require(second, requirements="CA")
        self.kernel.run(np.require(x, requirements="CA"), other, y, count, scratch)


_STEPS = {ConvSpec: _ConvStep, PoolSpec: _PoolStep, PointwiseSpec: _PointwiseStep}


class Program:
    """A plan with packed weights. Safe to call from several threads at once."""

    def __init__(self, plan: Plan, weights: Weights):
        self.plan = plan
        self._steps = [(s.operation, _STEPS[type(s.operation.spec)](s, plan.machine.isa, weights)) for s in plan.steps]
        self._flops = sum(kernel.flops for _, kernel in self._steps)

    def run(self, inputs, outputs=None, cancel=None) -> list[np.ndarray]:
        """Run on N images.

        Parameters
        ----------
        inputs : list of (N, C, H, W) arrays, in the order and of the dtype of the plan
        outputs : list of arrays to write, optional
            Of the exact shape; may not overlap an input, except the residual of the step that writes it.
        cancel : object with is_set(), optional
            Asked before every step.

        Returns
        -------
        The outputs, in the order of the plan.

        Raises
        ------
        Cancelled
            `cancel` was set; given outputs may have been written in part.
        """
        plan = self.plan
        n = len(inputs[0])
        values = dict(zip(plan.inputs, inputs, strict=True))
        arena = np.empty(plan.arena.size * n, plan.dtype) if plan.arena.size else None
        given = {} if outputs is None else dict(zip(plan.outputs, outputs, strict=True))
        with threads.team(self._flops * n) as count:
            scratch = _scratch.of(max(step.kernel.scratch_bytes(n, count) for _, step in self._steps))
            for operation, step in self._steps:
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the run was cancelled before it ended")
                value = operation.output
                shape = (n, *plan.values[value])
                if value in plan.arena.offsets:
                    begin = plan.arena.offsets[value] * n
                    y = arena[begin : begin + prod(shape)].reshape(shape)
                elif value in given and given[value].flags.carray:
                    y = given[value]
                else:
                    y = np.empty(shape, plan.dtype)
                second = values[operation.inputs[1]] if len(operation.inputs) > 1 else None
                step.run(values[operation.inputs[0]], second, y, count, scratch)
                values[value] = y
        for value, out in given.items():
            if values[value] is not out:
                out[...] = values[value]
                values[value] = out
        return [values[value] for value in plan.outputs]
