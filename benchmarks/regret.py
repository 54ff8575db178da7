"""Regret: what the planner's choice loses to the best of everything that it could have chosen.

In: a Layer.  Out: seconds of every candidate, and chosen / best - 1.

All candidates take turns. The fastest few and the chosen one then take turns once more, and only these new times are
compared: the least of many noisy times is too small, and would make every choice look bad.
"""

import statistics
from collections.abc import Callable

from worker import turn
from workloads import Layer

#: So many of the fastest are timed again beside the chosen one.
FINALISTS = 3


def _programs(layer: Layer, threads: int) -> tuple[dict[str, Callable], str]:
    """A program per candidate's label, and the label of the chosen one."""
    import cconv
    from cconv import backend
    from cconv.planning import algorithm, plan, specs
    from cconv.weights import Weights

    cconv.set_num_threads(threads)
    x, weight, bias = layer.arrays()
    twin = backend.get("cpu")
    machine = twin.machine()
    spec = specs.conv(layer.x[1:], layer.weight, bias=True, dtype=layer.dtype, **layer.options)
    weights = Weights(lambda _: (weight, bias))

    def call(tiling) -> Callable:
        program = twin.build(plan.single(spec, machine, tiling), weights)
        return lambda: program.run([x])

    given = spec, machine, algorithm.batch_class(len(x))
    return {t.label: call(t) for t in algorithm.candidates(*given)}, algorithm.choose(*given).label


def offered() -> bool:
    """Whether this version's planner can say what else it could have chosen."""
    from cconv.planning import algorithm

    return hasattr(algorithm, "candidates")


def _medians(runs: dict[str, Callable], rounds: int, seconds: float) -> dict[str, float]:
    times = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(turn(run, seconds))
    return {label: statistics.median(each) for label, each in times.items()}


def measure(layer: Layer, threads: int, rounds: int, seconds: float) -> dict:
    """The candidates' seconds, the chosen and the best label, and the regret; or why there is none."""
    if not offered():
        return {"missing": "this version's planner offers no candidates"}
    runs, chosen = _programs(layer, threads)
    if chosen not in runs:
        return {"missing": f"the chosen tiling {chosen!r} is not among the candidates"}
    first = _medians(runs, rounds, seconds)
    last = dict.fromkeys([chosen, *sorted(first, key=first.get)[:FINALISTS]])
    again = _medians({label: runs[label] for label in last}, rounds, 2 * seconds)
    best = min(again, key=again.get)
    loss = again[chosen] / again[best] - 1
    return {"chosen": chosen, "best": best, "regret": loss, "candidates_s": first, "finalists_s": again}
