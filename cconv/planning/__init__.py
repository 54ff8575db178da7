"""Planning: from what is asked to how it is done. Pure functions of shapes, standard library only, no arrays.

specs.py  ->  algorithm.py  ->  plan.py  ->  a twin's build()
  |             (the choice)      (buffers.py: the arena)
  |           direct.py, winograd.py: tilings and transforms, for a machine.py
cost.py  (the only FLOP rules)        shapes.py  (the one output-size formula)
"""

from . import algorithm, buffers, cost, direct, plan, shapes, specs, winograd
from .algorithm import ALGORITHMS, Depthwise, Direct, Tiling, Winograd, batch_class
from .cost import Cost, estimate
from .machine import Machine
from .plan import Operation, Plan, Step
from .specs import ACTIVATIONS, Activation, ConvSpec, PointwiseSpec, PoolSpec, Spec

__all__ = [
    "ACTIVATIONS", "ALGORITHMS", "Activation", "ConvSpec", "Cost", "Depthwise", "Direct", "Machine", "Operation",
    "Plan", "PointwiseSpec", "PoolSpec", "Spec", "Step", "Tiling", "Winograd", "algorithm", "batch_class", "buffers",
    "cost", "direct", "estimate", "plan", "shapes", "specs", "winograd",
]  # fmt: skip
