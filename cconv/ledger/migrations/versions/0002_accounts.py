"""An index by account, so that what one account had of a month is read without everybody else's.

In: tables of revision 0001.  Out: 0002's; events stay as they are. It takes a sort of the table, once, during which
nobody writes.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("ix_usage_event_account_at_seq", "usage_event", ["account", "at", "seq"])


def downgrade() -> None:
    op.drop_index("ix_usage_event_account_at_seq", "usage_event")
