"""Plan: steps in order, each with its tiling, and a place for every intermediate map. A frozen value without arrays.

In: operations on numbered values (what model/passes.py or ops.py wants run) and a Machine.  Out: a Plan, which a twin
builds into a Program.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from . import algorithm, buffers
from .algorithm import Tiling
from .buffers import Arena, Lifetime
from .machine import Machine
from .specs import ConvSpec
from .tensors import MoveSpec, Shape, Spec


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator on numbered values: `inputs` is the image, then the residual or second operand if there is one.

    Several operations may write the same value, each its part of it; they follow each other.
    """

    spec: Spec
    inputs: tuple[int, ...]
    output: int
    #: Key of the (weight, bias) in Weights.
    weights: str | None = None
    #: Images of the spec in one run of the plan.
    times: int = 1

    @property
    def shape(self) -> Shape:
        """Of the value that it writes, for one run."""
        return self.spec.output if self.times == 1 else (self.times, *self.spec.output)


@dataclass(frozen=True, slots=True)
class Step:
    """An operation and how it runs; `tiling` is None where there is nothing to decide."""

    operation: Operation
    tiling: Tiling | None


@dataclass(frozen=True)
class Plan:
    """What a Program executes. Values are numbered; a value that is neither input nor output lives in the arena.

    A sum takes the place of a residual that nobody reads again. In a run `alone`, of one image as a rule, what a Concat
    joins is one piece of memory, so its parts are written where they belong, and the steps in `moot`, which would move
    them there, have nothing to do. Images of more runs lie side by side, each with all its parts.
    """

    machine: Machine
    dtype: str
    values: dict[int, Shape]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    arena: Arena
    alone: Arena
    moot: frozenset[int]

    @property
    def executed_flops(self) -> int:
        """Multiplications and additions issued by the convolution kernels for one image."""
        return sum(step.operation.times * step.tiling.executed_flops for step in self.steps if step.tiling)


def make(
    operations: tuple[Operation, ...],
    inputs: dict[int, Shape],
    outputs: tuple[int, ...],
    machine: Machine,
    tiling: Tiling | None = None,
    images: int = 1,
    packs: bool = False,
) -> Plan:
    """The plan of operations given in an order in which every value is written before it is read.

    It runs on any number of images; `images` is how many it should be fast on, `packs` whether its weights are packed
    for one run alone. `tiling` is for the only operation of a plan; without it the estimated best is taken."""
    values, first, last, steps = dict(inputs), {}, {}, []
    for index, operation in enumerate(operations):
        for value in operation.inputs:
            last[value] = index
        values[operation.output] = operation.shape
        first.setdefault(operation.output, index)
        last[operation.output] = index
        together = algorithm.batch_class(images * operation.times, machine.device)
        steps.append(Step(operation, tiling or _tiling(operation.spec, machine, together, packs)))
    kept = set(outputs) | set(inputs)
    lifetimes = {
        value: Lifetime(prod(values[value]), first[value], last[value]) for value in first if value not in kept
    }
    if machine.device == "cuda":  # it moves parts where the whole lies: its runs are of many images
        arena = alone = buffers.place(lifetimes)
        moot = frozenset()
    else:
        sums = _sums(operations, lifetimes)
        arena = _placed(lifetimes, sums)
        alone, moot = _alone(operations, lifetimes, sums, arena)
    return Plan(machine, operations[0].spec.dtype, values, tuple(inputs), outputs, tuple(steps), arena, alone, moot)


#: A value -> the one in whose memory it lies, and where.
Parts = dict[int, tuple[int, int]]


def _sums(operations: tuple[Operation, ...], lifetimes: dict[int, Lifetime]) -> Parts:
    """Residuals that nobody reads once they are added, and the sums, which take their place: what has just been read is
    near, and memory that is written anew would be read first."""
    found = {}
    for index, operation in enumerate(operations):
        if isinstance(operation.spec, ConvSpec) and operation.spec.residual:
            (x, residual), total = operation.inputs, operation.output
            if residual != x and {residual, total} <= lifetimes.keys() and lifetimes[residual].last == index:
                found[residual] = total, 0
    return found


def _alone(
    operations: tuple[Operation, ...], lifetimes: dict[int, Lifetime], sums: Parts, arena: Arena
) -> tuple[Arena, frozenset[int]]:
    """The arena of one run alone, and the moves that it makes moot: `arena`, that of more, if there are none. A whole
    lives as long as all its parts."""
    repeated = {operation.output for operation in operations if operation.times > 1}
    movable = lifetimes.keys() - repeated
    whole: Parts = {}
    moot = set()
    for index, operation in enumerate(operations):
        spec, (part, *_), joined = operation.spec, operation.inputs, operation.output
        if isinstance(spec, MoveSpec) and spec.whole and {part, joined} <= movable and part not in whole:
            whole[part] = joined, spec.at
            moot.add(index)
    if not moot:
        return arena, frozenset()
    # Parts and wholes are read in each other's memory, and keep theirs.
    taken = whole.keys() | {joined for joined, _ in whole.values()}
    whole.update((value, place) for value, place in sums.items() if value not in taken and place[0] not in taken)
    return _placed(lifetimes, whole), frozenset(moot)


def _placed(lifetimes: dict[int, Lifetime], whole: Parts) -> Arena:
    """An arena in which values lie where they are parts of others."""

    def place(value: int) -> tuple[int, int]:
        """The value that is part of no other and holds this one, and where."""
        at = 0
        while value in whole:
            value, begin = whole[value]
            at += begin
        return value, at

    lives: dict[int, Lifetime] = {}
    for value, life in lifetimes.items():
        root, _ = place(value)
        own = lives.get(root, lifetimes[root])
        lives[root] = Lifetime(own.size, min(own.first, life.first), max(own.last, life.last))
    arena = buffers.place(lives)
    return Arena({value: arena.offsets[root] + at for value in lifetimes for root, at in [place(value)]}, arena.size)


@lru_cache(maxsize=1024)
def _tiling(spec: Spec, machine: Machine, images: int, packs: bool) -> Tiling | None:
    return algorithm.choose(spec, machine, images, packs) if isinstance(spec, ConvSpec) else None


@lru_cache(maxsize=1024)
def single(spec: Spec, machine: Machine, tiling: Tiling | None = None, images: int = 1, packs: bool = False) -> Plan:
    """The plan of one operator: value 0 is the image, 1 the residual or second summand, the last one the output."""
    inputs = {0: spec.image}
    if second := getattr(spec, "second", None):
        inputs[1] = second
    output = len(inputs)
    weights = "weight" if isinstance(spec, ConvSpec) or getattr(spec, "constant", False) else None
    return make((Operation(spec, tuple(inputs), output, weights),), inputs, (output,), machine, tiling, images, packs)
