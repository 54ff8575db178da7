"""Pooling: windows against the reference and against windows written out, padding that never wins, NaN that does."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cconv
from cconv import reference
from cconv.planning import plan, specs
from cconv.weights import Weights

#: kernel_size and options; the last dimension of the idea in the id.
WINDOWS = [
    pytest.param(2, {}, id="2x2"),
    pytest.param(3, {"stride": 2}, id="3x3-stride-2"),
    pytest.param(3, {"stride": 2, "padding": 1}, id="3x3-stride-2-padded"),
    pytest.param(3, {"stride": 1, "padding": 1}, id="3x3-stride-1"),
    pytest.param((1, 4), {"stride": (3, 1)}, id="1x4"),
    pytest.param((5, 1), {"stride": (1, 2), "padding": (2, 0)}, id="5x1"),
    pytest.param(2, {"ceil_mode": True}, id="ceil"),
    pytest.param(3, {"stride": 2, "padding": 1, "ceil_mode": True}, id="ceil-padded"),
    pytest.param(3, {"stride": 3, "padding": (1, 0, 0, 1)}, id="asymmetric"),
    pytest.param(3, {"stride": 2, "padding": "same"}, id="same"),
    pytest.param((11, 13), {}, id="whole-image"),
]
IMAGE = (2, 5, 11, 13)


def _oracle(x, kind, kernel, **options):
    spec = specs.pool(kind, x.shape[1:], kernel, dtype=x.dtype.name, **options)
    program = reference.build(plan.single(spec, reference.machine()), Weights({}.__getitem__))
    return program.run([x])[0]


def _windows(x, kernel, stride, padding, dilation, ceil_mode):
    """By definition, PyTorch's words: every window's values, and its position, from a square kernel."""
    size = x.shape[2:]
    round_ = math.ceil if ceil_mode else math.floor
    counts = [round_((n + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1 for n in size]
    counts = [c - 1 if ceil_mode and (c - 1) * stride >= n + padding else c for c, n in zip(counts, size, strict=True)]
    taps = [[[i * stride - padding + k * dilation for k in range(kernel)] for i in range(c)] for c in counts]
    for p, rows in enumerate(taps[0]):
        for q, columns in enumerate(taps[1]):
            inside = [[r for r in rows if 0 <= r < size[0]], [c for c in columns if 0 <= c < size[1]]]
            padded = [[r for r in rows if r < size[0] + padding], [c for c in columns if c < size[1] + padding]]
            yield p, q, x[:, :, inside[0]][:, :, :, inside[1]], len(padded[0]) * len(padded[1])


@pytest.mark.parametrize(("kernel", "options"), WINDOWS)
def test_maxima_are_exact(dtype, kernel, options, normal):
    x = normal(IMAGE, dtype)
    got = cconv.max_pool2d(x, kernel, **options)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, _oracle(x, "max", kernel, **options))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("kernel", "options"), WINDOWS)
def test_means_agree_with_the_reference(dtype, kernel, options, count_include_pad, normal):
    x = normal(IMAGE, dtype)
    got = cconv.avg_pool2d(x, kernel, **options, count_include_pad=count_include_pad)
    assert got.dtype == dtype
    exact = _oracle(x, "average", kernel, **options, count_include_pad=count_include_pad)
    bound = _oracle(np.abs(x), "average", kernel, **options, count_include_pad=count_include_pad)
    assert (np.abs(got - exact) <= 2e-5 * (2.0**-29 if dtype == "float64" else 1) * bound).all()


@st.composite
def windows(draw):
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "size": tuple(draw(st.integers(dilation * (kernel - 1) + 1, 14)) for _ in range(2)),
        "kernel": kernel,
        "stride": draw(st.integers(1, 5)),
        "padding": draw(st.integers(0, kernel // 2)),
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
    }


@given(window=windows(), seed=st.integers(0, 2**32 - 1))
def test_any_valid_window_gives_the_definition(window, seed):
    size, kernel, *rest = window.values()
    x = np.random.default_rng(seed).integers(-99, 100, (2, 3, *size)).astype(np.float32)
    stride, padding, dilation, ceil_mode = rest
    got = cconv.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    expected = np.full(got.shape, np.nan)
    for p, q, values, _ in _windows(x, kernel, *rest):
        expected[:, :, p, q] = values.max(axis=(2, 3))
    np.testing.assert_array_equal(got, expected)
    for count_include_pad in (True, False):
        got = cconv.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, dilation=dilation)
        for p, q, values, positions in _windows(x, kernel, *rest):
            divisor = positions if count_include_pad else values.shape[2] * values.shape[3]
            expected[:, :, p, q] = values.sum(axis=(2, 3)) / divisor
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_padding_never_wins(dtype):
    x = np.full((1, 1, 3, 3), -5, dtype)
    np.testing.assert_array_equal(cconv.max_pool2d(x, 3, 1, 1), x)
    x[:] = -np.inf
    np.testing.assert_array_equal(cconv.max_pool2d(x, 3, 1, 1), x)


def test_nan_wins_in_its_windows_alone(dtype, normal):
    x = normal((1, 20, 8, 9), dtype)
    clean = cconv.max_pool2d(x, 2, 2)
    x[0, 7, 3, 5] = np.nan
    got = cconv.max_pool2d(x, 2, 2)
    assert np.argwhere(np.isnan(got)).tolist() == [[0, 7, 1, 2]]
    np.testing.assert_array_equal(np.where(np.isnan(got), clean, got), clean)
    assert np.isnan(cconv.avg_pool2d(x, 2, 2)[0, 7, 1, 2])
    assert np.isnan(cconv.global_max_pool2d(x)[0, 7])


@pytest.mark.parametrize("shape", [(2, 5, 11, 13), (1, 512, 7, 7), (3, 17, 1, 1), (5, 6, 7)])
def test_global_pools_reduce_each_map(dtype, shape, normal):
    x = normal(shape, dtype)
    exact = x.astype(np.float64)
    np.testing.assert_array_equal(cconv.global_max_pool2d(x), exact.max(axis=(-2, -1), keepdims=True))
    mean, size = cconv.global_avg_pool2d(x), np.abs(exact).mean(axis=(-2, -1), keepdims=True)
    assert mean.shape == (*shape[:-2], 1, 1)
    assert (np.abs(mean - exact.mean(axis=(-2, -1), keepdims=True)) <= 2e-6 * size).all()


def test_the_mean_of_a_large_map_does_not_drift():
    x = np.full((1, 1, 1000, 1000), 0.1, np.float32)
    assert abs(cconv.global_avg_pool2d(x).item() - float(np.float32(0.1))) <= 2e-6 * 0.1


def test_the_stride_defaults_to_the_kernel(normal):
    x = normal((1, 2, 9, 9))
    np.testing.assert_array_equal(cconv.max_pool2d(x, 3), cconv.max_pool2d(x, 3, 3))
    np.testing.assert_array_equal(cconv.avg_pool2d(x, (2, 3)), cconv.avg_pool2d(x, (2, 3), (2, 3)))


@pytest.mark.parametrize(
    "view", [np.asfortranarray, lambda a: a[:, ::-1, ::-1, ::-1], lambda a: a.transpose(0, 1, 3, 2)]
)
def test_strides_do_not_matter(dtype, view, normal):
    x = view(normal((2, 5, 9, 9), dtype))
    for pool in (cconv.max_pool2d, cconv.avg_pool2d):
        np.testing.assert_array_equal(pool(x, 3, 2, 1), pool(np.ascontiguousarray(x), 3, 2, 1))
    np.testing.assert_array_equal(cconv.activate(x, "relu"), np.maximum(x, 0))


def test_pooling_does_not_depend_on_batch_or_threads(dtype, normal):
    x = normal((6, 33, 24, 25), dtype)
    before = cconv.get_num_threads()
    try:
        for pool in (lambda x: cconv.max_pool2d(x, 3, 2), lambda x: cconv.avg_pool2d(x, 3, 2), cconv.global_avg_pool2d):
            cconv.set_num_threads(1)
            alone = np.concatenate([pool(x[i : i + 1]) for i in range(6)])
            cconv.set_num_threads(3)
            np.testing.assert_array_equal(pool(x), alone)
    finally:
        cconv.set_num_threads(before)


def test_a_global_average_of_equal_numbers_is_that_number(backend):
    x = np.full((1, 1, 600, 700), 0.1, np.float32)
    y = backend.to_numpy(cconv.global_avg_pool2d(backend.asarray(x)))
    assert y.item() == np.float32(0.1)
