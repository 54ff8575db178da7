"""Env: what Alembic runs each time: it opens the database as the ledger does, and keeps other migrations waiting.

In: the Database that migrate.py put into the configuration.  Out: the migrations, in one transaction.
"""

from alembic import context

#: Any number, as long as all versions of this file have the same: PostgreSQL's name of the lock.
LOCK = 0xCC0_17

with context.config.attributes["database"].writing() as connection:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
    context.configure(connection=connection, render_as_batch=True)
    # SQLite's BEGIN IMMEDIATE and the lock above came first: whoever waited reads the revision that is there now.
    context.run_migrations()
