"""Npy: .npy files to checked arrays and back, read by no pickle and no eval.

In: untrusted bytes.  Out: a NumPy array that shares them where it can, or a WireError; what precedes its elements.
"""

import io
import re
from math import prod

import numpy as np

from .wire import MOST_AXES, WireError, aligned, brief

MAGIC = b"\x93NUMPY"
TYPES = {"<f4": "float32", "<f8": "float64", "|u1": "uint8"}
_HEADER_LIMIT = 1024
_ITEM = re.compile(
    r"""\s*['"](descr|fortran_order|shape)['"]\s*:\s*(True|False|\([0-9, ]*\)|['"][^'"\\]{1,16}['"])\s*(?:,|(?=}))"""
)
_SHAPE = re.compile(r"\((?:[0-9]{1,19},[ ]*)*(?:[0-9]{1,19})?[ ]*\)")


def read(data, name: str) -> np.ndarray:
    """The array of a .npy file: little-endian float32, float64 or uint8 in C order, read by no pickle and no eval.

    The result is read-only and shares the bytes where they are aligned.
    """
    data = memoryview(data)
    if bytes(data[:6]) != MAGIC:
        raise WireError(f"{name}: expected a .npy file, got bytes that begin with {brief(bytes(data[:8]))}")
    version = bytes(data[6:8])
    if version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise WireError(f"{name}: expected .npy version 1.0, 2.0 or 3.0, got {brief(version)}")
    start = 10 if version == b"\x01\x00" else 12
    length = int.from_bytes(data[8:start], "little")
    if len(data) < start or length > min(_HEADER_LIMIT, len(data) - start):
        raise WireError(
            f"{name}: expected a .npy header of at most {_HEADER_LIMIT} bytes and inside the file, got a length of "
            f"{length} in a file of {len(data)} bytes"
        )
    dtype, shape = _header(bytes(data[start : start + length]), name)
    payload = data[start + length :]
    expected = prod(shape) * np.dtype(dtype).itemsize
    if len(payload) != expected:
        raise WireError(f"{name}: expected {expected} bytes for {dtype} {list(shape)}, got {len(payload)}")
    return aligned(payload, dtype, shape)


def _header(text: bytes, name: str) -> tuple[str, tuple[int, ...]]:
    items = _items(text.decode("latin-1"))
    descr, order, sizes = (items.get(key, "") for key in ("descr", "fortran_order", "shape"))
    if descr[:1] not in ("'", '"') or order not in ("True", "False") or not _SHAPE.fullmatch(sizes):
        raise WireError(
            f"{name}: expected a .npy header {{'descr': ..., 'fortran_order': ..., 'shape': (...)}}, got {brief(text)}"
        )
    if descr[1:-1] not in TYPES:
        raise WireError(f"{name}: expected an element type of {', '.join(TYPES)} in the .npy header, got {descr}")
    if order == "True":
        raise WireError(f"{name}: expected C order, got a .npy file in Fortran order; save numpy.ascontiguousarray(x)")
    shape = tuple(int(size) for size in sizes[1:-1].replace(",", " ").split())
    if not 1 <= len(shape) <= MOST_AXES or not all(shape):
        raise WireError(f"{name}: expected up to {MOST_AXES} sizes of at least 1, got shape {brief(shape)}")
    return TYPES[descr[1:-1]], shape


def _items(text: str) -> dict[str, str]:
    """The three entries of the header's dict as they are written; {} for anything else."""
    text = text.rstrip(" \n")
    items, position = {}, 1
    while found := _ITEM.match(text, position):
        if found[1] in items:
            return {}
        items[found[1]], position = found[2], found.end()
    return items if text[:1] == "{" and text[position:].strip() == "}" else {}


def header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What precedes the elements of a C-ordered array in a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()
