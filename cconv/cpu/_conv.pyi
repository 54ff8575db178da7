"""Types of the compiled convolution; see _conv.pyx."""

import numpy as np

from ..planning import ConvSpec, Tiling
from ._core import Kernel
from ._pool import Buffer

class Convolution(Kernel):
    def __init__(self, spec: ConvSpec, tiling: Tiling, isa: str) -> None: ...
    def pack(self, weight: np.ndarray, threads: int = 1, before: np.ndarray | None = None) -> Buffer: ...
