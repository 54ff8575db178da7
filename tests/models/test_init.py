"""Initial values: the ranges that the papers give, and numbers that a seed decides."""

import math

import numpy as np
import pytest

from cconv import ArgumentError, ShapeError, init

SHAPE = (96, 40, 3, 3)
FAN_IN, FAN_OUT = 40 * 9, 96 * 9
VARIANCE = {"he": 2 / FAN_IN, "glorot": 2 / (FAN_IN + FAN_OUT), "lecun": 1 / FAN_IN}
RULES = [(rule, form) for rule in VARIANCE for form in ("normal", "uniform")]


def _draw(rule, form, shape=SHAPE, seed=0):
    return getattr(init, f"{rule}_{form}")(shape, seed)


@pytest.mark.parametrize(("rule", "form"), RULES)
def test_mean_and_variance_are_the_papers(rule, form):
    weight = _draw(rule, form)
    assert (weight.shape, weight.dtype) == (SHAPE, np.float32)
    std = math.sqrt(VARIANCE[rule])
    assert abs(weight.mean()) < 4 * std / math.sqrt(weight.size)
    assert abs(weight.std() / std - 1) < 0.02


@pytest.mark.parametrize("rule", VARIANCE)
def test_uniform_values_fill_their_range_and_keep_to_it(rule):
    bound = math.sqrt(3 * VARIANCE[rule])
    weight = _draw(rule, "uniform")
    assert abs(weight).max() <= bound * (1 + 1e-6)
    assert weight.max() > 0.999 * bound
    assert weight.min() < -0.999 * bound


@pytest.mark.parametrize("rule", VARIANCE)
def test_normal_values_are_normal(rule):
    z = _draw(rule, "normal") / math.sqrt(VARIANCE[rule])
    for limit, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((abs(z) < limit).mean() - share) < 0.01


@pytest.mark.parametrize(("rule", "form"), RULES)
def test_a_seed_decides_the_numbers(rule, form):
    np.testing.assert_array_equal(_draw(rule, form, seed=7), _draw(rule, form, seed=7))
    np.testing.assert_array_equal(_draw(rule, form, seed=7), _draw(rule, form, seed=np.random.default_rng(7)))
    assert not np.array_equal(_draw(rule, form, seed=7), _draw(rule, form, seed=8))


def test_a_dense_layer_is_a_1x1_convolution():
    assert init.fans((10, 20)) == init.fans((10, 20, 1, 1)) == (20, 10)
    np.testing.assert_array_equal(init.he_normal((10, 20)).ravel(), init.he_normal((10, 20, 1, 1)).ravel())


def test_a_given_standard_deviation_is_taken_as_given():
    assert abs(init.normal(SHAPE, 0.5).std() - 0.5) < 0.01
    assert not init.normal(SHAPE, 0).any()
    assert (init.constant(SHAPE, 0.25) == 0.25).all()
    with pytest.raises(ArgumentError, match=r"std: expected a finite number >= 0, got -1"):
        init.normal(SHAPE, -1)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3, 3, 3), (4, 3.5), (1, 2, 3, 4, 5)])
def test_shapes_that_no_weight_has_are_refused(shape):
    with pytest.raises(ShapeError, match="shape"):
        init.he_normal(shape)
