"""Activations: alone and in a convolution's epilogue, against the formulas in float64."""

import numpy as np
import pytest

import cconv
from cconv import reference
from cconv.planning import ACTIVATIONS, Activation
from cconv.planning.specs import as_activation

#: Across every bend of every formula, far into both tails, and the smallest numbers.
POINTS = np.concatenate(
    [np.linspace(-9, 9, 1801), [-1e4, -88.8, -50, -0.0, 1e-30, 50, 88.8, 1e4], np.linspace(-1e-3, 1e-3, 101)]
)
ULP = {"float32": 2.0**-24, "float64": 2.0**-53}


def _expected(x, activation):
    return reference.activate(x.astype(np.float64), as_activation(activation))


def _assert_close(got, expected, before, dtype):
    """A few roundings of the value before: gelu and silu subtract nearly equal numbers far below zero."""
    assert got.dtype == dtype
    error = np.abs(got.astype(np.float64) - expected)
    allowed = 8 * ULP[dtype] * (np.abs(expected) + np.minimum(np.abs(before), 8))
    worst = np.argmax(error - allowed)
    assert (error <= allowed).all(), f"at {before.flat[worst]}: {got.flat[worst]} instead of {expected.flat[worst]}"


def test_every_formula_holds_on_the_whole_line(activation, dtype):
    x = POINTS.astype(dtype).reshape(1, 1, 2, -1)
    _assert_close(cconv.activate(x, activation), _expected(x, activation), x, dtype)


def test_a_convolution_applies_it_last(activation, dtype, whole):
    x, weight, bias = whole((2, 3, 7, 9), dtype), whole((17, 3, 3, 3), dtype, reach=1), whole(17, dtype)
    residual = whole((2, 17, 7, 9), dtype)
    before = cconv.conv2d(x, weight, bias, padding=1, residual=residual)
    got = cconv.conv2d(x, weight, bias, padding=1, residual=residual, activation=activation)
    _assert_close(got, _expected(before, activation), before, dtype)


@pytest.mark.parametrize("groups", [1, 16])
def test_a_convolution_gives_the_same_bits_as_the_operator(activation, dtype, groups, normal):
    """Fused or apart, one implementation."""
    x, weight = normal((1, 16, 6, 7), dtype), normal((16, 16 // groups, 3, 3), dtype)
    apart = cconv.activate(cconv.conv2d(x, weight, groups=groups), activation)
    np.testing.assert_array_equal(cconv.conv2d(x, weight, groups=groups, activation=activation), apart)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.5, -1.0])
def test_leaky_relu_takes_its_slope(dtype, slope):
    x = POINTS.astype(dtype).reshape(1, 1, 1, -1)
    expected = np.where(x < 0, x * np.asarray(slope, dtype), x)
    np.testing.assert_allclose(cconv.activate(x, ("leaky_relu", slope)), expected, rtol=2 * ULP[dtype])


def test_leaky_relus_default_slope_is_a_hundredth():
    x = np.full((1, 1, 1), -100.0)
    assert cconv.activate(x, "leaky_relu").item() == cconv.activate(x, ("leaky_relu", 0.01)).item() == -1.0


def test_nan_stays_nan(activation, dtype):
    x = np.full((1, 3, 5), np.nan, dtype)
    assert np.isnan(cconv.activate(x, activation)).all()


def test_infinity_gives_the_limit(activation, dtype):
    x = np.array([[[-np.inf, np.inf]]], dtype)
    low, high = cconv.activate(x, activation).ravel()
    limits = {"relu": (0, np.inf), "relu6": (0, 6), "leaky_relu": (-np.inf, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1)}
    if activation in limits:
        assert (low, high) == limits[activation]
    else:  # x * s(x): -inf * 0 has no value, and IEEE says so
        assert np.isnan(low) or low == 0
        assert high == np.inf


def test_the_reference_has_a_formula_for_every_name():
    assert set(reference.FORMULAS) == set(ACTIVATIONS)
    assert Activation("relu").alpha == 0
