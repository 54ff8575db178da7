"""Shapes: the one output-size formula and the windows, against counting by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cconv import ArgumentError, ShapeError
from cconv.planning import shapes

SMALL = st.integers(1, 7)


@given(
    size=st.integers(1, 30),
    kernel=SMALL,
    stride=SMALL,
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    dilation=SMALL,
)
def test_the_output_size_is_the_number_of_windows_that_fit(size, kernel, stride, before, after, dilation):
    reach = dilation * (kernel - 1) + 1
    counted = sum(1 for begin in range(0, before + size + after, stride) if begin + reach <= before + size + after)
    assert max(0, shapes.output_size(size, kernel, stride, before + after, dilation)) == counted


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "dilation", "expected"),
    [
        (3, 2, 1, 0, 1, 2),  # the lecture's 3x3 and 2x2
        (5, 3, 2, 2, 1, 3),  # the cs231n demo
        (64, 5, 1, 4, 1, 64),
        (224, 7, 2, 6, 1, 112),
        (224, 11, 4, 4, 1, 55),
        (56, 3, 2, 2, 1, 28),
        (7, 7, 1, 0, 1, 1),
        (32, 3, 1, 4, 2, 32),
        (2, 3, 1, 0, 1, 0),
    ],
)
def test_known_sizes(size, kernel, stride, pad, dilation, expected):
    assert shapes.output_size(size, kernel, stride, pad, dilation) == expected


@given(size=st.integers(1, 40), kernel=SMALL, stride=SMALL, dilation=SMALL)
def test_same_gives_ceil_of_size_over_stride_and_the_extra_one_to_the_end(size, kernel, stride, dilation):
    top, left, bottom, right = shapes.padding("same", (size, size), (kernel, 1), (stride, 1), (dilation, 1))
    assert (left, right) == (0, 0)
    assert bottom - top in (0, 1)
    assert shapes.output_size(size, kernel, stride, top + bottom, dilation) == -(-size // stride)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, (0, 0, 0, 0)),
        (2, (2, 2, 2, 2)),
        ((1, 3), (1, 3, 1, 3)),
        ([1, 3], (1, 3, 1, 3)),
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        (np.int64(2), (2, 2, 2, 2)),
        ("valid", (0, 0, 0, 0)),
        ("same", (1, 0, 1, 1)),
    ],
    ids=str,
)
def test_every_form_of_padding(value, expected):
    """ONNX's order: top, left, bottom, right."""
    assert shapes.padding(value, (8, 9), (3, 2), (1, 1), (1, 1)) == expected


@pytest.mark.parametrize("value", [-1, (0, -1), (1, 2, 3), (1, 1, 1, 1, 1), 1.0, "1", None, True, (1, None)], ids=str)
def test_other_paddings_are_refused(value):
    with pytest.raises((ShapeError, ArgumentError), match="padding: expected"):
        shapes.padding(value, (8, 8), (3, 3), (1, 1), (1, 1))


@given(
    size=st.integers(1, 20), kernel=st.integers(1, 5), stride=st.integers(1, 6), dilation=st.integers(1, 3),
    ceil_mode=st.booleans(), data=st.data(),
)  # fmt: skip
def test_windows_lie_inside_the_image_and_divide_by_the_right_count(size, kernel, stride, dilation, ceil_mode, data):
    before, after = (data.draw(st.integers(0, kernel // 2)) for _ in range(2))
    for count_include_pad in (True, False):
        try:
            window = shapes.pooling_window(size, kernel, stride, before, after, dilation, ceil_mode, count_include_pad)
        except ShapeError:
            continue
        for i, (start, stop, extent) in enumerate(zip(window.start, window.stop, window.extent, strict=True)):
            taps = [i * stride - before + k * dilation for k in range(kernel)]
            assert list(range(start, stop, window.step)) == [t for t in taps if 0 <= t < size]
            assert extent == sum(1 for t in taps if t < size + after and (count_include_pad or 0 <= t < size))


@given(size=st.integers(1, 50), outputs=st.integers(1, 50))
def test_adaptive_windows_cover_the_image_without_gaps(size, outputs):
    window = shapes.adaptive_window(size, outputs)
    assert window.start[0] == 0
    assert window.stop[-1] == size
    assert all(begin < end for begin, end in zip(window.start, window.stop, strict=True))
    assert all(begin <= end for begin, end in zip(window.start[1:], window.stop, strict=False))
