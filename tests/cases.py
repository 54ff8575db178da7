"""Cases: the convolutions that every backend must get right, as data.

In: nothing.  Out: CASES, a tuple of Case; tests/conftest.py hands them to any test that asks for `case`.

Sizes lie around the register tiles (13, 14, 15 pixels; 16, 17, 31, 32, 33 channels), at primes and at the extremes; one
case per idea, small enough that the float64 oracle takes milliseconds.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One convolution: shapes and conv2d's options."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    options: dict = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def depth(self) -> int:
        """Products summed for one output."""
        _, depth, rows, columns = self.weight
        return depth * rows * columns


def _case(name, x, weight, **options) -> Case:
    return Case(name, x, weight, options)


_KERNELS = (
    _case("one-number", (1, 1, 1, 1), (1, 1, 1, 1)),
    _case("lecture", (1, 2, 3, 3), (3, 2, 2, 2)),
    _case("cs231n", (1, 3, 5, 5), (2, 3, 3, 3), padding=1, stride=2),
    _case("3x3", (2, 8, 9, 11), (12, 8, 3, 3), padding=1),
    _case("3x3-no-padding", (2, 5, 7, 7), (6, 5, 3, 3)),
    _case("1x1", (2, 7, 10, 9), (19, 7, 1, 1)),
    _case("1x7", (1, 6, 8, 15), (10, 6, 1, 7), padding=(0, 3)),
    _case("7x1", (1, 6, 15, 8), (10, 6, 7, 1), padding=(3, 0)),
    _case("2x2-even-kernel", (1, 4, 8, 8), (5, 4, 2, 2)),
    _case("5x5-lecture-layer", (1, 100, 12, 13), (100, 100, 5, 5), padding=2),
    _case("11x11-stride-4", (1, 3, 47, 43), (16, 3, 11, 11), stride=4, padding=2),
    _case("7x7-stride-2-stem", (1, 3, 33, 29), (16, 3, 7, 7), stride=2, padding=3),
    _case("kernel-equal-to-image", (3, 5, 6, 7), (20, 5, 6, 7)),
    _case("kernel-larger-than-image-before-padding", (1, 2, 3, 2), (4, 2, 5, 5), padding=2),
    _case("kernel-mostly-on-padding", (1, 3, 2, 2), (4, 3, 9, 9), padding=4),
)

_STRIDE_PADDING_DILATION = (
    _case("stride-2", (2, 6, 13, 14), (9, 6, 3, 3), stride=2, padding=1),
    _case("stride-3x2", (1, 5, 17, 16), (8, 5, 3, 5), stride=(3, 2)),
    _case("stride-larger-than-kernel", (1, 4, 16, 15), (6, 4, 2, 2), stride=(5, 4)),
    _case("stride-2-1x1", (1, 12, 14, 15), (20, 12, 1, 1), stride=2),
    _case("stride-larger-than-image", (1, 3, 4, 4), (5, 3, 3, 3), stride=7),
    _case("padding-asymmetric", (1, 4, 9, 8), (7, 4, 3, 4), padding=(2, 0, 1, 3)),
    _case("padding-one-side", (1, 4, 9, 8), (7, 4, 3, 3), padding=(0, 0, 0, 2)),
    _case("padding-larger-than-kernel", (1, 2, 5, 5), (3, 2, 2, 2), padding=4),
    _case("same", (1, 5, 10, 11), (8, 5, 3, 3), padding="same"),
    _case("same-even-kernel", (1, 5, 10, 11), (8, 5, 4, 2), padding="same"),
    _case("same-stride-2", (1, 5, 10, 11), (8, 5, 5, 3), padding="same", stride=2),
    _case("valid", (1, 5, 10, 11), (8, 5, 3, 3), padding="valid"),
    _case("dilation-2", (1, 6, 15, 14), (10, 6, 3, 3), dilation=2, padding=2),
    _case("dilation-3x1", (1, 4, 20, 9), (6, 4, 3, 3), dilation=(3, 1)),
    _case("dilation-and-stride", (1, 4, 21, 19), (6, 4, 3, 3), dilation=(2, 3), stride=(2, 3), padding=(1, 2)),
    _case("dilation-multiple-of-stride", (1, 4, 21, 19), (6, 4, 3, 3), dilation=4, stride=2, padding=3),
)

_GROUPS = (
    _case("groups-2", (2, 8, 9, 9), (12, 4, 3, 3), groups=2, padding=1),
    _case("groups-3-odd", (1, 15, 8, 7), (21, 5, 3, 3), groups=3),
    _case("groups-wide", (1, 32, 8, 9), (64, 16, 3, 3), groups=2, padding=1),
    _case("groups-of-4", (1, 32, 14, 14), (32, 4, 3, 3), groups=8, padding=1),
    _case("depthwise", (2, 13, 10, 11), (13, 1, 3, 3), groups=13, padding=1),
    _case("depthwise-stride-2", (1, 16, 15, 17), (16, 1, 3, 3), groups=16, stride=2, padding=1),
    _case("depthwise-5x5-dilated", (1, 9, 19, 18), (9, 1, 5, 5), groups=9, dilation=2, padding=4),
    _case("depthwise-multiplier-2", (1, 7, 9, 10), (14, 1, 3, 3), groups=7, padding=1),
    _case("depthwise-multiplier-17", (1, 3, 9, 10), (51, 1, 3, 3), groups=3, padding=1),
    _case("depthwise-one-pixel-out", (3, 8, 4, 4), (8, 1, 4, 4), groups=8),
    _case("groups-one-pixel-out", (3, 8, 4, 4), (40, 4, 4, 4), groups=2),
)

#: A tile's pixels are consecutive outputs of a row or of several rows: both are tried at every remainder.
_PIXELS = tuple(
    _case(f"pixels-{rows}x{columns}", (1, 4, rows, columns), (33, 4, 3, 3), padding=1)
    for rows, columns in ((1, 13), (1, 14), (1, 15), (13, 1), (3, 16), (2, 17), (5, 31), (4, 32), (3, 33), (7, 29))
)
_CHANNELS = tuple(
    _case(f"channels-{inputs}-to-{outputs}", (1, inputs, 6, 7), (outputs, inputs, 3, 3), padding=1)
    for inputs, outputs in (
        (1, 1),
        (3, 13),
        (13, 14),
        (15, 15),
        (16, 16),
        (17, 17),
        (31, 31),
        (32, 32),
        (33, 33),
        (5, 97),
    )
)

_EXTREMES = (
    _case("deep", (1, 512, 4, 5), (40, 512, 3, 3), padding=1),
    _case("deep-1x1", (2, 512, 3, 3), (48, 512, 1, 1)),
    _case("dense-layer", (5, 512, 1, 1), (100, 512, 1, 1)),
    _case("dense-layer-many-images", (33, 24, 2, 2), (10, 24, 2, 2)),
    _case("many-images", (17, 3, 4, 5), (4, 3, 3, 3), padding=1),
    _case("wide-row", (1, 2, 2, 700), (17, 2, 3, 3), padding=1),
    _case("tall-column", (1, 2, 700, 2), (17, 2, 3, 3), padding=1),
    _case("vgg-first-layer", (1, 3, 40, 40), (64, 3, 3, 3), padding=1),
)

#: Where "auto" may take Winograd: tiles that the map does not fill, that cross images, and that lie on padding.
_WINOGRAD = (
    _case("winograd-3x3", (2, 32, 13, 14), (48, 32, 3, 3), padding=1),
    _case("winograd-many-small-images", (9, 24, 7, 7), (32, 24, 3, 3), padding=1),
    _case("winograd-5x5-padding-asymmetric", (1, 32, 20, 19), (20, 32, 5, 5), padding=(0, 3, 1, 4)),
    _case("winograd-7x7", (1, 16, 15, 22), (33, 16, 7, 7), padding="same"),
    _case("winograd-3x3-stride-2", (2, 32, 17, 22), (33, 32, 3, 3), padding=1, stride=2),
    _case("winograd-5x5-stride-2", (3, 24, 19, 16), (20, 24, 5, 5), padding=(2, 1, 0, 3), stride=2),
    _case("winograd-3x3-dilated", (2, 32, 15, 20), (33, 32, 3, 3), padding=2, dilation=2),
)

CASES = _KERNELS + _STRIDE_PADDING_DILATION + _GROUPS + _PIXELS + _CHANNELS + _EXTREMES + _WINOGRAD
