"""Types of the compiled pools and elementwise steps; see _maps.pyx."""

import numpy as np

from ..planning import PointwiseSpec, PoolSpec
from ._core import Buffer

class Pooling:
    scratch_bytes: int
    def __init__(self, spec: PoolSpec, isa: str) -> None: ...
    def run(self, x: np.ndarray, y: np.ndarray, threads: int, scratch: Buffer) -> None: ...

class Pointwise:
    scratch_bytes: int
    def __init__(self, spec: PointwiseSpec, isa: str) -> None: ...
    def run(self, x: np.ndarray, other: np.ndarray | None, y: np.ndarray, threads: int, scratch: Buffer) -> None: ...
