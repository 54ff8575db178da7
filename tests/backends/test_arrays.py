"""Arrays: which memory may come in and go out, at any strides; what is never written; where NaN and Inf may go."""

import ctypes
import mmap
import pickle

import numpy as np
import pytest

import cconv


def _pixels_last(a):
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _reversed(a):
    return a[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]


def _every_second(a):
    spread = np.full([2 * n for n in a.shape], np.nan, a.dtype)
    spread[::2, 1::2, ::2, 1::2] = a
    return spread[::2, 1::2, ::2, 1::2]


def _cropped(a):
    """The inside of a larger array: the elements of a row are neighbours, the rows are not."""
    frame = np.full([n + 2 for n in a.shape], np.nan, a.dtype)
    frame[1:-1, 1:-1, 1:-1, 1:-1] = a
    return frame[1:-1, 1:-1, 1:-1, 1:-1]


def _misaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    view = memory.view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def _read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "pixels-last": _pixels_last,
    "fortran": np.asfortranarray,
    "negative-strides": _reversed,
    "every-second-element": _every_second,
    "cropped": _cropped,
    "misaligned": _misaligned,
    "read-only": _read_only,
}
OPTIONS = [
    pytest.param((2, 6, 9, 10), (9, 6, 3, 3), {"padding": 1}, id="3x3"),
    pytest.param((2, 6, 9, 10), (40, 6, 1, 1), {}, id="1x1"),
    pytest.param((2, 6, 9, 10), (40, 6, 1, 1), {"stride": 2}, id="1x1-stride-2"),
    pytest.param((2, 6, 9, 10), (6, 1, 3, 3), {"padding": 1, "groups": 6}, id="depthwise"),
    pytest.param((2, 6, 4, 3), (9, 6, 4, 3), {}, id="one-pixel-out"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), OPTIONS)
def test_the_layout_of_an_input_does_not_matter(dtype, layout, x_shape, w_shape, options, whole):
    x, weight = whole(x_shape, dtype), whole(w_shape, dtype)
    expected = cconv.conv2d(x, weight, **options)
    residual = whole(expected.shape, dtype)
    view = LAYOUTS[layout]
    np.testing.assert_array_equal(cconv.conv2d(view(x), view(weight), **options), expected)
    np.testing.assert_array_equal(cconv.conv2d(x, weight, residual=view(residual), **options), expected + residual)
    np.testing.assert_array_equal(cconv.Conv2d(view(weight), **options)(view(x)), expected)


@pytest.mark.parametrize("axes", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_strides_of_zero_repeat_values(axes, whole):
    x = whole((3, 4, 6, 6))
    small = x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
    repeated = np.broadcast_to(small, x.shape)
    weight = np.broadcast_to(whole((5, 4, 3, 1)), (5, 4, 3, 3))
    np.testing.assert_array_equal(cconv.conv2d(repeated, weight), cconv.conv2d(repeated.copy(), weight.copy()))


def test_a_strided_bias_counts_its_own_elements(dtype, whole):
    x, weight, bias = whole((1, 3, 5, 5), dtype), whole((7, 3, 3, 3), dtype), whole(14, dtype)
    for view in (bias[::2], bias[::-2]):
        np.testing.assert_array_equal(cconv.conv2d(x, weight, view), cconv.conv2d(x, weight, view.copy()))


@pytest.mark.parametrize(("x_shape", "w_shape", "options"), OPTIONS)
def test_inputs_are_never_written(dtype, x_shape, w_shape, options, normal):
    x, weight, bias = normal(x_shape, dtype), normal(w_shape, dtype), normal(w_shape[0], dtype)
    residual = normal(cconv.conv2d(x, weight, **options).shape, dtype)
    operands = (x, weight, bias, residual)
    before = [a.copy() for a in operands]
    cconv.conv2d(x, weight, bias, residual=residual, activation="relu", **options)
    cconv.max_pool2d(x, 2)
    cconv.avg_pool2d(x, 2)
    cconv.activate(x, "gelu")
    for array, copy in zip(operands, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_one_image_without_a_batch_axis(dtype, whole):
    x, weight = whole((3, 8, 9), dtype), whole((5, 3, 3, 3), dtype)
    y = cconv.conv2d(x, weight, padding=1)
    assert y.shape == (5, 8, 9)
    np.testing.assert_array_equal(y, cconv.conv2d(x[None], weight, padding=1)[0])
    np.testing.assert_array_equal(cconv.conv2d(x, weight, padding=1, residual=y), 2 * y)
    np.testing.assert_array_equal(cconv.max_pool2d(x, 2), cconv.max_pool2d(x[None], 2)[0])


class _OnlyDlpack:
    """An array of some other library: all it has is the protocol."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_dlpack_arrays_come_in_and_numpy_goes_out(dtype, whole):
    x, weight, bias = whole((1, 3, 6, 6), dtype), whole((4, 3, 3, 3), dtype), whole(4, dtype)
    y = cconv.conv2d(_OnlyDlpack(x), _OnlyDlpack(weight), _OnlyDlpack(bias))
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, cconv.conv2d(x, weight, bias))


def test_a_memory_mapped_file_is_an_array(tmp_path, whole):
    x, weight = whole((1, 3, 6, 6)), whole((4, 3, 3, 3))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(cconv.conv2d(mapped, weight), cconv.conv2d(x, weight))


class TestOut:
    def test_the_result_is_written_where_asked_and_returned(self, dtype, whole):
        x, weight = whole((2, 3, 6, 7), dtype), whole((4, 3, 3, 3), dtype)
        expected = cconv.conv2d(x, weight)
        out = np.full(expected.shape, np.nan, dtype)
        assert cconv.conv2d(x, weight, out=out) is out
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read-only"])
    @pytest.mark.parametrize(("x_shape", "w_shape", "options"), OPTIONS)
    def test_it_may_have_any_strides(self, dtype, layout, x_shape, w_shape, options, whole):
        x, weight = whole(x_shape, dtype), whole(w_shape, dtype)
        expected = cconv.conv2d(x, weight, **options)
        out = LAYOUTS[layout](np.zeros_like(expected))
        cconv.conv2d(x, weight, **options, out=out)
        np.testing.assert_array_equal(out, expected)

    def test_nothing_beside_it_is_written(self, dtype, whole):
        x, weight = whole((2, 3, 6, 7), dtype), whole((17, 3, 3, 3), dtype)
        expected = cconv.conv2d(x, weight)
        frame = np.full([n + 2 for n in expected.shape], 77, dtype)
        inside = (slice(1, -1),) * 4
        cconv.conv2d(x, weight, out=frame[inside])
        np.testing.assert_array_equal(frame[inside], expected)
        frame[inside] = 77
        assert (frame == 77).all()

    def test_it_may_be_the_residual(self, dtype, whole):
        x, weight = whole((2, 3, 6, 7), dtype), whole((17, 3, 3, 3), dtype)
        residual = whole((2, 17, 4, 5), dtype)
        expected = cconv.conv2d(x, weight, residual=residual, activation="relu")
        assert cconv.conv2d(x, weight, residual=residual, activation="relu", out=residual) is residual
        np.testing.assert_array_equal(residual, expected)

    @pytest.mark.parametrize("shift", [-40, -3, 3, 40])
    def test_it_may_lie_over_part_of_the_residual(self, dtype, shift, whole):
        """What is written must not be read again as a residual."""
        x, weight, memory = whole((2, 3, 6, 7), dtype), whole((17, 3, 3, 3), dtype), whole(2 * 17 * 20 + 80, dtype)

        def place(begin):
            return memory[begin : begin + 2 * 17 * 20].reshape(2, 17, 4, 5)

        residual, out = place(40), place(40 + shift)
        expected = cconv.conv2d(x, weight, residual=residual.copy())
        cconv.conv2d(x, weight, residual=residual, out=out)
        np.testing.assert_array_equal(out, expected)

    def test_it_may_be_the_residual_backwards(self, dtype, whole):
        x, weight, out = whole((2, 3, 6, 7), dtype), whole((17, 3, 3, 3), dtype), whole((2, 17, 4, 5), dtype)
        residual = out[::-1, ::-1, ::-1, ::-1]
        expected = cconv.conv2d(x, weight, residual=residual.copy())
        cconv.conv2d(x, weight, residual=residual, out=out)
        np.testing.assert_array_equal(out, expected)

    def test_it_works_without_a_batch_axis(self, dtype, whole):
        x, weight = whole((3, 6, 7), dtype), whole((4, 3, 3, 3), dtype)
        expected = cconv.conv2d(x, weight)
        for out in (np.zeros((4, 4, 5), dtype), np.zeros((5, 4, 4), dtype).T):
            assert cconv.conv2d(x, weight, out=out) is out
            np.testing.assert_array_equal(out, expected)

    def test_it_may_not_overlap_what_is_read(self):
        memory = np.zeros(4096, np.float32)
        x, weight = memory[:400].reshape(1, 4, 10, 10), memory[512:548].reshape(1, 4, 3, 3)
        for name, begin in (("x", 399), ("weight", 500)):
            with pytest.raises(cconv.ArgumentError, match=f"out: expected memory apart from {name}'s"):
                cconv.conv2d(x, weight, out=memory[begin : begin + 64].reshape(1, 1, 8, 8))
        cconv.conv2d(x, weight, out=memory[400:464].reshape(1, 1, 8, 8))

    def test_interleaved_memory_is_not_an_overlap(self, whole):
        memory = whole((1, 4, 8, 8, 2))
        x, out = memory[..., 0], memory[..., 1]
        weight = whole((4, 4, 1, 1))
        expected = cconv.conv2d(x.copy(), weight)
        np.testing.assert_array_equal(cconv.conv2d(x, weight, out=out), expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_the_windows_that_hold_them(dtype, case, poison, whole, by_definition):
    x, weight = whole(case.x, dtype), whole(case.weight, dtype)
    weight[weight == 0] = 1
    clean = cconv.conv2d(x, weight, **case.options, algorithm="direct")
    place = (0, case.x[1] // 2, case.x[2] // 2, case.x[3] // 2)
    x[place] = poison
    marker = np.zeros(case.x)
    marker[place] = 1
    touched = by_definition(marker, np.ones(case.weight), **case.options) > 0
    got = cconv.conv2d(x, weight, **case.options, algorithm="direct")
    assert not np.isfinite(got[touched]).any()
    np.testing.assert_array_equal(got[~touched], clean[~touched])


def _guarded(template: np.ndarray, memory: list) -> np.ndarray:
    """A copy whose last byte is the last of a page that is followed by one nobody may touch."""
    page = mmap.PAGESIZE
    size = -(-template.nbytes // page) * page
    mapping = mmap.mmap(-1, size + 2 * page)
    memory.append(mapping)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    for begin in (base, base + page + size):
        assert libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(page), 0) == 0
    array = np.frombuffer(mapping, template.dtype, template.size, page + size - template.nbytes).reshape(template.shape)
    array[...] = template
    return array


def test_not_a_byte_beyond_the_arrays_is_touched(dtype, case, whole):
    """Reading past an array's end would be a segmentation fault here, and a rare crash elsewhere."""
    memory = []
    x, weight, bias = whole(case.x, dtype), whole(case.weight, dtype), whole(case.weight[0], dtype)
    expected = cconv.conv2d(x, weight, bias, **case.options)
    x, weight, bias, out = (_guarded(a, memory) for a in (x, weight, bias, expected))
    out[...] = 0
    cconv.conv2d(x, weight, bias, **case.options, out=out)
    np.testing.assert_array_equal(out, expected)


def test_out_may_lie_over_the_bias(backend, normal):
    memory = normal((1, 64, 4, 16))
    x, weight, bias = normal((1, 8, 4, 16)), normal((64, 8, 1, 1)), memory.reshape(-1)[:64]
    want = cconv.conv2d(x, weight, bias.copy())
    np.testing.assert_array_equal(cconv.conv2d(x, weight, bias, out=memory), want)


def test_a_huge_dilation_reads_only_what_its_taps_touch(backend, convolve):
    x, weight = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 3, 3), np.float32)
    y = convolve(backend, x, weight, padding=2**29, dilation=2**29)
    np.testing.assert_array_equal(y, np.ones((1, 1, 2, 2)))


def test_a_layer_can_be_pickled(backend, normal):
    layer = cconv.Conv2d(normal((6, 2, 3, 3)), normal((6,)), 2, (1, 0, 2, 1), groups=3, activation="silu")
    x = normal((2, 6, 9, 9))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
