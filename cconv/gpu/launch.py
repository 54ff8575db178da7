"""Launch: a kernel together with the parameters that no run changes, in the one struct that it takes by value.

In: a device (device.py), a kernel's file and name, macros, values.  Out: a call that fills in the rest and launches.
The struct is read from the kernel's source, so it is written down once.
"""

import re
from functools import cache

import numpy as np

from ..errors import ShapeError
from . import compile

#: Blocks of a launch.
MOST_BLOCKS = 2**31 - 1
_TYPES = {"int": "i4", "long long": "i8", "double": "f8"}
_POINTER = np.dtype("u8")
_MEMBER = re.compile(r"(?P<type>const \w+ \*|\w+ \*|long long |int |double )(?P<names>.+)", re.S)
_NAME = re.compile(r"(\w+)(?:\[(\w+)\])?")
_DEFINE = re.compile(r"^#define (\w+) (\d+)$", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)


@cache
def struct(file: str, name: str) -> np.dtype:
    """The dtype of a struct of a .cu file, as C lays it out: pointers, int, long long, double and arrays of them."""
    text = _COMMENT.sub("", compile.source(file))
    sizes = dict(_DEFINE.findall(text))
    body = re.search(rf"^struct (?:alignas\(16\) )?{name} {{(.*?)^}};", text, re.M | re.S)[1]
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        member = _MEMBER.fullmatch(declaration)
        kind = "u8" if "*" in member["type"] else _TYPES[member["type"].strip()]
        for one in member["names"].split(","):
            called, length = _NAME.fullmatch(one.strip()).groups()
            fields.append((called, kind, (int(sizes.get(length, length)),)) if length else (called, kind))
    return np.dtype(fields, align=True)


@cache
def parameters(file: str, entry: str) -> np.dtype:
    """The dtype of the struct that a kernel takes."""
    return struct(file, re.search(rf"\b{entry}\(const (\w+) p\)", compile.source(file))[1])


@cache
def constant(file: str, name: str) -> int:
    """A number that a .cu file defines."""
    return int(re.search(rf"^#define {name} (\d+)$", compile.source(file), re.M)[1])


class Launch:
    """A kernel of a device with its fixed parameters. `threads` of a block; arrays among the values stay alive."""

    def __init__(self, device, file: str, entry: str, threads: int, macros: dict[str, object], **fixed):
        self._device, self._threads = device, threads
        self._function = device.kernel(file, entry, macros)
        self._fixed = np.zeros((), parameters(file, entry))
        self._pointers = {name for name in self._fixed.dtype.names if self._fixed.dtype[name] == _POINTER}
        self._owned = []
        self._set(self._fixed, fixed)

    def _set(self, target: np.ndarray, values: dict) -> None:
        for name, value in values.items():
            if name in self._pointers:
                if target is self._fixed:
                    self._owned.append(value)
                value = self._device.pointer(value)
            elif isinstance(value, tuple):
                value = value + (0,) * (target.dtype[name].shape[0] - len(value))
            try:
                target[name] = value
            except OverflowError:  # an int of the kernel's
                raise ShapeError(f"x: expected {name} of at most {MOST_BLOCKS} on a GPU, got {value}") from None

    def __call__(self, blocks: int, **values) -> None:
        """Launch so many blocks with these parameters besides."""
        if not blocks:
            return
        if blocks > MOST_BLOCKS:
            raise ShapeError(f"x: expected work of at most {MOST_BLOCKS} blocks on a GPU, got {blocks}")
        given = self._fixed.copy()
        self._set(given, values)
        self._function(blocks, self._threads, given)


def table(device, values: np.ndarray):
    """A structured or plain table as bytes on the device, for as long as it is held."""
    return device.kept(np.ascontiguousarray(values).view(np.uint8))


def aligned(device, *arrays) -> bool:
    """Whether vectors of 16 bytes can be loaded from the beginning of all of these; None always can."""
    return all(device.pointer(array) % 16 == 0 for array in arrays)


def blocks_of_maps(maps: int, span: int, threads: int) -> tuple[int, dict[str, int]]:
    """How many blocks cover so many maps of `span` places each, and the parameters by which cc_place finds them."""
    if span > MOST_BLOCKS - threads:
        raise ShapeError(f"x: expected maps of at most {MOST_BLOCKS - threads} places on a GPU, got {span}")
    blocks_per_map, maps_per_block = (-(-span // threads), 1) if span >= threads else (1, threads // span)
    return -(-maps // maps_per_block) * blocks_per_map, {
        "maps": maps, "span": span, "blocks_per_map": blocks_per_map, "maps_per_block": maps_per_block,
    }  # fmt: skip
