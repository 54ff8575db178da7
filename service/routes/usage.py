"""Usage: what was used, from the ledger: sums by day, model and account, or every bill.

In: GET with a query.  Out: JSON or CSV, written in pieces; bills are decimal text, as sums outgrow 64 bits.
"""

from datetime import UTC, date, datetime, timedelta

from flask import Blueprint, Response

from .. import wire
from ..errors import InvalidRequest
from ..ledger import GROUPS
from ..pipeline import Pipeline
from .exchange import JSON, admitted, check_options, option

LONGEST_NAME = 255
TYPES = {"json": JSON, "csv": "text/csv"}


class Usage:
    """The ledger's view."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def usage(self, permit) -> Response:
        check_options("by", "from", "to", "model", "format")
        form = option("format") or "json"
        if form not in TYPES:
            raise InvalidRequest(f"format: expected one of {', '.join(TYPES)}, got {wire.brief(form)}")
        since, until = _day("from"), _day("to")
        pieces = self._pipeline.book.usage(
            form,
            _groups(option("by")),
            permit.deadline,
            permit.account.id,
            account=permit.sees,
            model=_model(option("model")),
            since_us=0 if since is None else _us(since),
            until_us=None if until is None else _us(until + timedelta(days=1)),
        )
        return Response(pieces, mimetype=TYPES[form])


def _groups(text: str | None) -> tuple[str, ...] | None:
    """What to add up by; None for every bill."""
    if text == "event":
        return None
    names = GROUPS if text is None else tuple(filter(None, text.split(",")))
    if others := set(names) - set(GROUPS):
        raise InvalidRequest(f"by: expected some of {', '.join(GROUPS)}, or event; got {wire.brief(sorted(others))}")
    return names


def _model(name: str | None) -> str | None:
    if name is not None and (not 0 < len(name) <= LONGEST_NAME or not name.isprintable()):
        raise InvalidRequest(f"model: expected 1 to {LONGEST_NAME} printable characters, got {wire.brief(name)}")
    return name


def _day(name: str) -> date | None:
    text = option(name)
    if text is None:
        return None
    try:
        day = datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        day = date.min
    if not 1970 <= day.year <= 9000:
        raise InvalidRequest(f"{name}: expected a day, YYYY-MM-DD, got {wire.brief(text)}")
    return day


def _us(day: date) -> int:
    """Microseconds from 1970 to the beginning of a day, UTC."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1_000_000


def blueprint(pipeline: Pipeline) -> Blueprint:
    rules = Blueprint("usage", __name__, url_prefix="/v1")
    rules.add_url_rule("/usage", "usage", admitted(pipeline, Usage(pipeline).usage), methods=["GET"])
    return rules
