"""Events: what is appended is there, once, whole, and for ever."""

import dataclasses
import os
import threading
import time

import pytest
import sqlalchemy as sa

from cconv import CconvError, ledger
from cconv.ledger import Event, Ledger


def test_an_event_comes_back_as_it_went(book, event):
    sent = event(
        account="ключ-1", model="resnet50", version="2", device="cpu", algorithm="winograd", request_id="r/1", images=8,
        shapes=[{"x": [8, 3, 224, 224], "layers": ["relu", None]}, 1.5], bytes_in=1, bytes_out=2, queue_us=3,
        compute_us=4, macs=2**63 - 1, flops=0, flops_other=5, idempotency_key="k",
    )  # fmt: skip
    receipt = book.append(sent)
    assert receipt == (sent, False)
    assert list(book.events()) == [sent]


def test_the_same_event_is_recorded_once(book, event):
    sent = event()
    assert [book.append(sent).duplicate for _ in range(3)] == [False, False, False]
    assert list(book.events()) == [sent]


def test_a_second_bill_of_one_id_is_no_second_bill(book, event):
    """What a batch job's shard does that is computed twice."""
    first, second = event(id="job/1/shard/7", compute_us=10), event(id="job/1/shard/7", compute_us=99)
    assert not book.append(first).duplicate
    assert book.append(second) == (first, True)
    assert [total.flops for total in book.totals()] == [20]


@pytest.mark.parametrize("field", ["account", "model", "version", "images", "shapes", "macs", "flops", "flops_other"])
def test_another_bill_under_a_recorded_id_is_refused(book, event, field):
    first = event(id="one")
    book.append(first)
    value = getattr(first, field)
    other = dataclasses.replace(first, **{field: value + 1 if isinstance(value, int) else "other"})
    with pytest.raises(ledger.EventConflict, match="event one: expected the bill that is recorded"):
        book.append(other)
    assert list(book.events()) == [first]


def test_an_idempotency_key_is_billed_once_whatever_the_ids(book, event):
    first = event(idempotency_key="k")
    assert not book.append(first).duplicate
    assert book.append(event(idempotency_key="k")) == (first, True)
    assert not book.append(event(idempotency_key="k", account="bert")).duplicate
    assert len(list(book.events())) == 2


def test_many_threads_lose_nothing_and_share_commits(book, event):
    sent = [[event(request_id=f"{thread}-{n}") for n in range(25)] for thread in range(16)]

    def work(events):
        for one in events:
            book.append(one)

    threads = [threading.Thread(target=work, args=[events]) for events in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.id for e in book.events()) == sorted(e.id for events in sent for e in events)
    assert book._writer.tasks / book._writer.groups > 2


def test_threads_that_send_the_same_events_record_each_once(book, event):
    events = [event(id=f"shard/{n}") for n in range(20)]
    receipts = []

    def work():
        receipts.extend(book.append(dataclasses.replace(e, compute_us=threading.get_ident() % 1000)) for e in events)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(book.events())) == 20
    stored = {e.id: e for e in book.events()}
    assert all(receipt.event == stored[receipt.event.id] for receipt in receipts)


HOSTILE = {
    "negative": {"flops": -1},
    "beyond 64 bits": {"flops": 2**63},
    "a bool": {"macs": True},
    "a float": {"macs": 1.0},
    "text for a number": {"macs": "1"},
    "none": {"images": None},
    "empty account": {"account": ""},
    "empty model": {"model": ""},
    "empty id": {"id": ""},
    "empty key": {"idempotency_key": ""},
    "long key": {"idempotency_key": "k" * 256},
    "long text": {"request_id": "r" * 256},
    "line end": {"request_id": "a\nb"},
    "NUL": {"account": "a\0b"},
    "half a surrogate": {"account": "\ud800"},
    "bytes": {"model": b"vgg16"},
    "NaN in shapes": {"shapes": [float("nan")]},
    "objects in shapes": {"shapes": object()},
    "large shapes": {"shapes": "x" * 2**20},
    "negative time": {"at": -1},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_an_event_that_cannot_be_is_refused_by_its_field(event, fields):
    with pytest.raises(ledger.EventError, match=f"^{next(iter(fields))}: expected"):
        event(**fields)


@pytest.mark.parametrize("text", ["'; DROP TABLE usage_event; --", "%s %(x)s :x ?", '"', "\\", "𝔘𝔫𝔦", "=1+1"])
def test_any_text_is_only_text(book, event, text):
    sent = event(account=text, model=text, shapes=text, idempotency_key=text)
    book.append(sent)
    assert list(book.events(account=text, model=text)) == [sent]
    assert [total.account for total in book.totals(account=text)] == [text]


@pytest.mark.parametrize("statement", ["UPDATE usage_event SET flops = 0", "DELETE FROM usage_event"])
def test_the_database_itself_refuses_to_change_an_event(url, book, event, statement):
    sent = event()
    book.append(sent)
    engine = sa.create_engine(sa.make_url(url).set(drivername=book._database.url.drivername), poolclass=sa.NullPool)
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
        connection.exec_driver_sql(statement)
    assert list(book.events()) == [sent]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_process_is_refused_and_harms_nothing(sqlite_url, event):
    """Not with PostgreSQL too: what the refusal looks at is the process alone."""
    with Ledger(sqlite_url) as book:
        book.append(event())
        read, write = os.pipe()
        child = os.fork()
        if not child:
            answers = []
            for call in (lambda: book.append(event()), book.check, book.close, lambda: list(book.events())):
                try:
                    call()
                    answers.append("done")
                except ledger.LedgerForked:
                    answers.append("forked")
            os.write(write, ",".join(answers).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            assert pipe.read() == "forked,forked,forked,forked"
        os.waitpid(child, 0)
        book.append(event())
        assert len(list(book.events())) == 2


def test_a_closed_ledger_is_closed(book, event):
    book.append(event())
    assert book.close()
    with pytest.raises(ledger.LedgerClosed):
        book.append(event())
    assert book.close()


def test_closing_records_what_waits(sqlite_url, event):
    """Threads that wait for their turn are answered, not refused."""
    book = Ledger(sqlite_url)
    book.check()
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    receipts = []
    threads = [threading.Thread(target=lambda: receipts.append(book.append(event()))) for _ in range(8)]
    for thread in threads:
        thread.start()
        if thread is threads[0]:
            time.sleep(0.1)  # the writer has it, and waits for the lock; the others wait behind it
    end = time.monotonic() + 3
    while len(book._writer._queue) < 7 and time.monotonic() < end:
        time.sleep(0.001)
    assert len(book._writer._queue) == 7
    closer = threading.Thread(target=lambda: receipts.append(book.close()))
    closer.start()
    lock.execute("ROLLBACK")
    lock.close()
    for thread in (*threads, closer):
        thread.join(10)
    assert len(receipts) == 9
    assert all(receipts)
    with Ledger(sqlite_url) as book:
        assert len(list(book.events())) == 8


@pytest.mark.parametrize("url", ["", "mysql://a/b", "sqlite://", "sqlite:///:memory:", "/path", "postgresql"])
def test_other_urls_are_refused(url):
    with pytest.raises(CconvError, match="ledger: expected"):
        Ledger(url)


def test_errors_do_not_tell_the_url(event, tmp_path):
    with Ledger("postgresql://anna:geheim@127.0.0.1:1/none", timeout_s=5) as book:
        with pytest.raises(ledger.LedgerUnavailable) as caught:
            book.append(event())
        assert "geheim" not in str(caught.value)


def test_every_field_of_an_event_is_a_column_and_none_is_left_out():
    from cconv.ledger import schema
    from cconv.ledger.event import NUMBERS, TEXTS

    names = {entry.name for entry in dataclasses.fields(Event)}
    assert names == {*TEXTS, *NUMBERS, "shapes", "idempotency_key"}
    assert {column.name for column in schema.usage_event.columns} == names | {"seq"}
