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
from cconv.ledger import Ledger, writer


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


def outlives_its_request(error: type[Exception], append) -> object:
    """What is left of a caller's images once it has failed, before the collector of cycles comes by."""

    class Images:
        pass

    def request() -> weakref.ref:
        images = Images()
        with pytest.raises(error) as caught:
            append()
        del caught
        return weakref.ref(images)

    gc.disable()
    try:
        return request()()
    finally:
        gc.enable()


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

    assert outlives_its_request(ledger.EventConflict, lambda: book.append(event(id=first.id, macs=11))) is None


def test_a_doubt_keeps_nothing_of_its_caller_alive(book, event, monkeypatch):
    def doubtful(function, argument):
        raise ledger.LedgerDoubtful("ledger: planted")

    monkeypatch.setattr(book, "_submit", doubtful)
    assert outlives_its_request(ledger.LedgerDoubtful, lambda: book.append(event())) is None


def test_who_is_answered_as_its_patience_ends_has_its_answer_and_the_ledger_goes_on(book, event, monkeypatch):
    """Its time is over before it is settled, and it says so when the thread has gone to sleep."""
    wait = writer._Task.wait

    def late(task, timeout_s):
        monkeypatch.undo()
        assert wait(task, 10)
        task._settled.release()
        time.sleep(0.1)  # the thread has nothing to do, and waits for a task
        return False

    monkeypatch.setattr(writer._Task, "wait", late)
    first, second = event(), event()
    assert book.append(first) == (first, False)
    assert book.append(second) == (second, False)


def test_who_finds_no_answer_just_before_there_is_one_has_it_and_the_ledger_goes_on(book, monkeypatch):
    """It says that the ledger hangs while the thread, which has answered, looks for more to do."""
    wait, hold = writer._Task.wait, Hold()

    def early(task, timeout_s):
        if timeout_s:
            return wait(task, timeout_s)
        monkeypatch.undo()
        hold.ended.set()
        time.sleep(0.1)  # the thread settles it, and comes as far as it can
        return False

    monkeypatch.setattr(writer._Task, "wait", early)
    assert book._submit(hold, "done") == "done"
    end = time.monotonic() + 10
    while not recovered(book):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_group_is_done_even_if_a_caller_s_patience_ends_as_it_is_taken(book, event, monkeypatch):
    take = writer.Writer._take

    def impatient(self, pause_s):
        group = take(self, pause_s)
        if group:
            monkeypatch.undo()
            self._fault = ledger.LedgerUnavailable("ledger: no answer in 0.3 s")
        return group

    monkeypatch.setattr(writer.Writer, "_take", impatient)
    first = event()
    assert book.append(first) == (first, False)
    end = time.monotonic() + 10
    while not recovered(book):
        assert time.monotonic() < end


def test_what_fails_for_want_of_a_thread_is_recorded_by_nobody(book, event, monkeypatch):
    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            book.append(event())
    second = event()
    assert book.append(second) == (second, False)
    assert list(book.events()) == [second]


def test_the_first_of_an_id_counts_also_where_each_comes_alone(book, event):
    first = event()
    book.append(first)
    later = event(id=first.id, compute_us=9)
    assert book.append(later) == (first, True)
    with pytest.raises(ledger.EventConflict):
        book.append(event(id=first.id, macs=11))
    assert list(book.events()) == [first]
