"""Account: who asks, what they may ask for, and how much of it. A plain value that the rooms above hand around.

In: nothing.  Out: Account, and ANONYMOUS, who everybody is where keys are not asked for.
"""

from dataclasses import dataclass

#: infer: compute, and look at models; usage: the own bills; metrics: /metrics; admin: all of these, everybody's bills,
#: and loading and unloading models.
SCOPES = ("infer", "usage", "metrics", "admin")
ADMIN = "admin"


@dataclass(frozen=True)
class Account:
    """Who pays for a request.

    Attributes
    ----------
    id : str
        What bills and idempotency keys are filed under.
    scopes : frozenset of str
        Some of SCOPES.
    mflop_per_minute, mflop_per_month : int or None
        Most millions of flops + flops_other; None is any number.
    """

    id: str
    scopes: frozenset[str]
    mflop_per_minute: int | None = None
    mflop_per_month: int | None = None

    def may(self, scope: str) -> bool:
        return scope in self.scopes or ADMIN in self.scopes


ANONYMOUS = Account("anonymous", frozenset(SCOPES))
