"""The lecture's rows, one test or a few for each; docs/lecture.md shows the same rows to readers."""

import numpy as np
import pytest

import cconv
from cconv import filters, init, reference
from cconv.model import load
from cconv.planning import specs

X = np.stack([np.arange(0.0, 9).reshape(3, 3), np.arange(1.0, 10).reshape(3, 3)])
K = np.stack([np.arange(0.0, 4).reshape(2, 2), np.arange(1.0, 5).reshape(2, 2)])
DTYPES = ("float32", "float64")


@pytest.mark.parametrize("element", DTYPES)
def test_several_input_channels_are_summed_into_one_map(element):
    y = cconv.conv2d(X.astype(element), K[None].astype(element))
    assert y.dtype == element
    assert y.tolist() == [[[56, 72], [104, 120]]]


@pytest.mark.parametrize("element", DTYPES)
def test_several_output_channels_are_as_many_as_there_are_filters(element):
    y = cconv.conv2d(X.astype(element), np.stack([K, K + 1, K + 2]).astype(element))
    assert y.tolist() == [[[56, 72], [104, 120]], [[76, 100], [148, 172]], [[96, 128], [192, 224]]]


def test_filters_have_the_inputs_depth():
    with pytest.raises(cconv.ShapeError, match="weight"):
        cconv.conv2d(X, K[None, :1])


# 1x1 ----------------------------------------------------------------------------------------------------------------


def test_1x1_is_the_worked_case_of_a_matrix_times_pixels():
    image, matrix = np.arange(27.0).reshape(3, 3, 3), np.array([[1.0, -2, 3], [-4, 5, -6]])
    y = cconv.conv2d(image, matrix.reshape(2, 3, 1, 1))
    assert y.shape == (2, 3, 3)
    assert np.array_equal(y, (matrix @ image.reshape(3, 9)).reshape(2, 3, 3))


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "h", "w"), [(1, 1, 1, 1), (3, 5, 4, 7), (17, 33, 9, 5), (64, 31, 8, 8)])
def test_1x1_is_exactly_a_matrix_on_whole_numbers(inputs, outputs, h, w, element, whole):
    x, matrix = whole((2, inputs, h, w), element), whole((outputs, inputs), element)
    y = cconv.conv2d(x, matrix[:, :, None, None])
    assert np.array_equal(y, (matrix @ x.reshape(2, inputs, h * w)).reshape(2, outputs, h, w))


@pytest.mark.parametrize("element", DTYPES)
def test_1x1_is_a_matrix_within_the_bound_on_any_data(element, normal, assert_within_bound):
    x, weight = normal((2, 48, 9, 11), element), normal((40, 48, 1, 1), element)
    product = (weight[:, :, 0, 0].astype(np.float64) @ x.astype(np.float64).reshape(2, 48, 99)).reshape(2, 40, 9, 11)
    y = cconv.conv2d(x, weight)
    assert_within_bound(y, x, weight, zero_mean=True)
    np.testing.assert_allclose(y, product, atol=1e-4)


def test_1x1_with_relu_is_a_dense_layer_on_every_pixel(whole):
    x, matrix, bias = whole((6, 5, 4)), whole((7, 6)), whole(7)
    y = cconv.conv2d(x, matrix[:, :, None, None], bias, activation="relu")
    for h, w in np.ndindex(5, 4):
        assert np.array_equal(y[:, h, w], np.maximum(matrix @ x[:, h, w] + bias, 0))


# Bias and cost ------------------------------------------------------------------------------------------------------


def test_bias_is_one_number_per_map_or_the_slides_one_per_pair(whole):
    x, weight, pairs = whole((2, 3, 6, 6)), whole((4, 3, 3, 3)), whole((4, 3))
    plain = cconv.conv2d(x, weight)
    expected = plain + pairs.sum(axis=1)[:, None, None]
    assert np.array_equal(cconv.conv2d(x, weight, pairs), expected)
    assert np.array_equal(cconv.conv2d(x, weight, pairs.sum(axis=1)), expected)


def test_cost_of_the_lectures_layer():
    layer = cconv.conv2d_cost((1, 100, 64, 64), (100, 100, 5, 5), padding=2)
    assert (layer.macs, layer.flops) == (1_024_000_000, 2_048_000_000)
    assert (10 * 1_000_000 * layer).macs == 10_240_000_000_000_000


@pytest.mark.parametrize(("unit", "factor"), [("macs_per_s", 1), ("flops_per_s", 2)])
def test_estimated_hours_and_minutes_are_the_lectures(unit, factor):
    layer = cconv.conv2d_cost((1, 100, 64, 64), (100, 100, 5, 5), padding=2)
    samples = 10 * 1_000_000
    assert cconv.estimate(layer, samples, **{unit: 0.15e12}) / 3600 == pytest.approx(18.963 * factor, abs=1e-3)
    assert cconv.estimate(layer, samples, **{unit: 12e12}) / 60 == pytest.approx(14.222 * factor, abs=1e-3)


# Colour, hierarchy, blocks ------------------------------------------------------------------------------------------


def test_colour_is_what_a_grey_picture_has_lost(photograph):
    luminance = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), photograph, 1)
    opponent = filters.bank("green_opponent")
    on_colour, on_grey = (cconv.conv2d(x, opponent)[0] for x in (photograph, np.stack([luminance] * 3)))
    assert on_colour.max() > 0.08
    assert abs(on_grey).max() < 1e-6
    # What it finds are the cat's eyes, and both of them.
    rows, columns = np.nonzero(on_colour > 0.05)
    assert 85 < rows.min() < rows.max() < 165
    left = columns < 250
    assert 100 < left.sum() < 3000
    assert 100 < (~left).sum() < 3000
    assert 135 < columns[left].min() < columns[left].max() < 215
    assert 290 < columns[~left].min() < columns[~left].max() < 350


def test_splitting_into_channels_and_summing_their_maps_is_the_convolution(photograph):
    x, weight = photograph[:, :40, :50].astype(np.float64), filters.bank("green_opponent").astype(np.float64)
    by_channel = sum(cconv.conv2d(np.ascontiguousarray(x[c : c + 1]), weight[:, c : c + 1]) for c in range(3))
    np.testing.assert_allclose(by_channel, cconv.conv2d(x, weight), atol=1e-14)


def test_the_two_level_model_gives_maps_at_both_levels(photograph):
    levels = load("texture").run(photograph)
    assert {name: maps.shape for name, maps in levels.items()} == {
        "level1.relu": (8, 296, 447),
        "level2.relu": (10, 144, 219),
    }
    for maps in levels.values():
        assert maps.min() == 0
        assert (maps.max(axis=(1, 2)) > 0).all()
    # Higher up, the answers are rarer: more of the maps is silent.
    silent = [(maps == 0).mean() for maps in levels.values()]
    assert silent[1] > silent[0]


def test_a_vgg_block_has_128_maps_from_filters_of_depth_64():
    model = load("vgg16")
    layers = {layer.name: layer for layer in model.layers}
    shapes = [layers[f"features.{i}"].output_shape for i in (0, 2, 4, 5)]
    assert shapes == [(64, 224, 224), (64, 224, 224), (64, 112, 112), (128, 112, 112)]
    assert layers["features.5"].parameters == 128 * 64 * 9 + 128
    assert [layers[f"features.{i}"].cost.macs for i in (0, 2, 4, 5)] == [86_704_128, 1_849_688_064, 0, 924_844_032]
    maps = model.run(np.ones((1, 3, 16, 16), np.float32), ["features.5"])
    assert maps["features.5"].shape == (1, 128, 8, 8)


@pytest.mark.parametrize("element", DTYPES)
def test_the_cs231n_demo_is_what_the_reference_says(element, whole):
    x, weight, bias = (
        whole((3, 5, 5), element, reach=2),
        whole((2, 3, 3, 3), element, reach=1),
        whole(2, element, reach=1),
    )
    y = cconv.conv2d(x, weight, bias, stride=2, padding=1)
    assert y.shape == (2, 3, 3)
    spec = specs.conv(x.shape, weight.shape, bias=True, stride=2, padding=1, dtype=element)
    assert np.array_equal(y, reference.conv(x[None], weight, bias, None, spec)[0])


# Initial values -----------------------------------------------------------------------------------------------------


def _backward(gradient, weight):
    """The gradient before a stride-1 "same" layer, from the one after it."""
    return cconv.conv2d(gradient, weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1], padding="same")


def _scales(draw, layers=10, channels=12, size=24):
    """By how much ten layers with ReLU stretch a signal, forward and backward."""
    rng = np.random.default_rng(1)
    signal, gradient = rng.standard_normal((2, channels, size, size), dtype=np.float32)
    first, last, passed = signal, gradient, []
    for layer in range(layers):
        weight = draw((channels, channels, 3, 3), layer)
        signal = cconv.conv2d(signal, weight, padding="same", activation="relu")
        passed.append((weight, signal > 0))
    for weight, through in reversed(passed):
        gradient = _backward(gradient * through, weight)

    def rms(a):
        return np.sqrt(np.mean(np.square(a, dtype=np.float64)))

    return rms(signal) / rms(first), rms(gradient) / rms(last)


def test_too_large_initial_values_explode_both_ways():
    assert min(_scales(lambda shape, seed: init.normal(shape, 1.0, seed))) > 1e7


def test_too_small_initial_values_vanish_both_ways():
    assert max(_scales(lambda shape, seed: init.normal(shape, 0.01, seed))) < 1e-9


@pytest.mark.parametrize("draw", [init.he_normal, init.he_uniform])
def test_he_keeps_the_scale_both_ways(draw):
    for scale in _scales(draw):
        assert 0.2 < scale < 5


def test_without_rectification_lecun_keeps_the_scale_and_with_it_loses_half_the_variance_a_layer():
    with_relu = _scales(init.lecun_normal)[0]
    assert with_relu == pytest.approx(_scales(init.he_normal)[0] * 2**-5, rel=1e-3)


def test_equal_initial_values_make_all_filters_the_same_filter(normal):
    y = cconv.conv2d(normal((3, 8, 8)), init.constant((4, 3, 3, 3), 0.1))
    assert (y == y[0]).all()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_backward_signal_is_the_transposed_of_the_layer(kernel, normal):
    """<conv(x), g> = <x, backward(g)>: what defines the gradient of a linear layer."""
    x, g = normal((3, 9, 10), "float64"), normal((5, 9, 10), "float64")
    weight = normal((5, 3, kernel, kernel), "float64")
    forward, backward = cconv.conv2d(x, weight, padding="same"), _backward(g, weight)
    assert backward.shape == x.shape
    assert (forward * g).sum() == pytest.approx((x * backward).sum(), rel=1e-12)
