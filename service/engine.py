"""Engine: the service's only importer of cconv. Models by name, what a task costs, and the function that runs it.

In: names, shapes, arrays and encoded images.  Out: Quote (what it will cost, from shapes alone), Task (a quote with its
arrays, ready for the compute thread), images as arrays; cconv's errors as the service's own.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from math import ceil, prod

import numpy as np

import cconv
from cconv import Cost, images

from .errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from .wire import read_name

DEVICE = "cpu"
VERSION = "1"
FLOAT32_BYTES = 4
#: Options of conv2d that change how it is computed and not what it costs.
UNCOUNTED_OPTIONS = ("precision", "algorithm")
#: About what is computed between two looks at the clock: seconds at most, on any machine.
SLICE_FLOPS = 2 * 10**10
#: Filters of a slice, if there are so many: a multiple of every kernel's lanes.
SLICE_FILTERS = 16

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One layer that must run."""

    layer: str
    operator: str
    shape: Shape
    cost: Cost


@dataclass(frozen=True)
class Quote:
    """What a task will cost: known before anything is allocated, and what is billed when it is done.

    Attributes
    ----------
    cost : Cost
    steps : tuple of Step
        Every layer that must run, in order.
    outputs : dict of layer name to shape
        The maps that will be returned; of a single convolution only their number is known beforehand.
    output_numbers : int
    working_bytes : int
        About what the maps in between take.
    """

    cost: Cost
    steps: tuple[Step, ...]
    outputs: dict[str, Shape]
    output_numbers: int
    working_bytes: int

    @property
    def flops(self) -> int:
        """flops + flops_other: what limits and queues count."""
        return self.cost.flops + self.cost.flops_other


@dataclass(frozen=True, eq=False)
class Task:
    """A quote with its arrays. Tasks with equal keys may run together, stacked along the first axis."""

    label: str
    quote: Quote
    images: np.ndarray
    key: Hashable | None
    algorithm: str
    run: Callable[[np.ndarray, threading.Event], dict[str, np.ndarray]]


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except cconv.Cancelled as error:
        raise DeadlineExceeded(str(error)) from error
    except cconv.BackendUnavailable as error:
        raise Unavailable(str(error)) from error
    except cconv.CconvError as error:
        raise InvalidRequest(str(error)) from error


class Engine:
    """cconv's models and operators as tasks.

    Parameters
    ----------
    models : tuple of str
        The built-in models to serve; all of them if empty. An unknown name is a ValueError.
    """

    def __init__(self, models: tuple[str, ...] = ()):
        known = cconv.model_names()
        if unknown := sorted(set(models) - set(known)):
            raise ValueError(f"models: expected names of {', '.join(known)}, got {', '.join(unknown)}")
        self.names = models or known
        self._models: dict[str, cconv.Model] = {}
        self._operators: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        return metadata.version("cconv")

    def model(self, name: str, version: str | None = None) -> "cconv.Model":
        """A model that is served; its weights are drawn when it first runs."""
        if read_name(name, "model") not in self.names:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version not in (None, VERSION):
            raise NotFound(f"Request for unknown model: '{name}' version {version[:16]} is not found")
        with self._lock:
            if name not in self._models:
                self._models[name] = cconv.load(name)
                self._operators[name] = {layer.name: layer.operator for layer in self._models[name].layers}
            return self._models[name]

    def quote(self, name: str, x_shape: Shape, layers: tuple[str, ...] | None = None) -> Quote:
        """What running a model on images of this shape costs, if only these layers are asked for."""
        model = self.model(name)
        with _translated():
            cost = model.cost(x_shape, layers)
            shapes = model.shapes(x_shape, tuple(cost.layers))
            outputs = model.shapes(x_shape, layers)
        operators = self._operators[name]
        steps = tuple(Step(layer, operators[layer], shapes[layer], each) for layer, each in cost.layers.items())
        # A chain of layers keeps two maps at a time: the one that is read and the one that is written.
        largest = max(map(prod, shapes.values())) * FLOAT32_BYTES
        return Quote(cost.total, steps, outputs, sum(map(prod, outputs.values())), 2 * largest)

    def task(self, name: str, x: np.ndarray, layers: tuple[str, ...] | None = None) -> Task:
        """A model on images (N, C, H, W) float32."""
        model, quote = self.model(name), self.quote(name, x.shape, layers)
        asked = tuple(quote.outputs)

        def run(x: np.ndarray, cancel: threading.Event) -> dict[str, np.ndarray]:
            with _translated():
                return model.run(x, asked, cancel)

        return Task(name, quote, x, (name, asked, x.shape[1:]), "auto", run)

    def quote_conv2d(self, x_shape: Shape, w_shape: Shape, **options) -> Quote:
        """What one conv2d on arrays of these shapes costs; options as conv2d_cost's."""
        with _translated():
            cost = cconv.conv2d_cost(x_shape, w_shape, **options)
        # macs are one per output and weight of a filter: the only formula for the size stays in the library.
        return Quote(cost, (), {}, cost.macs // prod(w_shape[1:]), 0)

    def conv2d_task(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, options: dict) -> Task:
        """One convolution of tensors that came with the request."""
        counted = {name: value for name, value in options.items() if name not in UNCOUNTED_OPTIONS}
        quote = self.quote_conv2d(x.shape, weight.shape, bias=bias is not None, **counted)

        def run(x: np.ndarray, cancel: threading.Event) -> dict[str, np.ndarray]:
            with _translated():
                return {"y": _sliced_conv2d(x, weight, bias, options, quote.flops, cancel)}

        return Task("conv2d", quote, x, None, options.get("algorithm", "auto"), run)

    def decode(self, data: bytes, name: str, max_pixels: int) -> np.ndarray:
        """A JPEG or PNG as float32 (3, H, W) in 0..1; its size is checked before it is decoded."""
        try:
            with _translated():
                return images.decode(data, max_pixels=max_pixels)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name}: {error}") from error

    def grid(self, maps: np.ndarray) -> np.ndarray:
        """Maps (K, P, Q) as one grey picture, uint8 (height, width)."""
        with _translated():
            return images.grid(maps)

    def png(self, picture: np.ndarray) -> bytes:
        with _translated():
            return images.png(picture)


def _sliced_conv2d(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, options: dict, flops: int, cancel: threading.Event
) -> np.ndarray:
    """conv2d in slices of about SLICE_FLOPS, bit for bit as in one call; DeadlineExceeded once `cancel` is set.

    A slice is some images, or some filters on one image. Filters of several groups stay together.
    """
    images = x if x.ndim == 4 else x[None]
    per_image = ceil(flops / len(images))
    count, filters = max(1, SLICE_FLOPS // max(1, per_image)), len(weight)
    # A bias that does not fit goes to the library whole, which says so: a part of it might fit a part of the filters.
    fits = bias is None or bias.shape[:1] == (filters,)
    if per_image > SLICE_FLOPS and options.get("groups", 1) == 1 and fits:
        filters = max(1, filters * SLICE_FLOPS // per_image)
        filters -= filters % SLICE_FILTERS if filters > SLICE_FILTERS else 0
    y = None
    for n in range(0, len(images), count):
        for k in range(0, len(weight), filters):
            if cancel.is_set():
                raise DeadlineExceeded("the deadline passed before the convolution was done")
            part = slice(k, k + filters) if filters < len(weight) else slice(None)
            out = None if y is None else y[n : n + count, part]
            piece = cconv.conv2d(
                images[n : n + count], weight[part], None if bias is None else bias[part], **options, out=out
            )
            if y is None and piece.shape[:2] == (len(images), len(weight)):
                y = piece
            elif y is None:  # what follows is written in place: only the library says how large a map is
                y = np.empty((len(images), len(weight), *piece.shape[2:]), piece.dtype)
                y[:count, part] = piece
    return y if x.ndim == 4 else y[0]
