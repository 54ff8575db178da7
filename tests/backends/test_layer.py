"""Layer: a Conv2d object gives conv2d's bits, keeps its own packed weights and knows its cost."""

import numpy as np
import pytest

import cconv
from cconv import ops


def test_a_layer_gives_the_bits_of_the_function(dtype, case, normal):
    x, weight, bias = normal(case.x, dtype), normal(case.weight, dtype), normal(case.weight[0], dtype)
    options = case.options | {"activation": "relu"}
    layer = cconv.Conv2d(weight, bias, **options, algorithm="direct")
    np.testing.assert_array_equal(layer(x), cconv.conv2d(x, weight, bias, **options, algorithm="direct"))
    # Left to itself the function may take another algorithm: it packs its weights for one run.
    y, depth = cconv.Conv2d(weight, bias, **options)(x), weight[0].size
    bound = 2e-5 * max(1, depth / 2304) ** 0.5 * 2 * np.sqrt(depth) * (1 if dtype == "float32" else 2**-29)
    np.testing.assert_allclose(y, cconv.conv2d(x, weight, bias, **options), 0, bound)


def test_an_image_has_the_same_bits_in_a_batch_a_layer_and_a_call(dtype, normal):
    """By "direct", where a layer's time by two kernels that sum in different orders is about the same."""
    for image, outputs, size, stride, padding in (((2, 7, 7), 2, 5, 1, 0), ((128, 3, 5), 128, 5, 2, 2)):
        x, weight = normal((16, *image), dtype), normal((outputs, 1, size, size), dtype)
        options = {"stride": stride, "padding": padding, "groups": image[0], "algorithm": "direct"}
        want = cconv.Conv2d(weight, **options)(x)
        for first, last in ((0, 1), (3, 5), (0, 16)):
            assert cconv.conv2d(x[first:last], weight, **options).tobytes() == want[first:last].tobytes()


def test_it_adds_a_residual_and_writes_to_out(dtype, whole):
    x, weight, residual = whole((2, 3, 8, 8), dtype), whole((16, 3, 3, 3), dtype), whole((2, 16, 8, 8), dtype)
    layer = cconv.Conv2d(weight, padding="same")
    expected = layer(x) + residual
    np.testing.assert_array_equal(layer(x, residual), expected)
    assert layer(x, residual, residual) is residual
    np.testing.assert_array_equal(residual, expected)


def test_later_changes_to_the_passed_arrays_have_no_effect(whole):
    x, weight, bias = whole((1, 3, 8, 8)), whole((4, 3, 3, 3)), whole(4)
    layer = cconv.Conv2d(weight, bias)
    expected = cconv.conv2d(x, weight, bias)
    weight[:] = 0
    bias[:] = 0
    np.testing.assert_array_equal(layer(x), expected)


def test_one_layer_serves_images_of_many_sizes(whole):
    layer = cconv.Conv2d(weight := whole((5, 3, 3, 3)), padding=1)
    for size in range(3, 3 + 2 * ops.PROGRAMS_PER_LAYER):
        x = whole((1, 3, size, size + 1))
        np.testing.assert_array_equal(layer(x), cconv.conv2d(x, weight, padding=1))
    np.testing.assert_array_equal(layer(x[0]), layer(x)[0])


def test_it_knows_its_cost(whole):
    layer = cconv.Conv2d(whole((100, 100, 5, 5)), whole(100), padding=2, activation="sigmoid")
    expected = cconv.conv2d_cost((8, 100, 64, 64), (100, 100, 5, 5), bias=True, padding=2, activation="sigmoid")
    assert layer.cost((8, 100, 64, 64)) == expected
    assert layer.cost((100, 64, 64)) * 8 == cconv.Cost(
        expected.macs, expected.flops_other, layer.cost((100, 64, 64)).bytes * 8
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"groups": 2}, cconv.ShapeError),
        ({"stride": 0}, cconv.ShapeError),
        ({"padding": "some"}, cconv.ArgumentError),
        ({"activation": "softplus"}, cconv.ArgumentError),
        ({"algorithm": "magic"}, cconv.ArgumentError),
        ({"precision": "low"}, cconv.ArgumentError),
        ({"bias": np.zeros(3, np.float32)}, cconv.ShapeError),
        ({"bias": np.zeros(5)}, cconv.DTypeError),
    ],
    ids=str,
)
def test_options_are_checked_when_it_is_made(arguments, error):
    with pytest.raises(error):
        cconv.Conv2d(np.ones((5, 3, 3, 3), np.float32), **arguments)


def test_it_refuses_images_that_do_not_fit():
    layer = cconv.Conv2d(np.ones((5, 3, 3, 3), np.float32))
    with pytest.raises(cconv.ShapeError, match=r"x: expected 3 input channels.* got 4"):
        layer(np.ones((1, 4, 8, 8), np.float32))
    with pytest.raises(cconv.DTypeError, match="expected float32"):
        layer(np.ones((1, 3, 8, 8)))
    with pytest.raises(cconv.ShapeError, match="kernel no larger than the padded image"):
        layer(np.ones((1, 3, 2, 8), np.float32))
