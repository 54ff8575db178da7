"""Convolution: the launches of the steps with weights, by implicit products of matrices and by strips of maps.

In: a ConvSpec with its tiling, a device.  Out: packed weights; numbers in y.
"""

import numpy as np

from ..errors import ShapeError
from ..planning import ConvSpec, cuda, shapes
from .launch import Launch, aligned, blocks_of_maps, constant, struct, table

_CTYPES = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat"}


def macros(dtype: str, activation=None) -> dict[str, object]:
    """What every kernel is compiled with."""
    return {"T": _CTYPES[dtype], "ACTIVATE": f"cc_{activation.name if activation else 'none'}"}


def alpha(spec) -> float:
    return spec.activation.alpha if spec.activation else 0.0


def _taps(spec: ConvSpec) -> np.ndarray:
    """Where product k = (c, r, s) has its input, relative to the corner of a window."""
    c, r, s = np.indices((spec.C // spec.groups, spec.R, spec.S), np.int64).reshape(3, -1)
    taps = np.zeros(spec.depth, struct("conv.cu", "Tap"))
    taps["row"], taps["column"] = r * spec.dilation[0], s * spec.dilation[1]
    taps["offset"] = (c * spec.H + r * spec.dilation[0]) * spec.W + s * spec.dilation[1]
    return taps


class Convolution:
    """A ConvSpec by a tile of cuda.Ffma."""

    def __init__(self, spec: ConvSpec, tiling: cuda.Ffma, device):
        if spec.depth > shapes.LARGEST - cuda.STEP:
            raise ShapeError(
                f"weight: expected at most {shapes.LARGEST} products per output on a GPU, got {spec.depth}"
            )
        self._spec, self._tiling, self._device = spec, tiling, device
        self._outputs, self._panels = spec.K // spec.groups, tiling.panels(spec)
        self._steps, self._units = -(-spec.depth // cuda.STEP), spec.groups * self._panels
        tile = {n.upper(): getattr(tiling, n) for n in ("outputs", "pixels", "rows", "columns")} | {
            "DEPTH": cuda.STEP, "PREACTIVATED": int(spec.preactivated),
        }  # fmt: skip
        self._launch = Launch(
            device, "conv.cu", "conv", tiling.threads, macros(spec.dtype, spec.activation) | tile,
            taps=table(device, _taps(spec)), map=spec.P * spec.Q, image=spec.C * spec.H * spec.W,
            group_inputs=spec.C // spec.groups * spec.H * spec.W, H=spec.H, W=spec.W, Q=spec.Q, K=spec.K,
            outputs=self._outputs, depth=spec.depth, steps=self._steps, chain=tiling.chain, panels=self._panels,
            units=self._units, stride_down=spec.stride[0], stride_across=spec.stride[1], top=spec.padding[0],
            left=spec.padding[1], alpha=alpha(spec),
        )  # fmt: skip
        rows = self._steps * cuda.STEP
        self._packed = self._units * rows * tiling.outputs
        self._pack = Launch(
            device, "pack.cu", "pack", constant("pack.cu", "THREADS"), macros(spec.dtype), count=self._packed,
            width=tiling.outputs, rows=rows, depth=spec.depth, outputs=self._outputs, panels=self._panels,
        )  # fmt: skip

    def pack(self, weight, kept: bool):
        """The packed form of a weight (K, C/G, R, S), in memory that may be kept or in the pool's."""
        packed = self._device.empty((self._packed,), cuda.computed(self._spec.dtype), kept)
        self._pack(-(-self._packed // constant("pack.cu", "THREADS")), weight=weight, packed=packed)
        return packed

    def run(self, images: int, x, weights: tuple, second, y) -> None:
        """y = activation(conv(x) + bias + second), x preactivated if the spec says so; `weights`: as packed, bias, and
        (2, C) scale and shift or None; all C-ordered and on the device."""
        spec, (weight, bias, before) = self._spec, weights
        pixels = images * spec.P * spec.Q
        vectors = spec.P * spec.Q % cuda.lanes(spec.dtype) == 0 and aligned(self._device, y, second)
        self._launch(
            -(-pixels // self._tiling.pixels) * self._units, x=x, weight=weight, bias=bias, before=before,
            residual=second, y=y, pixels=pixels, vector=vectors,
        )  # fmt: skip


class DepthwiseConvolution:
    """A ConvSpec with one input channel per group, by cuda.Strips."""

    def __init__(self, spec: ConvSpec, tiling: cuda.Strips, device):
        self._spec, self._device = spec, device
        lanes = cuda.lanes(spec.dtype)
        code, columns, rows = {"R": 0}, 1, 1
        if tiling.known:
            columns, rows = lanes, cuda.strip(spec.R, spec.stride[0])
            code = {"R": spec.R, "S": spec.S, "STRIDE": spec.stride[0], "STRIP": rows}
        across = -(-spec.Q // columns)
        self._span = across * -(-spec.P // rows)
        self._even = spec.padding[1] == spec.S // 2 and spec.W % lanes == spec.Q % lanes == 0
        self._threads = constant("depthwise.cu", "THREADS")
        self._launch = Launch(
            device, "depthwise.cu", "depthwise", self._threads, macros(spec.dtype, spec.activation) | code,
            H=spec.H, W=spec.W, P=spec.P, Q=spec.Q, K=spec.K, multiplier=spec.K // spec.C, across=across,
            kernel_rows=spec.R, kernel_columns=spec.S, stride_down=spec.stride[0], stride_across=spec.stride[1],
            dilation_down=spec.dilation[0], dilation_across=spec.dilation[1], top=spec.padding[0],
            left=spec.padding[1], chain=tiling.chain, alpha=alpha(spec),
        )  # fmt: skip

    def run(self, images: int, x, weights: tuple, second, y) -> None:
        """y = activation(conv(x) + bias + second); all C-ordered and on the device."""
        weight, bias, _ = weights
        blocks, places = blocks_of_maps(images * self._spec.K, self._span, self._threads)
        vectors = self._even and aligned(self._device, x, second, y)
        self._launch(blocks, x=x, weight=weight, bias=bias, residual=second, y=y, aligned=vectors, **places)
