"""Prelude: the beginning of every script that a test of threads runs: conftest.py puts this text before the script's.

In: cconv.  Out: layers to compute, threads and children that compute them, and how many threads the process has.
"""

import os
import threading
import time

import numpy as np

import cconv


def layer(channels, size, kernel=3):
    """A layer of small integers, direct and so exact, and an image for it."""
    rng = np.random.default_rng(channels)
    weight = rng.integers(-3, 4, (channels, channels, kernel, kernel)).astype(np.float32)
    made = cconv.Conv2d(weight, padding=kernel // 2, algorithm="direct")
    return made, rng.integers(-3, 4, (1, channels, size, size)).astype(np.float32)


def together(count, work):
    """work(0), work(1), ... in so many threads at once; fails if one of them does."""
    failed = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def tasks():
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def computes_until(made, x, count):
    """A caller that is done before the others come does not wait for them, so a team may fill up in several calls."""
    end = time.monotonic() + 30
    while tasks() != count:
        assert time.monotonic() < end, (tasks(), count)
        made(x)


def settled():
    """`tasks`, once those that were joined, which takes a moment, have left /proc."""
    time.sleep(0.2)
    return tasks()


def child(work):
    """The process id of a fork that does `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
