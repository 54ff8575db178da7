"""Maps: the launches of the steps without weights: pools, elementwise, and the operators of planning/tensors.py.

In: a spec, a device.  Out: numbers in y. Every class has run(images, x, weights, second, y), of which it uses
what it needs; all arrays are C-ordered and on the device.
"""

from math import prod

import numpy as np

from ..errors import ShapeError
from ..planning import cuda, shapes, tensors
from .convolution import alpha, macros
from .launch import Launch, aligned, blocks_of_maps, constant, table

#: Positions of a pooling window from which on a block, not a thread, computes its output.
WIDE_WINDOW = 128


def _ints(device, values):
    if (most := max(values)) > shapes.LARGEST:
        raise ShapeError(f"x: expected positions of at most {shapes.LARGEST} on a GPU, got {most}")
    return table(device, np.array(values, np.int32))


def _check_counters(step: int, **sizes: int) -> None:
    """Kernels count to these in steps, with 32 bits."""
    for name, size in sizes.items():
        if size > shapes.LARGEST - step:
            raise ShapeError(f"x: expected {name} of at most {shapes.LARGEST - step} on a GPU, got {size}")


class Pooling:
    """A PoolSpec."""

    def __init__(self, spec, _, device):
        rows, columns = spec.rows, spec.columns
        self._spec = spec
        self._wide = _most(rows) * _most(columns) >= WIDE_WINDOW
        self._threads = constant("pool.cu", "WIDE_THREADS" if self._wide else "THREADS")
        tables = {
            f"{axis}_{part}": _ints(device, getattr(window, part))
            for axis, window in (("row", rows), ("column", columns))
            for part in ("start", "stop", "extent")
        }
        self._launch = Launch(
            device, "pool.cu", "pool_wide" if self._wide else "pool", self._threads,
            macros(spec.dtype) | {"AVERAGE": int(spec.kind == "average")}, **tables, H=spec.H, W=spec.W,
            P=len(rows.start), Q=len(columns.start), row_step=rows.step, column_step=columns.step,
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        maps, span = images * self._spec.C, prod(self._spec.output[1:])
        blocks, places = blocks_of_maps(maps, span, self._threads)
        self._launch(maps * span if self._wide else blocks, x=x, y=y, **places)


def _most(window) -> int:
    """Positions of the longest window."""
    return max(-(-(b - a) // window.step) for a, b in zip(window.start, window.stop, strict=True))


class Pointwise:
    """A PointwiseSpec or a FunctionSpec."""

    def __init__(self, spec, _, device):
        self._device, self._spec = device, spec
        self._threads = constant("pointwise.cu", "THREADS")
        if isinstance(spec, tensors.FunctionSpec):
            code, fixed = macros(spec.dtype) | {"FUNCTION": f"cc_{spec.kind}"}, {"parameters": spec.parameters}
        else:
            code, fixed = macros(spec.dtype, spec.activation), {"alpha": alpha(spec)}
        self._launch = Launch(device, "pointwise.cu", "pointwise", self._threads, code, **fixed)

    def run(self, images: int, x, weights, second, y) -> None:
        count, lanes = images * prod(self._spec.output), cuda.lanes(self._spec.dtype)
        self._launch(
            -(-count // (self._threads * lanes)), x=x, other=second, y=y, count=count,
            vector=aligned(self._device, x, second, y),
        )  # fmt: skip


class Moving:
    """A MoveSpec."""

    def __init__(self, spec, _, device):
        self._spec, self._fill = spec, None
        self._threads = constant("tensors.cu", "THREADS")
        begins, entries = [], []
        for axis in spec.axes:
            begins.append(-1 if axis.table is None else len(entries))
            entries += axis.table or ()
        self._count = prod(axis.count for axis in spec.axes)
        self._launch = Launch(
            device, "tensors.cu", "move", self._threads, macros(spec.dtype), count=self._count,
            source_size=spec.source, target_size=spec.target, begin=spec.begin, at=spec.at, loops=len(spec.axes),
            size=tuple(a.count for a in spec.axes), source=tuple(a.source for a in spec.axes),
            target=tuple(a.target for a in spec.axes), table=tuple(begins), tables=_ints(device, entries or [0]),
        )  # fmt: skip
        if spec.fill is not None:
            self._fill = Launch(
                device, "pointwise.cu", "fill", constant("pointwise.cu", "THREADS"), macros(spec.dtype), alpha=spec.fill
            )

    def run(self, images: int, x, weights, second, y) -> None:
        """The places of y that the spec says; what others have written there stays."""
        if self._fill is not None:
            count = images * self._spec.target
            self._fill(-(-count // self._threads), y=y, count=count)
        self._launch(-(-images * self._count // self._threads), x=x, y=y, images=images)


class Piece:
    """A MoveSpec by which x becomes a piece of y as it is, or all of it."""

    def __init__(self, spec, _, device):
        self._spec, self._device = spec, device
        self._threads = constant("tensors.cu", "THREADS")
        lanes = cuda.lanes(spec.dtype)
        self._blocks = -(-spec.source // (self._threads * lanes))
        self._even = spec.source % lanes == spec.target % lanes == spec.at % lanes == 0
        self._launch = Launch(
            device, "tensors.cu", "piece", self._threads, macros(spec.dtype), count=spec.source,
            target_size=spec.target, at=spec.at, blocks_per_image=self._blocks,
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        """Its places of y; what others have written beside them stays."""
        vector = self._even and aligned(self._device, x, y)
        self._launch(images * self._blocks, x=x, y=y, vector=vector)


def moving(spec, tiling, device):
    """The launches of a MoveSpec."""
    return (Piece if spec.whole else Moving)(spec, tiling, device)


class Arithmetic:
    """An ArithmeticSpec."""

    def __init__(self, spec, _, device):
        self._count = prod(spec.output)
        self._threads = constant("arithmetic.cu", "THREADS")
        code = macros(spec.dtype, spec.activation) | {"KIND": f"cc_{spec.kind}", "SWAPPED": int(spec.swapped)}
        self._launch = Launch(
            device, "arithmetic.cu", "arithmetic", self._threads, code, count=self._count, x_size=spec.x_size,
            other_size=0 if spec.constant else spec.other_size, loops=len(spec.loops),
            size=tuple(loop.count for loop in spec.loops), source=tuple(loop.x for loop in spec.loops),
            target=tuple(loop.other for loop in spec.loops), alpha=alpha(spec),
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        other = weights[0] if second is None else second
        self._launch(-(-images * self._count // self._threads), x=x, other=other, y=y, images=images)


class Softmax:
    """A SoftmaxSpec."""

    def __init__(self, spec, _, device):
        self._inner = spec.inner
        self._threads = constant("tensors.cu", "THREADS")
        _check_counters(self._threads, channels=spec.C)
        self._launch = Launch(
            device, "tensors.cu", "softmax_row" if spec.inner == 1 else "softmax", self._threads, macros(spec.dtype),
            inner=spec.inner, channels=spec.C,
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        rows = images * self._inner
        self._launch(rows if self._inner == 1 else -(-rows // self._threads), x=x, y=y, rows=rows)


class Lrn:
    """An LrnSpec."""

    def __init__(self, spec, _, device):
        self._size = prod(spec.output)
        self._threads = constant("tensors.cu", "THREADS")
        self._launch = Launch(
            device, "tensors.cu", "lrn", self._threads, macros(spec.dtype), inner=spec.inner, channels=spec.C,
            size=spec.size, alpha=spec.alpha, beta=spec.beta, bias=spec.bias,
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        count = images * self._size
        self._launch(-(-count // self._threads), x=x, y=y, count=count)


class Resizing:
    """A ResizeSpec."""

    def __init__(self, spec, _, device):
        self._spec = spec
        self._threads = constant("tensors.cu", "THREADS")
        tables = {}
        for axis, blend in (("row", spec.rows), ("column", spec.columns)):
            tables[f"{axis}_low"], tables[f"{axis}_high"] = _ints(device, blend.low), _ints(device, blend.high)
            tables[f"{axis}_weight"] = table(device, np.array(blend.weight, np.float64))
        _, p, q = spec.output
        self._launch = Launch(
            device, "tensors.cu", "resize", self._threads, macros(spec.dtype), **tables, H=spec.H, W=spec.W, P=p, Q=q
        )

    def run(self, images: int, x, weights, second, y) -> None:
        c, p, q = self._spec.output
        blocks, places = blocks_of_maps(images * c, p * q, self._threads)
        self._launch(blocks, x=x, y=y, **places)


class MatMul:
    """A MatMulSpec."""

    def __init__(self, spec, _, device):
        tile, depth = constant("matmul.cu", "TILE"), constant("matmul.cu", "DEPTH")
        _check_counters(tile, M=spec.M, K=spec.K, N=spec.N)
        down, across = -(-spec.M // tile), -(-spec.N // tile)
        self._blocks = spec.matrices * down * across
        self._launch = Launch(
            device, "matmul.cu", "matmul", constant("matmul.cu", "THREADS"), macros(spec.dtype),
            matrices=spec.matrices, x_size=spec.x_size, other_size=0 if spec.constant else spec.other_size, M=spec.M,
            K=spec.K, N=spec.N, chain=cuda.chain(spec.K) // depth, tiles_down=down, tiles_across=across,
            loops=len(spec.batch), size=tuple(loop.count for loop in spec.batch),
            source=tuple(loop.x for loop in spec.batch), target=tuple(loop.other for loop in spec.batch),
        )  # fmt: skip

    def run(self, images: int, x, weights, second, y) -> None:
        self._launch(images * self._blocks, x=x, other=weights[0] if second is None else second, y=y)
