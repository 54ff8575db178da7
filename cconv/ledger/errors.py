"""Errors: what a ledger refuses and why. LedgerUnavailable is the one that passes: the same call may succeed later.

In: nothing.  Out: exception classes. The texts hold no URL: it may carry a password.
"""

from ..errors import CconvError


class LedgerError(CconvError):
    """Base of every error of the ledger."""


class EventError(LedgerError, ValueError):
    """An event with a field that cannot be: a negative count, a text too long, a number beyond 64 bits."""


class EventConflict(LedgerError, ValueError):
    """An event of this id is recorded with another bill; the new one is not."""


class LedgerRefused(LedgerError, RuntimeError):
    """This one operation fails, and would the next time: rows that no table takes, or a fault in the ledger."""


class LedgerTimeout(LedgerError, RuntimeError):
    """A question took longer than it may."""


class LedgerUnavailable(LedgerError, RuntimeError):
    """The database or its disk fails, or is too slow. Nothing was recorded."""


class LedgerDoubtful(LedgerUnavailable):
    """A commit's answer did not come in time: it may be recorded. The same event again gives one row either way."""


class LedgerClosed(LedgerUnavailable):
    """The ledger has been closed."""


class SchemaOutdated(LedgerUnavailable):
    """The database has no tables of this version's; `python -m cconv.ledger migrate URL` makes them."""


class LedgerForked(LedgerError, RuntimeError):
    """The ledger was opened by the parent of this process; open one here."""


class KeyReused(LedgerError, ValueError):
    """The idempotency key belongs to a request with another body."""


class KeyExhausted(LedgerError, RuntimeError):
    """The request of this idempotency key has been answered as often as it may be."""


class KeyInProgress(LedgerError, RuntimeError):
    """A request of this idempotency key is being computed.

    Attributes
    ----------
    retry_after_s : float
        When to ask again: most requests are done by then.
    """

    def __init__(self, text: str, retry_after_s: float):
        super().__init__(text)
        self.retry_after_s = retry_after_s


class CannotRecompute(LedgerError, LookupError):
    """What an audit's function raises of a bill that cannot be computed any more, as its model is gone."""
