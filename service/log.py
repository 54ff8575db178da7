"""Log: what is written about requests and troubles, as text or as a JSON object per line. Never a body, never a key.

In: records of logging; a request's `fields` among a record's extras.  Out: lines.
"""

import logging
from datetime import UTC, datetime

import orjson

#: Loggers of this house: the service's rooms, which Flask's own is one of, and the library.
HOUSE = (__package__, "cconv")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def start(form: str) -> None:
    """The house writes where gunicorn writes, and all of it in this form: `text` or `json`."""
    handlers = logging.getLogger("gunicorn.error").handlers
    for name in HOUSE:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if handlers:
            logger.handlers = list(handlers)
    if form == "json":
        for handler in handlers:
            handler.setFormatter(JsonLines())
