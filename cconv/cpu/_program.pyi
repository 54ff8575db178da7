"""Types of the compiled programs; see _program.pyx."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..planning import Plan
from ..weights import Once, Weights
from ._core import Kernel

class Step:
    def __init__(
        self,
        kernel: Kernel,
        reads: Callable[[np.ndarray], bool],
        pack: Callable[[Weights | Once], tuple] | None,
        inputs: tuple[int, ...],
        value: int,
        image: tuple[int, int, int],
        output: tuple[int, int, int],
        times: int,
        begins: tuple[int, int],
        moot: bool,
    ) -> None: ...

class Geometry:
    plan: Plan
    def __init__(self, plan: Plan, steps: list[Step], work: float) -> None: ...
    def __call__(self, weights: Weights | Once) -> Program: ...

class Program:
    geometry: Geometry
    plan: Plan
    def __init__(self, geometry: Geometry, weights: Weights | Once) -> None: ...
    def run(
        self, inputs: list[np.ndarray], outputs: list[np.ndarray] | None = None, cancel: Any = None
    ) -> list[np.ndarray]: ...
