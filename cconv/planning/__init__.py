"""Planning: from what is asked to how it is done. Pure functions of shapes, standard library only, no arrays.

specs.py  ->  algorithm.py  ->  plan.py  ->  a twin's build()
tensors.py      (the choice)      (buffers.py: the arena)
  |           direct.py, depthwise.py, winograd.py: tilings and transforms, for a machine.py; cuda.py: those of a GPU
cost.py  (the only FLOP rules)        shapes.py  (the one output-size formula)
"""

from . import algorithm, buffers, cost, cuda, direct, plan, shapes, specs, tensors, winograd
from .algorithm import ALGORITHMS, Depthwise, Direct, Tiling, Winograd, batch_class
from .cost import Cost, estimate
from .machine import Machine
from .plan import Operation, Plan, Step
from .specs import ACTIVATIONS, Activation, ConvSpec, PointwiseSpec, PoolSpec
from .tensors import ArithmeticSpec, FunctionSpec, LrnSpec, MatMulSpec, MoveSpec, ResizeSpec, SoftmaxSpec, Spec

__all__ = [
    "ACTIVATIONS", "ALGORITHMS", "Activation", "ArithmeticSpec", "ConvSpec", "Cost", "Depthwise", "Direct",
    "FunctionSpec", "LrnSpec", "Machine", "MatMulSpec", "MoveSpec", "Operation", "Plan", "PointwiseSpec", "PoolSpec",
    "ResizeSpec", "SoftmaxSpec", "Spec", "Step", "Tiling", "Winograd", "algorithm", "batch_class", "buffers", "cost",
    "cuda", "direct", "estimate", "plan", "shapes", "specs", "tensors", "winograd",
]  # fmt: skip
