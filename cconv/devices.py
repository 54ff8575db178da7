"""Devices: images that lie on the host, computed where the caller says: "auto", "cpu" or "cuda".

In: the name of a device, a function of arrays, images as NumPy arrays.  Out: its results as NumPy arrays.
"""

import logging

import numpy as np

from . import backend, ops
from .errors import ArgumentError, BackendUnavailable, CconvError, OutOfMemory, ShapeError

NAMES = ("auto", "cpu", "cuda")
log = logging.getLogger(__name__)


class Device:
    """Where functions of images run; made by :func:`device`.

    Attributes
    ----------
    name : "cpu" or "cuda"
    """

    def __init__(self, name: str):
        self.name = name
        self._twin = backend.get("gpu" if name == "cuda" else "cpu")

    def __repr__(self) -> str:
        return f"<Device {self.name}>"

    def put(self, array):
        """A NumPy array, or None, as an array of the device that any stream may read."""
        if array is None or self.name == "cpu":
            return array
        array = self._twin.asarray(array)
        self._twin.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for what has been queued."""
        self._twin.synchronize()

    def run(self, function, images: np.ndarray, cancel=None, *, whole: bool = False) -> dict[str, np.ndarray]:
        """`function(images)` on the device.

        On a GPU images go there in chunks, while the chunk before is computed and the one before that comes back. Where
        its memory does not suffice, chunks are halved until it does.

        Parameters
        ----------
        function : function of an array of the device
            Gives a dict of arrays; each has a row for every image, in order, unless `whole`.
        images : NumPy array (N, ...)
        cancel : object with is_set(), optional
            Asked before every chunk; the function may ask it too.
        whole : bool
            All images at once.

        Raises
        ------
        ShapeError
            There are no images.
        OutOfMemory
            Not even one image fits.
        DeviceError
            The GPU failed: only a new process can use it again.
        Cancelled, and what the function raises

        Examples
        --------
        >>> import numpy as np
        >>> device("cpu").run(lambda x: {"twice": 2 * x}, np.ones((2, 3)))["twice"].sum()
        np.float64(12.0)
        """
        count = len(images)
        if not count:
            raise ShapeError("images: expected one or more, got none")
        if self.name == "cpu":
            return function(images)
        maps: dict[str, np.ndarray] = {}
        begin, step = 0, count if whole else self._twin.chunk(images)
        while begin < count:
            try:
                for part in self._twin.feed(function, images[begin:], step, cancel):
                    _put(maps, part, begin, 0 if whole else count)
                    begin += step
            except OutOfMemory:
                if whole or step == 1:
                    raise
                step = -(-step // 2)
                log.info("the GPU's memory does not suffice: %d images at a time from here on", step)
        return maps


def _put(maps: dict[str, np.ndarray], part: dict[str, np.ndarray], begin: int, count: int) -> None:
    """Rows from `begin` of arrays that have `count` in all; 0: these are the arrays."""
    for name, rows in part.items():
        if not count:
            maps[name] = rows.copy()
            continue
        if name not in maps:
            maps[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
        maps[name][begin : begin + len(rows)] = rows


def device(name: str = "auto") -> Device:
    """The device of that name: "cuda" only if it works here; "auto" a GPU that does, or else the CPU.

    Raises
    ------
    ArgumentError
        For another name.
    BackendUnavailable
        "cuda" where no GPU can be used, and why. It never stands for the CPU.

    Examples
    --------
    >>> device("cpu")
    <Device cpu>
    """
    if name not in NAMES:
        raise ArgumentError(f"device: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "cpu":
        return Device("cpu")
    try:
        backend.get("gpu").machine()
        found = Device("cuda")
        _check(found)
    except CconvError as error:
        if name == "cuda":
            raise
        log.info("computing on the CPU: %s", error)
        return Device("cpu")
    return found


def _check(found: Device) -> None:
    """Run a small convolution; BackendUnavailable if it gives a wrong answer."""
    x, weight = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3), found.put(np.ones((1, 1, 3, 3), np.float32))
    got = found.run(lambda x: {"y": ops.conv2d(x, weight)}, x)["y"].item()
    if got != 36.0:
        raise BackendUnavailable(f"gpu: expected 36 of the first convolution, got {got}")
