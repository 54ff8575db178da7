"""Pace: what the like of a run took, and whether company gained.

In: seconds of runs.  Out: estimates and choices.
"""

import pytest

from service.pace import Pace


def test_of_nothing_it_is_endless():
    assert Pace().estimate("a", 1) == float("inf")


def test_a_faster_run_counts_at_once_and_a_slower_one_by_and_by():
    pace = Pace()
    for seconds, expected in ((8.0, 8.0), (1.0, 1.0), (9.0, 2.0), (2.0, 2.0)):
        pace.learn("a", 100, seconds)
        assert pace.estimate("a", 100) == pytest.approx(expected)
    assert pace.estimate("a", 50) == pytest.approx(1.0)
    assert pace.estimate("b", 50) == float("inf")


def test_runs_that_cost_nothing_have_one_too():
    pace = Pace()
    pace.learn("a", 0, 0.5)
    assert pace.estimate("a", 0) == 0.5


def test_it_remembers_only_so_many_kinds():
    pace = Pace()
    for i in range(5000):
        pace.learn(i, 1, 1.0)
    assert len(pace._of) <= 1024


@pytest.mark.parametrize(("alone", "usual", "rare"), [(1.2, float("inf"), 0), (1.1, 0, 1)])
def test_company_is_what_was_faster_but_the_other_way_is_tried_again(alone, usual, rare):
    pace = Pace()
    assert pace.company("a") == 1
    pace.learn("a", 100, alone)
    assert pace.company("a") == 1
    pace.learn("a", 200, 2.0, together=True)
    choices = [pace.company("a") for _ in range(64)]
    assert (choices.count(usual), choices.count(rare)) == (60, 4)


def test_what_was_slow_once_is_seen_again():
    """The first run of several has its memory from the system."""
    pace = Pace()
    pace.learn("a", 100, 1.0)
    pace.learn("a", 200, 9.0, together=True)
    for _ in range(16):
        if pace.company("a"):
            pace.learn("a", 200, 1.0, together=True)
    assert pace.company("a") == float("inf")
