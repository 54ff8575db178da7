"""Feeding: images of the host through a function on the GPU, in chunks: one comes, one is computed, one goes back.

In: a device (device.py), NumPy images, a function of device arrays.  Out: its results, chunk by chunk, as NumPy arrays
that hold until the next but one.

    stream up      | 0 | 1 |   2 |   3 |          page-locked memory -> device
    stream work        |  0  |  1  |  2  |  3     the function
    stream down              | 0 |   | 1 |        device -> page-locked memory

A chunk's room is used again by the next but one, which is queued once the results of this one have come back.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

from ..errors import Cancelled, DeviceError

#: Of images at a time, unless one is larger: transfers overlap, and the device is full. A guess, not measured.
CHUNK_BYTES = 64 << 20


def chunk(images: np.ndarray) -> int:
    """Images at a time."""
    return max(1, min(len(images), CHUNK_BYTES // max(1, images.nbytes // len(images))))


class _Room:
    """Where a chunk's images lie on either side."""

    def __init__(self, device, shape: tuple[int, ...], dtype):
        self.staged, self.images = device.pinned(shape, dtype), device.empty(shape, dtype)


def feed(device, function: Callable, images: np.ndarray, step: int, cancel=None) -> Iterator[dict[str, np.ndarray]]:
    """The results for `step` images after the other; Cancelled once `cancel` is set."""
    with device.errors():
        streams = up, work, down = device.streams()
        try:
            shape = min(step, len(images)), *images.shape[1:]
            with work:
                rooms = [_Room(device, shape, images.dtype) for _ in range(2 if len(images) > step else 1)]
            # The pool may have taken their memory from what is still being computed.
            up.wait_event(work.record())
            coming: deque[tuple] = deque()
            for index, begin in enumerate(range(0, len(images), step)):
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the run was cancelled before it ended")
                if len(coming) == len(rooms):
                    yield _arrived(coming)
                part = images[begin : begin + step]
                room = rooms[index % 2]
                staged, given = room.staged[: len(part)], room.images[: len(part)]
                staged[...] = part
                device.upload(staged, given, up)
                work.wait_event(up.record())
                with work:
                    maps = function(given)
                down.wait_event(work.record())
                # What no image changes is a NumPy array already.
                copies = {n: m if isinstance(m, np.ndarray) else device.download(m, down) for n, m in maps.items()}
                coming.append((copies, maps, down.record()))
            while coming:
                yield _arrived(coming)
        finally:
            # Nothing is given back that a copy still reads or writes; what failed has failed above.
            for stream in streams:
                with suppress(DeviceError), device.errors():
                    stream.synchronize()


def _arrived(coming: deque) -> dict[str, np.ndarray]:
    """The oldest chunk's results, once they are there; its memory on the device is free then."""
    copies, _, event = coming.popleft()
    event.synchronize()
    return copies
