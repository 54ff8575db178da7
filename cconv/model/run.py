"""Run: Model, a graph with its weights, ready to describe itself, to be counted and to run.

In: a built-in's name, a file, or a graph; images.  Out: maps by layer, shapes, exact costs.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from math import prod

from .. import backend
from ..errors import ArgumentError, DTypeError, ModelError, ShapeError
from ..images import Preprocessing
from ..planning import ConvSpec, Machine, MoveSpec, Plan, PoolSpec, ResizeSpec, batch_class, plan, shapes, specs
from ..weights import ProcessLock, Weights
from . import builtin, onnx_format, passes, safetensors_format
from .graph import SHOWN, Graph, Layer, ModelCost, Shape
from .layers import Inferred, check, infer

DTYPE, DTYPE_BYTES = "float32", 4
#: Bytes of programs that a model keeps, least recently used dropped first; `Model.program_limit` sets it.
PROGRAM_LIMIT = 64 << 20
#: What a step of a program holds beside its tables: operation, tiling, kernel.
STEP_BYTES = 4096
#: What a pooling window's place takes, per row and column of windows.
WINDOW_BYTES = 96
#: What an entry of another table takes, as a number of Python and as one of C.
TABLE_BYTES = 40
#: Image sizes and choices of layers whose shapes and plans a model remembers.
PLANS_KEPT = 32
#: What the axes of an image are called, by their number.
_AXES = {3: "(N, C, H, W) or (C, H, W)", 2: "(N, C, L) or (C, L)", 1: "(N, F) or (F,)"}


class Programs:
    """Programs by key, the least recently used dropped when their bytes exceed the limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[tuple, tuple[object, int]] = OrderedDict()
        self._lock = ProcessLock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: tuple, build: Callable[[], object], nbytes: int):
        """The program of that key, built if it is not held. Two threads may build at once; one is kept."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
        program = build()
        with self._lock:
            if key not in self._held:
                self._held[key] = program, nbytes
                self.nbytes += nbytes
            self._shrink()
        return program

    def resize(self, limit: int) -> None:
        with self._lock:
            self.limit = limit
            self._shrink()

    def _shrink(self) -> None:
        # A child forked while another thread was in here has its count a program off, so emptiness is asked too.
        while self._held and self.nbytes > self.limit:
            self.nbytes -= self._held.popitem(last=False)[1][1]


def _whole(value, name: str) -> int:
    """An option that is no size: an integer >= 0."""
    try:
        return shapes.integer(value, name, 0, sys.maxsize)
    except ShapeError as error:
        raise ArgumentError(str(error)) from None


def program_bytes(planned: Plan) -> int:
    """What a program is counted as: its steps and their tables. Weights and the arena are not its own."""
    tables = 0
    for spec in (step.operation.spec for step in planned.steps):
        if isinstance(spec, ConvSpec):
            tables += 4 * spec.depth
        elif isinstance(spec, PoolSpec):
            tables += WINDOW_BYTES * (len(spec.rows.start) + len(spec.columns.start))
        elif isinstance(spec, MoveSpec):
            tables += TABLE_BYTES * sum(len(axis.table) for axis in spec.axes if axis.table)
        elif isinstance(spec, ResizeSpec):
            tables += 3 * TABLE_BYTES * (len(spec.rows.low) + len(spec.columns.low))
    return tables + STEP_BYTES * len(planned.steps)


class Model:
    """A network of named layers: any of them can be asked for, and only what it needs is run and counted.

    Made by :func:`load`. Weights are drawn or packed on the first run; layers, shapes and costs need none. A model may
    be run by several threads at once.

    Images do not see each other: N of them are N runs of the graph, or N / B where a file is made for batches of B.

    Attributes
    ----------
    name, description : str
    input_shape : tuple of int
        (C, H, W) that the model is made for; other heights and widths run too, if large enough. A file may be made for
        images of other ranks.
    outputs : tuple of str
        The layers that are returned unless others are asked for.
    weights : Weights
        The convolutions' arrays, shared by all programs.

    Examples
    --------
    >>> model = load("vgg16")
    >>> model.cost((1, 3, 224, 224)).total.macs
    15470264320
    >>> model.shapes((8, 3, 224, 224), ["features.4"])
    {'features.4': (8, 64, 112, 112)}
    """

    def __init__(self, graph: Graph, *, program_limit: int = PROGRAM_LIMIT, precision: str = "highest"):
        check(graph)
        self._graph = graph
        self._precision = specs.checked_precision(precision)
        self._recipes: dict[str, passes.Recipe] = {}
        self.weights = Weights(lambda key: passes.arrays(self._recipes[key]))
        self._programs = Programs(_whole(program_limit, "program_limit"))
        #: What makes this model again where it is unpickled; known to `load`.
        self._again: partial | None = None
        # Caches of this model's own, so that they go when it goes.
        self._infer = lru_cache(maxsize=PLANS_KEPT)(self._infer)
        self._plan = lru_cache(maxsize=PLANS_KEPT)(self._plan)

    def __reduce__(self):
        """A model of `load` is pickled and copied as its name and seed: its weights are drawn again."""
        if self._again is None:
            raise ModelError(f"{self.name}: expected a model made by load to pickle or copy, got one made of a graph")
        return partial(self._again, program_limit=self.program_limit), ()

    def __repr__(self) -> str:
        return f"<Model {self.name}: {len(self._graph.nodes)} layers>"

    @property
    def name(self) -> str:
        return self._graph.name

    @property
    def description(self) -> str:
        return self._graph.description

    @property
    def input_shape(self) -> Shape:
        return self._graph.input_shape

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._graph.outputs

    @property
    def input(self) -> str:
        """The image's name: a file's own, or "input"."""
        return self._graph.input

    @property
    def batch(self) -> int:
        """Images that one run takes: 1, unless a file is made for more; `run` takes multiples of it."""
        return self._graph.batch

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What `prepare` does to a picture; None for a model that takes pictures as they are."""
        return self._graph.preprocessing

    def prepare(self, picture):
        """A picture (3, H, W) in [0, 1], as `cconv.images.decode` gives it, as the model was trained to take it."""
        return picture if self.preprocessing is None else self.preprocessing(picture)

    @property
    def precision(self) -> str:
        """Of its convolutions, as `conv2d` takes it; no bill depends on it."""
        return self._precision

    @property
    def program_limit(self) -> int:
        """Bytes of programs that are kept for the next run; settable, 0 keeps none."""
        return self._programs.limit

    @program_limit.setter
    def program_limit(self, limit: int) -> None:
        self._programs.resize(_whole(limit, "program_limit"))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in order, for one image of `input_shape`, or for the batch that a file is made for."""
        batch = (self.batch,) if self.batch > 1 else ()
        return self.layers_at((*batch, *self.input_shape))

    def layers_at(self, x_shape) -> tuple[Layer, ...]:
        """Every layer, in order, for images of shape (N, C, H, W) or (C, H, W); ShapeError where one does not fit."""
        single, runs, image = self._images(x_shape)
        everything = tuple(node.name for node in self._graph.nodes)
        constants = self._graph.constants
        return tuple(
            Layer(
                name, item.node.operator, tuple(i for i in item.node.inputs if i and i not in constants),
                _visible(item, runs, single), item.result.parameters, item.cost(runs),
            )
            for name, item in self._infer(image, everything).items()
        )  # fmt: skip

    def shapes(self, x_shape, layers: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each asked layer's maps as `run` returns them: (N, K, P, Q), or (N, K) once flattened.

        `x_shape` is (N, C, H, W) or (C, H, W), and in the second case the results have no N either. `layers` are the
        default outputs unless given. ShapeError where an image does not fit, ModelError for an unknown layer.
        """
        single, runs, image = self._images(x_shape)
        asked = self._asked(layers)
        inferred = self._infer(image, asked)
        return {name: _visible(inferred[name], runs, single) for name in asked}

    def cost(self, x_shape, layers: Iterable[str] | None = None) -> ModelCost:
        """The exact cost of `run` on such images: every layer that must run for the asked ones, and the total.

        Counted on the graph as given: folding and fusion change nothing, and layers that need not run are not in it.
        """
        _, runs, image = self._images(x_shape)
        inferred = self._infer(image, self._asked(layers))
        return ModelCost({name: item.cost(runs) for name, item in inferred.items()})

    def executed_flops(self, x_shape, layers: Iterable[str] | None = None, device: str = "cpu") -> int:
        """Floating-point operations that the convolution kernels of this machine's CPU, or of its GPU if `device` is
        "cuda", issue for it; never what is billed."""
        _, runs, image = self._images(x_shape)
        machine = backend.get("gpu" if device == "cuda" else "cpu").machine()
        planned = self._plan(machine, image, self._asked(layers), _together(machine, runs))[0]
        return runs * planned.executed_flops if planned else 0

    def working_bytes(self, x_shape, layers: Iterable[str] | None = None) -> int:
        """Bytes that the maps in between take while `run` runs on this machine's CPU: those that are not returned."""
        _, runs, image = self._images(x_shape)
        planned = self._plan(backend.get("cpu").machine(), image, self._asked(layers))[0]
        if planned is None:
            return 0
        return DTYPE_BYTES * (planned.alone.size if runs == 1 else runs * planned.arena.size)

    def __call__(self, x):
        """The default output's maps; a dict of layer -> maps where the model has several default outputs."""
        maps = self.run(x)
        return maps[self.outputs[0]] if len(maps) == 1 else maps

    def run(self, x, layers: Iterable[str] | None = None, cancel=None) -> dict[str, object]:
        """Run just what the asked layers need.

        Parameters
        ----------
        x : array (N, C, H, W) or (C, H, W), float32
            NumPy runs on the CPU, CuPy on the GPU. Never written.
        layers : iterable of str, optional
            Names from `layers`; the default outputs unless given.
        cancel : optional
            Anything with ``is_set()``, such as a threading.Event; asked between steps. A :func:`cconv.cancel_flag` is
            asked without the GIL.

        Returns
        -------
        dict of layer name to array (N, K, P, Q), or (N, K) once flattened; without N for one (C, H, W) image.
            A Flatten or Dropout is a view of the maps that it was made from. What does not depend on the image, such
            as a Shape, is given as it is, once, in its own type.

        Raises
        ------
        ModelError, ShapeError, DTypeError
            Before anything is computed.
        Cancelled
            When the flag was set before the end.

        Examples
        --------
        >>> import numpy as np
        >>> maps = load("texture").run(np.zeros((3, 32, 48), np.float32), ["level1.pool", "level2.relu"])
        >>> maps["level1.pool"].shape
        (8, 14, 22)
        """
        twin, x = backend.of(x)
        if x.dtype != DTYPE:
            raise DTypeError(f"x: expected {DTYPE}, got {x.dtype}; use x.astype(numpy.{DTYPE})")
        single, runs, image = self._images(x.shape)
        asked = self._asked(layers)
        machine = twin.machine()
        together = _together(machine, runs)
        planned, values = self._plan(machine, image, asked, together)
        maps = {}
        if planned:
            program = self._programs.get(
                (machine, image, asked, together), partial(self._build, twin, planned), program_bytes(planned)
            )
            results = program.run([x.reshape(runs * self._graph.batch, *image)], cancel=cancel)
            maps = dict(zip(planned.outputs, results, strict=True))
        inferred = self._infer(image, asked)
        return {
            name: maps[values[name]].reshape(_visible(inferred[name], runs, single))
            if name in values else inferred[name].value.constant.read().copy()
            for name in asked
        }  # fmt: skip

    def _build(self, twin, planned: Plan):
        program = twin.build(planned, self.weights)
        self._graph.forget()
        return program

    def _asked(self, names: Iterable[str] | None) -> tuple[str, ...]:
        return self.outputs if names is None else self._graph.checked(names)

    def _images(self, x_shape) -> tuple[bool, int, Shape]:
        """Whether it is one image without N, how many runs of the graph it takes, and the image's shape."""
        own, batch = self.input_shape, self._graph.batch
        axes = _AXES.get(len(own), f"of {len(own)} axes, N before them or not")
        sizes = shapes.shape(x_shape, "x", (len(own), len(own) + 1), axes)
        images, image = sizes[: len(sizes) - len(own)], sizes[len(sizes) - len(own) :]
        if image[:1] != own[:1]:
            raise ShapeError(f"x: expected {own[0]} channels for {self.name}, got {image[0]} in {sizes}")
        if prod(images) % batch:
            raise ShapeError(f"x: expected a multiple of {batch} images for {self.name}, got {prod(images)}")
        return not images, prod(images) // batch, image

    def _infer(self, image: Shape, asked: tuple[str, ...]) -> dict[str, Inferred]:
        graph = self._graph
        nodes = passes.prune(graph.nodes, asked)
        if image == graph.input_shape and graph.inferred:
            return {node.name: graph.inferred[node.name] for node in nodes}
        return infer(graph, nodes, image)

    def _plan(
        self, machine: Machine, image: Shape, asked: tuple[str, ...], runs: int = 1
    ) -> tuple[Plan | None, dict[str, int]]:
        """How the asked layers run on one machine, if anything must, and the value that holds each one's maps."""
        inferred = self._infer(image, asked)
        moving = tuple(name for name in asked if inferred[name].value.constant is None)
        if not moving:
            return None, {}
        lowered = passes.lower(inferred, self._graph.input, (self._graph.batch, *image), moving, self.precision)
        self._recipes.update(lowered.recipes)
        outputs = tuple(dict.fromkeys(lowered.values.values()))
        return plan.make(lowered.operations, lowered.inputs, outputs, machine, images=runs), lowered.values


def _together(machine: Machine, runs: int) -> int:
    """For how many runs a plan is made: a GPU's tiles follow them, since no bit depends on that; a CPU's may not."""
    return batch_class(runs, machine.device) if machine.device == "cuda" else 1


def _visible(item: Inferred, runs: int, single: bool) -> Shape:
    """The shape of a layer's result: of all runs, one behind the other; without N if the image came without."""
    shape = item.value.shape
    if item.value.constant is not None or (single and shape[:1] == (1,)):
        return shape if item.value.constant is not None else shape[1:]
    return (runs * shape[0], *shape[1:]) if shape else (runs,)


def load(
    name: str | os.PathLike,
    *,
    architecture: str | None = None,
    preprocessing: str | Mapping | Preprocessing | None = None,
    seed: int = 0,
    program_limit: int = PROGRAM_LIMIT,
    precision: str = "highest",
) -> Model:
    """A built-in model by name, or a network from a file.

    Parameters
    ----------
    name : str or path
        One of :func:`model_names`, or a file, which needs the `model` extra: ``*.onnx``, of which the layers are its
        tensors by their names and the first input is the image; or ``*.safetensors``, a state dict.
    architecture : str, optional
        Of a safetensors file: whose state dict it is, such as "resnet50", by torchvision's names. Unless given, the
        file's metadata must say.
    preprocessing : str, mapping or Preprocessing, optional
        What `Model.prepare` does to a picture: "imagenet", "none", or what :class:`cconv.images.Preprocessing` takes.
        Unless given, what the file says, or torchvision's for its architecture; nothing for the other models.
    seed : int
        Of the weights of the models that have no weights of their own: the same seed gives the same weights.
    program_limit : int
        Bytes of programs that the model keeps between runs.
    precision : "highest", "high" or "medium"
        Of its convolutions, as :func:`cconv.conv2d` takes it.

    Raises
    ------
    ModelError
        For an unknown name; the text lists the known ones. For a file that is damaged, or holds what is not supported:
        the text names the node and its operator, or the tensor.
    BackendUnavailable
        For a file, where the library that reads it is not installed.
    ArgumentError
        For a seed or a limit that is no integer >= 0, and an unknown architecture, preprocessing or precision.

    Examples
    --------
    >>> load("edges").input_shape
    (3, 224, 224)
    """
    name, seed, prepared = str(name), _whole(seed, "seed"), Preprocessing.of(preprocessing)
    if architecture is not None and not name.endswith(".safetensors"):
        raise ArgumentError(f"architecture: expected only with a file *.safetensors, got {name[:SHOWN]!r}")
    if name in builtin.model_names():
        graph = builtin.make(name, seed)
    elif name.endswith(".onnx"):
        graph = onnx_format.read(name)
    elif name.endswith(".safetensors"):
        graph = safetensors_format.read(name, architecture)
    else:
        names = ", ".join(builtin.model_names())
        raise ModelError(f"model: expected one of {names}, or a file *.onnx or *.safetensors, got {name[:SHOWN]!r}")
    if preprocessing is not None:
        graph = replace(graph, preprocessing=prepared)
    model = Model(graph, program_limit=program_limit, precision=precision)
    model._again = partial(
        load, name, architecture=architecture, preprocessing=preprocessing, seed=seed, precision=precision
    )
    return model
