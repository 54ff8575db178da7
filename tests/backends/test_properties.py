"""Properties: what must hold between results, whatever the shapes: linearity, shifts, splits, threads, batches."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cconv

#: Hypothesis hands out shapes and a seed; whole numbers make every property exact.
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def convolutions(draw, channels=6, size=12):
    """Shapes and options of a valid convolution: (x_shape, w_shape, options)."""
    groups = draw(st.integers(1, 3))
    depth, outputs = draw(st.integers(1, channels)), draw(st.integers(1, channels))
    kernel = draw(st.tuples(*[st.integers(1, 5)] * 2))
    stride, dilation = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = draw(st.one_of(st.just("same"), st.tuples(*[st.integers(0, 4)] * 4)))
    around = (0, 0, 0, 0) if padding == "same" else padding
    least = [
        max(1, d * (k - 1) + 1 - around[i] - around[i + 2])
        for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
    ]
    image = tuple(draw(st.integers(low, low + size)) for low in least)
    x_shape = (draw(st.integers(1, 3)), groups * depth, *image)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x_shape, (groups * outputs, depth, *kernel), options


def _whole(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [rng.integers(-8, 9, shape).astype(dtype) for shape in shapes]


def _check_definition(twin, problem, seed, dtype, convolve, by_definition):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape, dtype=dtype)
    got = convolve(twin, x, weight, **options, algorithm="direct")
    np.testing.assert_array_equal(got, by_definition(x, weight, **options))


@given(problem=convolutions(), seed=SEEDS)
def test_any_valid_convolution_gives_the_definition(twin, dtype, problem, seed, convolve, by_definition):
    _check_definition(twin, problem, seed, dtype, convolve, by_definition)


@pytest.mark.slow
@settings(max_examples=3000)
@given(problem=convolutions(channels=70, size=40), seed=SEEDS)
def test_any_valid_larger_convolution_gives_the_definition(backend, dtype, problem, seed, convolve, by_definition):
    _check_definition(backend, problem, seed, dtype, convolve, by_definition)


@given(problem=convolutions(), seed=SEEDS, a=st.integers(-4, 4), b=st.integers(-4, 4))
def test_it_is_linear_in_the_image_and_in_the_weight(backend, problem, seed, a, b, convolve):
    x_shape, w_shape, options = problem
    x1, x2, w1, w2 = _whole(seed, x_shape, x_shape, w_shape, w_shape)

    def run(x, w):
        return convolve(backend, x, w, **options, algorithm="direct")

    np.testing.assert_array_equal(run(a * x1 + b * x2, w1), a * run(x1, w1) + b * run(x2, w1))
    np.testing.assert_array_equal(run(x1, a * w1 + b * w2), a * run(x1, w1) + b * run(x1, w2))


@given(problem=convolutions(), seed=SEEDS, down=st.integers(0, 3), right=st.integers(0, 3))
def test_shifting_the_image_by_strides_shifts_the_maps(backend, problem, seed, down, right, convolve):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape)
    options = options | {"padding": "valid"}
    rows, columns = (d * (k - 1) + 1 for d, k in zip(options["dilation"], w_shape[2:], strict=True))
    x = np.pad(x, ((0, 0), (0, 0), (0, rows), (0, columns)))
    y = convolve(backend, x, weight, **options)
    offset = (down * options["stride"][0], right * options["stride"][1])
    shifted = convolve(backend, np.pad(x, ((0, 0), (0, 0), (offset[0], 0), (offset[1], 0))), weight, **options)
    np.testing.assert_array_equal(shifted[:, :, down:, right:], y)


@given(problem=convolutions(), seed=SEEDS)
def test_groups_are_the_concatenation_of_their_parts(backend, problem, seed, convolve):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape)
    groups, alone = options["groups"], options | {"groups": 1}
    parts = [
        convolve(backend, np.ascontiguousarray(image), bank, **alone)
        for image, bank in zip(np.split(x, groups, axis=1), np.split(weight, groups), strict=True)
    ]
    np.testing.assert_array_equal(convolve(backend, x, weight, **options), np.concatenate(parts, axis=1))


@given(problem=convolutions(), seed=SEEDS)
def test_dilation_is_a_kernel_stuffed_with_zeros(backend, problem, seed, convolve):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape)
    rows, columns = options["dilation"]
    stuffed = np.zeros((*w_shape[:2], rows * (w_shape[2] - 1) + 1, columns * (w_shape[3] - 1) + 1), np.float32)
    stuffed[:, :, ::rows, ::columns] = weight
    np.testing.assert_array_equal(
        convolve(backend, x, weight, **options), convolve(backend, x, stuffed, **(options | {"dilation": 1}))
    )


@given(problem=convolutions(), seed=SEEDS)
def test_padding_is_an_image_padded_before(backend, problem, seed, convolve):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape)
    top, left, bottom, right = (1, 2, 0, 3) if options["padding"] == "same" else options["padding"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(options["dilation"], w_shape[2:], strict=True)]
    if padded.shape[2] < reach[0] or padded.shape[3] < reach[1]:
        return
    np.testing.assert_array_equal(
        convolve(backend, x, weight, **(options | {"padding": (top, left, bottom, right)})),
        convolve(backend, padded, weight, **(options | {"padding": 0})),
    )


@given(problem=convolutions(), seed=SEEDS)
def test_a_stride_keeps_every_second_output(backend, problem, seed, convolve):
    x_shape, w_shape, options = problem
    x, weight = _whole(seed, x_shape, w_shape)
    options = options | {"padding": (2, 2, 2, 2)}
    rows, columns = options["stride"]
    reach = [d * (k - 1) + 1 for d, k in zip(options["dilation"], w_shape[2:], strict=True)]
    if x_shape[2] + 4 < reach[0] or x_shape[3] + 4 < reach[1]:
        return
    every = convolve(backend, x, weight, **(options | {"stride": 1}))
    np.testing.assert_array_equal(convolve(backend, x, weight, **options), every[:, :, ::rows, ::columns])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_delta_kernel_is_the_identity(backend, dtype, size, normal, convolve):
    x = normal((2, 5, 11, 13), dtype)
    weight = np.zeros((5, 5, size, size), dtype)
    weight[range(5), range(5), size // 2, size // 2] = 1
    np.testing.assert_array_equal(convolve(backend, x, weight, padding="same", algorithm="direct"), x)


def test_a_kernel_of_ones_sums_boxes(backend, dtype, whole, convolve):
    x = whole((1, 1, 20, 31), dtype)
    sums = np.pad(x[0, 0].astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    boxes = sums[4:, 5:] - sums[:-4, 5:] - sums[4:, :-5] + sums[:-4, :-5]
    np.testing.assert_array_equal(convolve(backend, x, np.ones((1, 1, 4, 5), dtype))[0, 0], boxes)


def test_the_transposed_and_flipped_kernel_is_the_adjoint(backend, whole, convolve):
    """<conv(x), y> = <x, conv'(y)>, conv' with the weights transposed in (K, C) and flipped in (R, S)."""
    x, y, weight = whole((1, 7, 9, 10)), whole((1, 5, 9, 10)), whole((5, 7, 3, 3))
    forward = convolve(backend, x, weight, padding=1)
    backward = convolve(backend, y, np.ascontiguousarray(weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]), padding=1)
    assert np.vdot(forward.astype(np.float64), y) == np.vdot(x, backward.astype(np.float64))


def test_an_images_result_does_not_depend_on_batch_or_position(backend, dtype, case, normal, convolve):
    """Bit for bit, for one plan: `direct` pins it."""
    options = case.options | {"algorithm": "direct", "activation": "silu"}
    x, weight = normal((5, *case.x[1:]), dtype), normal(case.weight, dtype)
    together = convolve(backend, x, weight, **options)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(convolve(backend, np.ascontiguousarray(x[order]), weight, **options), together[order])
    for i in range(len(x)):
        np.testing.assert_array_equal(convolve(backend, x[i : i + 1], weight, **options)[0], together[i])


def test_a_result_does_not_depend_on_the_number_of_threads(dtype, case, normal):
    x, weight, bias = normal(case.x, dtype), normal(case.weight, dtype), normal(case.weight[0], dtype)
    before = cconv.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            cconv.set_num_threads(threads)
            results.append(cconv.conv2d(x, weight, bias, **case.options, algorithm="direct"))
    finally:
        cconv.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_large_result_does_not_depend_on_the_number_of_threads(normal):
    """Large enough that the threads are really used."""
    x, weight = normal((2, 32, 40, 40)), normal((70, 32, 3, 3))
    before = cconv.get_num_threads()
    try:
        cconv.set_num_threads(1)
        alone = cconv.conv2d(x, weight, padding=1)
        for threads in (2, 3, 5):
            cconv.set_num_threads(threads)
            np.testing.assert_array_equal(cconv.conv2d(x, weight, padding=1), alone)
    finally:
        cconv.set_num_threads(before)


def test_calls_from_many_threads_do_not_disturb_each_other(normal):
    layer = cconv.Conv2d(normal((33, 16, 3, 3)), padding=1)
    inputs = [normal((1, 16, 20 + i % 5, 21)) for i in range(40)]
    expected = [layer(x) for x in inputs]
    gate = threading.Barrier(4)

    def work(part):
        gate.wait()
        return [layer(x) for x in inputs[part::4]]

    with ThreadPoolExecutor(4) as pool:
        for part, results in enumerate(pool.map(work, range(4))):
            for got, want in zip(results, expected[part::4], strict=True):
                np.testing.assert_array_equal(got, want)
