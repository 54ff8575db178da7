"""Migrate: brings a database to the tables of schema.py by the migrations in migrations/, which the package ships.

In: a database's URL.  Out: its tables; LedgerUnavailable where it cannot be reached. Two at once wait for each other.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from .database import Database
from .errors import SchemaOutdated


def config(database: Database) -> Config:
    """Alembic's, for this database."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    settings.attributes["database"] = database
    return settings


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database to a revision, the newest unless given.

    Parameters
    ----------
    url : str
        `sqlite:////absolute/path.db` or `postgresql://user@host/name`.
    """
    database = Database(url)
    with database.translated():
        try:
            command.upgrade(config(database), revision)
        except CommandError as error:
            raise SchemaOutdated(f"ledger: expected tables of a version that this one knows: {error}") from error
