"""Oip: the Open Inference Protocol v2 with the binary tensor extension, so that tritonclient works unchanged.

In: /v2 requests.  Out: metadata, and maps of any layer with the bill in the top-level `parameters`.
Every model has one input, and every one of its layers is an output; the default ones are in the metadata. A file's
input has the file's name for it, and `image` is what every model's may be called.
"""

from dataclasses import asdict
from math import prod

from flask import Blueprint, Response, request

from .. import wire
from ..admission import Permit
from ..engine import INPUT
from ..errors import InvalidRequest, Unavailable
from ..pipeline import Outcome, Pipeline
from .exchange import JSON, admitted, answer, body, check_known, cost_document, document, json_body

PLATFORM = "cconv_graph"
#: Where a model runs, in the protocol's words.
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "cconv_cost")
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
        data = body(self._pipeline)
        self._pipeline.json(permit, len(data), len(data) * wire.JSON_MEMORY)
        content = wire.read_json(data) if data else {}
        check_known(content, ("ready",), "body")
        ready = content.get("ready", False)
        if type(ready) is not bool:
            raise InvalidRequest(f"ready: expected true or false, got {wire.brief(ready)}")
        return document([one for one in self._engine.index() if not ready or one["state"] == "READY"])

    def cost(self, permit: Permit, name: str, version: str | None = None) -> Response:
        self._engine.model(name, version)
        content = {**json_body(self._pipeline, permit), "model": name}
        return document(cost_document(self._pipeline, content, version))

    def infer(self, permit: Permit, name: str, version: str | None = None) -> Response:
        served = self._engine.model(name, version)
        data = body(self._pipeline)
        json_bytes = wire.json_bytes(request.headers.get(HEADER_LENGTH), len(data))
        self._pipeline.json(permit, json_bytes, json_bytes * wire.JSON_MEMORY)
        layers = frozenset(served.operators)
        inputs = (served.input, INPUT)
        asked = wire.read_infer(
            data, json_bytes, wire.Expected(name, inputs, served.input_shape, layers, served.model.outputs)
        )
        if asked.timeout_us:
            permit.shorten(asked.timeout_us / 1e6)
        task = self._pipeline.task(name, asked.images, asked.outputs, version, asked.device)
        as_json = sum(prod(shape) for layer, shape in task.quote.outputs.items() if layer not in asked.binary)

        def encode(outcome: Outcome):
            content = {"model_name": name, "model_version": served.version, "parameters": outcome.parameters()}
            if asked.id is not None:
                content["id"] = asked.id
            return wire.write_infer(content, outcome.results[0].maps, asked.binary)

        outcome, (header, tensors) = self._pipeline.run(permit, [task], encode, json_numbers=as_json)
        response = answer(self._pipeline, outcome, [header, *tensors], "application/octet-stream" if tensors else JSON)
        if tensors:
            response.headers[HEADER_LENGTH] = str(len(header))
        return response


def _json_of(value: dict) -> str:
    return wire.write_json(value).decode()


def blueprint(pipeline: Pipeline) -> Blueprint:
    oip = Oip(pipeline)
    rules = Blueprint("oip", __name__, url_prefix="/v2")
    rules.add_url_rule("", "server", oip.server)
    rules.add_url_rule("/models", "models", oip.models)
    rules.add_url_rule("/repository/index", "index", admitted(pipeline, oip.index), methods=["POST"])
    for suffix, prefix in (("", "/models/<name>"), ("_version", "/models/<name>/versions/<version>")):
        for ending, view in (("", oip.metadata), ("/config", oip.config), ("/ready", oip.ready)):
            rules.add_url_rule(prefix + ending, view.__name__ + suffix, view)
        for view in (oip.cost, oip.infer):
            name = view.__name__
            rules.add_url_rule(f"{prefix}/{name}", name + suffix, admitted(pipeline, view), methods=["POST"])
    return rules
