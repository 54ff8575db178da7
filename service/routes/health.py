"""Health: is the process alive, can it compute, and what has it counted.

In: GET.  Out: small JSON documents with 200 or 503, and /metrics. None of these takes a place in the house.
"""

import threading

from flask import Blueprint, Response, current_app

from ..door import Door
from ..errors import SHUTTING_DOWN, DeadlineExceeded, NotRecorded, Overloaded, Unavailable
from ..metrics import CONTENT_TYPE
from ..pipeline import Pipeline
from .exchange import document

NO_LEDGER = "the ledger cannot be written"


class Health:
    """Liveness asks nobody; readiness waits for the models and runs a self-test once."""

    def __init__(self, pipeline: Pipeline, door: Door):
        self._pipeline, self._door = pipeline, door
        self._testing = threading.Lock()
        self._passed = False

    def live(self) -> Response:
        return document({"live": True})

    def ready(self) -> Response:
        if reason := self._not_ready():
            return document({"ready": False, "error": reason}, 503)
        return document({"ready": True})

    def metrics(self) -> Response:
        return Response(self._pipeline.metrics.text(), content_type=CONTENT_TYPE)

    def _not_ready(self) -> str:
        if self._door.closed:
            return SHUTTING_DOWN
        if reason := self._pipeline.refusal():
            return reason
        if waiting := self._pipeline.loading():
            return f"models are being loaded: {waiting} to go"
        try:
            self._pipeline.book.require()
        except NotRecorded:
            return NO_LEDGER
        if self._passed:
            return ""
        # Nobody waits for another one's test: probes would take every request thread.
        if not self._testing.acquire(blocking=False):
            return "the self-test is running"
        try:
            self._pipeline.book.check()
            self._pipeline.self_test()
            self._passed = True
        except NotRecorded:
            return NO_LEDGER
        except Unavailable as error:
            return str(error)
        except (Overloaded, DeadlineExceeded):
            return "the self-test has not run yet: the server is full"
        except Exception:
            current_app.logger.exception("self-test")
            return "the self-test failed; the server's log says why"
        finally:
            self._testing.release()
        return ""


def blueprint(pipeline: Pipeline, door: Door) -> Blueprint:
    health = Health(pipeline, door)
    rules = Blueprint("health", __name__)
    for rule, view in (
        ("/livez", health.live),
        ("/readyz", health.ready),
        ("/v2/health/live", health.live),
        ("/v2/health/ready", health.ready),
        ("/metrics", health.metrics),
    ):
        rules.add_url_rule(rule, rule[1:].replace("/", "_"), view)
    return rules
