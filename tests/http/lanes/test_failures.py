"""Failures: who hears of one, what is called off, what counts as waste; and how lanes end.

In: a Scheduler with tasks whose runs fail, hang or go on.  Out: what each request is told; waste; no thread left.
"""

import gc
import threading
import time
import weakref

import pytest
from runs import WAIT_S, Held, later, soon, until_cancelled, waste

from service.errors import CLOSING, DeadlineExceeded, DeviceLost, InvalidRequest, Overloaded
from service.scheduler import SHORT_S

pytestmark = pytest.mark.alone


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
        assert str(waiting.exception()) == CLOSING
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
            assert str(answer.exception()) == CLOSING
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
