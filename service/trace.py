"""Trace: W3C trace context: which trace a request belongs to, and what it is called in it.

In: a `traceparent` header, or none.  Out: a Trace, with a header of its own for the answer.
"""

import random
import re
from dataclasses import dataclass

_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Trace:
    """A span of a trace: this request's."""

    trace_id: str
    span_id: str
    flags: str

    @classmethod
    def of(cls, parent: str) -> "Trace":
        """The caller's trace; a new one that nobody records, if the header is none."""
        found = _PARENT.fullmatch(parent.strip())
        good = found and int(found[2], 16) and int(found[3], 16) and (found[1] != "00" or found[5] is None)
        fresh = f"{random.getrandbits(192) or 1:048x}"  # unlike others, and no secret
        return cls(found[2] if good else fresh[16:], fresh[:16], found[4] if good else "00")

    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"
