"""Images: from the bytes of a photograph to an array, from that to what a network was trained on, and from maps to a
picture.

In: JPEG or PNG bytes, which nobody vouches for; maps (K, P, Q).  Out: float32 (3, H, W) in [0, 1]; uint8 pictures and
their PNG bytes.

What a file holds is what comes out, divided by its largest value: gamma and colour profiles are left alone. Palettes
are looked up, grey becomes three equal channels, CMYK is converted by Pillow's plain rule, 16-bit grey keeps its 16
bits (16-bit colour is read as 8). Transparency is blended over white. An EXIF orientation is carried out, so that up is
up; a broken EXIF block is ignored, with Pillow's warning. Of an animation the first picture is taken.
Needs Pillow: ``pip install cconv[batch]``.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .errors import ArgumentError, BackendUnavailable, DTypeError, ImageError, ShapeError

#: Pixels that an image may have unless the caller says otherwise: 600 MB as float32 in three channels.
MAX_PIXELS = 50_000_000
#: Segments or chunks of a file, and scans of a progressive JPEG: a decoder takes its time for each, however few pixels
#: there are. Photographs have tens, a large PNG some thousands.
MAX_PARTS = 20_000
MAX_SCANS = 100
#: Pixels along a side of what a network takes.
LONGEST_SIDE = 1 << 14
#: Grey lines between the maps of a grid.
SEPARATOR = 128

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


def _pillow():
    try:
        from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin
    except ImportError:
        raise BackendUnavailable("images need Pillow: pip install cconv[batch]") from None
    return Image, ImageOps, {_PNG: PngImagePlugin.PngImageFile, _JPEG: JpegImagePlugin.JpegImageFile}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a JPEG or PNG image, as the models take them.

    Parameters
    ----------
    data : bytes
        The whole file.
    max_pixels : int
        Height times width above which the image is refused, from its header, before anything is decoded.

    Returns
    -------
    array (3, H, W), float32 in [0, 1]
        Red, green, blue; see the head of this module for palettes, grey, CMYK, 16 bits, transparency and orientation.

    Raises
    ------
    ImageError
        For other formats, truncated or broken data, and images that are too large.
    BackendUnavailable
        Without Pillow.

    Examples
    --------
    >>> decode(png(np.zeros((4, 6), np.uint8))).shape
    (3, 4, 6)
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise DTypeError(f"data: expected the bytes of an image, got {type(data).__name__}")
    Image, ImageOps, openers = _pillow()
    data = bytes(data)
    opener = next((openers[magic] for magic in openers if data.startswith(magic)), None)
    if opener is None:
        raise ImageError(f"image: expected JPEG or PNG data, got {len(data)} bytes that begin with {data[:8]!r}")
    if (_jpeg_parts if data.startswith(_JPEG) else _png_parts)(data) > MAX_PARTS:
        raise ImageError(f"image: expected at most {MAX_PARTS} segments or chunks, got more in {len(data)} bytes")
    # Within a scan the byte FF is escaped, so these two are a marker or, once or twice, part of a thumbnail.
    if data.startswith(_JPEG) and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(f"image: expected at most {MAX_SCANS} scans in a JPEG, got {scans}")
    # The plugins' own classes instead of Image.open: the format is known, and the limit on size is ours.
    try:
        with opener(io.BytesIO(data)) as image:
            width, height = image.size
            if not 0 < width * height <= max_pixels:
                raise ImageError(
                    f"image: expected at most {max_pixels:,} pixels, got {height} x {width} = {height * width:,}"
                )
            image.load()
            return _pixels(ImageOps.exif_transpose(image), Image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a decoder that is fed broken bytes may raise anything
        raise ImageError(f"image: expected a whole {opener.format} image, got {len(data)} bytes: {error}") from error


def _jpeg_parts(data: bytes) -> int:
    """Steps that a parser takes to a JPEG's first scan: segments and stray bytes; counted up to one too many."""
    at = 2
    for parts in range(MAX_PARTS + 1):
        marker = data[at : at + 2]
        if len(marker) < 2 or marker == b"\xff\xda":  # what is truncated the decoder refuses
            return parts
        if marker[0] != 0xFF or marker[1] == 0xFF:
            at += 1
        elif marker[1] in (0x00, 0x01) or 0xD0 <= marker[1] <= 0xD9:  # these have no length
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return MAX_PARTS + 1


def _png_parts(data: bytes) -> int:
    """Chunks of a PNG; counted up to one too many."""
    at = len(_PNG)
    for parts in range(MAX_PARTS + 1):
        if at >= len(data):
            return parts
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return MAX_PARTS + 1


def _pixels(image, Image) -> np.ndarray:
    """A loaded image of any of Pillow's modes as (3, H, W) in [0, 1]."""
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", or "I" in some versions of Pillow
        grey = np.asarray(image).astype(np.float32) / np.float32(65535)
        return np.stack([grey] * 3)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    hwc = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(hwc.transpose(2, 0, 1), np.float32) / np.float32(255)


def read(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode` of a file, whose name is then in the text of an ImageError; OSError where it cannot be read."""
    data = Path(path).read_bytes()
    try:
        return decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Preprocessing:
    """What a picture goes through before a network takes it, in this order; torchvision's for ImageNet by default.

    Attributes
    ----------
    resize : int, (height, width) or None
        The length of the short side, the long one in proportion and rounded down; or both; or as it is.
    interpolation : {"bilinear", "bicubic", "nearest"}
        As Pillow does it: wider where it shrinks, so that nothing is skipped.
    size : int, (height, width) or None
        What is cut out of the middle, with zeros around a picture that is smaller; or all.
    scale : float
        What white is: 1, or 255.
    channels : {"RGB", "BGR"}
    mean, std : tuples of three floats
        Per channel, in the order of `channels`: subtracted, and divided by.
    layout : {"CHW", "HWC"}

    Examples
    --------
    >>> Preprocessing()(np.zeros((3, 300, 400), np.float32)).shape
    (3, 224, 224)
    """

    resize: int | tuple[int, int] | None = 256
    interpolation: str = "bilinear"
    size: int | tuple[int, int] | None = 224
    scale: float = 1.0
    channels: str = "RGB"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    layout: str = "CHW"

    def __post_init__(self):
        words = {"interpolation": "bilinear bicubic nearest", "channels": "RGB BGR", "layout": "CHW HWC"}
        for word, known in ((word, text.split()) for word, text in words.items()):
            if getattr(self, word) not in known:
                raise ArgumentError(f"{word}: expected one of {', '.join(known)}, got {getattr(self, word)!r:.40}")
        for word in ("resize", "size"):
            given = getattr(self, word)
            lengths = given if isinstance(given, tuple | list) and len(given) == 2 else (given,)
            if given is not None and not all(type(n) is int and 1 <= n <= LONGEST_SIDE for n in lengths):
                raise ArgumentError(f"{word}: expected one or two integers from 1 to {LONGEST_SIDE}, got {given!r:.40}")
            object.__setattr__(self, word, tuple(given) if isinstance(given, list) else given)
        for word, count in (("mean", 3), ("std", 3), ("scale", 1)):
            given = (self.scale,) if word == "scale" else getattr(self, word)
            if not isinstance(given, tuple | list) or len(given) != count or not all(map(_finite, given)):
                raise ArgumentError(f"{word}: expected {count} finite numbers, got {given!r:.60}")
            object.__setattr__(self, word, tuple(map(float, given)) if count > 1 else float(given[0]))
        if 0 in self.std:
            raise ArgumentError(f"std: expected numbers other than 0, got {self.std}")

    @classmethod
    def of(cls, given: "str | Mapping | Preprocessing | None") -> "Preprocessing | None":
        """One by its name in PREPROCESSING, or of its attributes as a mapping or as a JSON object, which is how files
        declare it; None for None and "none"."""
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, str) and given.startswith("{"):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise ArgumentError(f"preprocessing: expected JSON: {error!s:.200}") from None
        if isinstance(given, Mapping):
            if unknown := [str(word) for word in given if word not in {field.name for field in fields(cls)}]:
                raise ArgumentError(f"preprocessing: expected attributes of Preprocessing, got {unknown!r:.60}")
            return cls(**given)
        if not isinstance(given, str) or given not in PREPROCESSING:
            raise ArgumentError(f"preprocessing: expected one of {', '.join(PREPROCESSING)}, got {given!r:.40}")
        return PREPROCESSING[given]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """A picture (3, H, W) in [0, 1], as `decode` gives it, as float32 that the network takes.

        ImageError where it becomes larger than MAX_PIXELS.
        """
        if getattr(picture, "ndim", 0) != 3 or len(picture) != 3 or not picture.size:
            raise ShapeError(f"picture: expected (3, H, W), got shape {getattr(picture, 'shape', None)}")
        x = np.asarray(picture, np.float32)
        if self.resize is not None:
            x = self._resized(x)
        if self.size is not None:
            x = _centre(x, *((self.size,) * 2 if isinstance(self.size, int) else self.size))
        x = x[::-1] if self.channels == "BGR" else x
        mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
        x = (x * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(x if self.layout == "CHW" else x.transpose(1, 2, 0))

    def _resized(self, x: np.ndarray) -> np.ndarray:
        height, width = x.shape[1:]
        if isinstance(self.resize, int):
            short = min(height, width)
            size = tuple(self.resize if n == short else int(self.resize * n / short) for n in (height, width))
        else:
            size = self.resize
        if size == (height, width):
            return x
        if max(size[0], height) * size[1] > MAX_PIXELS:
            raise ImageError(f"image: expected at most {MAX_PIXELS:,} pixels, got {size[0]} x {size[1]} of {x.shape}")
        Image = _pillow()[0]
        how = Image.Resampling[self.interpolation.upper()]
        # One axis after the other, as Pillow does it: on bytes, it cuts off after each what bicubic gives beyond black
        # and white.
        for wanted in ((size[1], height), size[::-1]):
            resized = [np.asarray(Image.fromarray(np.ascontiguousarray(one)).resize(wanted, how)) for one in x]
            x = np.clip(np.stack(resized), 0, 1)
        return x


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e30


def _centre(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture, as torchvision's CenterCrop cuts it."""
    lacking = [max(0, wanted - n) for wanted, n in zip((height, width), x.shape[1:], strict=True)]
    x = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in lacking)]) if any(lacking) else x
    top, left = (round((n - wanted) / 2) for wanted, n in zip((height, width), x.shape[1:], strict=True))
    return x[:, top : top + height, left : left + width]


#: By name: of torchvision's weights for ImageNet, the first of most networks, and of the EfficientNets.
PREPROCESSING: dict[str, Preprocessing | None] = {
    "none": None,
    "imagenet": Preprocessing(),
    "imagenet_bicubic": Preprocessing(interpolation="bicubic"),
}


def grid(maps, columns: int | None = None) -> np.ndarray:
    """Maps side by side, each in its own range from black to white, with a grey line of one pixel between them.

    Parameters
    ----------
    maps : array (K, P, Q)
        A map that is the same everywhere is black, and so is what is not finite.
    columns : int, optional
        Maps per row; unless given, so many that the picture is about as high as it is wide.

    Returns
    -------
    array (h, w), uint8

    Raises
    ------
    ShapeError, ArgumentError

    Examples
    --------
    >>> grid(np.arange(24.0).reshape(3, 2, 4), columns=2)
    array([[  0,  36,  73, 109, 128,   0,  36,  73, 109],
           [146, 182, 219, 255, 128, 146, 182, 219, 255],
           [128, 128, 128, 128, 128, 128, 128, 128, 128],
           [  0,  36,  73, 109, 128, 128, 128, 128, 128],
           [146, 182, 219, 255, 128, 128, 128, 128, 128]], dtype=uint8)
    """
    maps = np.asarray(maps)
    if maps.ndim != 3 or not maps.size:
        raise ShapeError(f"maps: expected 3 axes (K, P, Q), each >= 1, got shape {maps.shape}")
    count, height, width = maps.shape
    if columns is None:
        columns = min(count, max(1, round(math.sqrt(count * height / width))))
    if isinstance(columns, bool) or not isinstance(columns, (int, np.integer)) or columns < 1:
        raise ArgumentError(f"columns: expected an integer >= 1, got {columns!r}")
    columns = min(int(columns), count)
    rows = -(-count // columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), SEPARATOR, np.uint8)
    for index, one in enumerate(maps):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        picture[top : top + height, left : left + width] = _scaled(one)
    return picture


def _scaled(one: np.ndarray) -> np.ndarray:
    """A map from its own range to 0..255."""
    finite = np.isfinite(one)
    if not finite.any():
        return np.zeros(one.shape, np.uint8)
    one = np.where(finite, one, one[finite].min()).astype(np.float64)
    low, high = one.min(), one.max()
    # Halved first: the range of two finite float64 need not be finite.
    span = high / 2 - low / 2
    return np.round((one / 2 - low / 2) / span * 255).astype(np.uint8) if span > 0 else np.zeros(one.shape, np.uint8)


def png(picture) -> bytes:
    """A uint8 picture, (h, w) grey or (h, w, 3) colour, as the bytes of a PNG file.

    Examples
    --------
    >>> png(np.zeros((2, 2), np.uint8))[1:4]
    b'PNG'
    """
    picture = np.asarray(picture)
    if picture.dtype != np.uint8:
        raise DTypeError(f"picture: expected uint8, got {picture.dtype}")
    if not picture.size or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
        raise ShapeError(f"picture: expected (h, w) or (h, w, 3), each >= 1, got shape {picture.shape}")
    buffer = io.BytesIO()
    _pillow()[0].fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()
