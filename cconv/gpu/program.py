"""Program: a plan's steps in order, on a device: which kernel computes each, and where its maps lie.

In: a Plan, a device (device.py), Weights; then images.  Out: maps, on the device. Nothing waits: runs are queued on
CuPy's current stream, and so is the memory that they use.
"""

from math import prod

from ..errors import Cancelled
from ..planning import (
    ArithmeticSpec,
    ConvSpec,
    FunctionSpec,
    LrnSpec,
    MatMulSpec,
    MoveSpec,
    Plan,
    PointwiseSpec,
    PoolSpec,
    ResizeSpec,
    SoftmaxSpec,
    cuda,
)
from .convolution import Convolution, DepthwiseConvolution
from .maps import Arithmetic, Lrn, MatMul, Pointwise, Pooling, Resizing, Softmax, moving

#: The kernel of a step, by its tiling's type if it has one, or by its spec's: f(spec, tiling, device).
_KERNELS = {
    cuda.Ffma: Convolution,
    cuda.Strips: DepthwiseConvolution,
    PoolSpec: Pooling,
    PointwiseSpec: Pointwise,
    FunctionSpec: Pointwise,
    MoveSpec: moving,
    ArithmeticSpec: Arithmetic,
    SoftmaxSpec: Softmax,
    LrnSpec: Lrn,
    ResizeSpec: Resizing,
    MatMulSpec: MatMul,
}


class Geometry:
    """A plan compiled for a device, without weights. Called with Weights, a Program."""

    def __init__(self, plan: Plan, device):
        self.plan, self.device = plan, device
        with device.errors():
            self.kernels = [
                _KERNELS[type(step.operation.spec if step.tiling is None else step.tiling)](
                    step.operation.spec, step.tiling, device
                )
                for step in plan.steps
            ]
            device.settle()  # the tables are read by whatever streams programs run on

    def __call__(self, weights) -> "Program":
        return Program(self, weights)


class Program:
    """A plan with packed weights on a device. Safe to call from several threads at once."""

    def __init__(self, geometry: Geometry, weights):
        self.plan, self._device, self._kernels = geometry.plan, geometry.device, geometry.kernels
        with self._device.errors():
            self._packed = [self._pack(*pair, weights) for pair in zip(self.plan.steps, self._kernels, strict=True)]

    def _pack(self, step, kernel, weights) -> tuple:
        """(weight in the kernel's form, bias, what is before a preactivated convolution), where there is a weight."""
        operation, device = step.operation, self._device
        if operation.weights is None:
            return ()
        spec = operation.spec
        packs = isinstance(spec, ConvSpec) and step.tiling.packs

        def pack(arrays: tuple) -> tuple:
            kept = device.kept if weights.shared else device.contiguous
            weight, bias, *before = arrays
            weight = kernel.pack(device.contiguous(weight), weights.shared) if packs else kept(weight)
            bias, before = (None if a is None else kept(a) for a in (bias, before[0] if before else None))
            if weights.shared:
                device.settle()
            return weight, bias, before

        form = ("gpu", step.tiling.packing, spec.groups) if packs else ("gpu", spec.dtype)
        return weights.derived(operation.weights, form, pack)

    def run(self, inputs, outputs=None, cancel=None) -> list:
        """Run on N images, or on as many runs as the first input holds.

        Parameters
        ----------
        inputs : list of (N, C, H, W) device arrays, in the order and of the dtype of the plan
        outputs : list of arrays to write, optional
            Of the exact shape; may not overlap an input, except the residual of the step that writes it.
        cancel : object with is_set(), optional
            Asked before every step is queued.

        Returns
        -------
        The outputs, in the order of the plan: queued, not waited for.

        Raises
        ------
        Cancelled
            `cancel` was set; given outputs may have been written in part.
        BackendUnavailable
            This process was forked from one that had used CUDA.
        OutOfMemory
            The device has too little for so many images.
        DeviceError
            The device failed, now or in what was queued before.
        """
        self._device.check()
        with self._device.errors():
            return self._run(inputs, outputs, cancel)

    def _run(self, inputs, outputs, cancel) -> list:
        plan, device = self.plan, self._device
        # What steps write is contiguous and on the device by construction.
        values = {value: device.contiguous(x) for value, x in zip(plan.inputs, inputs, strict=True)}
        given = {} if outputs is None else dict(zip(plan.outputs, map(device.asarray, outputs), strict=True))
        runs = values[plan.inputs[0]].size // prod(plan.values[plan.inputs[0]])
        arena = device.empty((plan.arena.size * runs,), plan.dtype) if plan.arena.size else None
        for step, kernel, weights in zip(plan.steps, self._kernels, self._packed, strict=True):
            if cancel is not None and cancel.is_set():
                raise Cancelled("the run was cancelled before it ended")
            operation = step.operation
            x, *rest = (values[v] for v in operation.inputs)
            y = values.get(operation.output)  # there already if it is written in parts
            if y is None:
                y = values[operation.output] = self._place(operation, runs, arena, given)
            kernel.run(runs * operation.times, x, weights, rest[0] if rest else None, y)
        for value, array in given.items():
            if values[value] is not array:
                array[...] = values[value].reshape(array.shape)
                values[value] = array
        return [values[value] for value in plan.outputs]

    def _place(self, operation, runs: int, arena, given: dict):
        """Where a step writes: an array that was given, its place in the arena, or a new one."""
        out = given.get(operation.output)
        if out is not None and out.flags.c_contiguous:
            return out
        shape = (runs * operation.times, *operation.spec.output)
        begin = self.plan.arena.offsets.get(operation.output)
        if begin is None:
            return self._device.empty(shape, self.plan.dtype)
        return arena[begin * runs : begin * runs + prod(shape)].reshape(shape)
