"""Slices: one long convolution as several short ones, so that somebody may call it off in between.

In: the function, its arrays, and how much work it is.  Out: its result; or DeadlineExceeded once `cancel` is set.
"""

from collections.abc import Callable
from math import ceil
from typing import Protocol

import numpy as np

from .errors import DeadlineExceeded

#: About what is computed between two looks at the clock: seconds at most, on any machine.
FLOPS = 2 * 10**10
#: Filters of a slice, if there are so many: a multiple of every kernel's lanes.
FILTERS = 16


class Cancel(Protocol):
    """What says whether a run is called off."""

    def is_set(self) -> bool: ...


def conv2d(
    compute: Callable[..., np.ndarray],
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    options: dict,
    flops: int,
    cancel: Cancel,
) -> np.ndarray:
    """`compute`, which is conv2d, in slices of about FLOPS of its `flops`, bit for bit as in one call.

    A slice is some images, or some filters on one image. Filters of several groups stay together.
    """
    images = x if x.ndim == 4 else x[None]
    per_image = ceil(flops / len(images))
    count, filters = max(1, FLOPS // max(1, per_image)), len(weight)
    # A bias that does not fit goes to the library whole, which says so: a part of it might fit a part of the filters.
    fits = bias is None or bias.shape[:1] == (filters,)
    if per_image > FLOPS and options.get("groups", 1) == 1 and fits:
        filters = max(1, filters * FLOPS // per_image)
        filters -= filters % FILTERS if filters > FILTERS else 0
    y = None
    for n in range(0, len(images), count):
        for k in range(0, len(weight), filters):
            if cancel.is_set():
                raise DeadlineExceeded("the deadline passed before the convolution was done")
            part = slice(k, k + filters) if filters < len(weight) else slice(None)
            out = None if y is None else y[n : n + count, part]
            piece = compute(
                images[n : n + count], weight[part], None if bias is None else bias[part], **options, out=out
            )
            if y is None and piece.shape[:2] == (len(images), len(weight)):
                y = piece
            elif y is None:  # what follows is written in place: only the library says how large a map is
                y = np.empty((len(images), len(weight), *piece.shape[2:]), piece.dtype)
                y[:count, part] = piece
    return y if x.ndim == 4 else y[0]
