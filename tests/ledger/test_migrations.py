"""Migrations: they make the tables that the code expects, once, however many run them."""

import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cconv import ledger
from cconv.ledger import Ledger, schema
from cconv.ledger.database import Database
from cconv.ledger.migrate import config


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/usage.db"
    return request.getfixturevalue("postgres").create()


def test_the_code_expects_what_the_newest_migration_makes(empty_url):
    scripts = ScriptDirectory.from_config(config(Database(empty_url)))
    assert scripts.get_current_head() == schema.REVISION
    ledger.migrate(empty_url)
    with Database(empty_url).writing() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        found = {c["sqltext"] for c in sa.inspect(connection).get_check_constraints("usage_event")}
        assert len(found) == 3
        assert len(sa.inspect(connection).get_unique_constraints("usage_event")) == 2


def test_migrating_again_changes_nothing(empty_url, event):
    ledger.migrate(empty_url)
    with Ledger(empty_url) as book:
        book.append(event())
    ledger.migrate(empty_url)
    with Ledger(empty_url) as book:
        assert len(list(book.events())) == 1


def test_a_ledger_of_the_first_version_keeps_its_bills(empty_url, event):
    ledger.migrate(empty_url, "0001")
    with Ledger(empty_url) as book, pytest.raises(ledger.SchemaOutdated, match="got 0001"):
        book.append(event())
    names = ("id", "account", "model", "version", "device", "algorithm", "request_id")
    numbers = ("at", "images", "bytes_in", "bytes_out", "queue_us", "compute_us", "macs", "flops", "flops_other")
    old = {**dict.fromkeys(names, "x"), **dict.fromkeys(numbers, 7), "shapes": "[]"}
    with Database(empty_url).writing() as connection:
        connection.execute(sa.insert(schema.usage_event), [old])
    ledger.migrate(empty_url)
    with Ledger(empty_url) as book:
        book.append(event(account="x", flops=20))
        assert [(t.events, t.flops) for t in book.totals((), account="x")] == [(2, 27)]


def test_many_migrations_at_once_are_one(empty_url, event):
    command = [sys.executable, "-m", "cconv.ledger", "migrate", empty_url]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 4
    with Ledger(empty_url) as book:
        book.append(event())


def test_tables_of_another_version_are_refused(url, event):
    database = Database(url)
    with database.writing() as connection:
        connection.execute(sa.update(schema.alembic_version).values(version_num="9999"))
    with Ledger(url) as book:
        with pytest.raises(ledger.SchemaOutdated, match=f"expected tables of revision {schema.REVISION}, got 9999"):
            book.append(event())
        with pytest.raises(ledger.SchemaOutdated):
            list(book.events())
    with pytest.raises(ledger.SchemaOutdated, match="9999"):
        ledger.migrate(url)
