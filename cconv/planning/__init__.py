"""Planning: from what is asked to how it is done. Pure functions of shapes, standard library only, no arrays.

specs.py  ->  algorithm.py  ->  plan.py  ->  a twin's build()
  |               (tiles)         (buffers.py: the arena)
cost.py  (the only FLOP rules)        shapes.py  (the one output-size formula)
"""

from . import algorithm, buffers, cost, plan, shapes, specs
from .algorithm import ALGORITHMS, Machine, Tiling
from .cost import Cost, estimate
from .plan import Operation, Plan, Step
from .specs import ACTIVATIONS, Activation, ConvSpec, PointwiseSpec, PoolSpec, Spec

__all__ = [
    "ACTIVATIONS", "ALGORITHMS", "Activation", "ConvSpec", "Cost", "Machine", "Operation", "Plan", "PointwiseSpec",
    "PoolSpec", "Spec", "Step", "Tiling", "algorithm", "buffers", "cost", "estimate", "plan", "shapes", "specs",
]  # fmt: skip
