"""Exponentials: what the vector kernels make of e^x, in units of the last place, for every ISA and element type.

In: numbers spread over all binary orders, both tails, the edges of every formula.  Out: largest errors, against libm's
functions in a wider type; the same bits wherever an element lies.
"""

import math

import numpy as np
import pytest

from cconv import cpu
from cconv.planning import SoftmaxSpec, plan, specs
from cconv.planning.tensors import FunctionSpec
from cconv.weights import Weights

#: Wider than the results: float64, and where it is wider than that, long double.
WIDE = {"float32": np.float64, "float64": np.longdouble}
needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="this system has no type wider than float64"
)
#: e^x is subnormal below the first, infinite above the second; so is e^-x, and there the formulas give 0.
NORMAL = {"float32": (-87, 88.5), "float64": (-708, 709.5)}

_erfc64 = np.vectorize(math.erfc, otypes=[np.float64])


def _erfc(x):
    """At the nearest float64, and along the tangent from there."""
    near = x.astype(np.float64)
    return _erfc64(near) - 2 / np.sqrt(np.arccos(x.dtype.type(-1))) * np.exp(-x * x) * (x - near)


def _gelu_tanh_slope(x):
    return np.sqrt(8 / np.arccos(x.dtype.type(-1))) * (1 + x.dtype.type("0.044715") * x * x)


#: Name -> what it should be, in the type of x.
FORMULAS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-2 * x)),
    "tanh": np.tanh,
    "gelu": lambda x: x / 2 * _erfc(-x / np.sqrt(x.dtype.type(2))),
    "gelu_tanh": lambda x: x / (1 + np.exp(-_gelu_tanh_slope(x) * x)),
}
#: Most units in the last place.
BOUND = {"sigmoid": 3, "silu": 3, "swish": 3, "tanh": 3, "gelu": 9, "gelu_tanh": 3}
#: From where on: results are subnormal below; the argument of gelu_tanh's power is a rounded polynomial.
LOWEST = {
    "float32": {"swish": -43, "gelu": -13, "gelu_tanh": -1},
    "float64": {"swish": -353, "gelu": -37, "gelu_tanh": -1},
}


def _spec(name, count, dtype):
    if name in ("swish", "gelu_tanh"):
        return FunctionSpec(name, count, (2.0,) if name == "swish" else (), dtype)
    return specs.pointwise((1, 1, count), activation=name, dtype=dtype)


def _run(isa, spec, x):
    program = cpu.build(plan.single(spec, cpu.machine_of(isa, 1)), Weights(lambda _: (None, None)))
    return program.run([x])[0]


def _apply(isa, name, x):
    return _run(isa, _spec(name, x.size, x.dtype.name), x.reshape(1, 1, 1, -1)).ravel()


def _numbers(dtype):
    """Both signs of all binary orders down to 2^-60, and evenly over what matters."""
    sizes = np.concatenate([np.geomspace(2.0**-60, 700, 20011), np.linspace(0, 40, 20011)])
    return np.concatenate([-sizes, sizes]).astype(dtype)


def _ulps(got, want, dtype):
    """The largest error and where it is; subnormal results have the last place of the smallest normal one's."""
    size = np.maximum(np.abs(want), np.finfo(dtype).tiny)
    place = np.exp2(np.floor(np.log2(size)) - np.finfo(dtype).nmant)
    error = np.abs(got.astype(want.dtype) - want) / place
    return error.max(), error.argmax()


@needs_long_double
@pytest.mark.parametrize("name", FORMULAS)
def test_errors_are_a_few_units_in_the_last_place(isa, dtype, name):
    x = _numbers(dtype)
    low, high = NORMAL[dtype]
    x = x[(x > LOWEST[dtype].get(name, low)) & (x < high)]
    got, want = _apply(isa, name, x), FORMULAS[name](x.astype(WIDE[dtype]))
    worst, at = _ulps(got, want, dtype)
    assert worst <= BOUND[name], f"{worst} ulp at {x[at]!r}: {got[at]!r}"


@needs_long_double
def test_a_softmax_of_two_is_a_power_down_to_the_smallest_number(isa, dtype):
    """e^x / (1 + e^x), gradually to 0."""
    x = np.linspace(-104.5 if dtype == "float32" else -746, 0, 20011).astype(dtype)
    pairs = np.stack([np.zeros_like(x), x], axis=1).reshape(-1, 2, 1, 1)
    got = _run(isa, SoftmaxSpec(2, 1, dtype), pairs)[:, 1].ravel()
    e = np.exp(x.astype(WIDE[dtype]))
    assert _ulps(got, e / (1 + e), dtype)[0] <= 2.5
    across = np.ascontiguousarray(pairs.reshape(-1, 2).T).reshape(1, 2, 1, -1)
    np.testing.assert_array_equal(_run(isa, SoftmaxSpec(2, x.size, dtype), across)[0, 1].ravel(), got)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_not_finite_and_zeros_are_as_the_formulas_say(isa, dtype, name):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40], dtype)
    got = _apply(isa, name, x)
    half = x * x.dtype.type(0.5)
    if name == "sigmoid":
        np.testing.assert_array_equal(got, [np.nan, 1, 0, 0.5, 0.5, 1, 0, 0.5, 0.5])
    elif name == "tanh":
        np.testing.assert_array_equal(got, [np.nan, 1, -1, 0, -0.0, 1, -1, x[7], x[8]])
    else:  # -inf * 0 is no number
        np.testing.assert_array_equal(got, [np.nan, np.inf, np.nan, 0, 0, x[5], 0, half[7], half[8]])
    if name in ("swish", "gelu_tanh"):  # an epilogue adds a bias of 0
        np.testing.assert_array_equal(np.signbit(got[3:]), np.signbit(x[3:]))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_bounded_functions_stay_within_their_bounds(isa, dtype, name):
    got = _apply(isa, name, _numbers(dtype))
    assert np.abs(got).max() == 1
    assert got.min() >= (-1 if name == "tanh" else 0)


def test_tanh_is_odd(isa, dtype):
    x = _numbers(dtype)
    np.testing.assert_array_equal(_apply(isa, "tanh", -x), -_apply(isa, "tanh", x))


@pytest.mark.parametrize("name", FORMULAS)
def test_no_bit_depends_on_the_place_in_a_vector(isa, dtype, name):
    x = np.random.default_rng(1).standard_normal(67).astype(dtype) * 4
    together = _apply(isa, name, x)
    for first in range(33):
        for count in (1, 2, 3, 5, 8, 17, 34):
            part = _apply(isa, name, x[first : first + count])
            assert part.tobytes() == together[first : first + count].tobytes(), (first, count)


@pytest.mark.parametrize("inner", [1, 5])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_softmax_keeps_to_ieee(isa, dtype, inner, value):
    x = np.random.default_rng(2).standard_normal((1, 37, 1, inner)).astype(dtype)
    for at in (0, 3, 36):
        spoiled = x.copy()
        spoiled[0, at] = value
        got = _run(isa, SoftmaxSpec(37, inner, dtype), spoiled)
        if value < 0:
            assert not got[0, at].any()
            assert np.isfinite(got).all()
        else:
            assert np.isnan(got).all()
    assert np.isnan(_run(isa, SoftmaxSpec(37, inner, dtype), np.full_like(x, -np.inf))).all()
