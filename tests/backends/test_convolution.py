"""Convolution: every case on every backend, exactly on integers and within the documented bound on real numbers."""

import numpy as np
import pytest

import cconv


def _operands(case, draw, dtype, *, bias=False, residual_shape=None):
    x, weight = draw(case.x, dtype), draw(case.weight, dtype)
    return (
        x,
        weight,
        draw(case.weight[0], dtype) if bias else None,
        draw(residual_shape, dtype) if residual_shape else None,
    )


def test_whole_numbers_give_exactly_the_definition(twin, dtype, case, whole, convolve, by_definition):
    x, weight, *_ = _operands(case, whole, dtype)
    expected = by_definition(x, weight, **case.options)
    got = convolve(twin, x, weight, **case.options, algorithm="direct")
    np.testing.assert_array_equal(got, expected)
    # Trust check: a test on zeros would pass for the wrong reason.
    reached = by_definition(np.ones(case.x), np.ones(case.weight), **case.options) > 0
    assert np.count_nonzero(expected) >= np.count_nonzero(reached) / 2


def test_bias_and_residual_are_added_exactly(twin, dtype, case, whole, convolve, by_definition):
    x, weight, bias, _ = _operands(case, whole, dtype, bias=True)
    expected = by_definition(x, weight, **case.options) + bias[:, None, None]
    residual = whole(expected.shape, dtype)
    got = convolve(twin, x, weight, bias, residual, **case.options, algorithm="direct")
    np.testing.assert_array_equal(got, expected + residual)


def test_auto_is_exact_on_whole_numbers_below_16_channels(backend, case, whole, convolve, by_definition):
    if case.weight[1] >= 16 and case.weight[0] // case.groups >= 16:
        pytest.skip("16 channels or more on both sides: auto may choose an algorithm that rounds")
    x, weight, *_ = _operands(case, whole, "float32")
    np.testing.assert_array_equal(
        convolve(backend, x, weight, **case.options), by_definition(x, weight, **case.options)
    )


def test_zero_mean_data_stays_within_the_bound(backend, dtype, case, normal, convolve, assert_within_bound):
    x, weight, bias, _ = _operands(case, normal, dtype, bias=True)
    got = convolve(backend, x, weight, bias, **case.options)
    # A handful of outputs may all lie near zero by chance: their own size is then no measure.
    assert_within_bound(got, x, weight, bias, zero_mean=got[0].size >= 64, **case.options)


def test_positive_data_stays_within_the_bound(backend, dtype, case, rng, convolve, assert_within_bound):
    x, weight = rng.random(case.x).astype(dtype), rng.random(case.weight).astype(dtype)
    assert_within_bound(convolve(backend, x, weight, **case.options), x, weight, **case.options)


def test_the_result_has_the_type_of_x(backend, dtype, case, normal, convolve):
    x, weight, *_ = _operands(case, normal, dtype)
    assert convolve(backend, x, weight, **case.options).dtype == dtype


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_every_precision_meets_its_bound_where_many_products_are_summed(backend, precision, normal, convolve, oracle):
    x, weight = normal((1, 512, 7, 7)), normal((32, 512, 7, 7))
    exact = oracle(x, weight, padding=3)
    factor = np.sqrt(512 * 49 / 2304)
    allowed = {"highest": 2e-6 * factor, "high": 1e-3, "medium": 5e-3}[precision]
    got = convolve(backend, x, weight, padding=3, precision=precision)
    assert np.linalg.norm(got - exact) <= allowed * np.linalg.norm(exact)


def test_large_numbers_cancel_without_losing_the_small_ones(backend, convolve):
    """2**24 + 1 - 2**24: the bound is relative to conv(|x|, |w|), so the answer may be 0, 1 or 2, nothing else."""
    x = np.array([2.0**24, 1, -(2.0**24)], np.float32).reshape(1, 3, 1, 1)
    got = convolve(backend, x, np.ones((1, 3, 1, 1), np.float32))
    assert got.item() in (0, 1, 2)


@pytest.mark.parametrize("depth", [64, 256, 511, 512, 576, 2304, 4608, 25088, 2**20])
def test_a_sum_of_equal_terms_does_not_drift(backend, depth, convolve, assert_within_bound):
    """Rounding errors of equal terms do not cancel: one float32 accumulator over 2**20 tenths is off by 1e-3."""
    for value in (0.1, 0.3, 1 / 3, 0.9, 1.1):
        x, weight = np.full((1, depth, 1, 1), value, np.float32), np.full((1, depth, 1, 1), 0.7, np.float32)
        assert_within_bound(convolve(backend, x, weight), x, weight)


@pytest.mark.parametrize("fill", [0.0, -0.0])
def test_zeros_give_zeros(backend, dtype, fill, convolve):
    y = convolve(backend, np.full((1, 3, 9, 9), fill, dtype), np.ones((5, 3, 3, 3), dtype), padding=1)
    assert not y.any()


def test_subnormal_numbers_are_not_flushed(backend, convolve):
    tiny = np.float32(2.0**-140)
    y = convolve(backend, np.full((1, 1, 3, 3), tiny), np.ones((1, 1, 3, 3), np.float32))
    assert y.item() == 9 * 2.0**-140


class TestLecture:
    """The worked examples of the lecture, digit by digit."""

    X = np.stack([np.arange(0.0, 9).reshape(3, 3), np.arange(1.0, 10).reshape(3, 3)])
    K = np.stack([np.arange(0.0, 4).reshape(2, 2), np.arange(1.0, 5).reshape(2, 2)])

    def test_several_input_channels(self, dtype):
        y = cconv.conv2d(self.X.astype(dtype), self.K[None].astype(dtype))
        np.testing.assert_array_equal(y, [[[56, 72], [104, 120]]])

    def test_several_output_channels(self, dtype):
        bank = np.stack([self.K, self.K + 1, self.K + 2]).astype(dtype)
        y = cconv.conv2d(self.X.astype(dtype), bank)
        np.testing.assert_array_equal(y, [[[56, 72], [104, 120]], [[76, 100], [148, 172]], [[96, 128], [192, 224]]])

    @pytest.mark.parametrize(("inputs", "outputs", "size"), [(3, 2, 3), (64, 96, 14), (17, 33, 9)])
    def test_1x1_is_a_matrix_product_over_pixels(self, inputs, outputs, size, whole, normal, assert_within_bound):
        x, weight = whole((inputs, size, size)), whole((outputs, inputs))
        expected = (weight @ x.reshape(inputs, -1)).reshape(outputs, size, size)
        np.testing.assert_array_equal(cconv.conv2d(x, weight[:, :, None, None], algorithm="direct"), expected)
        relu = cconv.conv2d(x, weight[:, :, None, None], activation="relu", algorithm="direct")
        np.testing.assert_array_equal(relu, np.maximum(expected, 0))
        x, weight = normal((1, inputs, size, size)), normal((outputs, inputs, 1, 1))
        assert_within_bound(cconv.conv2d(x, weight), x, weight)

    def test_the_slides_bias_with_a_column_per_input_channel(self, dtype, whole):
        x, weight, bias = whole((2, 3, 7, 7), dtype), whole((5, 3, 3, 3), dtype), whole((5, 3), dtype)
        np.testing.assert_array_equal(
            cconv.conv2d(x, weight, bias), cconv.conv2d(x, weight) + bias.sum(axis=1)[:, None, None]
        )

    def test_the_cs231n_demo(self, whole, oracle):
        """5x5x3, padded by 1 to 7x7x3, two 3x3x3 filters, stride 2: 3x3x2 out."""
        x, weight, bias = whole((1, 3, 5, 5), reach=2), whole((2, 3, 3, 3), reach=1), whole(2, reach=1)
        y = cconv.conv2d(x, weight, bias, stride=2, padding=1)
        assert y.shape == (1, 2, 3, 3)
        np.testing.assert_array_equal(y, oracle(x, weight, bias, stride=2, padding=1))

    def test_the_first_vgg_blocks(self, normal):
        """3 -> 64 -> 64 -> max-pool -> 128: 128 maps, from 128 filters of depth 64 (not 8192 maps)."""
        x = normal((1, 3, 16, 16))
        filters = [normal((64, 3, 3, 3)), normal((64, 64, 3, 3)), normal((128, 64, 3, 3))]
        x = cconv.conv2d(x, filters[0], padding=1, activation="relu")
        x = cconv.conv2d(x, filters[1], padding=1, activation="relu")
        assert x.shape == (1, 64, 16, 16)
        x = cconv.max_pool2d(x, 2)
        assert x.shape == (1, 64, 8, 8)
        assert cconv.conv2d(x, filters[2], padding=1, activation="relu").shape == (1, 128, 8, 8)
        assert cconv.conv2d_cost(x.shape, filters[2].shape, padding=1).macs == 128 * 64 * 9 * 64
