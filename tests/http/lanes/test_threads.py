"""Threads: which one computes: a lane's, which gives way, or for short tasks the one that asks; and none that is left.

In: a Scheduler with tasks whose runs do what the test says.  Out: the threads they ran in.
"""

import os
import sys
import threading
import time

import pytest
from runs import WAIT_S, Held, later, soon, until_cancelled, waste

from service import scheduler as scheduling
from service.errors import DeadlineExceeded
from service.scheduler import SHORT_S

pytestmark = pytest.mark.alone


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no niceness of its own")
def test_what_computes_gives_way_to_who_refuses_reads_and_writes(make, task):
    seen = []

    def look(cancel):
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    make(1).run([task(look), task(look)], later())  # two, which no request computes itself
    assert set(seen) == {min(19, own + scheduling.NICE)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_where_a_sandbox_forbids_to_be_nice_lanes_compute_all_the_same(make, task, monkeypatch):
    def forbidden(which, who, priority):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", forbidden)
    scheduler, computed = make(1), []
    scheduler.run([task(computed.append), task(computed.append)], later())
    assert len(computed) == 2
    assert not scheduler.refusal()


class TestThreads:
    """Where the system has no thread left."""

    def test_nothing_is_computed_without_a_watchdog_and_the_next_one_has_it(self, make, task, monkeypatch):
        scheduler, start = make(1), threading.Thread.start

        def refuse(thread):
            if thread.name == "cconv-watchdog":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start"):
                    scheduler.run([task()], later())
        assert scheduler.run([task()], later())
        assert scheduler._watchdog.is_alive()

    def test_nothing_is_queued_for_lanes_that_do_not_start_and_one_lane_is_enough(self, make, task, pool, monkeypatch):
        scheduler, held, start = make(2), Held(), threading.Thread.start

        def refuse(thread):
            if thread.name.startswith("cconv-cpu"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            scheduler.run([task()], later())
        assert not scheduler._queues["cpu"]
        monkeypatch.undo()
        first = pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        second = threading.Thread(target=scheduler.run, args=([task()], later()))
        start(second)
        assert soon(lambda: scheduler._queues["cpu"])
        held.go.set()
        assert first.result()
        second.join(WAIT_S)
        assert not second.is_alive()


class TestShort:
    """A short task that finds a lane free runs in the thread that asks for it."""

    @pytest.fixture
    def short(self, task):
        """f(scheduler, run) -> a task that is expected to be short."""

        def made(scheduler, run=lambda cancel: None, seconds=SHORT_S / 100):
            found = task(run, label="short")
            scheduler._pace.learn(("short", "cpu"), found.quote.flops, seconds)
            return found

        return made

    def test_it_does_and_what_takes_longer_or_has_never_run_does_not(self, make, task, short):
        scheduler, threads = make(2), []

        def run(cancel):
            threads.append(threading.current_thread())

        for one in (short(scheduler, run), task(run, label="new")):
            scheduler.run([one], later())
        slow = task(run, label="slow")
        scheduler._pace.learn(("slow", "cpu"), slow.quote.flops, 2 * SHORT_S)
        scheduler.run([slow], later())
        me = threading.current_thread()
        assert [thread is me for thread in threads] == [True, False, False]

    def test_not_where_others_run_or_wait_nor_near_the_deadline(self, make, task, short, pool):
        scheduler, held, threads = make(1), Held(), []
        one = short(scheduler, lambda cancel: threads.append(threading.current_thread()))
        pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)
        scheduler._pace.estimate = lambda *_: SHORT_S / 2
        answer = pool.submit(scheduler.run, [one], later())
        assert soon(lambda: scheduler._queues["cpu"])
        held.go.set()
        answer.result()
        scheduler.run([one], later(SHORT_S))
        me = threading.current_thread()
        assert [thread.name for thread in threads] == ["cconv-cpu-0"] * 2
        scheduler.run([one], later())
        assert threads[2] is me

    def test_it_is_measured_and_late_ones_are_not_answered(self, make, short):
        scheduler = make(2)
        result = scheduler.run([short(scheduler)], later())[0]
        assert result.queue_s >= 0
        count = scheduler._metrics.registry.get_sample_value("cconv_queue_seconds_count")
        assert count == 1
        late = short(scheduler, lambda cancel: time.sleep(0.2))
        with pytest.raises(DeadlineExceeded) as raised:
            scheduler.run([late], later(0.1))
        assert raised.value.computed
        assert waste(scheduler, late) == 1

    def test_the_watchdog_calls_it_off_at_its_deadline_and_notices_one_that_hangs(self, make, short, pool):
        scheduler = make(2, watchdog_s=0.4)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            scheduler.run([short(scheduler, until_cancelled)], later(0.2))
        assert time.monotonic() - began < WAIT_S / 2
        assert not scheduler.told
        held = Held()
        answer = pool.submit(scheduler.run, [short(scheduler, held)], later(0.2))
        assert soon(lambda: scheduler.told)
        assert scheduler.told == ["a run of short has not ended 0.4 s after its deadline"]
        held.go.set()
        assert isinstance(answer.exception(), DeadlineExceeded)
