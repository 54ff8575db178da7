"""Engine: the service's only importer of cconv. Models by name and version, what a task costs, and what runs it.

In: names, shapes, arrays and encoded images.  Out: Quote (what it will cost, from shapes alone), Task (a quote with its
arrays, ready to run), images as arrays; cconv's errors as the service's own.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from math import prod

import numpy as np

import cconv
from cconv import Cost, backend, devices, images

from . import slices
from .errors import DeadlineExceeded, DeviceLost, InvalidRequest, NotFound, Overloaded, Unavailable
from .repository import Entry, Repository, State, unknown
from .wire import read_name

#: What a run is done with: the flag that calls it off, its threads, how many there are; and the bytes kept idle.
cancel_flag, limit_threads, cores = cconv.cancel_flag, cconv.limit_threads, cconv.get_num_threads
limit_pool = cconv.set_pool_limit
#: The device that a request asks for unless it names one.
AUTO = "auto"
#: Of the built-in models, and what their input is called.
VERSION, INPUT = "1", "image"
#: What bills of single convolutions are counted under.
CONV2D = "conv2d"
FLOAT32_BYTES = 4
#: Options of conv2d that change how it is computed and not what it costs.
UNCOUNTED_OPTIONS = ("precision", "algorithm")
#: Of each model: shapes and layers of which it is remembered what they cost.
MOST_LOOKS = 256

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
    """

    cost: Cost
    steps: tuple[Step, ...]
    outputs: dict[str, Shape]
    output_numbers: int

    @property
    def flops(self) -> int:
        """flops + flops_other: what limits and queues count."""
        return self.cost.flops + self.cost.flops_other


@dataclass(frozen=True, eq=False)
class Task:
    """A quote with its arrays. Tasks with equal keys may run together, stacked along the first axis.

    Attributes
    ----------
    count : int
        Images.
    device : str
        "cpu" or "cuda".
    working_bytes : function without arguments
        What the maps in between take while it runs. Asked once the work is admitted: it needs a plan.
    per_image : bool
        Whether every output has a row for each image.
    version : str
    shapes : dict
        What `price` computes the cost from again: of a model the shape and the layers, of a conv2d its arguments.
    more : tuple of arrays
        What came along beside the images.
    options : str
        What else makes the task what it is; of devices the one that was asked for, and not the one that was there.
    one : function without arguments
        Of a model: the quote of one image of these.
    """

    label: str
    quote: Quote
    images: np.ndarray
    key: Hashable | None
    algorithm: str
    run: Callable[[np.ndarray, slices.Cancel], dict[str, np.ndarray]]
    count: int
    device: str
    working_bytes: Callable[[], int] = lambda: 0
    per_image: bool = True
    version: str = VERSION
    shapes: dict = field(default_factory=dict)
    more: tuple[np.ndarray, ...] = ()
    options: str = ""
    one: Callable[[], Quote] | None = None


def pool_idle_bytes() -> int:
    """Memory that the library keeps for its next runs."""
    return backend.get("cpu").idle_bytes()


def _common(one: Shape, other: Shape) -> Shape:
    """Where two shapes agree, and -1 elsewhere."""
    same_rank = len(one) == len(other)
    return tuple(size if same_rank and other[axis] == size else -1 for axis, size in enumerate(one))


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model that is ready, and what its callers must know of it."""

    name: str
    version: str
    input: str
    model: cconv.Model
    operators: dict[str, str]
    #: What was asked of it lately, by shape and layers: pure functions of these, which take longer than a small run.
    _looks: dict = field(default_factory=dict)

    def look(self, x_shape: Shape, layers: tuple[str, ...] | None) -> "_Look":
        """What running it on images of this shape is, if only these layers are asked for."""
        found = self._looks.get((x_shape, layers))
        if found is None:
            found = _Look(self.model, self.operators, x_shape, layers)
            if len(self._looks) >= MOST_LOOKS:
                self._looks.clear()
            self._looks[x_shape, layers] = found
        return found

    @classmethod
    def of(cls, name: str, version: str, model: cconv.Model, input: str) -> "Served":
        return cls(name, version, input, model, {layer.name: layer.operator for layer in model.layers})

    @property
    def takes_images(self) -> bool:
        """Whether it is made for single images (C, H, W)."""
        return self.model.batch == 1 and len(self.model.input_shape) == 3

    @property
    def x_shape(self) -> Shape:
        """The images of one run, of the model's own size."""
        return (self.model.batch, *self.model.input_shape)

    @property
    def input_shape(self) -> Shape:
        """-1 for how many there are and for what may vary."""
        return (-1, *self.model.input_shape[:1], *(-1 for _ in self.model.input_shape[1:]))

    def output_shapes(self) -> dict[str, Shape]:
        """The default outputs', with -1 where larger images or more of them change a size."""
        own = self.model.shapes(self.x_shape)
        batch, *sizes = self.x_shape
        try:
            more = self.model.shapes((2 * batch, *sizes[:1], *(2 * size for size in sizes[1:])))
        except cconv.CconvError:  # it takes no larger ones
            more = self.model.shapes((2 * batch, *sizes))
        return {layer: _common(shape, more[layer]) for layer, shape in own.items()}


class _Look:
    """A model on images of one shape, asked for some layers: what that costs and takes."""

    def __init__(self, model: cconv.Model, operators: dict[str, str], x_shape: Shape, layers: tuple[str, ...] | None):
        self._model, self._x_shape = model, x_shape
        with _translated():
            cost = model.cost(x_shape, layers)
            shapes = model.shapes(x_shape, tuple(cost.layers))
            outputs = model.shapes(x_shape, layers)
        steps = tuple(Step(layer, operators[layer], shapes[layer], each) for layer, each in cost.layers.items())
        self.quote = Quote(cost.total, steps, outputs, sum(map(prod, outputs.values())))

    @cached_property
    def per_image(self) -> bool:
        """Whether every image has maps of its own.

        What no image changes, such as a Shape, is there once, and a file may fold its batch into other axes.
        """
        count, *sizes = self._x_shape
        outputs = self.quote.outputs
        with _translated():
            doubled = self._model.shapes((2 * count, *sizes), tuple(outputs))
        return all(outputs[layer][:1] == (count,) and doubled[layer][:1] == (2 * count,) for layer in outputs)

    @cached_property
    def working_bytes(self) -> int:
        """Bytes that the maps in between take."""
        with _translated():
            return self._model.working_bytes(self._x_shape, tuple(self.quote.outputs))


@contextmanager
def _translated(argument: str = "") -> Iterator[None]:
    """cconv's errors as the service's; of a client's mistake it is said in which argument, if that is named."""
    try:
        yield
    except cconv.Cancelled as error:
        raise DeadlineExceeded(str(error)) from error
    except cconv.BackendUnavailable as error:
        raise Unavailable(str(error)) from error
    except cconv.OutOfMemory as error:
        raise Overloaded("the GPU has too little memory for this request; try again, or with fewer images") from error
    except cconv.DeviceError as error:
        raise DeviceLost("the GPU failed and nothing was billed; the server starts anew, try again") from error
    except cconv.CconvError as error:
        raise InvalidRequest(f"{argument}: {error}" if argument else str(error)) from error


class Engine:
    """cconv's models and operators as tasks.

    Parameters
    ----------
    models : tuple of str
        The models to serve, of the built-in ones and the repository's; all of them if empty. An unknown name is a
        ValueError.
    repository : str
        A folder of models, or empty. Its names hide built-in ones.
    device : str
        "cpu" or "cuda" to compute there alone, "auto" to take either. Nothing is touched before the first task.
    """

    def __init__(self, models: tuple[str, ...] = (), repository: str = "", device: str = AUTO):
        if device not in devices.NAMES:
            raise ValueError(f"device: expected one of {', '.join(devices.NAMES)}, got {device!r}")
        self._device = device
        self._devices: dict[str, devices.Device] = {}
        #: Called if a GPU fails before any task runs on it.
        self.on_lost: Callable[[DeviceLost], None] = lambda error: None
        self.repository = Repository(repository, reserved=(CONV2D,))
        known = tuple(dict.fromkeys((*cconv.model_names(), *self.repository.names)))
        if others := sorted(set(models) - set(known)):
            raise ValueError(f"models: expected names of {', '.join(known)}, got {', '.join(others)}")
        self._only = models
        self.repository.keep(self.names)
        self._built_in: dict[str, Served] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models that are served."""
        return self._only or tuple(dict.fromkeys((*cconv.model_names(), *self.repository.names)))

    def look(self, name: str) -> list[Entry]:
        """What the repository's folder has of a model now; NotFound if it has nothing, or may not be served."""
        if self._only and name not in self._only:
            raise NotFound(f"failed to load '{name}', CCONV_MODELS does not name it")
        return self.repository.look(name)

    @property
    def version(self) -> str:
        return metadata.version("cconv")

    def device(self, asked: str = AUTO) -> devices.Device:
        """Where a task that asks for this device runs; Unavailable where this server has no such one."""
        if asked not in devices.NAMES:
            raise InvalidRequest(f"device: expected one of {', '.join(devices.NAMES)}, got {asked!r:.40}")
        if AUTO not in (asked, self._device) and asked != self._device:
            raise Unavailable(f"device: expected {self._device}, on which alone this server computes, got {asked}")
        name = self._device if asked == AUTO else asked
        with self._lock:
            if name not in self._devices:
                try:
                    with _translated():
                        self._devices[name] = devices.device(name)
                except DeviceLost as error:
                    self.on_lost(error)
                    raise
            return self._devices[name]

    def model(self, name: str, version: str | None = None) -> Served:
        """A model that is served, its highest version unless given; Unavailable unless that is ready.

        No other version, and no built-in model, ever stands in for one that is not ready.
        """
        if read_name(name, "model") in self.repository.names:
            entry = self.repository.find(name, version)
            if entry.state is not State.READY:
                reason = entry.reason or "it is being loaded; try again"
                raise Unavailable(f"model '{name}' version {entry.version or '-'} is not ready: {reason}")
            return entry.model
        if name not in self.names:
            raise NotFound(unknown(name))
        if version not in (None, VERSION):
            raise NotFound(unknown(name, version))
        with self._lock:
            if name not in self._built_in:
                self._built_in[name] = Served.of(name, VERSION, cconv.load(name), INPUT)
            return self._built_in[name]

    def image_model(self, name: str) -> Served:
        """A model for photographs; InvalidRequest for one that takes anything else."""
        served = self.model(name)
        if not served.takes_images:
            shape = list(served.x_shape)
            raise InvalidRequest(
                f"model: expected one that takes single images (C, H, W), but '{name}' takes {shape}; "
                f"POST /v2/models/{name}/infer takes tensors of any shape"
            )
        return served

    def image_models(self) -> list[Served]:
        """Every model for photographs that is ready."""
        names = (n for n in self.names if n not in self.repository.names or self._is_ready(n))
        return [served for served in map(self.model, names) if served.takes_images]

    def _is_ready(self, name: str) -> bool:
        return self.repository.find(name).state is State.READY

    def versions(self, name: str) -> tuple[str, ...]:
        """From the highest down."""
        return self.repository.versions(name) if name in self.repository.names else (VERSION,)

    def index(self) -> list[dict[str, str]]:
        """Every version of every model, ready or not, and why not."""
        built_in = (name for name in self.names if name not in self.repository.names)
        ready = {"version": VERSION, "state": State.READY.value, "reason": ""}
        return [{"name": name, **ready} for name in built_in] + [entry.as_dict() for entry in self.repository.entries]

    def open(self, entry: Entry) -> Served:
        """A model of the repository, from its file; InvalidRequest or Unavailable says what is wrong with it."""
        with _translated():
            model = cconv.load(entry.path)
            return Served.of(entry.name, entry.version, model, model.input)

    def task(self, served: Served, x: np.ndarray, layers: tuple[str, ...] | None = None, device: str = AUTO) -> Task:
        """A model on images (N, C, H, W) float32, or on what else it takes."""
        place, model, look = self.device(device), served.model, served.look(x.shape, layers)
        quote, asked = look.quote, tuple(look.quote.outputs)

        def run(x: np.ndarray, cancel: slices.Cancel) -> dict[str, np.ndarray]:
            with _translated():
                return place.run(lambda part: model.run(part, asked, cancel), x, cancel, whole=not look.per_image)

        def working_bytes() -> int:
            return _staging_bytes(x, quote) if place.name == "cuda" else look.working_bytes

        # The model itself: another one may be served under its name and version by now.
        key = (served, asked, x.shape[1:], place.name) if look.per_image else None
        return Task(
            served.name, quote, x, key, "auto", run, len(x), place.name, working_bytes, look.per_image, served.version,
            {"shape": x.shape, "layers": asked}, options=device,
            one=lambda: self.quote(served, (1, *x.shape[1:]), asked),
        )  # fmt: skip

    def quote(self, served: Served, x_shape: Shape, layers: tuple[str, ...] | None = None) -> Quote:
        """What running a model on images of this shape costs, if only these layers are asked for."""
        return served.look(x_shape, layers).quote

    def quote_conv2d(self, x_shape: Shape, w_shape: Shape, **options) -> Quote:
        """What one conv2d on arrays of these shapes costs; options as conv2d_cost's."""
        with _translated():
            cost = cconv.conv2d_cost(x_shape, w_shape, **options)
        # macs are one per output and weight of a filter: the only formula for the size stays in the library.
        return Quote(cost, (), {}, cost.macs // prod(w_shape[1:]))

    def conv2d_task(
        self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, options: dict, device: str = AUTO
    ) -> Task:
        """One convolution of tensors that came with the request."""
        place = self.device(device)
        counted = {name: value for name, value in options.items() if name not in UNCOUNTED_OPTIONS}
        quote = self.quote_conv2d(x.shape, weight.shape, bias=bias is not None, **counted)

        def run(x: np.ndarray, cancel: slices.Cancel) -> dict[str, np.ndarray]:
            with _translated():
                if place.name == "cpu":
                    return {"y": slices.conv2d(cconv.conv2d, x, weight, bias, options, quote.flops, cancel)}
                filters, shifts = place.put(weight), place.put(bias)
                images = x if x.ndim == 4 else x[None]
                maps = place.run(lambda part: {"y": cconv.conv2d(part, filters, shifts, **options)}, images, cancel)
                return {"y": maps["y"] if x.ndim == 4 else maps["y"][0]}

        count = len(x) if x.ndim == 4 else 1
        shapes = {"x_shape": x.shape, "w_shape": weight.shape, "bias": bias is not None, **counted}
        more = (weight,) if bias is None else (weight, bias)
        algorithm = options.get("algorithm", "auto")
        asked = repr((sorted(options.items()), device))
        return Task(
            CONV2D, quote, x, None, algorithm, run, count, place.name,
            lambda: _staging_bytes(x, quote) if place.name == "cuda" else 0, shapes=shapes, more=more, options=asked,
        )  # fmt: skip

    def price(self, name: str, version: str, shapes: dict) -> Cost:
        """What a task cost of which the ledger has these shapes; NotFound for a model that is not served any more."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in shapes.items()}
        if name == CONV2D:
            return self.quote_conv2d(**values).cost
        return self.quote(self.model(name, version), values["shape"], values["layers"]).cost

    def decode(self, data: bytes, name: str, max_pixels: int) -> np.ndarray:
        """A JPEG or PNG as float32 (3, H, W) in 0..1; its size is checked before it is decoded."""
        with _translated(name):
            return images.decode(data, max_pixels=max_pixels)

    def prepare(self, served: Served, picture: np.ndarray, name: str, max_pixels: int) -> np.ndarray:
        """A picture as a model was trained to take it, by what is declared with the model; as it is without that."""
        declared = served.model.preprocessing
        if declared is None:
            return picture
        short, long = sorted(picture.shape[1:])
        if isinstance(declared.resize, int) and declared.resize**2 * long > max_pixels * short:
            raise InvalidRequest(
                f"{name}: expected at most {max_pixels} pixels when its short side is made {declared.resize} for "
                f"model '{served.name}', got {short} x {long} to begin with"
            )
        with _translated(name):
            return served.model.prepare(picture)

    def grid(self, maps: np.ndarray) -> np.ndarray:
        """Maps (K, P, Q) as one grey picture, uint8 (height, width)."""
        with _translated():
            return images.grid(maps)

    def png(self, picture: np.ndarray) -> bytes:
        with _translated():
            return images.png(picture)


def _staging_bytes(x: np.ndarray, quote: Quote) -> int:
    """Page-locked memory for what goes to a GPU and comes back; the maps in between take none of the host's."""
    return x.nbytes + quote.output_numbers * x.itemsize
