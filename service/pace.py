"""Pace: how long a run will take, and whether tasks gain by running together, by how long the like of them took.

In: what kind of task it was, FLOPs, and seconds of runs that have ended.  Out: estimates; infinity for what is unknown.

Whether company gains depends on the network and the machine. Weights that no cache holds are read once for all
(alexnet: 1.8 times as many images/s), and so is what a run costs besides arithmetic (a filter bank on a small picture:
1.8); but the maps of several images leave the caches in which one's stay (mobilenet_v2: 0.8). So it is measured.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

#: Of what a run took longer than before, how much the estimate follows: it may have been held up.
RISE = 1 / 8
#: Of what a task takes alone, less than so much is a gain: what runs alone is answered sooner.
GAIN = 0.9
#: Of so many choices one is the other way, so that what was slow once is seen again.
EXPLORE = 16
#: Kinds that are remembered.
MOST_KINDS = 1024


@dataclass
class _Paces:
    """Seconds per FLOP."""

    alone: float = inf
    together: float = inf
    choices: int = 0


class Pace:
    """Seconds of one core per FLOP, by kind of task. A faster run counts at once: nothing is faster than it can be.

    Examples
    --------
    >>> pace = Pace()
    >>> pace.learn("edges", 1000, 2e-3)
    >>> pace.estimate("edges", 500), pace.estimate("gabor", 500)
    (0.001, inf)
    """

    def __init__(self):
        self._of: dict[Hashable, _Paces] = {}

    def learn(self, kind: Hashable, flops: int, seconds: float, together: bool = False) -> None:
        """A run of so many FLOPs, of one task or of several together, has taken so long."""
        if kind not in self._of and len(self._of) >= MOST_KINDS:
            self._of.clear()
        paces, found = self._of.setdefault(kind, _Paces()), seconds / max(1, flops)
        arm = "together" if together else "alone"
        before = getattr(paces, arm)
        setattr(paces, arm, found if found < before else before + RISE * (found - before))

    def estimate(self, kind: Hashable, flops: int) -> float:
        """Seconds of one core that a task will take by itself."""
        return self._of.get(kind, _Paces()).alone * max(1, flops)

    def company(self, kind: Hashable) -> float:
        """How many others a task should take along: all, or none; or to see how that is, one."""
        paces = self._of.get(kind)
        if paces is None or paces.together == inf:
            return 1
        paces.choices += 1
        gains, tries = paces.together < GAIN * paces.alone, paces.choices % EXPLORE == 0
        if gains:
            return 0 if tries else inf
        return 1 if tries else 0
