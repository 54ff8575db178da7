"""Main: `python -m service audit`, every recorded bill computed again; `python -m service keys`, who may ask.

In: the ledger of CCONV_LEDGER and the models that the service serves, or the file of CCONV_API_KEYS.  Out: the bills
that differ, and exit code 1 if there are any, or if they cannot be computed for another reason than that their model is
not served any more, or if none could be computed; what waits in a spool is not in the ledger yet. Of keys: a new one, a
list, or a revocation; 2 is any error.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from . import auth
from .account import SCOPES
from .config import Settings
from .engine import Engine
from .errors import ServiceError
from .ledger import Book
from .metrics import Metrics


def audit(settings: Settings) -> int:
    engine = Engine(settings.models, settings.model_repository)
    # Without the spool: it is the service's, and who opens one empties it.
    book = Book(replace(settings, ledger_spool=""), Metrics())
    try:
        for entry in engine.repository.pending:
            try:
                entry.succeed(engine.open(entry))
            except ServiceError as error:
                entry.fail(str(error))

        def price(model: str, version: str, shapes: dict) -> tuple[int, int, int]:
            cost = engine.price(model, version, shapes)
            return cost.macs, cost.flops, cost.flops_other

        found = book.audit(price)
        for difference in found:
            event = difference.event
            expected = "unknown" if difference.expected is None else difference.expected
            print(f"{event.id} {event.model}: recorded {difference.recorded}, computed {expected}: {difference.reason}")
        print(
            f"{found.checked} bills, {found.right} right, {found.wrong} wrong, {found.unknown} of models that are not "
            f"served, {found.failed} that could not be computed"
        )
        nothing = found.checked and not found.right
        return 1 if found.wrong or found.failed or nothing else 0
    finally:
        book.close()


def keys(settings: Settings, given: argparse.Namespace) -> int:
    """Make, add, list or revoke; only `make` ever shows a key."""
    if not settings.api_keys:
        raise ValueError("CCONV_API_KEYS: expected the name of a file, got none")
    path = Path(settings.api_keys)
    if given.action in ("make", "add"):
        scopes = tuple(filter(None, given.scopes.split(",")))
        limits = (given.mflop_per_minute, given.mflop_per_month)
        if given.action == "make":
            print(auth.make(path, given.name, scopes, *limits))
        else:
            print(f"{auth.add(path, sys.stdin.readline().strip(), given.name, scopes, *limits)} is known")
    elif given.action == "revoke":
        print(f"{given.id} is revoked since {auth.revoke(path, given.id).revoked}")
    else:
        for key in auth.read(path).values():
            most = ", ".join(
                f"{number} MFLOP per {span}"
                for number, span in ((key.mflop_per_minute, "minute"), (key.mflop_per_month, "month"))
                if number is not None
            )
            state = f"revoked {key.revoked}" if key.revoked else f"made {key.created}"
            print(f"{key.id}  {state}  {','.join(key.scopes)}  {most or 'no limits'}  {key.name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description="The service's own checks, and its keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("audit", help="compute every recorded bill again")
    actions = commands.add_parser("keys", help="API keys, in the file of CCONV_API_KEYS").add_subparsers(
        dest="action", required=True
    )
    for action, meaning in (
        ("make", "make a key and show it, this once"),
        ("add", "know the key on standard input, which was made elsewhere"),
    ):
        new = actions.add_parser(action, help=meaning)
        new.add_argument("name", help="whom it is for")
        new.add_argument("--scopes", default="infer,usage", help=f"some of {','.join(SCOPES)}; default infer,usage")
        new.add_argument("--mflop-per-minute", type=int, help="most millions of flops + flops_other in any minute")
        new.add_argument("--mflop-per-month", type=int, help="the same in a calendar month, UTC")
    actions.add_parser("list", help="every key's id, state, scopes, limits and name")
    actions.add_parser("revoke", help="a key is good no more").add_argument("id")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        settings = Settings.from_env()
        return audit(settings) if given.command == "audit" else keys(settings, given)
    except (ServiceError, ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
