"""Cores: which share of them a run has, and in whose company.

In: a Scheduler with tasks whose runs do what the test says.  Out: how many ran, with how many threads, together.
"""

import threading
from dataclasses import replace

import pytest
from runs import WAIT_S, Held, later, soon

from cconv.cpu._team import limit

pytestmark = pytest.mark.alone


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
