"""Workloads: layers of real networks, as data.

In: nothing; standard library and NumPy only, for a peer's environment reads this file too.  Out: LAYERS, and each one's
arrays, the same in every process.
"""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layer:
    """One convolution with a bias, float32."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x after a ReLU, He-scaled weights, a bias: drawn from the layer's name."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        x = np.maximum(rng.standard_normal(self.x, np.float32), 0)
        weight = rng.standard_normal(self.weight, np.float32) * np.float32(np.sqrt(2 / np.prod(self.weight[1:])))
        return x, weight, rng.standard_normal(self.weight[0], np.float32)


LAYERS = (
    Layer("lecture 100->100 5x5 64x64", (1, 100, 64, 64), (100, 100, 5, 5), padding=2),
    Layer("lecture 100->100 5x5 64x64, batch 8", (8, 100, 64, 64), (100, 100, 5, 5), padding=2),
    Layer("vgg 3->64 3x3 224", (1, 3, 224, 224), (64, 3, 3, 3), padding=1),
    Layer("vgg 64->64 3x3 224", (1, 64, 224, 224), (64, 64, 3, 3), padding=1),
    Layer("vgg 256->256 3x3 56", (1, 256, 56, 56), (256, 256, 3, 3), padding=1),
    Layer("vgg 512->512 3x3 14", (1, 512, 14, 14), (512, 512, 3, 3), padding=1),
    Layer("resnet stem 3->64 7x7 s2 224", (1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    Layer("resnet 64->256 1x1 56", (1, 64, 56, 56), (256, 64, 1, 1)),
    Layer("resnet 64->256 1x1 56, batch 8", (8, 64, 56, 56), (256, 64, 1, 1)),
    Layer("resnet 128->128 3x3 s2 56", (1, 128, 56, 56), (128, 128, 3, 3), stride=2, padding=1),
    Layer("resnet 256->256 3x3 14", (1, 256, 14, 14), (256, 256, 3, 3), padding=1),
    Layer("resnet 256->256 3x3 14, batch 8", (8, 256, 14, 14), (256, 256, 3, 3), padding=1),
    Layer("resnet 2048->512 1x1 7", (1, 2048, 7, 7), (512, 2048, 1, 1)),
    Layer("resnet 512->1024 1x1 s2 28", (1, 512, 28, 28), (1024, 512, 1, 1), stride=2),
    Layer("mobilenet depthwise 96 3x3 s2 112", (1, 96, 112, 112), (96, 1, 3, 3), stride=2, padding=1, groups=96),
    Layer("mobilenet depthwise 384 3x3 14", (1, 384, 14, 14), (384, 1, 3, 3), padding=1, groups=384),
    Layer("mobilenet 96->24 1x1 56", (1, 96, 56, 56), (24, 96, 1, 1)),
    Layer("resnext 128->128 3x3 g32 56", (1, 128, 56, 56), (128, 4, 3, 3), padding=1, groups=32),
)
