"""Outputs: what a client wants of an output: some channels, pooled, in fewer bits.

In: the `parameters` of a requested output.  Out: a Form, checked against the output's shape before anything runs, and
afterwards the smaller array, with what is needed to read it. None of it is in the bill.

    channels  "0:16", "3,5,8:12", 7       pool  "gap" (the mean), "max2" ... (windows of 2 by 2)
    dtype     "FP32", "FP16", "UINT8" (value = scale * number + offset; one scale and offset for the whole output)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from .wire import WireError, brief

DTYPES = ("FP32", "FP16", "UINT8")
#: Rows and columns that one window of a pool may have.
LARGEST_WINDOW = 999
#: Numbers that are made fewer bits at a time.
SLICE = 1 << 20
_CHANNELS = re.compile(r"[0-9]{1,5}(:[0-9]{1,5})?(,[0-9]{1,5}(:[0-9]{1,5})?)*")
_POOL = re.compile(r"max([1-9][0-9]{0,2})")


@dataclass(frozen=True)
class Form:
    """How an output comes back.

    Attributes
    ----------
    channels : tuple of int or None
        None is all of them.
    pool : int or None
        The window's side; 0 is the mean of each map.
    dtype : str
        One of DTYPES.
    """

    channels: tuple[int, ...] | None = None
    pool: int | None = None
    dtype: str = "FP32"

    @classmethod
    def read(cls, name: str, parameters: Mapping, shape: tuple[int, ...], binary: bool) -> "Form":
        """What the parameters say, if an output of this shape can come back so."""
        where = f"output {name!r}"
        dtype = parameters.get("dtype", "FP32")
        if dtype not in DTYPES:
            raise WireError(f"dtype of {where}: expected one of {', '.join(DTYPES)}, got {brief(dtype)}")
        if dtype == "FP16" and not binary:
            raise WireError(
                f"sending FP16 data via JSON is not supported. Please use the binary data format for {where}"
            )
        channels = _channels(parameters.get("channels"), shape, where)
        return cls(channels, _pool(parameters.get("pool"), shape, where), dtype)

    def room(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes that `apply` takes beside an array of this shape, at most: of every step, as if none gave any back."""
        numbers, nbytes = prod(shape), 0
        if self.channels is not None:
            numbers = numbers // shape[1] * len(self.channels)
            nbytes += numbers * itemsize
        if self.pool is not None:
            rows, columns = shape[2:]
            maps = numbers // (rows * columns)
            numbers = maps * (rows // self.pool) * (columns // self.pool) if self.pool else maps
            nbytes += numbers * (itemsize if self.pool else itemsize + 8)
        if self.dtype == "FP16":
            nbytes += 2 * numbers
        if self.dtype == "UINT8":  # the numbers, which of them are finite, and a slice in float64, twice
            nbytes += 2 * numbers + 16 * min(numbers, SLICE)
        return nbytes

    def apply(self, array: np.ndarray, name: str) -> tuple[np.ndarray, dict[str, float]]:
        """The array in this form, and the parameters that say how to read it."""
        if self.channels is not None:
            array = array.take(self.channels, axis=1)
        if self.pool == 0:
            array = array.mean(axis=(2, 3), keepdims=True, dtype=np.float64).astype(array.dtype)
        elif self.pool:
            array = _max_pooled(array, self.pool)
        if self.dtype == "FP16":
            with np.errstate(over="ignore"):  # infinity, as it is for any number that is too large
                return array.astype(np.float16), {}
        if self.dtype == "UINT8":
            return _quantised(array, name)
        return array, {}


def _channels(value, shape: tuple[int, ...], where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    text = str(value) if type(value) is int else value
    if not (isinstance(text, str) and len(text) <= 4096 and _CHANNELS.fullmatch(text)):
        raise WireError(f"channels of {where}: expected numbers and ranges, 0:16 or 3,5,8:12, got {brief(value)}")
    count = shape[1] if len(shape) > 1 else 0
    chosen: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        chosen += range(int(first), min(int(last), count + 1) if colon else int(first) + 1)
        if not chosen or max(chosen) >= count or len(chosen) > count:
            raise WireError(f"channels of {where}: expected at most {count} of 0 to {count - 1}, got {brief(value)}")
    return tuple(chosen)


def _pool(value, shape: tuple[int, ...], where: str) -> int | None:
    if value is None:
        return None
    found = _POOL.fullmatch(value) if isinstance(value, str) else None
    if not found and value != "gap":
        raise WireError(f"pool of {where}: expected gap, or max2 to max{LARGEST_WINDOW}, got {brief(value)}")
    side = int(found[1]) if found else 0
    if len(shape) != 4 or side > min(shape[2:]):
        raise WireError(f"pool of {where}: expected maps of at least {side} x {side}, got shape {list(shape)}")
    return side


def _max_pooled(array: np.ndarray, side: int) -> np.ndarray:
    """The largest of each window; what is left over at the end belongs to none."""
    n, k, p, q = array.shape
    rows, columns = p // side, q // side
    return array[:, :, : rows * side, : columns * side].reshape(n, k, rows, side, columns, side).max(axis=(3, 5))


def _quantised(array: np.ndarray, name: str) -> tuple[np.ndarray, dict[str, float]]:
    if not np.isfinite(array).all():
        raise WireError(f"output {brief(name)}: holds NaN or infinity, which UINT8 cannot carry; ask for FP32 or FP16")
    low, high = float(array.min()), float(array.max())
    scale = (high - low) / 255 or 1.0
    numbers = np.empty(array.shape, np.uint8)
    flat, result = array.reshape(-1), numbers.reshape(-1)
    for start in range(0, flat.size, SLICE):  # in float64 one at a time
        part = slice(start, start + SLICE)
        result[part] = np.rint(np.subtract(flat[part], low, dtype=np.float64) / scale)
    return numbers, {"scale": scale, "offset": low}
