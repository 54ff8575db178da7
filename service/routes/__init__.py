"""Routes: translate HTTP to the pipeline's terms and back, nothing else.

oip.py       the Open Inference Protocol v2        features.py  photographs and tensors in, maps and bills out
usage.py     what was used, from the ledger
health.py    is it alive, is it ready, metrics     web.py       the page
exchange.py  what they share: a place in the house, the body, the answer with its bill
"""

from flask import Flask

from ..pipeline import Pipeline
from . import features, health, oip, usage, web


def register(app: Flask, pipeline: Pipeline) -> None:
    """Add every route to the application."""
    for room in (oip, features, usage, health, web):
        app.register_blueprint(room.blueprint(pipeline))
