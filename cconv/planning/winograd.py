"""Winograd: the transforms of F(m, r), the points they stand on, and the rounding errors they cost. Exact numbers.

In: m outputs and r taps of one dimension.  Out: a Transform, whose numbers the kernels take, and its expected errors.

F(m, r) computes y[i] = sum over k < r of g[k] * d[i + k], i < m, by alpha = m + r - 1 products instead of m * r: filter
and data become values of polynomials at alpha points, one of them infinity. The others lie symmetrically, at +-p for
every p of `pairs`, and at zero where alpha is even, because the rows of a pair then share all but one operation:

    Q_p(t) = product over the other pairs q of (t - q*q)     [k]: the coefficient of t^k
    Z(t)   = product over all pairs q of (t - q*q)
    A_p    = sum over k of Q_p[k] * d[2k + 1 + z]            z = 1 if zero is a point, else 0
    B_p    = sum over k of Q_p[k] * d[2k + z]

    row of zero      sum over k of Z[k] * d[2k]              only with zero; the rows lie in this order,
    rows of +-p      A_p + p * B_p, A_p - p * B_p            pair after pair
    row of infinity  sum over k of Z[k] * d[2k + z]

    y[i] = [i = 0] * M(zero) + sum over p of p^i * (M(+p) + (-1)^i * M(-p)) + [i = m - 1] * M(infinity)

In two dimensions both are done one after the other, and the two transforms may differ.

At stride 2, even inputs meet even taps only, and odd ones odd taps: y is the sum of two such correlations, F(m, r')
with r' = ceil(r / 2) and F(m, r - r'), which take 2 m + r - 2 products together. F(m, 1) has no points: its products
are its inputs times its tap.

Any points are right in exact arithmetic. These amplify rounding errors least (within 1 % of what no choice of points
can better, symmetric or not) among fractions of so few bits that every coefficient and power is a float32: only data
are rounded, never constants. Here they are doubles, which hold all these numbers exactly but those of the filter,
quotients rounded once, and take a twentieth of the time of fractions. (The tests give fractions, and compare.)
"""

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod, sqrt
from numbers import Real

from ..errors import ArgumentError

#: (m, r) -> the pairs.
SUPPORTED = {
    (2, 2): (1.0,),
    (4, 2): (3 / 8, 5 / 4),
    (2, 3): (1.0,),
    (3, 3): (3 / 8, 5 / 4),
    (4, 3): (21 / 32, 3 / 2),
    (5, 3): (19 / 64, 27 / 32, 7 / 4),
    (6, 3): (1 / 2, 1.0, 2.0),
    (7, 3): (1 / 4, 11 / 16, 9 / 8, 9 / 4),
    (2, 5): (21 / 32, 3 / 2),
    (3, 5): (19 / 64, 27 / 32, 7 / 4),
    (4, 5): (1 / 2, 1.0, 2.0),
    (6, 5): (7 / 16, 13 / 16, 5 / 4, 5 / 2),
    (2, 7): (1 / 2, 1.0, 2.0),
    (4, 7): (7 / 16, 13 / 16, 5 / 4, 5 / 2),
}

#: (r, stride) -> the tiles, m down and m across, that the kernels have. Where the two differ it is 4 across, which
#: sorts columns into lanes by the fewest shuffles.
TILES = {
    (3, 1): ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7)),
    (5, 1): ((2, 2), (3, 3), (3, 4), (4, 4), (6, 6)),
    (7, 1): ((2, 2), (4, 4)),
    (3, 2): ((2, 2), (4, 4)),
    (5, 2): ((2, 2), (4, 4)),
}

#: precision -> the largest L2 error and the largest single error, both over the RMS of the result.
BOUNDS = {"highest": (2e-6, 2e-5), "high": (1e-3, float("inf")), "medium": (5e-3, float("inf"))}
#: How far expected errors must stay below a bound.
MARGIN = 1.35

#: Variances in units of 2^-24: of one rounding, which leaves at most half a unit in the last place of any number, ...
ROUNDING = 0.18
#: ... of transformed data, which several roundings have passed, and of transforming products to results: measured.
DATA, RESULTS = 0.36, 0.30

#: The longest chain of products, and the shortest, below which adding up the chains costs more than a smaller tile.
LONGEST, SHORTEST = 96, 16
#: Amplification times length of chain. Equal products leave equal errors, which grow with the length of a chain and not
#: with its root: the same pattern in all channels has more error then than white data, and meets the bound with this.
DRIFT = 180


Numbers = tuple[Real, ...]


@dataclass(frozen=True, slots=True)
class Transform:
    """F(m, r) on the points +-pairs, infinity and, where alpha is even, zero.

    All numbers are of the type of the pairs: doubles, or fractions.
    """

    m: int
    r: int
    pairs: Numbers

    stride = 1

    def __post_init__(self):
        if len(set(self.pairs)) != (self.alpha - 1) // 2 or min(self.pairs, default=1) <= 0:
            raise ArgumentError(f"pairs: expected {(self.alpha - 1) // 2} different positive numbers, got {self.pairs}")

    @property
    def alpha(self) -> int:
        return self.m + self.r - 1

    @property
    def zero(self) -> bool:
        return self.alpha % 2 == 0

    @property
    def finite(self) -> Numbers:
        """The finite points in the order of the rows."""
        return (0,) * self.zero + tuple(sign * p for p in self.pairs for sign in (1, -1))

    @property
    def coefficients(self) -> Numbers:
        """For every pair p and the coefficients of Q_p, then those of Z, each without the leading 1."""
        inner = [(p, *_with_roots([q * q for q in self.pairs if q != p])[:-1]) for p in self.pairs]
        return tuple(x for row in (*inner, _with_roots([q * q for q in self.pairs])[:-1]) for x in row)

    @property
    def powers(self) -> Numbers:
        """p, p^2 ... p^(m-1) of every pair."""
        return tuple(p**i for p in self.pairs for i in range(1, self.m))

    @property
    def filter(self) -> Numbers:
        """G, row by row: alpha rows of r. That of p holds its powers over the product of p - q, q the other points."""
        points, rows = self.finite, []
        for p in points:
            others = prod((p - q for q in points if q != p), start=1)
            rows += [p**k / others for k in range(self.r)]
        return (*rows, *(int(k == self.r - 1) for k in range(self.r)))

    @property
    def filter_operations(self) -> int:
        """What G takes in one dimension, kernels/filters.inc.c: the rows of a pair share their even and their odd taps,
        and the last row is a tap."""
        return self.zero + len(self.pairs) * (self.r + 2)

    @property
    def taps(self) -> tuple[Numbers, ...]:
        """G: alpha rows of r."""
        numbers = self.filter
        return tuple(numbers[i : i + self.r] for i in range(0, len(numbers), self.r))

    @property
    def data(self) -> tuple[Numbers, ...]:
        """B^T: alpha rows of alpha; what the kernels compute from `coefficients`."""
        points = self.finite
        rows = [_with_roots([q for q in points if q != p]) for p in points]
        return (*((*row, 0) for row in rows), _with_roots(points))

    @property
    def result(self) -> tuple[Numbers, ...]:
        """A^T: m rows of alpha; what the kernels compute from `powers`."""
        points = self.finite
        return tuple((*[p**i for p in points], int(i == self.m - 1)) for i in range(self.m))


@dataclass(frozen=True, slots=True)
class Strided:
    """m outputs of r taps at stride 2: the sum of two transforms. Their numbers follow each other; see Transform."""

    #: Of the inputs 0, 2, 4 ... and the taps 0, 2 ...
    even: Transform
    #: Of the others; None where there is one tap, whose products need no points.
    odd: Transform | None

    stride = 2

    @property
    def m(self) -> int:
        return self.even.m

    @property
    def r(self) -> int:
        return self.even.r + (self.odd.r if self.odd else 1)

    @property
    def filter_operations(self) -> int:
        return self.even.filter_operations + (self.odd.filter_operations if self.odd else 0)

    @property
    def alpha(self) -> int:
        return 2 * self.m + self.r - 2

    @property
    def coefficients(self) -> Numbers:
        return self.even.coefficients + (self.odd.coefficients if self.odd else ())

    @property
    def powers(self) -> Numbers:
        return self.even.powers + (self.odd.powers if self.odd else ())

    @property
    def filter(self) -> Numbers:
        """G of the even taps, then that of the odd ones, none where there is one."""
        return self.even.filter + (self.odd.filter if self.odd else ())

    @property
    def taps(self) -> tuple[Numbers, ...]:
        odd = self.odd.taps if self.odd else ((1,),) * self.m
        return (*(_spread(row, 0, self.r) for row in self.even.taps), *(_spread(row, 1, self.r) for row in odd))

    @property
    def data(self) -> tuple[Numbers, ...]:
        odd = self.odd.data if self.odd else _identity(self.m)
        return (*(_spread(row, 0, self.alpha) for row in self.even.data), *(_spread(row, 1, self.alpha) for row in odd))

    @property
    def result(self) -> tuple[Numbers, ...]:
        odd = self.odd.result if self.odd else _identity(self.m)
        return tuple(a + b for a, b in zip(self.even.result, odd, strict=True))


AnyTransform = Transform | Strided


@lru_cache(64)
def transform(m: int, r: int, stride: int = 1) -> AnyTransform:
    """The transform of m outputs and r taps."""
    if stride == 2:
        return Strided(transform(m, (r + 1) // 2), transform(m, r // 2) if r > 3 else None)
    if (m, r) not in SUPPORTED or stride != 1:
        names = ", ".join(f"F{pair}" for pair in SUPPORTED)
        raise ArgumentError(f"transform: expected one of {names}, stride 1 or 2, got F({m}, {r}), stride {stride}")
    return Transform(m, r, SUPPORTED[m, r])


@lru_cache(64)
def amplification(t: AnyTransform) -> tuple[float, float]:
    """How much larger the errors of results are than those of products: root mean square and at the worst place.

    For white data, one dimension; those of two dimensions multiply.
    """
    energy = [_energy(data) * _energy(row) / t.r for data, row in zip(t.data, t.taps, strict=True)]
    places = [sum(e * a**2 for e, a in zip(energy, row, strict=True)) for row in t.result]
    return sqrt(sum(places) / t.m), sqrt(max(places))


def chains(channels: int, rows: AnyTransform | None = None, columns: AnyTransform | None = None) -> int:
    """Into how many chains of multiply-adds "highest" cuts a sum: for these transforms, or for any."""
    amplified = amplification(rows)[0] * amplification(columns)[0] if rows and columns else DRIFT
    length = min(max(SHORTEST, int(DRIFT / amplified)), LONGEST)
    return -(-channels // max(length, isqrt(channels)))


def error(rows: AnyTransform, columns: AnyTransform, channels: int, count: int) -> tuple[float, float]:
    """The float32 errors to expect on white data, L2 and largest, over the RMS of the result.

    Rounding errors are independent, so their variances add: of data, filters, results, and of sums. A sum over channels
    is cut into `count` chains of fused multiply-adds, whose totals are added one after the other: the error of either
    grows with the root of its length. The largest is of ten million; few channels have longer tails.
    """
    sums = ROUNDING * ((channels / count + 1) / 2 + (count + 1) / 2 - 1 / count)
    size = 2.0**-24 * sqrt(DATA + ROUNDING + sums + RESULTS)
    (down, down_worst), (across, across_worst) = amplification(rows), amplification(columns)
    return size * down * across, size * down_worst * across_worst * (6 + 64 / channels)


def within(rows: AnyTransform, columns: AnyTransform, precision: str, channels: int) -> bool:
    """Whether the errors of two transforms, of rows and of columns, stay below a precision's bounds, with a margin."""
    if precision not in BOUNDS:
        raise ArgumentError(f"precision: expected one of {', '.join(BOUNDS)}, got {precision!r}")
    factor = max(1.0, sqrt(channels * rows.r * columns.r / 2304)) if precision == "highest" else 1.0
    expected = error(rows, columns, channels, chains(channels, rows, columns))
    return all(MARGIN * e <= factor * bound for e, bound in zip(expected, BOUNDS[precision], strict=True))


def _energy(row) -> float:
    return sum([x**2 for x in row])


def _spread(row, first: int, length: int) -> Numbers:
    """A row with its entries at first, first + 2 ... of as many zeros as it needs."""
    entries = dict(zip(range(first, length, 2), row, strict=False))
    return tuple(entries.get(i, 0) for i in range(length))


def _identity(size: int) -> tuple[Numbers, ...]:
    return tuple(tuple(int(i == j) for j in range(size)) for i in range(size))


def _with_roots(roots) -> Numbers:
    """The coefficients, from the constant on, of the product of t - root."""
    coefficients = [1]
    for root in roots:
        pairs = zip([0, *coefficients], [*coefficients, 0], strict=True)
        coefficients = [lower - root * upper for lower, upper in pairs]
    return tuple(coefficients)
