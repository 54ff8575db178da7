"""Types of the compiled depthwise convolution; see _depthwise.pyx."""

import numpy as np

from ..planning import ConvSpec, Tiling
from ._core import Kernel
from ._pool import Buffer

class DepthwiseConvolution(Kernel):
    def __init__(self, spec: ConvSpec, tiling: Tiling, isa: str) -> None: ...
    def pack(self, weight: np.ndarray, threads: int = 1) -> Buffer: ...
