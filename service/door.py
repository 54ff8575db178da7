"""Door: what the server's loop says to requests for which there is no room, before anybody has read them.

In: how many are in the house.  Out: a refusal as the bytes of an answer, counted; or None, and the request may come in.
"""

from .admission import Admission
from .config import Settings
from .errors import CLOSING
from .metrics import Metrics
from .wire import write_json


class Door:
    """The application's side of service.worker."""

    def __init__(self, settings: Settings, admission: Admission, metrics: Metrics, headers: dict[str, str]):
        self.max_body_bytes, self.queue_bytes = settings.max_body_bytes, settings.queue_bytes
        self.deadline_s, self.places = settings.deadline_s, settings.queue_requests
        self._admission, self._metrics = admission, metrics
        self._full = _answer("the server is full: the most requests are waiting or running; try again", headers)
        self._closed = _answer(CLOSING, {**headers, "Connection": "close"})
        #: Whether nobody is let in any more; those who are in are answered.
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def full(self) -> bool:
        """Whether a request that comes in now would be refused."""
        return self.closed or self._admission.full()

    def refusal(self, welcome: bool, busy: bool) -> bytes | None:
        """What a request gets that would need a place; one that was welcome once is not sent away by a shutdown."""
        if self.closed and not welcome:
            text = self._closed
        elif busy or self._admission.full():
            text = self._full
        else:
            return None
        self._metrics.turned_away()
        return text


def _answer(text: str, headers: dict[str, str]) -> bytes:
    body = write_json({"error": text})
    named = {"Content-Type": "application/json", "Content-Length": len(body), "Retry-After": 1, **headers}
    lines = ("HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in named.items()), "", "")
    return "\r\n".join(lines).encode() + body
