"""Factory: builds the application: settings and collaborators are handed down from here.

In: Settings.  Out: a Flask application. What holds for every request stands here: errors as JSON, headers, counting.
"""

import atexit
import logging
import time
from io import BytesIO

import flask
from flask import g, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.utils import cached_property

from . import log
from .account import ADMIN, ANONYMOUS, Account
from .admission import Admission
from .auth import Auth
from .body import Body, Gathered, Inflated
from .config import Settings
from .door import Door
from .engine import Engine, limit_pool
from .errors import (
    INTERNAL,
    NO_MEMORY,
    Forbidden,
    InvalidRequest,
    Overloaded,
    ServiceError,
    TooLarge,
    Unauthorized,
    UnsupportedEncoding,
)
from .ledger import Book
from .metrics import Metrics
from .pipeline import Pipeline
from .routes import register, request_id, scope_of
from .scheduler import Scheduler
from .trace import Trace
from .wire import WireError

requests = logging.getLogger(f"{__package__}.requests")
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


class Request(flask.Request):
    """A request that keeps a form's files in memory: the body's limit bounds them, and the disk may be read-only."""

    @cached_property
    def stream(self):
        stream = super().stream  # which refuses a body that is too long
        came = self.environ["wsgi.input"]
        # Werkzeug would copy a whole body piece by piece, in case it were longer than announced.
        body = Body(came if isinstance(came, Gathered) else stream, self.content_length)
        encoding = self.headers.get("Content-Encoding", "identity").strip().lower()
        return body if encoding == "identity" else Inflated(body, encoding, self.max_content_length - 1)

    def _get_file_stream(self, total_content_length, content_type, filename=None, content_length=None):
        return BytesIO()


def build(settings: Settings | None = None) -> flask.Flask:
    """The application; ValueError for settings that cannot be."""
    settings = settings or Settings.from_env()
    metrics = Metrics()
    log.start(settings.log_format)
    limit_pool(settings.pool_bytes)
    engine = Engine(settings.models, settings.model_repository, settings.device)
    scheduler = Scheduler(metrics, settings.max_batch, settings.watchdog_s, lanes=settings.lanes)
    book = Book(settings, metrics)
    admission = Admission(settings, metrics, book.used if book.kept else None)
    pipeline = Pipeline(settings, engine, admission, scheduler, metrics, book)
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
    door = Door(settings, admission, metrics, HEADERS)
    app.extensions["cconv.door"] = door
    register(app, pipeline, door)
    _guard(app, Auth(settings), metrics, settings.log_format == "json")
    _answer_errors(app, settings, metrics)
    pipeline.start_loading()
    return app


def _guard(app: flask.Flask, auth: Auth, metrics: Metrics, log_requests: bool) -> None:
    """What holds for every request: who asks, no unknown encodings, headers that a browser obeys, and a count."""

    @app.before_request
    def begin():
        g.began, headers = time.monotonic(), request.headers
        g.trace = Trace.of(headers.get("traceparent", ""))
        g.account, g.served = ANONYMOUS, ("", "")
        g.account = _account(auth)
        if not request.query_string.isascii():
            raise InvalidRequest("query: expected ASCII, with everything else percent-encoded")
        if (encoding := headers.get("Transfer-Encoding", "chunked")).strip().lower() != "chunked":
            raise UnsupportedEncoding(f"Unsupported compression type: expected chunked, got {encoding[:32]!r}")
        if (encoding := headers.get("Content-Encoding", "identity").strip().lower()) != "identity":
            Inflated.check(encoding)

    @app.after_request
    def finish(response):
        # The rule, not the address: the number of series must not grow with what clients send.
        route = request.url_rule.rule if request.url_rule else "unknown"
        seconds = time.monotonic() - g.began
        metrics.answered(route, *g.served, response.status_code, seconds)
        more = {**HEADERS, "traceparent": g.trace.header()}
        if called := request_id():
            more["X-Request-Id"] = called
        own = {name.lower() for name, _ in response.headers}
        response.headers.extend((name, value) for name, value in more.items() if name.lower() not in own)
        if log_requests:
            requests.info("answered", extra={"fields": _line(response, route, seconds, called)})
        return response


def _line(response: flask.Response, route: str, seconds: float, called: str) -> dict:
    """What the log says about a request: nothing that the client could have put a secret into."""
    bill = {
        name.removeprefix("X-Cconv-").lower().replace("-", "_"): value
        for name, value in response.headers
        if name.startswith("X-Cconv-")
    }
    return {
        "request_id": called,
        "trace_id": g.trace.trace_id,
        "span_id": g.trace.span_id,
        "account": g.account.id,
        "method": request.method,
        "route": route,
        "model": (request.view_args or {}).get("name", "") if response.status_code < 400 else "",
        "status": response.status_code,
        "seconds": round(seconds, 6),
        "bytes_in": request.content_length,
        **bill,
    }


def _account(auth: Auth) -> Account:
    """Whose request this is, if that must be known."""
    scope = scope_of(request.endpoint)
    if scope == ADMIN and not auth.required:
        raise Forbidden("expected a service with API keys, as this needs one of scope 'admin'; CCONV_API_KEYS has none")
    if scope is None or not auth.required:
        return ANONYMOUS
    account = auth.account(request.headers, scope)
    # A browser adds Basic's password to whatever another site's page makes it send.
    site = request.headers.get("Sec-Fetch-Site", "none")
    if request.method not in ("GET", "HEAD") and site not in ("none", "same-origin"):
        raise Forbidden(f"Sec-Fetch-Site: expected a request of this site's own page, got {site[:32]!r}")
    return account


def _answer_errors(app: flask.Flask, settings: Settings, metrics: Metrics) -> None:
    """Every refusal and failure as {"error": "..."} with its status."""

    def refusal(text: str, status: int, reason: str, headers: dict[str, str] | None = None):
        metrics.rejected.labels(reason).inc()
        return jsonify(error=text), status, headers or {}

    @app.errorhandler(ServiceError)
    def refused(error):
        again = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if isinstance(error, Unauthorized):
            again["WWW-Authenticate"] = 'Bearer realm="cconv", Basic realm="cconv", charset="UTF-8"'
        return refusal(str(error), error.status, error.reason, again)

    @app.errorhandler(WireError)
    def unreadable(error):
        return refusal(str(error), 400, "invalid")

    @app.errorhandler(MemoryError)
    def no_memory(_):
        return refused(Overloaded(NO_MEMORY))

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
        return refusal(INTERNAL, 500, "internal")
