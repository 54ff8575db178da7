"""Oip: the Open Inference Protocol v2 with the binary tensor extension, so that tritonclient works unchanged.

In: /v2 requests.  Out: metadata, and maps of any layer with the bill in the top-level `parameters`.
Every model has one input, `image`, and every one of its layers is an output; the default ones are in the metadata.
"""

from math import prod

from flask import Blueprint, Response, request

from .. import wire
from ..admission import Permit
from ..engine import VERSION
from ..pipeline import Outcome, Pipeline
from .exchange import JSON, admitted, answer, body, cost_document, document, json_body

INPUT = "image"
PLATFORM = "cconv_graph"
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
        model = self._engine.model(name, version)
        cost = model.cost((1, *model.input_shape)).total
        return document(
            {
                "name": name,
                "versions": [VERSION],
                "platform": PLATFORM,
                "inputs": [{"name": INPUT, "datatype": "FP32", "shape": self._input_shape(name)}],
                "outputs": [
                    {"name": layer, "datatype": "FP32", "shape": self._free(shape)}
                    for layer, shape in model.shapes((1, *model.input_shape)).items()
                ],
                # Strings to strings, says the protocol.
                "properties": {
                    "description": model.description,
                    "layers": ",".join(layer.name for layer in model.layers),
                    "default_input_shape": "x".join(map(str, model.input_shape)),
                    **{f"{key}_per_default_image": str(value) for key, value in cost.as_dict().items()},
                },
            }
        )

    def config(self, name: str, version: str | None = None) -> Response:
        model = self._engine.model(name, version)
        return document(
            {
                "name": name,
                "platform": PLATFORM,
                "backend": "cconv",
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": self._pipeline.settings.max_images,
                "input": [
                    {
                        "name": INPUT,
                        "data_type": "TYPE_FP32",
                        "format": "FORMAT_NCHW",
                        "dims": self._input_shape(name)[1:],
                        "optional": False,
                    }
                ],
                "output": [
                    {"name": layer, "data_type": "TYPE_FP32", "dims": self._free(shape)[1:]}
                    for layer, shape in model.shapes((1, *model.input_shape)).items()
                ],
                "dynamic_batching": {"max_queue_delay_microseconds": 0},
                "instance_group": [{"name": name, "kind": "KIND_CPU", "count": 1}],
            }
        )

    def ready(self, name: str, version: str | None = None) -> Response:
        self._engine.model(name, version)
        return document({"name": name, "ready": True})

    def cost(self, permit: Permit, name: str, version: str | None = None) -> Response:
        self._engine.model(name, version)
        return document(cost_document(self._pipeline, {**json_body(self._pipeline, permit), "model": name}))

    def infer(self, permit: Permit, name: str, version: str | None = None) -> Response:
        model = self._engine.model(name, version)
        data = body(self._pipeline)
        json_bytes = wire.json_bytes(request.headers.get(HEADER_LENGTH), len(data))
        self._pipeline.json(permit, json_bytes, json_bytes * wire.JSON_MEMORY)
        layers = frozenset(layer.name for layer in model.layers)
        asked = wire.read_infer(
            data, json_bytes, wire.Expected(name, INPUT, tuple(self._input_shape(name)), layers, model.outputs)
        )
        if asked.timeout_us:
            permit.shorten(asked.timeout_us / 1e6)
        task = self._pipeline.task(name, asked.images, asked.outputs)
        as_json = sum(prod(shape) for layer, shape in task.quote.outputs.items() if layer not in asked.binary)

        def encode(outcome: Outcome):
            content = {"model_name": name, "model_version": VERSION, "parameters": outcome.parameters()}
            if asked.id is not None:
                content["id"] = asked.id
            return wire.write_infer(content, outcome.results[0].maps, asked.binary)

        outcome, (header, tensors) = self._pipeline.run(permit, [task], encode, json_numbers=as_json)
        response = answer(self._pipeline, outcome, [header, *tensors], "application/octet-stream" if tensors else JSON)
        if tensors:
            response.headers[HEADER_LENGTH] = str(len(header))
        return response

    def _input_shape(self, name: str) -> list[int]:
        return [-1, self._engine.model(name).input_shape[0], -1, -1]

    @staticmethod
    def _free(shape: tuple[int, ...]) -> list[int]:
        """An output's shape with -1 for what follows from the input: the images and the size of a map."""
        return [-1, shape[1], *(-1 for _ in shape[2:])]


def blueprint(pipeline: Pipeline) -> Blueprint:
    oip = Oip(pipeline)
    rules = Blueprint("oip", __name__, url_prefix="/v2")
    rules.add_url_rule("", "server", oip.server)
    rules.add_url_rule("/models", "models", oip.models)
    for suffix, prefix in (("", "/models/<name>"), ("_version", "/models/<name>/versions/<version>")):
        for ending, view in (("", oip.metadata), ("/config", oip.config), ("/ready", oip.ready)):
            rules.add_url_rule(prefix + ending, view.__name__ + suffix, view)
        for view in (oip.cost, oip.infer):
            name = view.__name__
            rules.add_url_rule(f"{prefix}/{name}", name + suffix, admitted(pipeline, view), methods=["POST"])
    return rules
