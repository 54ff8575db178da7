"""Routes: translate HTTP to the pipeline's terms and back, nothing else.

oip.py       the Open Inference Protocol v2        features.py  photographs and tensors in, maps and bills out
usage.py     what was used, from the ledger
health.py    is it alive, is it ready, metrics     web.py       the page
exchange.py  what they share: a place in the house, the body, the answer with its bill
"""

from flask import Flask

from ..door import Door
from ..pipeline import Pipeline
from . import features, health, oip, usage, web
from .exchange import request_id

__all__ = ("SCOPE_OF", "register", "request_id", "scope_of")

#: What every endpoint that is not here needs.
INFER = "infer"
#: None is nothing: probes have no keys, and the page's style sheet is no secret.
SCOPE_OF = {
    "health.livez": None,
    "health.readyz": None,
    "health.v2_health_live": None,
    "health.v2_health_ready": None,
    "static": None,
    "health.metrics": "metrics",
    # They add up what all accounts had.
    "oip.stats": "metrics",
    "oip.stats_version": "metrics",
    "oip.all_stats": "metrics",
    "usage.usage": "usage",
    "oip.load": "admin",
    "oip.unload": "admin",
}


def scope_of(endpoint: str | None) -> str | None:
    """The scope that an endpoint's callers need, if any; there is nothing at addresses without one."""
    return None if endpoint is None else SCOPE_OF.get(endpoint, INFER)


def register(app: Flask, pipeline: Pipeline, door: Door) -> None:
    """Add every route to the application."""
    for room in (oip, features, usage, web):
        app.register_blueprint(room.blueprint(pipeline))
    app.register_blueprint(health.blueprint(pipeline, door))
