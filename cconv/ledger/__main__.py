"""Main: the ledger's few commands, `python -m cconv.ledger`.

In: arguments.  Out: tables in a database, or its totals and events on standard output.
"""

import argparse
import sys

from ..errors import CconvError
from .event import Event
from .ledger import Ledger
from .migrate import migrate
from .query import Total, as_csv, as_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cconv.ledger", description="Usage events of cconv.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("migrate", "make the tables, or bring them to this version"),
        ("totals", "sums by day, model and account"),
        ("events", "every event"),
    ):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("url", help="sqlite:////absolute/path.db or postgresql://user@host/name")
        if name != "migrate":
            command.add_argument("--csv", action="store_true", help="CSV instead of JSON")
        if name == "totals":
            command.add_argument("--by", default="day,model,account", help="some of day,model,account")
    given = parser.parse_args(arguments)
    try:
        if given.command == "migrate":
            migrate(given.url)
            return 0
        with Ledger(given.url) as book:
            kind = Total if given.command == "totals" else Event
            rows = book.totals(tuple(filter(None, given.by.split(",")))) if kind is Total else book.events()
            for piece in as_csv(rows, kind) if given.csv else as_json(rows):
                sys.stdout.write(piece)
    except CconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
