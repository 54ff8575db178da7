"""Writer: one operation at a time, of callers that wait no longer than they said.

In: a ledger whose thread is busy, or a row that no table takes.  Out: a refusal, and a ledger that goes on.
"""

import gc
import threading
import time
import weakref
from contextlib import suppress

import pytest

from cconv import ledger
from cconv.ledger import Ledger


class Hold:
    """An operation that lasts until it is let go."""

    def __init__(self):
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, connection, arguments):
        self.begun.set()
        self.ended.wait(10)
        return arguments


@pytest.fixture
def book(url):
    with Ledger(url, timeout_s=0.3) as book:
        yield book


def recovered(book) -> bool:
    with suppress(ledger.LedgerUnavailable):
        book.check()
        return True
    return False


def test_who_gets_no_turn_is_recorded_by_nobody(book, event):
    hold, answers = Hold(), []
    thread = threading.Thread(target=lambda: answers.append(book._submit(hold, "done")))
    thread.start()
    hold.begun.wait(10)
    with pytest.raises(ledger.LedgerUnavailable) as caught:
        book.append(event())
    assert not isinstance(caught.value, ledger.LedgerDoubtful)
    hold.ended.set()
    thread.join(10)
    assert answers == ["done"], "what had begun is done"
    end = time.monotonic() + 10
    while not recovered(book):
        assert time.monotonic() < end
    assert list(book.events()) == []


def test_a_row_that_the_table_refuses_is_its_own_caller_s_trouble(book, event, caplog):
    """Alone in its transaction, as most are."""
    wrong, good = event(), event()
    object.__setattr__(wrong, "flops", -1)
    with pytest.raises(ledger.LedgerRefused):
        book.append(wrong)
    book.require()
    for _ in range(2):
        assert book.append(good) == (good, False)
    assert list(book.events()) == [good]
    assert "the ledger refused an operation" in caplog.text


def test_an_error_keeps_nothing_of_its_caller_alive(book, event):
    """As a cycle of a task, its error and the frames it went through would, until the collector comes by."""
    first = event()
    book.append(first)

    class Images:
        pass

    def request() -> weakref.ref:
        images = Images()
        with pytest.raises(ledger.EventConflict) as caught:
            book.append(event(id=first.id, macs=11))
        del caught
        return weakref.ref(images)

    gc.disable()
    try:
        assert request()() is None
    finally:
        gc.enable()


def test_the_first_of_an_id_counts_also_where_each_comes_alone(book, event):
    first = event()
    book.append(first)
    later = event(id=first.id, compute_us=9)
    assert book.append(later) == (first, True)
    with pytest.raises(ledger.EventConflict):
        book.append(event(id=first.id, macs=11))
    assert list(book.events()) == [first]
