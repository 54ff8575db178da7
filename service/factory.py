"""Factory: builds the application: settings and collaborators are handed down from here.

In: Settings.  Out: a Flask application. What holds for every request stands here: errors as JSON, headers, counting.
"""

import atexit
import logging
import time
from io import BytesIO, RawIOBase

import flask
from flask import g, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.utils import cached_property

from .admission import Admission
from .config import Settings
from .engine import Engine
from .errors import InvalidRequest, Overloaded, ServiceError, TooLarge, UnsupportedEncoding
from .metrics import Metrics
from .pipeline import Pipeline
from .routes import register
from .scheduler import Scheduler
from .wire import WireError

#: A form's own fields beside its files.
FORM_FIELDS = 16
#: Bytes of a form's text fields: names, options and the like.
FORM_TEXT_BYTES = 500_000
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Body(RawIOBase):
    """A request's body as it is read; InvalidRequest where it is broken, or ends before its announced size.

    Gunicorn hands an early end on as if all had come: it would be computed and billed.
    """

    def __init__(self, stream, announced: int | None):
        self._stream, self._announced, self._came = stream, announced, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except (RequestEntityTooLarge, MemoryError):
            raise
        except Exception as error:  # broken chunks, a lost connection: the server in front of us has its own names
            raise InvalidRequest("body: expected a whole body, got one that is broken or cut short") from error
        self._came += len(data)
        ended = size is None or size < 0 or (size and not data)
        if ended and self._announced is not None and self._came < self._announced:
            raise InvalidRequest(f"body: expected {self._announced} bytes by its Content-Length, got {self._came}")
        return data


class Request(flask.Request):
    """A request that keeps a form's files in memory: the body's limit bounds them, and the disk may be read-only."""

    @cached_property
    def stream(self):
        return Body(super().stream, self.content_length)

    def _get_file_stream(self, total_content_length, content_type, filename=None, content_length=None):
        return BytesIO()


def build(settings: Settings | None = None) -> flask.Flask:
    """The application; ValueError for settings that cannot be."""
    settings = settings or Settings.from_env()
    metrics = Metrics()
    _log()
    engine = Engine(settings.models, settings.model_repository, settings.device)
    scheduler = Scheduler(metrics, settings.max_batch)
    pipeline = Pipeline(settings, engine, Admission(settings, metrics), scheduler, metrics)
    atexit.register(pipeline.close)

    # The package, not this module: templates/ and static/ lie beside it.
    app = flask.Flask(__package__)
    app.request_class = Request
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    # One byte more than is allowed: Werkzeug cuts a chunked body off here without a word, and we refuse it by its size.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    app.config["MAX_FORM_PARTS"] = settings.max_images + FORM_FIELDS
    app.config["MAX_FORM_MEMORY_SIZE"] = FORM_TEXT_BYTES
    app.extensions["cconv"] = pipeline
    register(app, pipeline)
    _guard(app, metrics)
    _answer_errors(app, settings, metrics)
    pipeline.start_loading()
    return app


def _log() -> None:
    """The service's rooms, which Flask's own logger is one of, write where gunicorn writes, if it runs them."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    if handlers := logging.getLogger("gunicorn.error").handlers:
        logger.handlers = list(handlers)


def _guard(app: flask.Flask, metrics: Metrics) -> None:
    """What holds for every request: no compressed bodies, headers that a browser obeys, and a count."""

    @app.before_request
    def begin():
        g.began = time.monotonic()
        for name, plain, shown in (
            ("Content-Encoding", "identity", "none"),
            ("Transfer-Encoding", "chunked", "chunked"),
        ):
            if (encoding := request.headers.get(name, plain)).strip().lower() != plain:
                raise UnsupportedEncoding(f"Unsupported compression type: expected {shown}, got {encoding[:32]!r}")

    @app.after_request
    def finish(response):
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        # The rule, not the address: the number of series must not grow with what clients send.
        route = request.url_rule.rule if request.url_rule else "unknown"
        metrics.answered(route, response.status_code, time.monotonic() - g.began)
        return response


def _answer_errors(app: flask.Flask, settings: Settings, metrics: Metrics) -> None:
    """Every refusal and failure as {"error": "..."} with its status."""

    def refusal(text: str, status: int, reason: str, headers: dict[str, str] | None = None):
        metrics.rejected.labels(reason).inc()
        return jsonify(error=text), status, headers or {}

    @app.errorhandler(ServiceError)
    def refused(error):
        again = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Overloaded) else {}
        return refusal(str(error), error.status, error.reason, again)

    @app.errorhandler(WireError)
    def unreadable(error):
        return refusal(str(error), 400, "invalid")

    @app.errorhandler(MemoryError)
    def no_memory(_):
        return refused(Overloaded("the server has no memory left for this request; try again"))

    @app.errorhandler(413)
    def too_long(_):
        size, parts = settings.max_body_bytes, app.config["MAX_FORM_PARTS"]
        text = (
            f"body: expected at most {size} bytes; of a form {parts} parts and {FORM_TEXT_BYTES} bytes of text fields"
        )
        return refused(TooLarge(f"{text}; got more"))

    @app.errorhandler(HTTPException)
    def http(error):
        allowed = {name: value for name, value in error.get_headers() if name == "Allow"}
        return refusal(error.name if error.code in (404, 405) else error.description, error.code, "http", allowed)

    @app.errorhandler(Exception)
    def failed(_):
        app.logger.exception("unexpected")
        return refusal("internal error; the server's log says more", 500, "internal")
