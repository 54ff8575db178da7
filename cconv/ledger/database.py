"""Database: SQLite or PostgreSQL behind one set of connections that are durable, or refuse to be opened.

In: a URL.  Out: connections of SQLAlchemy's, and database errors as the ledger's own.

SQLite before 3.51.3 (but for two back-ports) may corrupt a WAL database with two connections, so there, and where a
file system has no write-ahead log, the journal is a rollback journal, kept from transaction to transaction: about five
fsyncs for a commit where a log has one, shared by all events of a group. Its readers hold a lock against commits, so
they look at some rows at a time (`pause`).
"""

import logging
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from ..errors import ArgumentError
from . import schema
from .errors import LedgerUnavailable, SchemaOutdated
from .sqlite import sqlite3

log = logging.getLogger(__name__)

CONNECT_S = 3
#: The first with RETURNING.
OLDEST_SQLITE = (3, 35, 0)
#: After so many pages of 4 KiB, 150 small commits, the log is written back to the database's file, which takes the last
#: of these some milliseconds; what it has grown to by large commits, or while readers looked at it, it gives up above.
LOG_PAGES, LOG_BYTES = 1000, 16 << 20
#: Execution option of connections that write: SQLite takes its lock at once, since a reader cannot become a writer.
_WRITES = {"ledger_writes": True}
#: Classes of SQLSTATE that a transaction of its own may get over: conflicts with other transactions.
_CONFLICT = "40"


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite has the fix of the WAL-reset bug."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)


class Database:
    """Where a ledger lies. Nothing is opened until it is used.

    Parameters
    ----------
    url : str
        `sqlite:////absolute/path.db`, `sqlite:///relative.db` or `postgresql://user@host/name`.
    timeout_s : float
        Longest wait for a lock or a statement.
    """

    def __init__(self, url: str, timeout_s: float = 5.0):
        try:
            self.url = make_url(url)
        except (sa.exc.ArgumentError, ValueError):
            raise ArgumentError("ledger: expected a URL sqlite:///... or postgresql://..., got another text") from None
        self.timeout_s = timeout_s
        kind = self.url.get_backend_name()
        self.is_sqlite = kind == "sqlite"
        if self.is_sqlite:
            if sqlite3.sqlite_version_info < OLDEST_SQLITE:
                expected = ".".join(map(str, OLDEST_SQLITE))
                raise ArgumentError(f"ledger: expected SQLite {expected} or newer, got {sqlite3.sqlite_version}")
            if self.url.database in (None, "", ":memory:"):
                raise ArgumentError("ledger: expected a file, sqlite:///path, got none")
            self._path = Path(self.url.database).absolute()
            connect = {"module": sqlite3, "creator": self._connect_sqlite}
        elif kind == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
            alive = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
            limits = {"connect_timeout": CONNECT_S, "tcp_user_timeout": round(1000 * timeout_s), **alive}
            connect = {"connect_args": limits}
        else:
            raise ArgumentError(f"ledger: expected a URL sqlite:///... or postgresql://..., got {kind}:")
        try:
            self._engine = sa.create_engine(self.url, poolclass=sa.NullPool, hide_parameters=True, **connect)
        except ModuleNotFoundError as error:
            raise ArgumentError(f"ledger: {error.name} is missing; pip install 'cconv[ledger]'") from None
        sa.event.listen(self._engine, "begin", self._begin)
        self._may_create = False

    def _connect_sqlite(self) -> sqlite3.Connection:
        mode = "rwc" if self._may_create else "rw"
        return sqlite3.connect(
            f"file:{quote(str(self._path))}?mode={mode}",
            uri=True,
            timeout=self.timeout_s,
            isolation_level=None,  # no BEGIN of Python's own
            check_same_thread=False,
        )

    def _begin(self, connection: Connection) -> None:
        if self.is_sqlite:
            writes = connection.get_execution_options().get("ledger_writes")
            # The driver's own: SQLAlchemy's execution takes longer than SQLite does.
            driver = connection.connection.driver_connection
            driver.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            if writes and not wal_is_safe(sqlite3.sqlite_version_info):
                # Another process, whose SQLite has the fix, may have changed the journal since this one was opened.
                (journal,) = driver.execute("PRAGMA journal_mode").fetchone()
                if journal == "wal":
                    raise LedgerUnavailable(_unsafe())

    def open_writer(self) -> Connection:
        """A connection whose commits are on the disk when they return, to tables of this version."""
        connection = self._engine.connect().execution_options(**_WRITES)
        try:
            self._harden(connection)
            self._set_timeouts(connection, "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
            self.check_schema(connection)
            connection.rollback()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One durable transaction that takes its time: a migration's. It creates SQLite's file."""
        self._may_create = True
        try:
            with self._engine.connect().execution_options(**_WRITES) as connection:
                self._harden(connection)
                with connection.begin():
                    yield connection
        finally:
            self._may_create = False

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that cannot write."""
        options = {} if self.is_sqlite else {"postgresql_readonly": True}
        with self.translated(), self._engine.connect().execution_options(**options) as connection:
            if self.is_sqlite:
                self._make_durable(connection)  # the last to close a file writes its log back, whoever it is
                self._pragma(connection, "query_only", "ON", 1)
            else:
                self._set_timeouts(connection, "statement_timeout", "lock_timeout")
            self.check_schema(connection)
            yield connection

    def pause(self, connection: Connection) -> None:
        """Between two looks at the rows, which never change: SQLite's writer may commit, PostgreSQL's vacuum go on."""
        connection.rollback()

    def check_schema(self, connection: Connection) -> None:
        found = None
        if sa.inspect(connection).has_table(schema.alembic_version.name):
            found = connection.execute(sa.select(schema.alembic_version.c.version_num)).scalar()
        if found != schema.REVISION:
            raise SchemaOutdated(
                f"ledger: expected tables of revision {schema.REVISION}, got {found or 'none'}; "
                f"run python -m cconv.ledger migrate URL"
            )

    def _harden(self, connection: Connection) -> None:
        """What durability needs, set and read back."""
        if self.is_sqlite:
            self._choose_journal(connection)
            self._make_durable(connection)
            self._pragma(connection, "mmap_size", "0", 0)
            # A log that is found may lie in the system's memory alone, where an fsync failed: nothing may follow on it
            # until it is written back.
            self._ask(connection, "wal_checkpoint")
            return
        names = ("fsync", "full_page_writes", "synchronous_commit", "transaction_read_only")
        settings = dict(zip(names, connection.exec_driver_sql(
            "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
        ).one(), strict=True))  # fmt: skip
        if settings["fsync"] != "on" or settings["full_page_writes"] != "on":
            raise LedgerUnavailable("ledger: the server runs without fsync or full_page_writes: nothing is durable")
        if settings["transaction_read_only"] != "off":
            raise LedgerUnavailable("ledger: the server is read-only")
        if settings["synchronous_commit"] == "off":
            connection.exec_driver_sql("SET synchronous_commit = on")
        connection.commit()

    def _make_durable(self, connection: Connection) -> None:
        """What SQLite says is on the disk is there."""
        self._pragma(connection, "synchronous", "FULL", 2)
        self._pragma(connection, "fullfsync", "ON", 1)  # Apple's fsync leaves data in the disk's cache

    def _set_timeouts(self, connection: Connection, *names: str) -> None:
        if not self.is_sqlite:
            for name in names:
                connection.exec_driver_sql(f"SET {name} = {round(1000 * self.timeout_s)}")
            connection.commit()

    def _choose_journal(self, connection: Connection) -> None:
        """A write-ahead log, or a rollback journal where that is not safe, or not to be had."""
        if wal_is_safe(sqlite3.sqlite_version_info):
            if self._begin_log(connection):
                return
            log.warning("the file system of %s has no write-ahead log: commits take several times as long", self._path)
        elif self._ask(connection, "journal_mode") == "wal":
            log.warning("%s", _unsafe())
        self._pragma(connection, "journal_mode", "persist", "persist")

    def _begin_log(self, connection: Connection) -> bool:
        """Whether there is one from now on."""
        if not _maps_shared_files(self._path.parent):  # asked before: what the file has once been told to use, it wants
            # Who has the file alone keeps a log's index in memory of its own, and so can give up a log that is there.
            self._ask(connection, "locking_mode = exclusive")
            self._pragma(connection, "journal_mode", "persist", "persist")
            self._ask(connection, "locking_mode = normal")
            return False
        begun = self._ask(connection, "journal_mode = wal") == "wal"
        self._ask(connection, "schema_version")  # opens it
        if begun:
            self._ask(connection, f"wal_autocheckpoint = {LOG_PAGES}")
            self._ask(connection, f"journal_size_limit = {LOG_BYTES}")
        return begun

    def _pragma(self, connection: Connection, name: str, value: str, expected) -> None:
        """Set it and see that it holds."""
        self._ask(connection, f"{name} = {value}")
        found = self._ask(connection, name)
        if found not in (None, expected):  # None: a build without this setting
            raise LedgerUnavailable(f"ledger: expected SQLite's {name} to be {expected}, got {found}")

    @staticmethod
    def _ask(connection: Connection, pragma: str):
        """What SQLite answers to a pragma outside of a transaction, where alone many of them work; None if nothing."""
        cursor = connection.connection.driver_connection.cursor()
        row = cursor.execute(f"PRAGMA {pragma}").fetchone()
        cursor.close()
        return row and row[0]

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Database errors as the ledger's."""
        try:
            yield
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise unavailable(error) from error


def _maps_shared_files(folder: Path) -> bool:
    """Whether a file system has what a write-ahead log's index needs: memory that processes share by mapping a file."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:  # without one SQLite has more to say
        file.truncate(1)
        try:
            mmap.mmap(file.fileno(), 1).close()
        except OSError:
            return False
    return True


def _unsafe() -> str:
    return (
        f"ledger: the database has a write-ahead log, which is not safe with SQLite {sqlite3.sqlite_version}; expected "
        f"nobody to have it open, so that it can be given up, or the SQLite that pip install 'cconv[ledger]' brings"
    )


def unavailable(error: BaseException, kind: type[LedgerUnavailable] = LedgerUnavailable) -> LedgerUnavailable:
    """The ledger's error for a database's, in one line and without its statement."""
    cause = getattr(error, "orig", None) or error
    return kind(f"ledger: {type(cause).__name__}: {str(cause).partition(chr(10))[0]:.200}")


def concerns_one(error: BaseException) -> bool:
    """Whether an error is about one operation's own rows, so that others of its group may do without it."""
    if isinstance(error, (sa.exc.IntegrityError, sa.exc.DataError, sqlite3.IntegrityError, sqlite3.DataError)):
        return True
    if not isinstance(error, (sa.exc.SQLAlchemyError, sqlite3.Error, OSError, LedgerUnavailable)):
        return True
    return is_conflict(error)


def is_conflict(error: BaseException) -> bool:
    """Whether another transaction stood in the way."""
    return (getattr(getattr(error, "orig", None), "sqlstate", None) or "").startswith(_CONFLICT)
