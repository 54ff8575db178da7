"""Workloads: layers of real networks as data, and how fast each must be.

In: nothing; standard library and NumPy only, for every peer's environment reads this file too.  Out: CLASSES (the bar),
LAYERS, and each layer's arrays, the same in every process.
"""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bar:
    """The least ratios of nominal GFLOP/s, cconv's over the best peer's, that a class of layers has to reach."""

    #: `Conv2d` at precision "highest".
    highest: float
    #: `Conv2d` at precision "high"; None: it is only reported.
    high: float | None = None
    #: At "highest" over looped ncnn, where `highest` is over the peers that take a batch; None: ncnn is one of them.
    looped: float | None = None


#: Class of layers -> its bar.
CLASSES = {
    "5x5": Bar(2.6, high=5.0),
    "5x5, batch": Bar(2.4, high=4.5),
    "3x3, large map": Bar(2.0),  # stride 1, at least 64 channels, maps of 56x56 and more
    "3x3, 28x28": Bar(1.6),
    "3x3, small map": Bar(1.3),  # 14x14 and 7x7
    "3x3, small map, batch": Bar(2.5, looped=1.2),
    "direct": Bar(1.0),  # 1x1, strided, the 7x7 stem, and other big layers that are computed directly
    "3 channels": Bar(1.5),
    "depthwise": Bar(2.5),
    "grouped": Bar(3.0),
    "tiny": Bar(1.0),
}
#: Over all layers: the geometric mean of the ratios, and the worst one.
MEAN, WORST = 1.6, 1.0
#: The plain function `conv2d`: at most so many times the time of `Conv2d` on maps of 28x28 and more; and over torch's
#: functional form, whose weights are not packed either, at least this ratio on every layer.
FUNCTION_TIME, FUNCTION_RATIO = 1.3, 1.0
FUNCTION_MAP = 28
#: The planner's choice over the best candidate, minus one, on average over the layers.
REGRET = 0.05
#: Executed FLOP/s over the peak, of cconv forced to AVX2 and to direct computation, on the layers that are `big`.
AVX2_SHARE = 0.85


@dataclass(frozen=True)
class Layer:
    """One convolution with a bias."""

    name: str
    bar: str  # a key of CLASSES
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def output(self) -> tuple[int, int, int, int]:
        """N, K, P, Q."""
        n, _, *image = self.x
        outputs, _, *kernel = self.weight
        reach = ((k - 1) * self.dilation + 1 for k in kernel)
        return (
            n,
            outputs,
            *((size + 2 * self.padding - r) // self.stride + 1 for size, r in zip(image, reach, strict=True)),
        )

    @property
    def big(self) -> bool:
        """Enough work in every direction that the kernel alone counts: where a direct kernel's speed is judged."""
        n, outputs, rows, columns = self.output
        work = n * outputs * rows * columns * self.weight[1] * self.weight[2] * self.weight[3]
        windows = self.weight[2] * self.weight[3] > 1 and self.groups == 1
        return windows and self.dtype == "float32" and min(self.x[1], outputs) >= 64 and work >= 100_000_000

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x after a ReLU, He-scaled weights, a bias: drawn from the layer's name."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        x = np.maximum(rng.standard_normal(self.x, np.float32), 0)
        weight = rng.standard_normal(self.weight, np.float32) * np.float32(np.sqrt(2 / np.prod(self.weight[1:])))
        bias = rng.standard_normal(self.weight[0], np.float32)
        return x.astype(self.dtype), weight.astype(self.dtype), bias.astype(self.dtype)


def _square(
    name: str, bar: str, channels: tuple[int, int], kernel: int, image: int | tuple[int, int], *, batch: int = 1,
    stride: int = 1, dilation: int = 1, groups: int = 1, dtype: str = "float32",
) -> Layer:  # fmt: skip
    """A layer whose padding keeps the map's size at stride 1."""
    height, width = image if isinstance(image, tuple) else (image, image)
    inputs, outputs = channels
    depthwise = groups == inputs == outputs
    parts = [name, f"depthwise {inputs}" if depthwise else f"{inputs}->{outputs}", f"{kernel}x{kernel}"]
    parts += [f"s{stride}"] * (stride > 1) + [f"d{dilation}"] * (dilation > 1)
    parts += [f"g{groups}"] * (groups > 1 and not depthwise)
    parts += [f"{height}x{width}"] + [dtype] * (dtype != "float32")
    return Layer(
        " ".join(filter(None, parts)) + (f", batch {batch}" if batch > 1 else ""), bar,
        (batch, inputs, height, width), (outputs, inputs // groups, kernel, kernel),
        stride, dilation * (kernel // 2), dilation, groups, dtype,
    )  # fmt: skip


LAYERS = (
    _square("lecture", "5x5", (100, 100), 5, 64),
    _square("lecture", "5x5, batch", (100, 100), 5, 64, batch=8),
    _square("vgg", "3 channels", (3, 64), 3, 224),
    _square("mobilenet", "3 channels", (3, 32), 3, 224, stride=2),
    _square("vgg", "3x3, large map", (64, 64), 3, 224),
    _square("resnet", "3x3, large map", (64, 64), 3, 56),
    _square("vgg", "3x3, large map", (256, 256), 3, 56),
    _square("odd", "3x3, large map", (97, 113), 3, (57, 61)),
    _square("odd", "direct", (48, 80), 3, (61, 57)),
    _square("resnet", "3x3, 28x28", (128, 128), 3, 28),
    _square("resnet", "3x3, 28x28", (128, 128), 3, 28, batch=8),
    _square("vgg", "3x3, 28x28", (512, 512), 3, 28),
    _square("resnet", "3x3, small map", (256, 256), 3, 14),
    _square("resnet", "3x3, small map, batch", (256, 256), 3, 14, batch=8),
    _square("resnet", "3x3, small map, batch", (256, 256), 3, 14, batch=32),
    _square("vgg", "3x3, small map", (512, 512), 3, 14),
    _square("vgg", "3x3, small map, batch", (512, 512), 3, 14, batch=8),
    _square("resnet", "3x3, small map", (512, 512), 3, 7),
    _square("resnet", "3x3, small map, batch", (512, 512), 3, 7, batch=8),
    _square("resnet", "3x3, small map, batch", (512, 512), 3, 7, batch=32),
    _square("dilated", "direct", (256, 256), 3, 28, dilation=2),
    _square("double", "direct", (64, 64), 3, 56, dtype="float64"),
    _square("resnet", "direct", (128, 128), 3, 56, stride=2),
    _square("resnet", "direct", (256, 512), 3, 28, stride=2),
    _square("strided", "direct", (64, 128), 5, 56, stride=2),
    _square("resnet stem", "direct", (3, 64), 7, 224, stride=2),
    _square("resnet", "direct", (64, 256), 1, 56),
    _square("resnet", "direct", (64, 256), 1, 56, batch=8),
    _square("resnet", "direct", (256, 64), 1, 56),
    _square("resnet", "direct", (512, 1024), 1, 28, stride=2),
    _square("resnet", "direct", (2048, 512), 1, 7),
    _square("mobilenet", "direct", (96, 24), 1, 56),
    _square("mobilenet", "depthwise", (96, 96), 3, 112, stride=2, groups=96),
    _square("mobilenet", "depthwise", (144, 144), 3, 56, groups=144),
    _square("mobilenet", "depthwise", (384, 384), 3, 14, groups=384),
    _square("mobilenet", "depthwise", (240, 240), 5, 28, groups=240),
    _square("resnext", "grouped", (128, 128), 3, 56, groups=32),
    _square("resnext", "grouped", (256, 256), 3, 28, groups=32),
    _square("tiny", "tiny", (8, 8), 3, 16),
    _square("tiny", "tiny", (16, 16), 1, 14),
)
