"""Exchange: what the computing routes share: a place in the house around a request, its body, its options, its answer.

In: Flask's request and a view.  Out: a response that gives the place back once it has been sent, with the bill in its
headers.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps

import numpy as np
from flask import Response, g, make_response, request

from .. import wire
from ..admission import Permit
from ..body import ENCODINGS
from ..engine import Served, Task
from ..errors import InvalidRequest, NotAcceptable
from ..pipeline import Outcome, Pipeline

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
JSON = "application/json"
NPY = "application/x-npy"
PNG = "image/png"
NPYS = "application/x-npy-sequence"
FORMATS = {"json": JSON, "npy": NPY, "npys": NPYS, "png": PNG}


def admitted(pipeline: Pipeline, view: Callable) -> Callable:
    """`view(permit, ...)` as a Flask view that holds a permit until its answer has left."""

    @wraps(view)
    def guarded(**arguments):
        permit = enter(pipeline)
        try:
            response = make_response(view(permit, **arguments))
        except BaseException:
            permit.release()
            raise
        response.call_on_close(permit.release)
        return response

    return guarded


def enter(pipeline: Pipeline) -> Permit:
    """A place for this request, which the caller has to release."""
    headers = request.headers
    key = headers.get("Idempotency-Key")
    if key is not None and not key.strip():  # whoever sends one wants not to be billed twice
        raise InvalidRequest("Idempotency-Key: expected a text, got an empty one")
    length = request.content_length
    if length is None and "Transfer-Encoding" not in headers:
        length = 0
    pipeline.body(length or 0)
    stream = request.stream  # refuses what it cannot read: nothing may fail once there is a permit
    asked = f"{request.method} {request.path}?{request.query_string.decode()}"
    plain = headers.get("Content-Encoding", "identity").strip().lower() == "identity"
    permit = pipeline.enter(length if plain else None, g.account)  # how much a compressed body will be, nobody knows
    permit.came = lambda: stream.came
    permit.asked, permit.key, permit.request_id = asked, key or "", request_id()
    return permit


def of_model(one: Served | Task) -> None:
    """Whose request this is, for the metrics: said as soon as it is known that there is such a model."""
    g.served = (one.name, one.version) if isinstance(one, Served) else (one.label, one.version)


def request_id() -> str:
    """The client's own name for its request, if it is one that may be written anywhere."""
    given = request.headers.get("X-Request-Id", "")
    return given if REQUEST_ID.fullmatch(given) else ""


def body(pipeline: Pipeline) -> bytes:
    """The whole body, as it came."""
    data = request.get_data(cache=False, parse_form_data=False)
    pipeline.body(len(data))
    return data


def json_body(pipeline: Pipeline, permit: Permit) -> dict:
    data = body(pipeline)
    pipeline.json(permit, len(data), len(data) * wire.JSON_MEMORY)
    return wire.read_json(data)


def is_form() -> bool:
    return request.mimetype == "multipart/form-data"


def parts() -> list[tuple[str, str, bytes]]:
    """The files of a form as (field, file name, data); the fields in which no file was chosen are left out."""
    read = ((field, (part.filename or field)[:128], part.read()) for field, part in request.files.items(multi=True))
    return [part for part in read if part[2]]


def files(pipeline: Pipeline) -> list[tuple[str, bytes]]:
    """The files of a form, or the body itself as one, by name."""
    if is_form():
        return [(name, data) for _, name, data in parts()]
    data = body(pipeline)
    return [("body", data)] if data else []


def option(name: str) -> str | None:
    """A query or form field that may be given once."""
    values = request.args.getlist(name)
    if is_form():  # any other body is not looked into, whatever it is called: curl calls a photograph a form
        values += request.form.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name}: expected one value, got {len(values)}")
    return values[0] if values else None


def check_options(*known: str) -> None:
    """Refuse query and form fields of any other name: one that is misspelt would be left out without a word."""
    given = {*request.args, *(request.form if is_form() else ())}
    check_known(given, known, "options")


def check_known(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """InvalidRequest for a name that is not known."""
    if unknown := sorted(set(given) - set(known)):
        raise InvalidRequest(f"{where}: expected only {', '.join(known)}; got {wire.brief(unknown)}")


def answer_format(*allowed: str) -> str:
    """`format=`, or what the Accept header prefers of the allowed formats; the first one if it has no preference."""
    given = option("format")
    if given is not None:
        if given not in allowed:
            raise InvalidRequest(f"format: expected one of {', '.join(allowed)}, got {wire.brief(given)}")
        return given
    if not request.accept_mimetypes:
        return allowed[0]
    types = {FORMATS[name]: name for name in allowed}
    best = request.accept_mimetypes.best_match(list(types))
    if best is None:
        came = wire.brief(str(request.accept_mimetypes))
        raise NotAcceptable(f"Accept: expected one of {', '.join(types)}, got {came}")
    return types[best]


def answer(
    pipeline: Pipeline, outcome: Outcome, parts: Sequence[bytes | np.ndarray], mimetype: str, **headers: str
) -> Response:
    """A computed answer, written in pieces, with the bill in its headers."""
    size, content = wire.total_bytes(parts), wire.pieces(parts)
    pipeline.metrics.bytes_out.inc(size)
    headers |= outcome.headers()
    # One encoding alone is a wish. Lists of them are what HTTP libraries send unasked, and maps compress poorly.
    encoding = request.headers.get("Accept-Encoding", "").strip().lower()
    if encoding in ENCODINGS:
        content = _compressed(content, ENCODINGS[encoding])
        headers["Content-Encoding"] = encoding
    else:
        headers["Content-Length"] = str(size)
    return Response(content, mimetype=mimetype, headers=headers)  # all at once: to set one looks at all others


def _compressed(pieces: Iterable[bytes], bits: int) -> Iterator[bytes]:
    packer = zlib.compressobj(1, wbits=bits)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def document(content: dict | list, status: int = 200) -> Response:
    """A JSON answer that computed nothing."""
    return Response(wire.write_json(content), status=status, mimetype=JSON)


def cost_document(pipeline: Pipeline, content: dict, version: str | None = None) -> dict:
    """The dry run: what a model on `shape`, or a conv2d on `x_shape` and `w_shape`, would cost. Nothing is computed."""
    if "model" in content:
        check_known(content, ("model", "shape", "layers"), "body")
        name = content["model"]
        if not isinstance(name, str):
            raise InvalidRequest(f"model: expected a name, got {wire.brief(name)}")
        served = pipeline.engine.model(name, version)
        shape = wire.read_shape(content["shape"], "shape") if "shape" in content else served.x_shape
        quote = pipeline.quote(served, shape, wire.read_names(content.get("layers"), "layers"))
    else:
        options = {key: wire.read_option(value, key) for key, value in content.items() if not key.endswith("_shape")}
        if unknown := sorted(set(options) - set(COST_OPTIONS)):
            known = ", ".join(COST_OPTIONS)
            raise InvalidRequest(f"body: expected model, or x_shape, w_shape and {known}; got {wire.brief(unknown)}")
        shapes = [wire.read_shape(content.get(key), key) for key in ("x_shape", "w_shape")]
        quote = pipeline.quote_conv2d(*shapes, options)
    answer = quote.cost.as_dict()
    if quote.steps:
        answer["outputs"] = {name: list(shape) for name, shape in quote.outputs.items()}
        answer["layers"] = steps(quote.steps)
    return answer


#: What changes the cost of one convolution.
COST_OPTIONS = ("stride", "padding", "dilation", "groups", "bias", "activation", "residual")


def steps(quoted) -> list[dict]:
    """Every layer that ran or would run, with its part of the bill."""
    return [
        {"layer": step.layer, "operator": step.operator, "shape": list(step.shape), **step.cost.as_dict()}
        for step in quoted
    ]
