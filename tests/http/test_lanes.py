"""Lanes: runs side by side, and in the thread that asks: who gets how many cores, what is called off, and what is kept.

In: a Scheduler with tasks whose runs do what the test says.  Out: who ran when, with how many threads; waste.
"""

import gc
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from cconv.cpu._team import limit
from service import scheduler as scheduling
from service.engine import Engine
from service.errors import DeadlineExceeded, DeviceLost, InvalidRequest, Overloaded
from service.metrics import Metrics
from service.scheduler import SHORT_S, Scheduler

pytestmark = pytest.mark.alone
WAIT_S = 20


def soon(condition) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.fixture(scope="module")
def plain():
    """A task that costs 9 macs."""
    x = np.ones((1, 1, 3, 3), np.float32)
    return Engine(("edges",)).conv2d_task(x, x, None, {})


@pytest.fixture
def task(plain):
    """f(run, **changes) -> a task; `run` gets the cancel flag."""

    def make(run=lambda cancel: None, **changes):
        def maps(images, cancel):
            run(cancel)
            return {"y": images}

        return replace(plain, run=maps, images=plain.images.copy(), **changes)

    return make


@pytest.fixture
def make():
    """f(lanes, **options) -> a Scheduler that is closed after the test; `waste` and `told` are its own."""
    made = []

    def scheduler(lanes, **options):
        told = []
        found = Scheduler(Metrics(), 8, lanes=lanes, **{"on_stuck": told.append, **options})
        found.told = told
        made.append(found)
        return found

    yield scheduler
    for one in made:
        one.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as found:
        yield found


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(scheduling, "cores", lambda: 4)


def later(seconds=WAIT_S) -> float:
    return time.monotonic() + seconds


def waste(scheduler, task) -> float:
    """How many times the task's FLOPs were discarded."""
    found = scheduler._metrics.registry.get_sample_value(
        "cconv_discarded_flops_total", {"model": task.label, "device": task.device}
    )
    return (found or 0) / task.quote.flops


def until_cancelled(cancel) -> None:
    assert soon(cancel.is_set)
    raise DeadlineExceeded("cancelled")


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


class Held:
    """Runs that begin and go on until they are let go; `threads` are the limits they ran with."""

    def __init__(self):
        self.go, self.began, self.threads = threading.Event(), threading.Semaphore(0), []

    def __call__(self, cancel):
        self.threads.append(limit())
        self.began.release()
        assert self.go.wait(WAIT_S)

    def wait(self, runs):
        for _ in range(runs):
            assert self.began.acquire(timeout=WAIT_S)


class TestCores:
    """A run has its share of the cores."""

    def test_alone_it_has_all_and_those_that_come_share_them(self, make, task, pool, four_cores):
        scheduler, held = make(0), Held()
        for _ in range(4):
            pool.submit(scheduler.run, [task(held)], later())
            held.wait(1)
        assert held.threads == [4, 2, 2, 1]
        waiting = pool.submit(scheduler.run, [task(held)], later())
        assert soon(lambda: scheduler._queues["cpu"])
        held.go.set()
        waiting.result()
        assert len(held.threads) == 5

    @pytest.mark.parametrize(("tasks", "threads"), [(1, [4]), (2, [2, 2]), (3, [2, 2, 2]), (4, [1] * 4), (9, [1] * 4)])
    def test_what_comes_together_leaves_no_core_idle(self, make, task, four_cores, tasks, threads):
        scheduler, seen, all_began = make(0), [], threading.Barrier(min(tasks, 4))

        def run(cancel):
            seen.append(limit())
            if len(seen) <= 4:
                all_began.wait(WAIT_S)

        scheduler.run([task(run) for _ in range(tasks)], later())
        assert (seen[:4], len(seen)) == (threads, tasks)

    def test_one_lane_has_all_cores_whoever_waits(self, make, task, four_cores):
        scheduler, seen = make(1), []
        scheduler.run([task(lambda cancel: seen.append(limit())) for _ in range(5)], later())
        assert seen == [4] * 5

    def test_a_gpu_has_a_lane_of_its_own(self, make, task, pool):
        scheduler, held = make(1), Held()
        for device in ("cpu", "cuda", "cuda"):
            pool.submit(scheduler.run, [task(held, device=device)], later())
        held.wait(2)
        assert soon(lambda: scheduler._queues["cuda"])
        assert not held.began.acquire(timeout=0.05)
        held.go.set()
        held.wait(1)


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


class TestCompany:
    """Tasks of one key wait for nobody, and run together where that was seen to gain."""

    @pytest.fixture
    def sizes(self, task):
        """f(scheduler, tasks, lanes) -> the sizes of the runs of so many tasks; the first ones wait for each other."""

        def sizes(scheduler, tasks, lanes):
            found, together = [], threading.Barrier(lanes)

            def run(images, cancel):
                found.append(len(images))
                if len(found) <= lanes:
                    together.wait(WAIT_S)
                return {"y": images}

            one = replace(task(), run=run, key="key")
            for result in scheduler.run([one] * tasks, later()):
                assert result.maps["y"].shape == one.images.shape
            return sorted(found, reverse=True)

        return sizes

    @pytest.mark.parametrize(
        ("company", "expected"), [(0, [1] * 7), (1, [2, 2, 2, 1]), (float("inf"), [4, 3])], ids=["none", "one", "all"]
    )
    def test_each_lane_takes_as_many_as_the_pace_says_and_no_more_than_its_share(self, make, sizes, company, expected):
        scheduler = make(2)
        scheduler._pace.company = lambda kind: company
        assert sizes(scheduler, 7, lanes=2) == expected

    def test_one_lane_takes_all_that_fit(self, make, sizes):
        assert sizes(make(1), 11, lanes=1) == [8, 3]

    def test_other_keys_and_none_stay_alone(self, make, task, pool):
        scheduler, held = make(1), Held()
        pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)
        sizes = []

        def run(images, cancel):
            sizes.append(len(images))
            return {"y": images}

        tasks = [replace(task(), run=run, key=key) for key in ("a", None, "b", None, "a")]
        answers = [pool.submit(scheduler.run, [one], later()) for one in tasks]
        assert soon(lambda: len(scheduler._queues["cpu"]) == 5)
        held.go.set()
        for answer in answers:
            answer.result()
        assert sorted(sizes) == [1, 1, 1, 2]


class TestFailures:
    """A request's end ends all that is done for it alone, and each task that began counts as waste once."""

    def test_a_sibling_of_a_task_that_failed_is_cancelled(self, make, task):
        scheduler, began = make(2), threading.Event()

        def wait(cancel):
            began.set()
            until_cancelled(cancel)

        def fail(cancel):
            assert began.wait(WAIT_S)
            raise ZeroDivisionError("boom")

        tasks = [task(wait), task(fail)]
        with pytest.raises(ZeroDivisionError):
            scheduler.run(tasks, later())
        assert soon(lambda: not scheduler._runs)
        assert waste(scheduler, tasks[0]) == 2

    def test_one_that_waits_is_not_computed_and_one_that_is_done_is_wasted(self, make, task):
        scheduler, ran = make(1), []

        def fail(cancel):
            raise ZeroDivisionError("boom")

        tasks = [task(lambda cancel: ran.append("before")), task(fail), task(lambda cancel: ran.append("after"))]
        with pytest.raises(ZeroDivisionError):
            scheduler.run(tasks, later())
        scheduler.run([task()], later())
        assert ran == ["before"]
        assert waste(scheduler, tasks[0]) == 2

    def test_what_was_refused_before_it_was_computed_is_no_waste(self, make, task):
        def refuse(cancel):
            raise InvalidRequest("no")

        scheduler = make(2)
        with pytest.raises(InvalidRequest):
            scheduler.run([task(refuse)], later())
        assert waste(scheduler, task()) == 0

    def test_of_many_failures_at_once_every_request_hears_and_counts_once(self, make, task, pool):
        scheduler, together = make(4), threading.Barrier(4)

        def fail(cancel):
            together.wait(WAIT_S)
            raise ZeroDivisionError("boom")

        for _ in range(10):
            answers = [pool.submit(scheduler.run, [task(fail), task(fail)], later()) for _ in range(2)]
            assert all(isinstance(answer.exception(), ZeroDivisionError) for answer in answers)
        assert soon(lambda: not scheduler._runs)
        assert waste(scheduler, task()) == 40

    def test_a_run_that_nobody_wants_is_cancelled_while_others_go_on(self, make, task, pool):
        scheduler, held, cancelled = make(2), Held(), []

        def unwanted(cancel):
            held.began.release()
            assert soon(cancel.is_set)
            cancelled.append(time.monotonic())
            raise DeadlineExceeded("cancelled")

        other = pool.submit(scheduler.run, [task(held)], later())
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as raised:
            scheduler.run([task(unwanted)], later(0.1))
        assert raised.value.computed
        assert soon(lambda: cancelled)
        assert cancelled[0] - began < WAIT_S / 2
        assert not other.done()
        held.go.set()
        assert other.result()
        assert waste(scheduler, task()) == 1

    def test_a_deadline_in_the_queue_has_computed_nothing(self, make, task, pool):
        scheduler, held = make(1), Held()
        pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)
        with pytest.raises(DeadlineExceeded) as raised:
            scheduler.run([task(held)], later(0.05))
        assert not raised.value.computed
        assert not scheduler._queues["cpu"]
        held.go.set()

    def test_what_the_cpu_computes_is_finished_when_the_gpu_is_lost(self, make, task, pool):
        scheduler, began, go = make(1), threading.Event(), threading.Event()

        def run(cancel):
            began.set()
            assert go.wait(WAIT_S)
            if cancel.is_set():
                raise DeadlineExceeded("cancelled")

        def lose(cancel):
            raise DeviceLost("gone")

        running = pool.submit(scheduler.run, [task(run)], later())
        assert began.wait(WAIT_S)
        waiting = pool.submit(scheduler.run, [task()], later())
        assert soon(lambda: scheduler._queues["cpu"])
        with pytest.raises(DeviceLost):
            scheduler.run([task(lose, device="cuda")], later())
        assert str(waiting.exception()) == scheduling.CLOSING
        go.set()
        assert running.result()[0].maps["y"].size == 9
        assert waste(scheduler, task()) == 0

    def test_the_watchdog_sees_what_the_cpu_computes_after_the_gpu_is_lost(self, make, task, pool):
        scheduler, held = make(1, watchdog_s=0.2), Held()
        running = pool.submit(scheduler.run, [task(held, label="held")], later(0.5))
        held.wait(1)
        scheduler.lose(DeviceLost("gone"))
        assert isinstance(running.exception(), DeadlineExceeded)
        assert soon(lambda: scheduler.told)
        assert scheduler.told == ["a run of held has not ended 0.2 s after its deadline"]
        held.go.set()

    def test_the_gpu_is_lost_once(self, make, task, pool):
        scheduler, lost, together = make(2), [], threading.Barrier(2)
        scheduler.on_lost = lambda: lost.append(1)

        def lose(cancel):
            together.wait(WAIT_S)
            raise DeviceLost("gone")

        answers = [pool.submit(scheduler.run, [task(lose)], later()) for _ in range(2)]
        for answer in answers:
            assert isinstance(answer.exception(), (DeviceLost, Overloaded))
        scheduler.lose(DeviceLost("gone"))
        assert lost == [1]
        assert scheduler.refusal() == "the GPU failed"
        with pytest.raises(Overloaded, match="shutting down"):
            scheduler.run([task()], later())


class TestEnd:
    """Closing stops every lane, and the watchdog sees one that stopped by itself."""

    def test_closing_cancels_what_runs_anywhere_and_refuses_what_waits(self, make, task, pool):
        scheduler, before, began = make(2), threading.active_count(), threading.Semaphore(0)

        def run(cancel):
            began.release()
            try:
                until_cancelled(cancel)
            finally:
                time.sleep(0.2 if threading.current_thread().name.startswith("ThreadPool") else 0)

        scheduler._pace.learn(("short", "cpu"), task().quote.flops, SHORT_S / 100)
        answers = []
        for label in ("short", "long", "long"):
            answers.append(pool.submit(scheduler.run, [task(run, label=label)], later()))
            assert began.acquire(timeout=WAIT_S)
        answers.append(pool.submit(scheduler.run, [task(run)], later()))
        assert soon(lambda: scheduler._queues["cpu"])
        scheduler.close()
        assert not scheduler._runs
        for answer in answers:
            assert str(answer.exception()) == scheduling.CLOSING
        assert not any(thread.name.startswith("cconv-") for thread in threading.enumerate())
        assert waste(scheduler, task(label="long")) == 2
        assert threading.active_count() <= before + 4  # the pool's own

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_any_lane_that_ends_is_noticed(self, make, task, pool):
        scheduler, held = make(2, watchdog_s=0.05), Held()
        pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)

        def end(cancel):
            raise SystemExit

        with pytest.raises(DeadlineExceeded):
            scheduler.run([task(end)], later(0.3))
        assert soon(lambda: scheduler.told)
        assert scheduler.told == [scheduler.refusal()] == ["a compute thread has ended"]
        held.go.set()

    def test_of_several_runs_the_one_that_hangs_is_noticed(self, make, task, pool):
        scheduler, held, hangs = make(2, watchdog_s=0.2), Held(), Held()
        pool.submit(scheduler.run, [task(held)], later())
        held.wait(1)
        with pytest.raises(DeadlineExceeded):
            scheduler.run([task(hangs, label="hangs")], later(0.1))
        assert soon(lambda: scheduler.told)
        assert scheduler.told == ["a run of hangs has not ended 0.2 s after its deadline"]
        held.go.set()
        hangs.go.set()

    def test_idle_lanes_hold_no_images(self, make, task):
        scheduler, kept = make(2), []

        def fail(cancel):
            raise ZeroDivisionError("boom")

        def one_request():
            tasks = [task(), task(fail)]
            kept.extend(weakref.ref(one.images) for one in tasks)
            with pytest.raises(ZeroDivisionError):
                scheduler.run(tasks, later())
            tasks = [task(), task()]
            kept.extend(weakref.ref(one.images) for one in tasks)
            scheduler.run(tasks, later())

        gc.collect()
        gc.disable()
        try:
            one_request()
            assert soon(lambda: not any(image() is not None for image in kept))
        finally:
            gc.enable()


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
