"""Queries: totals are the events' exact sums, rows come a page at a time, and an audit finds every wrong bill."""

import csv
import io
import itertools
import json
import random
import time
import tracemalloc
from collections import defaultdict

import pytest
import sqlalchemy as sa

from cconv import ArgumentError, ledger
from cconv.ledger import Event, Ledger, Total, query
from cconv.ledger.rows import append_groups

DAY = 86_400_000_000
NOON = 1_790_000_000_000_000 // DAY * DAY + DAY // 2


def fill(book, events):
    """Many at once, in the writer's own transactions."""
    for start in range(0, len(events), 200):
        book._submit(append_groups, events[start : start + 200])


@pytest.fixture
def filled(book, event, rng):
    """A ledger of a few days, and its events."""
    draw = random.Random(int(rng.integers(2**32)))
    events = [
        event(
            account=draw.choice(["anna", "bert", "çelik"]), model=draw.choice(["vgg16", "edges"]),
            at=NOON + draw.randrange(5 * DAY), images=draw.randrange(100), macs=draw.randrange(2**63),
            flops=draw.randrange(2**63), flops_other=draw.randrange(2**40),
        )
        for _ in range(400)
    ]  # fmt: skip
    fill(book, events)
    return book, events


def expected(events, by):
    groups = defaultdict(lambda: [0] * 5)
    for e in events:
        names = {"day": query.date(e.at // DAY), "model": e.model, "account": e.account}
        numbers = groups[tuple(names[name] for name in by)]
        for index, number in enumerate((1, e.images, e.macs, e.flops, e.flops_other)):
            numbers[index] += number
    return groups


@pytest.mark.parametrize("by", [c for n in range(4) for c in itertools.combinations(["day", "model", "account"], n)])
@pytest.mark.parametrize("span", [7, 20_000])
def test_totals_are_the_exact_sums_of_the_events(filled, by, span, monkeypatch):
    monkeypatch.setattr(query, "SPAN", span)
    book, events = filled
    got = list(book.totals(by))
    assert {tuple(getattr(t, name) for name in by): list(_numbers(t)) for t in got} == expected(events, by)
    assert all(getattr(t, name) is None for t in got for name in {"day", "model", "account"} - set(by))
    assert sum(t.flops for t in got) > 2**63


def _numbers(total):
    return total.events, total.images, total.macs, total.flops, total.flops_other


def test_totals_may_be_of_an_account_a_model_and_a_time(filled, monkeypatch):
    monkeypatch.setattr(query, "SPAN", 50)
    book, events = filled
    since, until = NOON + DAY, NOON + 3 * DAY
    chosen = [e for e in events if e.account == "anna" and e.model == "edges" and since <= e.at < until]
    selection = {"account": "anna", "model": "edges", "since_us": since, "until_us": until}
    (total,) = book.totals(by=[], **selection)
    assert list(_numbers(total)) == expected(chosen, ())[()]
    assert sorted(e.id for e in book.events(**selection)) == sorted(e.id for e in chosen)


def test_sums_beyond_64_bits_are_exact(book, event):
    largest = 2**63 - 1
    fill(book, [event(macs=largest, flops=largest, flops_other=largest, images=largest) for _ in range(1000)])
    (total,) = book.totals(by=["model"])
    assert _numbers(total) == (1000, *[1000 * largest] * 4)
    assert total.shown()["flops"] == "9223372036854775807000"


def test_an_empty_ledger_adds_up_to_nothing(book):
    assert [*book.totals(), *book.totals(by=[]), *book.events()] == []
    assert list(query.as_json(book.totals())) == ["[]\n"]


def test_days_are_days_of_utc(book, event):
    fill(book, [event(at=at) for at in (0, DAY - 1, DAY, 20_000 * DAY)])
    assert [(t.day, t.events) for t in book.totals(by=["day"])] == [
        ("1970-01-01", 2), ("1970-01-02", 1), ("2024-10-04", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("by", [["hour"], ["day", "id"], ["flops"]])
def test_other_groups_are_refused(book, by):
    with pytest.raises(ArgumentError, match="by: expected some of day, model, account"):
        book.totals(by)


def test_json_is_an_array_of_objects_with_bills_as_text(filled):
    book, events = filled
    rows = json.loads("".join(query.as_json(book.events())))
    assert [int(row["flops"]) for row in rows] == [e.flops for e in book.events()]
    assert all(isinstance(row["macs"], str) and row["at"].endswith("Z") for row in rows)
    totals = json.loads("".join(query.as_json(book.totals(by=["account"]))))
    assert {row["account"]: int(row["flops"]) for row in totals} == {
        account: numbers[3] for (account,), numbers in expected(events, ["account"]).items()
    }


def test_csv_is_a_table_that_no_spreadsheet_executes(book, event):
    book.append(event(account='=HYPERLINK("x")', model='a,"b"', shapes={"x": [1, 2]}))
    header, row = csv.reader(io.StringIO("".join(query.as_csv(book.events(), Event))))
    found = dict(zip(header, row, strict=True))
    assert found["account"] == '\'=HYPERLINK("x")'
    assert (found["model"], json.loads(found["shapes"]), found["flops"]) == ('a,"b"', {"x": [1, 2]}, "20")
    header, row = csv.reader(io.StringIO("".join(query.as_csv(book.totals(), Total))))
    assert header == ["day", "model", "account", "events", "images", "macs", "flops", "flops_other"]


def test_a_long_ledger_is_read_in_little_memory(sqlite_url, event):
    with Ledger(sqlite_url) as book:
        fill(book, [event(shapes="x" * 3000) for _ in range(6000)])
        tracemalloc.start()
        try:
            assert sum(len(piece) for piece in query.as_json(book.events())) > 18_000_000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3_000_000, "a page has 100 rows of 3 KB"


def test_a_reader_that_takes_its_time_holds_up_no_writer(url, event):
    with Ledger(url, timeout_s=2) as book:
        fill(book, [event() for _ in range(1500)])
        events = book.events()
        next(events)
        book.append(event())
        assert len(list(events)) == 1499, "what came later is not of this answer"
        assert len(list(book.events())) == 1501


@pytest.fixture
def looks(monkeypatch):
    """What happens between two looks at the rows: f(call) has it called each time, and `looks` counts them."""
    from cconv.ledger.database import Database

    calls, count = [], []
    pause = Database.pause

    def paused(self, connection):
        pause(self, connection)
        count.append(1)
        for call in calls:
            call()

    monkeypatch.setattr(Database, "pause", paused)
    count_ = type("Looks", (), {"count": property(lambda _: len(count)), "each": staticmethod(calls.append)})
    return count_()


QUESTIONS = {
    "events of a rare model": lambda book: book.events(model="rare"),
    "totals of a rare model": lambda book: book.totals(by=["model"], model="rare"),
    "totals since a day": lambda book: book.totals(since_us=NOON - DAY),
    "totals of no event": lambda book: book.totals(by=[], model="none"),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_of_which_few_rows_are_the_answer_lets_the_writer_in_too(url, event, monkeypatch, looks, question):
    """Every statement looks at a bounded number of rows, chosen or not; between them commits go on."""
    monkeypatch.setattr(query, "SPAN", 100)
    with Ledger(url, timeout_s=5) as book:
        fill(book, [event(at=NOON + n, model="rare" if n == 1500 else "vgg16") for n in range(2000)])
        late = []
        looks.each(
            lambda: late.append(book.append(event(at=NOON + 5, model="rare", account="bert"))) if len(late) < 9 else 0
        )
        answer = list(question(book))
        assert looks.count >= 20
        assert len(late) == 9
        counted = sum(getattr(row, "events", 1) for row in answer)
        assert counted in (0, 1, 2000), "what came later is not of this answer"


@pytest.mark.parametrize(("account", "index"), [(None, "at_seq"), ("anna", "account_at_seq")])
def test_no_statement_of_a_question_looks_at_the_whole_table(sqlite_url, event, monkeypatch, account, index):
    """The places where it goes on come from the index alone: of all times, or of one account's."""
    monkeypatch.setattr(query, "SPAN", 100)
    statements = []
    with Ledger(sqlite_url) as book:
        fill(book, [event(at=NOON + n) for n in range(300)])
        listen = sa.event.listen
        listen(book._database._engine, "before_cursor_execute", lambda *a: statements.append((a[2], a[3])))
        list(book.events(since_us=NOON, until_us=NOON + 250, model="vgg16", account=account))
        list(book.totals(by=[], since_us=NOON, until_us=NOON + 250, account=account))
    connection = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    plans = [
        [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", parameters)]
        for text, parameters in statements
        if "usage_event.at" in text
    ]
    connection.close()
    assert len(plans) >= 8
    for plan in plans:
        assert plan[0].startswith("SEARCH usage_event USING")
        assert f"ix_usage_event_{index} (" in plan[0]
    assert not [plan for plan in plans if any("TEMP B-TREE" in line for line in plan)]


def test_postgresql_finds_an_accounts_month_without_the_others(postgres, postgres_url, event):
    """Its planner's own words, once it knows how the table lies."""
    with Ledger(postgres_url) as book:
        fill(book, [event(at=NOON + n * DAY // 100, account=("anna", "bert")[n % 2]) for n in range(6000)])
        statements = []
        sa.event.listen(
            book._database._engine, "before_cursor_execute", lambda *a: statements.append((a[2], dict(a[3])))
        )
        (total,) = book.totals(by=[], account="anna", since_us=NOON + 58 * DAY, until_us=NOON + 60 * DAY)
        assert total.events == 100
    walks = [(text, given) for text, given in statements if "usage_event.at" in text]
    assert len(walks) >= 2
    engine = sa.create_engine(postgres_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM ANALYZE usage_event")
        for text, given in walks:
            plan = "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {text}", given))
            assert "ix_usage_event_account_at_seq" in plan, plan
            assert "Seq Scan" not in plan, plan


def test_an_accounts_question_looks_at_its_own_rows_alone(url, event, monkeypatch, looks):
    monkeypatch.setattr(query, "SPAN", 100)
    with Ledger(url) as book:
        fill(book, [event(at=NOON + n, account="anna" if n % 10 == 0 else "bert") for n in range(2000)])
        before = looks.count
        assert sum(total.events for total in book.totals(by=["day"], account="anna", since_us=NOON)) == 200
        assert looks.count - before <= 3, "200 rows, 100 in a look"
        assert len(list(book.events(account="anna"))) == 200
        before = looks.count
        assert list(book.events(account="nobody")) == []
        assert looks.count - before <= 2


def test_events_of_one_moment_are_all_there(book, event, monkeypatch):
    """More of them than a span, and than a page."""
    monkeypatch.setattr(query, "SPAN", 30)
    monkeypatch.setattr(query, "PAGE", 7)
    events = [event(at=NOON) for _ in range(100)]
    fill(book, events)
    assert [e.id for e in book.events()] == sorted((e.id for e in events), key=[e.id for e in book.events()].index)
    assert sorted(e.id for e in book.events(since_us=NOON, until_us=NOON + 1)) == sorted(e.id for e in events)
    assert list(book.events(until_us=NOON)) == list(book.events(since_us=NOON + 1)) == []
    assert [t.events for t in book.totals(by=[])] == [100]


@pytest.mark.parametrize("ask", [lambda b: b.events(timeout_s=0.05), lambda b: b.totals(timeout_s=0.05)])
def test_an_answer_that_takes_too_long_is_given_up(book, event, monkeypatch, looks, ask):
    monkeypatch.setattr(query, "SPAN", 10)
    fill(book, [event() for _ in range(100)])
    looks.each(lambda: time.sleep(0.02))
    with pytest.raises(ledger.LedgerTimeout, match="no whole answer"):
        list(ask(book))


@pytest.mark.parametrize("name", ["account", "model"])
@pytest.mark.parametrize("text", ["\0", "a\nb", "x" * 256])
def test_a_question_with_what_no_column_holds_is_refused(book, name, text):
    with pytest.raises(ledger.EventError, match=f"^{name}: expected"):
        book.events(**{name: text})
    with pytest.raises(ledger.EventError, match=f"^{name}: expected"):
        book.totals(**{name: text})


def test_a_table_without_its_database_is_an_error_before_its_first_line(tmp_path):
    with Ledger(f"sqlite:///{tmp_path}/none.db") as book:
        for pieces in (
            query.as_csv(book.totals(), Total),
            query.as_csv(book.events(), Event),
            query.as_json(book.events()),
        ):
            with pytest.raises(ledger.LedgerUnavailable):
                next(pieces)


def test_an_audit_of_right_bills_finds_nothing(filled):
    book, events = filled
    bills = {e.id: (e.macs, e.flops, e.flops_other) for e in events}
    audit = book.audit(lambda e: bills[e.id])
    assert list(audit) == []
    assert (audit.checked, audit.wrong, audit.unknown) == (400, 0, 0)


def test_an_audit_finds_every_wrong_bill_and_every_one_that_it_cannot_compute(book, event):
    right, wrong, gone, odd = event(), event(macs=11), event(model="gone"), event(model="odd")
    fill(book, [right, wrong, gone, odd])

    def recompute(one):
        if one.model == "gone":
            raise ledger.CannotRecompute("no such model")
        if one.model == "odd":
            raise KeyError("a bug")
        return 10, 20, 3

    audit = book.audit(recompute)
    found = {difference.event.id: difference for difference in audit}
    assert (audit.checked, audit.right, audit.wrong, audit.unknown, audit.failed) == (4, 1, 1, 1, 1)
    assert found[wrong.id].recorded == (11, 20, 3)
    assert found[wrong.id].expected == (10, 20, 3)
    assert found[gone.id].expected is None
    assert found[gone.id].reason == "no such model"
    assert "a bug" in found[odd.id].reason


def test_an_audit_computes_real_costs_from_recorded_shapes(book, event):
    import cconv

    shape, layers = (2, 3, 64, 64), ["features.4"]
    cost = cconv.load("vgg16").cost(shape, layers).total
    bill = {"macs": cost.macs, "flops": cost.flops, "flops_other": cost.flops_other}
    book.append(event(shapes={"x": shape, "layers": layers}, **bill))
    book.append(event(shapes={"x": (1, 3, 64, 64), "layers": layers}, **bill))

    def recompute(one):
        cost = cconv.load(one.model).cost(tuple(one.shapes["x"]), one.shapes["layers"]).total
        return cost.macs, cost.flops, cost.flops_other

    audit = book.audit(recompute)
    (difference,) = audit
    assert difference.recorded == tuple(2 * n for n in difference.expected)


def test_the_commands_show_what_is_there(sqlite_url, event, capsys):
    from cconv.ledger.__main__ import main

    with Ledger(sqlite_url) as book:
        book.append(event())
    assert main(["migrate", sqlite_url]) == 0
    assert main(["totals", sqlite_url, "--by", "model"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"day": None, "model": "vgg16", "account": None, "events": 1, "images": 1,
         "macs": "10", "flops": "20", "flops_other": "3"}
    ]  # fmt: skip
    assert main(["events", sqlite_url, "--csv"]) == 0
    assert capsys.readouterr().out.count("\r\n") == 2
    assert main(["totals", "sqlite:////none/at/all.db"]) == 1
    assert capsys.readouterr().err.startswith("error: ledger:")
