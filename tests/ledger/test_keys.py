"""Keys: a request that is sent again is computed again at most three times, and billed once; across processes too."""

import json
import threading
import time
from collections import Counter

import pytest

from cconv import ledger
from cconv.ledger import Ledger


def test_one_bill_three_repetitions_and_no_more(book, event):
    first = book.reserve("anna", "k", "body")
    assert (first.replay, first.event_id) == (0, None)
    bill = book.record(first, event())
    assert not bill.duplicate
    assert bill.event.idempotency_key == "k"
    for replay in (1, 2, 3):
        again = book.reserve("anna", "k", "body")
        assert (again.replay, again.event_id) == (replay, bill.event.id)
        assert book.record(again, event()) is None
    for _ in range(3):
        with pytest.raises(ledger.KeyExhausted, match="at most 3"):
            book.reserve("anna", "k", "body")
    assert len(list(book.events())) == 1


@pytest.mark.parametrize("billed", [False, True])
def test_another_body_under_a_key_is_refused(book, event, billed):
    first = book.reserve("anna", "k", "body")
    if billed:
        book.record(first, event())
    with pytest.raises(ledger.KeyReused):
        book.reserve("anna", "k", "other body")


def test_keys_belong_to_their_account(book, event):
    for account in ("anna", "bert"):
        book.record(book.reserve(account, "k", account), event())
    assert [(total.account, total.events) for total in book.totals(by=["account"])] == [("anna", 1), ("bert", 1)]


def test_while_it_is_computed_others_are_told_to_wait(book, event):
    """The first time, and every time again."""
    for replay in range(3):
        mine = book.reserve("anna", "k", "body")
        assert mine.replay == replay
        with pytest.raises(ledger.KeyInProgress) as caught:
            book.reserve("anna", "k", "body")
        assert caught.value.retry_after_s <= 1
        with pytest.raises(ledger.KeyReused):
            book.reserve("anna", "k", "other body")
        book.record(mine, event())


def test_a_released_key_is_as_before(book, event):
    book.release(book.reserve("anna", "k", "body"))
    first = book.reserve("anna", "k", "other body")
    assert first.replay == 0
    book.record(first, event())
    book.release(first)  # too late: it is billed
    again = book.reserve("anna", "k", "other body")
    assert again.replay == 1
    book.release(first)  # nor is it the first one's any more
    with pytest.raises(ledger.KeyInProgress):
        book.reserve("anna", "k", "other body")
    book.release(again)
    book.release(again)
    for replay in (1, 2, 3):
        again = book.reserve("anna", "k", "other body")
        assert again.replay == replay, "what came to nothing is not counted"
        book.record(again, event())
    with pytest.raises(ledger.KeyExhausted):
        book.reserve("anna", "k", "other body")


def test_a_key_that_nobody_could_look_up_is_free(sqlite_url, event):
    """The reservation of which its caller heard nothing holds nothing up."""
    lock = ledger.sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    with Ledger(sqlite_url, timeout_s=0.2) as book:
        book.check()
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(ledger.LedgerUnavailable):
            book.reserve("anna", "k", "body")
        lock.close()
        end = time.monotonic() + 10
        while True:
            try:
                assert book.reserve("anna", "k", "body").replay == 0
                break
            except ledger.LedgerUnavailable:
                assert time.monotonic() < end
                time.sleep(0.02)


def test_two_processes_that_compute_one_request_make_one_bill(url, event):
    """Neither knows of the other's reservation; the later one is a repetition."""
    with Ledger(url) as one, Ledger(url) as other:
        first, second = (book.reserve("anna", "k", "body") for book in (one, other))
        assert (first.replay, second.replay) == (0, 0)
        bill = one.record(first, event())
        assert not bill.duplicate
        assert other.record(second, event()) == (bill.event, True)
        assert one.reserve("anna", "k", "body").replay == 2
        assert len(list(one.events())) == 1


def test_two_processes_that_compute_other_requests_under_one_key_make_one_bill(url, event):
    with Ledger(url) as one, Ledger(url) as other:
        first, second = one.reserve("anna", "k", "body"), other.reserve("anna", "k", "other body")
        bill = one.record(first, event())
        with pytest.raises(ledger.KeyReused):
            other.record(second, event())
        assert list(one.events()) == [bill.event]


def test_the_same_record_again_counts_once(book, event):
    """What the writer does when it does not know whether a commit was made."""
    from cconv.ledger.keys import record_all

    mine, one = book.reserve("anna", "k", "body"), event(idempotency_key="k")
    assert not any(book._submit(record_all, (mine, one)).duplicate for _ in range(3))
    book.release(mine)
    again = book.reserve("anna", "k", "body")
    for _ in range(3):
        book._submit(record_all, (again, one))
    book.release(again)
    assert book.reserve("anna", "k", "body").replay == 2


def test_a_bill_whose_reservation_was_given_back_still_holds_the_key(book, event):
    first = book.reserve("anna", "k", "body")
    book.release(first)
    bill = book.record(first, event())
    again = book.reserve("anna", "k", "body")
    assert (again.replay, again.event_id) == (1, bill.event.id)
    book.release(again)
    with pytest.raises(ledger.KeyReused):
        book.reserve("anna", "k", "other body")


def test_a_key_that_was_billed_by_its_event_alone_is_known(book, event):
    book.append(event(idempotency_key="k"))
    assert book.reserve("anna", "k", "body").replay == 1


@pytest.mark.parametrize(
    "fields", [("", "k", "f"), ("a", "", "f"), ("a", "k", ""), ("a", "k\n", "f"), ("a", "k" * 256, "f")]
)
def test_keys_that_cannot_be_are_refused(book, fields):
    with pytest.raises(ledger.EventError):
        book.reserve(*fields)


def _answers(book, event) -> list[str]:
    """What a client hears that sends the same request until it is refused for good."""
    heard, end = [], time.monotonic() + 30
    while "exhausted" not in heard:
        assert time.monotonic() < end
        try:
            mine = book.reserve("anna", "k", "body")
        except ledger.KeyInProgress:
            time.sleep(0.002)
        except ledger.KeyExhausted:
            heard.append("exhausted")
        else:
            receipt = book.record(mine, event())
            heard.append("replay" if receipt is None else "duplicate" if receipt.duplicate else "billed")
    return heard


def test_threads_that_send_one_request_share_one_bill_and_three_repetitions(book, event):
    heard = []
    threads = [threading.Thread(target=lambda: heard.extend(_answers(book, event))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(heard) == {"billed": 1, "replay": 3, "exhausted": 20}
    assert len(list(book.events())) == 1


CLIENT = """
import json, sys, time
from cconv import ledger
heard, (url, keys) = {}, (sys.argv[1], int(sys.argv[2]))
with ledger.Ledger(url, timeout_s=30) as book:
    book.check()
    print("ready", flush=True)
    sys.stdin.readline()
    for key in map(str, range(keys)):
        for _ in range(400):
            try:
                mine = book.reserve("anna", key, "body")
            except ledger.KeyInProgress:
                time.sleep(0.002)
                continue
            except ledger.KeyExhausted:
                break
            event = ledger.Event(account="anna", model="m", shapes=[key], macs=1, flops=2, flops_other=0)
            receipt = book.record(mine, event)
            word = "replay" if receipt is None else "duplicate" if receipt.duplicate else "billed"
            heard.setdefault(key, []).append(word)
print(json.dumps(heard))
"""


def test_processes_that_send_the_same_requests_share_their_bills(url, python):
    processes = [python(CLIENT, url, "10") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    heard: dict[str, list] = {}
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        for key, words in json.loads(out).items():
            heard.setdefault(key, []).extend(words)
    assert len(heard) == 10
    for words in heard.values():
        count = Counter(words)
        assert count["billed"] == 1
        # Two of the three processes may have computed what the third one billed, or counted the same repetition.
        assert 3 <= count["replay"] + count["duplicate"] <= 3 * len(processes)
    with Ledger(url) as book:
        assert [total.events for total in book.totals(by=[])] == [10]


def test_a_process_that_dies_with_a_reservation_leaves_it_to_others(url, python, event):
    script = """
import os, signal, sys
from cconv import ledger
ledger.Ledger(sys.argv[1]).reserve("anna", "k", "body")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(script, url).wait(timeout=30) == -9
    with Ledger(url) as book:
        assert not book.record(book.reserve("anna", "k", "body"), event()).duplicate
