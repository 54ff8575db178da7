"""Types of the compiled pools and elementwise steps; see _maps.pyx."""

import numpy as np

from ..planning import PointwiseSpec, PoolSpec
from ._pool import Buffer

class Pooling:
    def __init__(self, spec: PoolSpec, isa: str) -> None: ...
    def scratch_bytes(self, images: int, threads: int) -> int: ...
    def run(
        self, x: np.ndarray, weights: None, bias: None, second: None, y: np.ndarray, threads: int, scratch: Buffer
    ) -> None: ...

class Pointwise:
    def __init__(self, spec: PointwiseSpec, isa: str) -> None: ...
    def scratch_bytes(self, images: int, threads: int) -> int: ...
    def run(
        self,
        x: np.ndarray,
        weights: None,
        bias: None,
        second: np.ndarray | None,
        y: np.ndarray,
        threads: int,
        scratch: Buffer,
    ) -> None: ...
