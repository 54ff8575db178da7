"""The first tables: usage events of which triggers refuse UPDATE and DELETE, idempotency keys, the writer's probe.

In: an empty database.  Out: schema.py's tables of revision 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TEXTS = ("id", "account", "model", "version", "device", "algorithm", "request_id")
BILL = ("macs", "flops", "flops_other")
NUMBERS = ("at", "images", "bytes_in", "bytes_out", "queue_us", "compute_us", *BILL)
TEXT = 255

SQLITE = [
    f"CREATE TRIGGER usage_event_no_{verb.lower()} BEFORE {verb} ON usage_event "
    "BEGIN SELECT RAISE(ABORT, 'usage_event is append-only'); END"
    for verb in ("UPDATE", "DELETE")
]
POSTGRESQL = [
    "CREATE FUNCTION usage_event_append_only() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN RAISE EXCEPTION 'usage_event is append-only'; END$$",
    "CREATE TRIGGER usage_event_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON usage_event "
    "FOR EACH STATEMENT EXECUTE FUNCTION usage_event_append_only()",
]


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "usage_event",
        sa.Column("seq", number, primary_key=True, autoincrement=True),
        *(sa.Column(name, sa.String(TEXT), nullable=False, unique=name == "id") for name in TEXTS),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in NUMBERS),
        sa.Column("shapes", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.String(TEXT), nullable=True),
        sa.UniqueConstraint("account", "idempotency_key"),
        *(sa.CheckConstraint(f"{name} >= 0", name=f"{name}_not_negative") for name in BILL),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_usage_event_at_seq", "usage_event", ["at", "seq"])
    op.create_table(
        "idempotency_key",
        sa.Column("account", sa.String(TEXT), primary_key=True),
        sa.Column("key", sa.String(TEXT), primary_key=True),
        sa.Column("fingerprint", sa.String(TEXT), nullable=False),
        sa.Column("replays", sa.Integer, nullable=False),
        sa.Column("event_id", sa.String(TEXT), nullable=False),
    )
    op.create_table(
        "ledger_probe",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    for statement in {"sqlite": SQLITE, "postgresql": POSTGRESQL}[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("a ledger's first tables hold bills; nothing drops them")
