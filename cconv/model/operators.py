"""Operators: what a rule of the operator table is given and what it gives.

In: values.  Out: the operations that compute a node, the shape of what they give, its cost and parameters.

A run of a graph takes `Graph.batch` images, one as a rule, and any number of images is so many runs. So no axis is
special: what a file writes about its tensors holds for a run, its batch axis included, and a run that is repeated never
mixes images.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from ..errors import ModelError, ShapeError
from ..planning import Cost, Spec
from .graph import Constant, Shape

#: The name of a value: a node's, or that of something in between.
Key = str | tuple[str, int]


class Value(NamedTuple):
    """A tensor of one run; `constant` if no image changes it."""

    shape: Shape
    constant: Constant | None = None

    def numbers(self) -> list:
        """A short constant as Python numbers."""
        if self.constant is None:
            raise ModelError("expected an operand that does not depend on the image, got one that does")
        if prod(self.shape) > 64:
            raise ShapeError(f"expected at most 64 numbers, got shape {self.shape}")
        return self.constant.read().ravel().tolist()

    def number(self) -> float:
        if prod(self.shape) != 1:
            raise ShapeError(f"expected one number, got shape {self.shape}")
        return self.numbers()[0]


class Affine(NamedTuple):
    """What is folded into a convolution: a batch norm, or arithmetic with a number per channel."""

    kind: str
    constants: tuple[Constant, ...]
    epsilon: float = 0.0
    swapped: bool = False

    @property
    def key(self) -> str:
        return repr((self.kind, [c.key for c in self.constants], self.epsilon, self.swapped))


class Recipe(NamedTuple):
    """What an operation's arrays are made of: constants in some form, and what is folded into them."""

    form: str
    constants: tuple[Constant | None, ...]
    shape: Shape
    options: tuple = ()
    affines: tuple[Affine, ...] = ()
    #: What a preactivated convolution's input is normed with.
    before: tuple[Affine, ...] = ()

    @property
    def key(self) -> str:
        names = [c and c.key for c in self.constants]
        folded = [[a.key for a in affines] for affines in (self.affines, self.before)]
        return repr((self.form, names, self.shape, self.options, folded))


class Part(NamedTuple):
    """An operation: a spec on `times` images a run, what it reads, what it writes or helps to write, its arrays."""

    spec: Spec
    reads: tuple[Key, ...]
    output: Key
    recipe: Recipe | None = None
    times: int = 1


class Result(NamedTuple):
    """A node on operands of known shapes; without parts its tensor is its first operand's, in another shape."""

    shape: Shape
    parts: tuple[Part, ...] = ()
    cost: Callable[[int], Cost] = lambda n: Cost()
    parameters: int = 0


#: node, its operands (None for one that is left out) -> result.
Rule = Callable[..., Result]


def size(value: Value | None) -> int:
    return 0 if value is None else prod(value.shape)


def weights(value: Value | None, what: str = "weights") -> Constant:
    """An operand's constant; a ModelError if it depends on the image, is left out, or is not float32."""
    if value is None or value.constant is None:
        raise ModelError(f"expected {what} that do not depend on the image")
    if value.constant.dtype != "float32":
        raise ModelError(f"expected {what} that are float32, got {value.constant.dtype}")
    return value.constant


def axis_of(value: object, rank: int) -> int:
    """An axis from 0 to rank - 1, from one that may count from the end."""
    if isinstance(value, bool) or not isinstance(value, int) or not -rank <= value < rank:
        raise ShapeError(f"axis: expected an integer from {-rank} to {rank - 1}, got {value!r:.40}")
    return value % rank
