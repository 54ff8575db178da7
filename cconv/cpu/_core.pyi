"""Types of the compiled core; see _core.pyx."""

import numpy as np

from ..planning import ConvSpec, PointwiseSpec, PoolSpec, Tiling

def instruction_sets() -> list[tuple[str, bool, int, int, int]]: ...

class Buffer:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...

class Convolution:
    scratch_bytes: int
    def __init__(self, spec: ConvSpec, tiling: Tiling, isa: str) -> None: ...
    def pack(self, weight: np.ndarray) -> Buffer: ...
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

class Pooling:
    scratch_bytes: int
    def __init__(self, spec: PoolSpec, isa: str) -> None: ...
    def run(self, x: np.ndarray, y: np.ndarray, threads: int, scratch: Buffer) -> None: ...

class Pointwise:
    scratch_bytes: int
    def __init__(self, spec: PointwiseSpec, isa: str) -> None: ...
    def run(self, x: np.ndarray, other: np.ndarray | None, y: np.ndarray, threads: int, scratch: Buffer) -> None: ...
