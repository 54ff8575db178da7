"""Main: `python -m service audit`, every recorded bill computed again from its shapes.

In: the ledger of CCONV_LEDGER, and the models that the service serves.  Out: the bills that differ, and exit code 1 if
there are any, or if they cannot be computed for another reason than that their model is not served any more, or if none
could be computed. What waits in a spool is not in the ledger yet.
"""

import argparse
import sys
from dataclasses import replace

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description="The service's own checks.")
    parser.add_argument("command", choices=["audit"], help="audit: compute every recorded bill again")
    parser.parse_args(arguments)
    try:
        return audit(Settings.from_env())
    except (ServiceError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
