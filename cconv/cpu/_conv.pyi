"""Types of the compiled convolution; see _conv.pyx."""

import numpy as np

from ..planning import ConvSpec, Tiling
from ._core import Buffer

class Convolution:
    scratch_bytes: int
    def __init__(self, spec: ConvSpec, tiling: Tiling, isa: str) -> None: ...
    def pack(self, weight: np.ndarray, threads: int = 1, before: np.ndarray | None = None) -> Buffer: ...
    def run(
        self,
        x: np.ndarray,
        weights: Buffer,
        bias: np.ndarray | None,
        residual: np.ndarray | None,
        y: np.ndarray,
        threads: int,
        scratch: Buffer,
    ) -> None: ...
