"""Images: every kind of JPEG and PNG gives the right pixels, and bytes that are neither give a typed error."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from cconv import ArgumentError, BackendUnavailable, DTypeError, ImageError, ShapeError, images

SIZE = (20, 30)


def _encoded(image, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _expected(rgb) -> np.ndarray:
    return np.asarray(rgb).transpose(2, 0, 1).astype(np.float32) / np.float32(255)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is that large."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(100))) + _chunk(b"IEND", b"")


def test_a_colour_png_is_its_pixels_in_unit_range(rgb):
    x = images.decode(_encoded(Image.fromarray(rgb)))
    assert (x.shape, x.dtype, x.flags.c_contiguous) == ((3, *SIZE), np.float32, True)
    np.testing.assert_array_equal(x, _expected(rgb))


def test_any_buffer_of_bytes_is_accepted(rgb):
    data = _encoded(Image.fromarray(rgb))
    for same in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(images.decode(same), _expected(rgb))


def test_a_jpeg_is_nearly_its_pixels():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    smooth = np.stack([8 * x, 10 * y, 4 * (x + y)], axis=2).astype(np.uint8)
    decoded = images.decode(_encoded(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0))
    assert abs(decoded - _expected(smooth)).max() < 0.05


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("L", "JPEG")])
def test_grey_is_three_equal_channels(mode, form, rgb):
    x = images.decode(_encoded(Image.fromarray(rgb).convert(mode), form))
    assert x.shape == (3, *SIZE)
    assert np.array_equal(x[0], x[1])
    assert np.array_equal(x[0], x[2])
    if form == "PNG":
        np.testing.assert_array_equal(
            x[0], np.asarray(Image.fromarray(rgb).convert(mode).convert("L")) / np.float32(255)
        )


def test_16_bit_grey_keeps_its_16_bits(rng):
    grey = rng.integers(0, 65536, SIZE, dtype=np.uint16)
    x = images.decode(_encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(x[1], grey.astype(np.float32) / np.float32(65535))


def test_a_palette_is_looked_up(rgb):
    image = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(images.decode(_encoded(image)), _expected(image.convert("RGB")))


def test_transparency_is_blended_over_white(rgb):
    alpha = np.zeros(SIZE, np.uint8)
    alpha[:, 10:] = 255
    over_white = np.where(alpha[..., None] > 0, rgb, 255)
    image = Image.fromarray(np.dstack([rgb, alpha]))
    np.testing.assert_array_equal(images.decode(_encoded(image)), _expected(over_white))
    half = Image.fromarray(np.dstack([np.zeros_like(rgb), np.full(SIZE, 128, np.uint8)]))
    assert abs(images.decode(_encoded(half)) - 127 / 255).max() < 0.01


def test_a_transparent_entry_of_a_palette_is_white():
    image = Image.new("P", SIZE[::-1])
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 10, 20))
    x = images.decode(_encoded(image, transparency=0))
    np.testing.assert_array_equal(x[:, 0, 20], [1, 1, 1])
    np.testing.assert_array_equal(x[:, 0, 0], np.array([200, 100, 50], np.float32) / np.float32(255))


def test_cmyk_becomes_red_green_and_blue():
    image = Image.new("CMYK", SIZE[::-1], (0, 255, 255, 0))
    x = images.decode(_encoded(image, "JPEG", quality=95))
    assert x[0].min() > 0.95
    assert x[1:].max() < 0.05


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_exif_orientation_is_carried_out(form, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to the right"
    turned = images.decode(_encoded(Image.fromarray(rgb), form, exif=exif))
    straight = images.decode(_encoded(Image.fromarray(rgb), form))
    np.testing.assert_array_equal(turned, np.rot90(straight, -1, axes=(1, 2)))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.5, 0.9])
def test_a_truncated_image_is_refused(form, part, rgb):
    data = _encoded(Image.fromarray(rgb), form)
    with pytest.raises(ImageError, match=f"expected a whole {form} image, got"):
        images.decode(data[: int(len(data) * part)])


def test_damaged_bytes_never_raise_anything_else(rgb, rng):
    for form in ("JPEG", "PNG"):
        whole = np.frombuffer(_encoded(Image.fromarray(rgb), form), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(8, len(damaged), 3)] = rng.integers(0, 256, 3)
            try:
                x = images.decode(damaged.tobytes(), max_pixels=100_000)
            except ImageError:
                continue
            assert x.ndim == 3


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"GIF89a" + bytes(50), b"BM" + bytes(50), b"RIFF0000WEBPVP8 ", bytes(100)]
)
def test_other_formats_and_no_image_at_all_are_refused(data):
    with pytest.raises(ImageError, match=f"expected JPEG or PNG data, got {len(data)} bytes"):
        images.decode(data)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP"])
def test_what_pillow_could_read_but_is_not_on_the_list_is_refused(form, rgb):
    with pytest.raises(ImageError, match="expected JPEG or PNG data"):
        images.decode(_encoded(Image.fromarray(rgb), form))


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_image_is_refused_from_its_header(size):
    with pytest.raises(ImageError, match=f"expected at most 50,000,000 pixels, got .* = {size[0] * size[1]:,}"):
        images.decode(_png_header(*size))


def test_the_limit_on_pixels_is_the_callers(rgb):
    data = _encoded(Image.fromarray(rgb), "JPEG")
    assert images.decode(data, max_pixels=600).shape == (3, *SIZE)
    with pytest.raises(ImageError, match="expected at most 599 pixels, got 20 x 30 = 600"):
        images.decode(data, max_pixels=599)


def test_an_image_of_no_pixels_is_refused():
    with pytest.raises(ImageError):
        images.decode(_png_header(0, 5))


def test_text_instead_of_bytes_is_refused():
    with pytest.raises(DTypeError, match="expected the bytes of an image, got str"):
        images.decode("photo.png")


def test_a_file_is_read_and_a_bad_one_named(rgb, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    good.write_bytes(_encoded(Image.fromarray(rgb)))
    bad.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    np.testing.assert_array_equal(images.read(good), _expected(rgb))
    with pytest.raises(ImageError, match=r"bad\.jpg: .*expected a whole JPEG image"):
        images.read(bad)
    with pytest.raises(FileNotFoundError):
        images.read(tmp_path / "missing.png")


def test_without_pillow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BackendUnavailable, match=r"pip install cconv\[batch\]"):
        images.decode(b"\x89PNG\r\n\x1a\n")


# What a network takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (200, 100), (37, 256), (256, 256), (257, 255)])
@pytest.mark.parametrize("name", ["imagenet", "imagenet_bicubic"])
def test_preprocessing_is_torchvisions_by_pillow_on_bytes(name, size, rng):
    """Resize(256), CenterCrop(224), ToTensor, Normalize, written out; bytes are rounded after each axis."""
    rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    short = min(size)
    height, width = (256 if n == short else int(256 * n / short) for n in size)
    how = Image.Resampling.BICUBIC if name.endswith("bicubic") else Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(rgb).resize((width, height), how)).transpose(2, 0, 1)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    expected = (resized[:, top : top + 224, left : left + 224] / 255 - mean) / std
    got = images.PREPROCESSING[name](_expected(rgb))
    assert (got.shape, got.dtype) == ((3, 224, 224), np.float32)
    np.testing.assert_allclose(got * std, expected * std, atol=1.1 / 255)


def test_each_step_of_preprocessing_is_what_it_says():
    x = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6) / 72
    plain = {"resize": None, "size": None, "mean": (0, 0, 0), "std": (1, 1, 1)}
    np.testing.assert_array_equal(images.Preprocessing(**plain)(x), x)
    np.testing.assert_array_equal(images.Preprocessing(**plain | {"size": (2, 4)})(x), x[:, 1:3, 1:5])
    padded = images.Preprocessing(**plain | {"size": (6, 4)})(x)
    np.testing.assert_array_equal(padded, np.pad(x[:, :, 1:5], [(0, 0), (1, 1), (0, 0)]))
    assert images.Preprocessing(**plain | {"resize": 8})(x).shape == (3, 8, 12)
    nearest = images.Preprocessing(**plain | {"resize": (8, 12), "interpolation": "nearest"})(x)
    np.testing.assert_array_equal(nearest, x.repeat(2, axis=1).repeat(2, axis=2))
    turned = images.Preprocessing(**plain | {"channels": "BGR", "scale": 255, "layout": "HWC", "mean": (1, 2, 3)})(x)
    np.testing.assert_allclose(turned, x[::-1].transpose(1, 2, 0) * 255 - [1, 2, 3], rtol=1e-6, atol=1e-5)


def test_preprocessing_is_known_by_name_or_made_of_a_mapping():
    assert images.Preprocessing.of("imagenet") == images.Preprocessing()
    assert images.Preprocessing.of("none") is None
    assert images.Preprocessing.of({"size": [4, 5]}) == images.Preprocessing(size=(4, 5))
    with pytest.raises(ArgumentError, match=r"preprocessing: expected one of none, imagenet, .*got 'imagenot'"):
        images.Preprocessing.of("imagenot")
    with pytest.raises(ArgumentError, match=r"expected attributes of Preprocessing, got ..sizes"):
        images.Preprocessing.of({"sizes": 4})


@pytest.mark.parametrize(
    "given",
    [{"resize": 0}, {"size": (1, 2, 3)}, {"size": True}, {"size": 10**6}, {"interpolation": "area"}, {"mean": 1},
     {"std": (1, 0, 1)}, {"std": (1, float("nan"), 1)}, {"scale": float("inf")}, {"channels": "RGBA"}, {"layout": []}],
)  # fmt: skip
def test_preprocessing_that_cannot_be_is_refused(given):
    with pytest.raises(ArgumentError, match=f"^{next(iter(given))}: expected"):
        images.Preprocessing(**given)


@pytest.mark.parametrize(("resize", "size"), [(256, (1, 300_000)), ((1, 2000), (60_000, 1))])
def test_a_picture_that_becomes_too_large_is_refused(resize, size):
    with pytest.raises(ImageError, match="expected at most 50,000,000 pixels"):
        images.Preprocessing(resize=resize)(np.zeros((3, *size), np.float32))


# Pictures of maps ---------------------------------------------------------------------------------------------------


def test_each_map_of_a_grid_is_scaled_to_its_own_range(normal):
    maps = normal((5, 6, 7)) * np.array([1, 100, 1e-3, 1e30, 1e-30], np.float32)[:, None, None]
    picture = images.grid(maps, columns=3)
    assert (picture.shape, picture.dtype) == ((2 * 7 - 1, 3 * 8 - 1), np.uint8)
    for index, one in enumerate(maps):
        top, left = index // 3 * 7, index % 3 * 8
        cell = picture[top : top + 6, left : left + 7]
        assert (cell.min(), cell.max()) == (0, 255)
        assert cell.flat[one.argmax()] == 255
        assert cell.flat[one.argmin()] == 0


def test_maps_of_a_grid_are_kept_apart_by_a_line():
    picture = images.grid(np.zeros((5, 6, 7)), columns=3)
    line = np.unique(picture[6])
    assert line.size == 1
    assert line[0] != 0
    assert (picture[:, [7, 15]] == line[0]).all()
    assert (picture[7:, 16:] == line[0]).all()  # the cell without a map


def test_a_grid_is_about_as_high_as_wide_unless_told_otherwise():
    for count, height, width in ((64, 20, 20), (10, 30, 45), (1, 9, 9), (512, 7, 7), (7, 5, 50)):
        h, w = images.grid(np.zeros((count, height, width))).shape
        assert 0.4 < h / w < 2.5 or count == 1
    assert images.grid(np.zeros((3, 4, 4)), columns=100).shape == (4, 14)


@pytest.mark.filterwarnings("error")
def test_constant_and_infinite_maps_have_a_picture_too():
    maps = np.ones((4, 2, 2))
    maps[1] = np.nan
    maps[2] = [[np.inf, 1], [2, -np.inf]]
    maps[3] = [[-1.7e308, 1.7e308], [0, 0]]
    picture = images.grid(maps, columns=4)
    assert picture[0, [0, 3]].tolist() == [0, 0]
    assert picture[:, 6:8].tolist() == [[0, 0], [255, 0]]
    assert picture[:, 9:11].tolist() == [[0, 255], [128, 128]]


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 3), (1, 2, 3, 4)])
def test_maps_of_another_rank_have_no_grid(shape):
    with pytest.raises(ShapeError, match=r"maps: expected 3 axes \(K, P, Q\)"):
        images.grid(np.zeros(shape))


@pytest.mark.parametrize("columns", [0, -1, 2.5, True, "3"])
def test_columns_are_a_whole_number(columns):
    with pytest.raises(ArgumentError, match="columns: expected an integer >= 1"):
        images.grid(np.zeros((3, 4, 4)), columns=columns)


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3)])
def test_a_png_holds_the_picture(shape, rng):
    picture = rng.integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(images.png(picture[:, ::-1]))) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture[:, ::-1])


def test_only_pictures_of_bytes_become_a_png():
    with pytest.raises(DTypeError, match="picture: expected uint8, got float64"):
        images.png(np.zeros((4, 4)))
    with pytest.raises(ShapeError, match=r"expected \(h, w\) or \(h, w, 3\)"):
        images.png(np.zeros((4, 4, 4), np.uint8))


class TestBombs:
    """Files that are small, or hold few pixels, and would keep a decoder busy for minutes."""

    @pytest.fixture
    def jpeg(self, rgb):
        return _encoded(Image.fromarray(rgb), "JPEG", progressive=True)

    def test_a_progressive_jpeg_has_few_scans_and_passes(self, jpeg):
        assert 2 < jpeg.count(b"\xff\xda") < images.MAX_SCANS
        assert images.decode(jpeg).shape == (3, *SIZE)

    def test_a_jpeg_of_many_scans_is_refused(self, jpeg):
        last = jpeg.rindex(b"\xff\xda")
        with pytest.raises(ImageError, match="at most 100 scans"):
            images.decode(jpeg[:-2] + jpeg[last:-2] * 200 + jpeg[-2:])

    @pytest.mark.parametrize("part", [b"\xff\xe5\x00\x02", b"\x00", b"\xff", b"\xff\x00"], ids=repr)
    def test_a_jpeg_of_many_segments_or_stray_bytes_is_refused(self, jpeg, part):
        with pytest.raises(ImageError, match="at most 20000 segments"):
            images.decode(jpeg[:2] + b"\xff\xe5\x00\x02" + part * 100_000 + jpeg[2:])

    def test_a_png_of_many_chunks_is_refused(self, rgb):
        whole = _encoded(Image.fromarray(rgb))
        with pytest.raises(ImageError, match="at most 20000 segments or chunks"):
            images.decode(whole[:33] + _chunk(b"prVt", b"") * 100_000 + whole[33:])

    def test_a_large_png_of_small_chunks_passes(self, rgb):
        whole = _encoded(Image.fromarray(rgb))
        assert images.decode(whole[:33] + _chunk(b"prVt", b"") * 5000 + whole[33:]).shape == (3, *SIZE)
