"""Types of the compiled pools and elementwise steps; see _maps.pyx."""

from ..planning import PointwiseSpec, PoolSpec
from ._core import Kernel

class Pooling(Kernel):
    def __init__(self, spec: PoolSpec, isa: str) -> None: ...

class Pointwise(Kernel):
    def __init__(self, spec: PointwiseSpec, isa: str) -> None: ...
