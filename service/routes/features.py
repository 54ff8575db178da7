"""Features: photographs in, maps and the bill out; one convolution of tensors that came along; the dry run.

In: JPEG, PNG or .npy bodies, multipart forms, JSON.  Out: .npy, JSON or PNG, with the bill in the headers and in JSON.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from flask import Blueprint, Response

from .. import npy, wire
from ..admission import Permit
from ..engine import AUTO, Task
from ..errors import InvalidRequest
from ..pipeline import Outcome, Pipeline, bill
from .exchange import (
    FORMATS,
    JSON,
    admitted,
    answer,
    answer_format,
    check_options,
    cost_document,
    document,
    files,
    is_form,
    json_body,
    of_model,
    option,
    parts,
    steps,
)

TENSORS = ("x", "weight", "bias")
#: Numbers whose statistics are taken at a time.
SLICE = 1 << 20
OPTIONS = ("stride", "padding", "dilation", "groups", "activation", "precision", "algorithm")


class Features:
    """The project's own API, /v1."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def cost(self, permit: Permit) -> Response:
        return document(cost_document(self._pipeline, json_body(self._pipeline, permit)))

    def features(self, permit: Permit) -> Response:
        check_options("model", "layers", "format", "device")
        wanted = answer_format("json", "npy", "npys", "png")
        named = files(self._pipeline)
        name = option("model")
        if not name:
            raise InvalidRequest(f"model: expected one of {', '.join(self._pipeline.engine.names)}, got nothing")
        layers = wire.read_names(option("layers"), "layers")
        served = self._pipeline.engine.image_model(name)
        of_model(served)
        images = self._pipeline.images(permit, named, served)
        tasks = self._pipeline.image_tasks(served, images, layers, option("device") or AUTO)
        if wanted == "json":
            names = [file for file, _ in named]
            outcome, content = self._pipeline.run(permit, tasks, lambda done: self._summary(names, done))
            return answer(self._pipeline, outcome, [content], JSON)
        if wanted != "npys":
            _check_one_layer(tasks, wanted)
        encode = {"npy": _npy, "npys": _npys, "png": self._picture}[wanted]
        outcome, content = self._pipeline.run(permit, tasks, encode)
        return answer(self._pipeline, outcome, content, FORMATS[wanted])

    def conv2d(self, permit: Permit) -> Response:
        check_options("format", *((*OPTIONS, "device") if is_form() else ()))
        wanted = answer_format("npy", "json")
        tensors, options = self._tensors_of_form() if is_form() else self._tensors_of_json(permit)
        device = options.pop("device", AUTO)
        for name in TENSORS[:2]:
            if name not in tensors:
                raise InvalidRequest(f"{name}: expected a tensor, got none; a request holds x, weight and perhaps bias")
        task = self._pipeline.conv2d_task(tensors["x"], tensors["weight"], tensors.get("bias"), options, device)
        of_model(task)

        def as_json(outcome: Outcome) -> list[bytes]:
            y = wire.as_json(outcome.maps[0]["y"], "y")
            content = {"shape": list(y.shape), "dtype": y.dtype.name, "data": y, **outcome.parameters()}
            return [wire.write_json(content)]

        as_text = wanted == "json"
        numbers = task.quote.output_numbers if as_text else 0
        outcome, content = self._pipeline.run(permit, [task], as_json if as_text else _npy, json_numbers=numbers)
        return answer(self._pipeline, outcome, content, FORMATS[wanted])

    def _tensors_of_form(self) -> tuple[dict[str, np.ndarray], dict]:
        tensors = {}
        for name, _, data in parts():
            if name not in TENSORS or name in tensors:
                raise InvalidRequest(f"body: expected one part each of {', '.join(TENSORS)}, got {wire.brief(name)}")
            tensors[name] = npy.read(data, name)
        given = {name: option(name) for name in OPTIONS}
        options = {name: wire.read_option(value, name) for name, value in given.items() if value is not None}
        return tensors, options | {"device": option("device") or AUTO}

    def _tensors_of_json(self, permit: Permit) -> tuple[dict[str, np.ndarray], dict]:
        content = json_body(self._pipeline, permit)
        dtype = content.pop("dtype", "float32")
        if dtype not in ("float32", "float64"):
            raise InvalidRequest(f"dtype: expected float32 or float64, got {wire.brief(dtype)}")
        device = wire.read_name(content.pop("device", AUTO), "device")
        if unknown := sorted(set(content) - {*TENSORS, *OPTIONS}):
            known = ", ".join((*TENSORS, "dtype", "device", *OPTIONS))
            raise InvalidRequest(f"body: expected {known}; got {wire.brief(unknown)}")
        given = {name: content[name] for name in TENSORS if content.get(name) is not None}
        tensors = {name: wire.read_numbers(data, name, dtype) for name, data in given.items()}
        options = {name: wire.read_option(content[name], name) for name in OPTIONS if name in content}
        return tensors, options | {"device": device}

    def _summary(self, names: Sequence[str], outcome: Outcome) -> bytes:
        """Every image's shape, layers, bill and the statistics of its maps; and the bill in total."""
        images = []
        for task, maps, name in zip(outcome.tasks, outcome.maps, names, strict=True):
            one = task.one()
            for index in range(len(task.images)):
                images.append(
                    {
                        "name": name,
                        "shape": list(task.images.shape[1:]),
                        "bill": bill(one.cost),
                        "layers": steps(one.steps),
                        "maps": {layer: statistics(array[index]) for layer, array in maps.items()},
                    }
                )
        model = outcome.tasks[0].label
        return wire.write_json({"model": model, **outcome.parameters(), "images": images})

    def _picture(self, outcome: Outcome) -> list[bytes]:
        grids = [self._pipeline.engine.grid(maps) for maps in _stacked(outcome)]
        return [self._pipeline.engine.png(np.concatenate(grids))]


def _stacked(outcome: Outcome) -> list[np.ndarray]:
    """The maps of the one layer of every image, (K, P, Q) each; a layer without height and width has one row."""
    arrays = [array for maps in outcome.maps for array in maps.values()]
    return [one if one.ndim == 3 else one.reshape(1, 1, -1) for array in arrays for one in array]


def _npy(outcome: Outcome) -> list[bytes | np.ndarray]:
    """The maps of the one layer of every image, as one array along the first axis."""
    arrays = [np.ascontiguousarray(array) for maps in outcome.maps for array in maps.values()]
    shape = arrays[0].shape
    if len(arrays) > 1:
        shape = (sum(map(len, arrays)), *shape[1:])
    return [npy.header(arrays[0].dtype, shape), *arrays]


def _npys(outcome: Outcome) -> list[bytes | np.ndarray]:
    """Every layer of every image as a .npy of its own, one after the other, as `numpy.save` to an open file does."""
    arrays = [
        array[n] for maps in outcome.maps for n in range(len(next(iter(maps.values())))) for array in maps.values()
    ]
    arrays = [np.ascontiguousarray(array) for array in arrays]
    return [part for array in arrays for part in (npy.header(array.dtype, array.shape), array)]


def _check_one_layer(tasks: Sequence[Task], wanted: str) -> None:
    """One array or picture holds one layer of images of one size: checked before anything is computed."""
    layers = list(tasks[0].quote.outputs)
    if len(layers) != 1:
        raise InvalidRequest(f"layers: expected one layer for format={wanted}, got {', '.join(layers)}")
    sizes = sorted({task.images.shape[1:] for task in tasks})
    if len(sizes) != 1:
        raise InvalidRequest(f"body: expected images of one size for format={wanted}, got {wire.brief(sizes)}")


def statistics(array: np.ndarray) -> dict:
    """Shape, range, mean and standard deviation (of all numbers of an array) over what is finite, in float64."""
    finite = array if np.isfinite(array).all() else array[np.isfinite(array)]
    summary = {"shape": list(array.shape), "min": None, "max": None, "mean": None, "std": None}
    if finite.size:
        mean = float(finite.mean(dtype=np.float64))
        squares = sum(
            float(np.square(np.subtract(part, mean, dtype=np.float64)).sum()) for part in _slices(finite.reshape(-1))
        )
        summary |= {"min": float(finite.min()), "max": float(finite.max()), "mean": mean}
        summary["std"] = (squares / finite.size) ** 0.5
    if finite.size != array.size:
        summary["not_finite"] = array.size - finite.size
    return summary


def _slices(flat: np.ndarray) -> Iterator[np.ndarray]:
    """A long row in parts, so that what is made of one in float64 stays small."""
    return (flat[start : start + SLICE] for start in range(0, flat.size, SLICE))


def blueprint(pipeline: Pipeline) -> Blueprint:
    features = Features(pipeline)
    rules = Blueprint("features", __name__, url_prefix="/v1")
    for view in (features.features, features.conv2d, features.cost):
        rules.add_url_rule(f"/{view.__name__}", view.__name__, admitted(pipeline, view), methods=["POST"])
    return rules
