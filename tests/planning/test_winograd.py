"""Winograd: a transform is an exact correlation, its constants are exact, its errors are those that it states."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cconv import ArgumentError
from cconv.planning import winograd

PRECISE = [  # (rows, columns, input channels) that meet "highest"
    ((2, 3), (2, 3), 64),
    ((3, 3), (3, 3), 64),
    ((4, 3), (4, 3), 64),
    ((5, 3), (5, 3), 64),
    ((5, 3), (4, 3), 256),
    ((6, 3), (4, 3), 64),
    ((2, 5), (2, 5), 32),
    ((3, 5), (3, 5), 64),
    ((3, 5), (4, 5), 100),
    ((4, 5), (4, 5), 192),
]
COARSE = [  # that do not
    ((6, 3), (6, 3), 64),
    ((7, 3), (7, 3), 64),
    ((6, 5), (6, 5), 100),
    ((2, 7), (2, 7), 32),
    ((4, 7), (4, 7), 32),
]


def exact(t):
    """The same transform in fractions."""
    if isinstance(t, winograd.Strided):
        return winograd.Strided(exact(t.even), exact(t.odd) if t.odd else None)
    return replace(t, pairs=tuple(map(Fraction, t.pairs)))


DOUBLES = [winograd.transform(m, r) for m, r in winograd.SUPPORTED]
DOUBLES += [winograd.transform(m, *kind) for kind, tiles in winograd.TILES.items() if kind[1] == 2 for m, _ in tiles]
ALL = [exact(t) for t in DOUBLES if t.stride == 1]
STRIDED = [exact(t) for t in DOUBLES if t.stride == 2]
each = pytest.mark.parametrize("t", ALL, ids=lambda t: f"F({t.m},{t.r})")


def data_rows(t, d):
    """The rows as the kernels compute them: even and odd parts, shared by the two points of a pair."""
    z, n = int(t.zero), len(t.pairs)

    def dot(coefficients, start):
        return sum(c * d[start + 2 * k] for k, c in enumerate((*coefficients, 1)))

    outer = t.coefficients[n * n :]
    rows = [dot(outer, 0)] if t.zero else []
    for i in range(0, n * n, n):
        p, *inner = t.coefficients[i : i + n]
        odd, even = dot(inner, 1 + z), dot(inner, z)
        rows += [odd + p * even, odd - p * even]
    return [*rows, dot(outer, z)]


def results(t, products):
    """The outputs as the kernels compute them: sums and differences of the two products of a pair."""
    first, middle, last = products[: t.zero], products[t.zero : -1], products[-1]
    y = []
    for i in range(t.m):
        total = sum(first) if i == 0 else 0
        for n in range(len(t.pairs)):
            power = t.powers[n * (t.m - 1) + i - 1] if i else 1
            total += power * (middle[2 * n] + (-1) ** i * middle[2 * n + 1])
        y.append(total + last if i == t.m - 1 else total)
    return y


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def units(size):
    """The unit vectors: what is linear, and right for all of them, is right for every vector."""
    return [[int(i == j) for j in range(size)] for i in range(size)]


@each
def test_the_steps_of_the_kernels_are_an_exact_correlation(t):
    data, taps = [data_rows(t, d) for d in units(t.alpha)], [times(t.taps, g) for g in units(t.r)]
    for j, k in itertools.product(range(t.alpha), range(t.r)):
        products = [u * v for u, v in zip(taps[k], data[j], strict=True)]
        assert results(t, products) == [int(i + k == j) for i in range(t.m)]


@each
def test_the_steps_of_the_kernels_are_the_matrices(t):
    for d in units(t.alpha):
        assert data_rows(t, d) == times(t.data, d)
        assert results(t, d) == times(t.result, d)


@pytest.mark.parametrize("t", STRIDED, ids=lambda t: f"F({t.m},{t.r}) stride 2")
def test_at_stride_2_even_and_odd_inputs_give_the_correlation_together(t):
    data, taps = [times(t.data, d) for d in units(t.alpha)], [times(t.taps, g) for g in units(t.r)]
    for j, k in itertools.product(range(t.alpha), range(t.r)):
        products = [u * v for u, v in zip(taps[k], data[j], strict=True)]
        assert times(t.result, products) == [int(2 * i + k == j) for i in range(t.m)]
    assert t.alpha == 2 * (t.m - 1) + t.r, "as many products as inputs"


def test_the_numbers_of_strided_transforms_follow_each_other():
    for t in STRIDED:
        parts = [t.even, t.odd] if t.odd else [t.even]
        for name in ("coefficients", "powers", "filter"):
            assert getattr(t, name) == sum((getattr(part, name) for part in parts), ())
        assert {part.r for part in parts} | {t.r // 2} == {(t.r + 1) // 2, t.r // 2}


@pytest.mark.parametrize("pairs", [("1/3", "7/5"), ("1/2", "9/2", "3/7")])
@pytest.mark.parametrize("r", [2, 3, 4])
def test_any_points_give_an_exact_correlation(pairs, r):
    for zero in (0, 1):
        alpha = 2 * len(pairs) + 1 + zero
        t = winograd.Transform(alpha - r + 1, r, tuple(map(Fraction, pairs)))
        d, g = [Fraction(7 * i * i - 5, i + 1) for i in range(alpha)], [Fraction(3 * k - 2, k + 2) for k in range(r)]
        products = [u * v for u, v in zip(times(t.taps, g), data_rows(t, d), strict=True)]
        assert results(t, products) == [sum(g[k] * d[i + k] for k in range(r)) for i in range(t.m)]


@each
def test_alpha_points_are_zero_pairs_and_infinity(t):
    assert t.alpha == t.m + t.r - 1 == int(t.zero) + 2 * len(t.pairs) + 1
    assert len(t.data) == len(t.taps) == t.alpha
    assert len(t.result) == t.m


@pytest.mark.parametrize("t", DOUBLES, ids=lambda t: f"F({t.m},{t.r}) stride {t.stride}")
def test_doubles_are_the_exact_numbers_and_quotients_are_rounded_once(t):
    def flat(numbers):
        return [x for one in numbers for x in (flat(one) if isinstance(one, tuple) else [one])]

    for name in ("coefficients", "powers", "data", "result"):
        assert flat(getattr(t, name)) == flat(getattr(exact(t), name)), name
    for name in ("filter", "taps"):
        assert flat(getattr(t, name)) == list(map(float, flat(getattr(exact(t), name)))), name


@each
def test_the_constants_of_the_kernels_are_exact_in_float32(t):
    for x in (*t.coefficients, *t.powers):
        odd = abs(x.numerator)
        while odd and odd % 2 == 0:
            odd //= 2
        assert x.denominator & (x.denominator - 1) == 0, f"{x} is no binary fraction"
        assert odd < 2**24
        assert Fraction(float(x)) == x


def fused(a, b, c):
    """a * b + c, rounded once to float32."""
    return (np.float64(a) * b + c).astype(np.float32)


def chain(coefficients, start):
    for a, b in coefficients:
        start = fused(a, b, start)
    return start


def rounded_rows(t, d):
    """data_rows in float32, by fused multiply-adds; d[i] are arrays."""
    z, n = int(t.zero), len(t.pairs)

    def dot(coefficients, start):
        places = d[start::2]
        return chain([(float(c), x) for c, x in zip(coefficients, places, strict=False)], places[len(coefficients)])

    outer, rows = t.coefficients[n * n :], []
    for i in range(0, n * n, n):
        p, *inner = t.coefficients[i : i + n]
        odd, even = dot(inner, 1 + z), dot(inner, z)
        rows += [fused(float(p), even, odd), fused(-float(p), even, odd)]
    return np.stack([*([dot(outer, 0)] if z else []), *rows, dot(outer, z)])


def rounded_results(t, v):
    """results in float32, one operation after the other."""
    z = int(t.zero)
    halves = [v[z:-1:2] + v[z + 1 : -1 : 2], v[z:-1:2] - v[z + 1 : -1 : 2]]
    y = []
    for i in range(t.m):
        powers = [float(t.powers[n * (t.m - 1) + i - 1]) if i else 1.0 for n in range(len(t.pairs))]
        first = v[0] if z and i == 0 else np.zeros_like(v[0])
        total = chain(list(zip(powers, halves[i % 2], strict=True)), first)
        y.append(total + v[-1] if i == t.m - 1 else total)
    return np.stack(y)


def winograd_float32(rows, columns, x, w, count):
    """Tiles x (C, alpha, alpha', tiles) and filters w (K, C, r, r') to (m, m', K, tiles), rounded as the kernels do."""
    v = rounded_rows(columns, rounded_rows(rows, x.transpose(1, 2, 0, 3)).swapaxes(0, 1)).swapaxes(0, 1)
    down, across = (np.array(t.taps, float) for t in (rows, columns))
    u = np.einsum("ar,kcrs,bs->abck", down, w, across).astype(np.float32)
    products = None
    for part in range(count):
        total = np.zeros((*u.shape[:2], u.shape[3], x.shape[3]), np.float32)
        for c in range(part * len(x) // count, (part + 1) * len(x) // count):
            total = fused(u[:, :, c, :, None], v[:, :, c, None], total)
        products = total if products is None else products + total
    return rounded_results(rows, rounded_results(columns, products.swapaxes(0, 1)).swapaxes(0, 1))


def errors(rows, columns, x, w, zero_mean):
    """L2 and largest error over the RMS of the result, or of what |x| and |w| give."""

    def direct(x, w):
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(float), (rows.r, columns.r), (1, 2))
        return np.einsum("cijtrs,kcrs->ijkt", windows, w.astype(float), optimize=True)

    count = winograd.chains(len(x), rows, columns)
    error = winograd_float32(rows, columns, x, w, count) - direct(x, w)
    rms = np.sqrt(np.mean((direct(x, w) if zero_mean else direct(abs(x), abs(w))) ** 2))
    return np.sqrt(np.mean(error**2)) / rms, abs(error).max() / rms


def tiles(draw, rows, columns, channels, count=64, filters=8):
    x = draw((channels, rows.alpha, columns.alpha, count)).astype(np.float32)
    return x, draw((filters, channels, rows.r, columns.r)).astype(np.float32)


@pytest.mark.parametrize(("down", "across", "channels"), PRECISE + COARSE)
def test_errors_are_those_expected(down, across, channels):
    rows, columns = winograd.transform(*down), winograd.transform(*across)
    x, w = tiles(np.random.default_rng(1).standard_normal, rows, columns, channels)
    l2, largest = errors(rows, columns, x, w, zero_mean=True)
    expected, most = winograd.error(rows, columns, channels, winograd.chains(channels, rows, columns))
    assert l2 == pytest.approx(expected, rel=0.1)
    assert l2 < largest < most


@pytest.mark.parametrize(("down", "across", "channels"), PRECISE)
def test_what_meets_the_highest_precision_keeps_its_bound_on_any_data(down, across, channels):
    """Equal terms, a pattern in all channels, positive numbers, one lone number: errors that add up or hide."""
    rows, columns = winograd.transform(*down), winograd.transform(*across)
    assert winograd.within(rows, columns, "highest", channels)
    factor = max(1, np.sqrt(channels * rows.r * columns.r / 2304))
    rng = np.random.default_rng(2)

    def lone(shape):
        return np.where(np.arange(np.prod(shape)).reshape(shape) % 977 == 500, rng.standard_normal(shape), 0)

    def in_all_channels(draw):
        return lambda shape: np.broadcast_to(draw((shape[0], 1, *shape[2:])), shape)

    kinds = {
        "positive": (rng.random, rng.random),
        "rectified": (lambda shape: np.maximum(rng.standard_normal(shape), 0), rng.standard_normal),
        "equal": (lambda shape: np.full(shape, 0.3), lambda shape: np.full(shape, 0.7)),
        "one pattern": (lambda shape: np.broadcast_to(rng.random((1, *shape[1:])), shape), in_all_channels(rng.random)),
        "one signed pattern": (
            lambda shape: np.broadcast_to(rng.standard_normal((1, *shape[1:])), shape),
            in_all_channels(rng.standard_normal),
        ),
        "lone": (lone, rng.standard_normal),
    }
    for kind, (data, filters) in kinds.items():
        x = data((channels, rows.alpha, columns.alpha, 16)).astype(np.float32)
        w = filters((8, channels, rows.r, columns.r)).astype(np.float32)
        l2, largest = errors(rows, columns, x, w, zero_mean=False)
        assert l2 <= 2e-6 * factor, f"{kind}: L2 error {l2:.2e}"
        assert largest <= 2e-5 * factor, f"{kind}: largest error {largest:.2e}"


@pytest.mark.parametrize(("down", "across", "channels"), COARSE)
def test_large_transforms_are_for_lower_precisions(down, across, channels):
    rows, columns = winograd.transform(*down), winograd.transform(*across)
    assert not winograd.within(rows, columns, "highest", channels)
    assert winograd.within(rows, columns, "high", channels)


def test_every_transform_has_a_tile_and_every_tile_its_transforms():
    tiles = {(down, across, *kind) for kind, tiles in winograd.TILES.items() for down, across in tiles}
    used = [winograd.transform(m, r, stride) for down, across, r, stride in tiles for m in (down, across)]
    parts = {part for t in used for part in ((t.even, t.odd) if t.stride == 2 else (t,)) if part}
    assert {(part.m, part.r) for part in parts} == set(winograd.SUPPORTED)
    assert {(t.m, t.m, t.r, t.stride) for t in used} <= tiles
    for down, across, *kind in tiles:  # all serve somewhere
        assert winograd.within(winograd.transform(down, *kind), winograd.transform(across, *kind), "high", 64)


@given(channels=st.integers(1, 10**6))
def test_chains_are_neither_longer_nor_more_than_needed(channels):
    for t in ALL + STRIDED:
        count = winograd.chains(channels, t, t)
        length = channels / count
        assert length <= max(winograd.LONGEST, channels**0.5)
        assert count <= max(1, channels / winograd.SHORTEST + 1, channels**0.5 + 1)
        assert winograd.chains(channels) >= count


def test_unknown_transforms_and_precisions_are_named():
    with pytest.raises(ArgumentError, match=r"F\(9, 3\)"):
        winograd.transform(9, 3)
    with pytest.raises(ArgumentError, match="'low'"):
        winograd.within(ALL[0], ALL[0], "low", 64)
    for pairs in [(Fraction(1),), (Fraction(1), Fraction(1)), (Fraction(1), Fraction(-1))]:
        with pytest.raises(ArgumentError, match="2 different positive"):
            winograd.Transform(4, 3, pairs)
