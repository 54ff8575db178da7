"""Schema: the ledger's tables, as this version of the code reads and writes them. Migrations make them.

In: nothing.  Out: tables of SQLAlchemy's, the same for SQLite and PostgreSQL.
"""

import sqlalchemy as sa

from .event import BILL, LONGEST_TEXT, NUMBERS, TEXTS

#: The migration that these tables are the result of; a test compares it with Alembic's head.
REVISION = "0002"
metadata = sa.MetaData()
#: In SQLite only a column of this very type numbers its rows by itself.
_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")

#: Append-only: triggers refuse to change or delete a row.
usage_event = sa.Table(
    "usage_event",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),
    *(sa.Column(name, sa.String(LONGEST_TEXT), nullable=False, unique=name == "id") for name in TEXTS),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in NUMBERS),
    sa.Column("shapes", sa.Text, nullable=False),
    sa.Column("idempotency_key", sa.String(LONGEST_TEXT), nullable=True),
    sa.UniqueConstraint("account", "idempotency_key"),
    *(sa.CheckConstraint(f"{name} >= 0", name=f"{name}_not_negative") for name in BILL),
    # Queries walk along these, a bounded number of entries in a statement: of everybody, and of one account.
    sa.Index("ix_usage_event_at_seq", "at", "seq"),
    sa.Index("ix_usage_event_account_at_seq", "account", "at", "seq"),
    sqlite_autoincrement=True,
)

#: One row per account and key that has been billed: for which request, and how often it was answered again.
idempotency_key = sa.Table(
    "idempotency_key",
    metadata,
    sa.Column("account", sa.String(LONGEST_TEXT), primary_key=True),
    sa.Column("key", sa.String(LONGEST_TEXT), primary_key=True),
    sa.Column("fingerprint", sa.String(LONGEST_TEXT), nullable=False),
    sa.Column("replays", sa.Integer, nullable=False),
    sa.Column("event_id", sa.String(LONGEST_TEXT), nullable=False),
)

#: One row that a writer overwrites to learn whether it can write.
ledger_probe = sa.Table(
    "ledger_probe",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)

alembic_version = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32)))
