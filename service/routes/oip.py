"""Oip: the Open Inference Protocol v2 with the binary tensor extension, so that tritonclient works unchanged.

In: /v2 requests.  Out: metadata, and maps of any layer with the bill in the top-level `parameters`.
Every model has one input, and every one of its layers is an output; the default ones are in the metadata. A file's
input has the file's name for it, and `image` is what every model's may be called.
"""

from dataclasses import asdict
from math import prod

import numpy as np
from flask import Blueprint, Response, request

from .. import wire
from ..admission import Permit
from ..engine import INPUT, Served
from ..errors import InvalidRequest, NotFound, Unavailable
from ..outputs import Form
from ..pipeline import Outcome, Pipeline
from ..repository import unknown
from .exchange import (
    JSON,
    REQUEST_ID,
    admitted,
    answer,
    body,
    check_known,
    cost_document,
    document,
    json_body,
    of_model,
)

PLATFORM = "cconv_graph"
#: Where a model runs, in the protocol's words.
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
    "cconv_cost",
    "cconv_outputs",
)
#: How a JPEG and a PNG begin.
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
HEADER_LENGTH = "Inference-Header-Content-Length"


class Oip:
    """The protocol's views."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._engine = pipeline.engine

    def server(self) -> Response:
        return document({"name": "cconv", "version": self._engine.version, "extensions": list(EXTENSIONS)})

    def models(self) -> Response:
        return document({"models": list(self._engine.names)})

    def metadata(self, name: str, version: str | None = None) -> Response:
        served = self._engine.model(name, version)
        model = served.model
        cost = model.cost(served.x_shape).total
        per = "image" if model.batch == 1 else f"batch_of_{model.batch}"
        declared = {} if model.preprocessing is None else {"preprocessing": _json_of(asdict(model.preprocessing))}
        return document(
            {
                "name": name,
                "versions": list(self._engine.versions(name)),
                "platform": PLATFORM,
                "inputs": [{"name": served.input, "datatype": "FP32", "shape": list(served.input_shape)}],
                "outputs": [
                    {"name": layer, "datatype": "FP32", "shape": list(shape)}
                    for layer, shape in served.output_shapes().items()
                ],
                # Strings to strings, says the protocol.
                "properties": {
                    "description": model.description,
                    "version": served.version,
                    "layers": ",".join(served.operators),
                    "default_input_shape": "x".join(map(str, model.input_shape)),
                    **declared,
                    **{f"{key}_per_default_{per}": str(value) for key, value in cost.as_dict().items()},
                },
            }
        )

    def config(self, name: str, version: str | None = None) -> Response:
        served = self._engine.model(name, version)
        return document(
            {
                "name": name,
                "platform": PLATFORM,
                "backend": "cconv",
                "version_policy": {"all": {}},
                "max_batch_size": self._pipeline.settings.max_images,
                "input": [
                    {
                        "name": served.input,
                        "data_type": "TYPE_FP32",
                        "format": "FORMAT_NCHW" if len(served.x_shape) == 4 else "FORMAT_NONE",
                        "dims": list(served.input_shape[1:]),
                        "optional": False,
                    }
                ],
                "output": [
                    {"name": layer, "data_type": "TYPE_FP32", "dims": list(shape[1:])}
                    for layer, shape in served.output_shapes().items()
                ],
                "dynamic_batching": {"max_queue_delay_microseconds": 0},
                "instance_group": [{"name": name, "kind": KINDS[self._engine.device().name], "count": 1}],
            }
        )

    def ready(self, name: str, version: str | None = None) -> Response:
        try:
            self._engine.model(name, version)
        except Unavailable as error:
            return document({"name": name, "ready": False, "error": str(error)}, 503)
        return document({"name": name, "ready": True})

    def index(self, permit: Permit) -> Response:
        """Every version of every model; of `{"ready": true}` only those that can be asked."""
        content = self._json_or_nothing(permit)
        check_known(content, ("ready",), "body")
        ready = content.get("ready", False)
        if type(ready) is not bool:
            raise InvalidRequest(f"ready: expected true or false, got {wire.brief(ready)}")
        return document([one for one in self._engine.index() if not ready or one["state"] == "READY"])

    def cost(self, permit: Permit, name: str, version: str | None = None) -> Response:
        self._engine.model(name, version)
        content = {**json_body(self._pipeline, permit), "model": name}
        return document(cost_document(self._pipeline, content, version))

    def stats(self, name: str, version: str | None = None) -> Response:
        known = self._engine.versions(name) if name in self._engine.names else ()
        if not known or version not in (None, *known):
            raise NotFound(unknown(name, version))
        statistics = self._pipeline.metrics.statistics
        return document({"model_stats": [statistics.of(name, one) for one in known if version in (None, one)]})

    def all_stats(self) -> Response:
        statistics, engine = self._pipeline.metrics.statistics, self._engine
        found = [statistics.of(name, version) for name in engine.names for version in engine.versions(name)]
        return document({"model_stats": found})

    def load(self, permit: Permit, name: str) -> Response:
        self._check_no_files(permit)
        self._pipeline.load(name)
        return document({"name": name, "load": True})

    def unload(self, permit: Permit, name: str) -> Response:
        self._check_no_files(permit)
        self._pipeline.unload(name)
        return document({"name": name, "load": False})

    def _check_no_files(self, permit: Permit) -> None:
        """Models come from the operator's folder, and not from requests."""
        content = self._json_or_nothing(permit)
        check_known(content, ("parameters",), "body")
        parameters = content.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidRequest(f"parameters: expected a JSON object, got {wire.brief(parameters)}")
        check_known(parameters, ("unload_dependents",), "parameters")

    def _json_or_nothing(self, permit: Permit) -> dict:
        data = body(self._pipeline)
        self._pipeline.json(permit, len(data), len(data) * wire.JSON_MEMORY)
        return wire.read_json(data) if data else {}

    def infer(self, permit: Permit, name: str, version: str | None = None) -> Response:
        served = self._engine.model(name, version)
        of_model(served)
        asked = self._asked(permit, served, body(self._pipeline))
        if not permit.request_id and REQUEST_ID.fullmatch(asked.id or ""):
            permit.request_id = asked.id
        if asked.timeout_us:
            permit.shorten(asked.timeout_us / 1e6)
        images = self._tensor(permit, served, asked.images)
        task = self._pipeline.task(served, images, tuple(asked.outputs), asked.device)
        forms = {
            layer: Form.read(layer, parameters, task.quote.outputs[layer], layer in asked.binary)
            for layer, parameters in asked.outputs.items()
        }
        permit.asked += repr(forms)
        as_json = sum(prod(shape) for layer, shape in task.quote.outputs.items() if layer not in asked.binary)

        def encode(outcome: Outcome):
            content = {"model_name": name, "model_version": served.version, "parameters": outcome.parameters()}
            if asked.id is not None:
                content["id"] = asked.id
            maps = {layer: forms[layer].apply(array, layer) for layer, array in outcome.results[0].maps.items()}
            return wire.write_infer(content, maps, asked.binary)

        room = sum(form.room(task.quote.outputs[layer], task.images.itemsize) for layer, form in forms.items())
        outcome, (header, tensors) = self._pipeline.run(
            permit, [task], encode, json_numbers=as_json, encoding_bytes=room
        )
        if not tensors:
            return answer(self._pipeline, outcome, [header], JSON)
        length = {HEADER_LENGTH: str(len(header))}
        return answer(self._pipeline, outcome, [header, *tensors], "application/octet-stream", **length)

    def _asked(self, permit: Permit, served: Served, data: bytes) -> wire.InferRequest:
        given = request.headers.get(HEADER_LENGTH)
        if given is not None and given.strip("0") == "" and given:
            return self._raw(served, data)
        size = wire.json_bytes(given, len(data))
        self._pipeline.json(permit, size, size * wire.JSON_MEMORY)
        expected = wire.Expected(
            served.name,
            (served.input, INPUT),
            served.input_shape,
            frozenset(served.operators),
            served.model.outputs,
            pictures=served.takes_images,
            most_pictures=self._pipeline.settings.max_images,
        )
        return wire.read_infer(data, size, expected)

    def _raw(self, served: Served, data: bytes) -> wire.InferRequest:
        """A body that is one tensor, without a word about it: of a model for photographs, one JPEG or PNG."""
        if not served.takes_images or not data.startswith(PICTURES):
            raise InvalidRequest(
                f"The shape of the raw input '{served.input}' can not be deduced because there are more than one "
                f"variable-sized dimension; expected a JPEG or PNG for a model of photographs (C, H, W), got bytes "
                f"that begin with {wire.brief(data[:8])} for one of {list(served.x_shape)}"
            )
        outputs = served.model.outputs
        return wire.InferRequest(None, [data], {layer: {} for layer in outputs}, frozenset(outputs))

    def _tensor(self, permit: Permit, served: Served, images: np.ndarray | list[bytes]) -> np.ndarray:
        if isinstance(images, np.ndarray):
            return self._pipeline.as_float32(permit, images)
        named = [(f"element {index} of input '{served.input}'", data) for index, data in enumerate(images)]
        if odd := next((name for name, data in named if not data.startswith(PICTURES)), None):
            raise InvalidRequest(f"{odd}: expected a JPEG or PNG, got something else")
        arrays = self._pipeline.images(permit, named, served)
        if sizes := {array.shape for array in arrays if array.shape != arrays[0].shape}:
            raise InvalidRequest(
                f"input '{served.input}': expected images of one size, got {[*arrays[0].shape[2:]]} and "
                f"{[*sizes.pop()[2:]]}"
            )
        permit.take(nbytes=sum(array.nbytes for array in arrays))
        return np.concatenate(arrays)


def _json_of(value: dict) -> str:
    return wire.write_json(value).decode()


def blueprint(pipeline: Pipeline) -> Blueprint:
    oip = Oip(pipeline)
    rules = Blueprint("oip", __name__, url_prefix="/v2")
    rules.add_url_rule("", "server", oip.server)
    rules.add_url_rule("/models", "models", oip.models)
    rules.add_url_rule("/models/stats", "all_stats", oip.all_stats)
    for view in (oip.load, oip.unload):
        address = f"/repository/models/<name>/{view.__name__}"
        rules.add_url_rule(address, view.__name__, admitted(pipeline, view), methods=["POST"])
    rules.add_url_rule("/repository/index", "index", admitted(pipeline, oip.index), methods=["POST"])
    for suffix, prefix in (("", "/models/<name>"), ("_version", "/models/<name>/versions/<version>")):
        for ending, view in (("", oip.metadata), ("/config", oip.config), ("/ready", oip.ready), ("/stats", oip.stats)):
            rules.add_url_rule(prefix + ending, view.__name__ + suffix, view)
        for view in (oip.cost, oip.infer):
            name = view.__name__
            rules.add_url_rule(f"{prefix}/{name}", name + suffix, admitted(pipeline, view), methods=["POST"])
    return rules
