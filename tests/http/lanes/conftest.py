"""Conftest: a scheduler, and tasks whose runs do what the test says.

In: service/ of this checkout.  Out: fixtures; runs.py has what else the tests of this folder share.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service import scheduler as scheduling
from service.engine import Engine
from service.metrics import Metrics
from service.scheduler import Scheduler

sys.path.insert(1, str(Path(__file__).parent))  # runs.py


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
    """f(lanes, **options) -> a Scheduler that is closed after the test; `told` is what its watchdog said."""
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
