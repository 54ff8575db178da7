"""Worker: the process of one library. It makes layers ready and times them when it is asked.

In: questions, one JSON line each, on stdin.  Out: one JSON line each on stdout; outputs as .npy files.

    {"prepare": 3, "folder": "/tmp/x"}   the layer's forms, and what each computed   -> {"forms": [...]}
    {"network": "x.onnx", "batch": 1, "precision": "highest", "folder": "/tmp/x"}   the same of a network's file
    {"load": "x.onnx", "batch": 1, "precision": "highest"}  what loading it takes      -> {"ready_s": 0.1, ...}
    {"tensors": "x.onnx", "batch": 1, "precision": "highest", "folder": "/tmp/x"}   all its outputs by name, in a file
    {"time": 0, "seconds": 0.1}          a turn of form 0                            -> {"seconds": median of the turn}
    {"regret": 3, ...}                   every way the planner could have chosen     -> regret.py
    {"peak": "avx2"}, {"machine": 2}     in the process called "machine"             -> machine.py
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
from peers import LIBRARIES, Form, Unsupported, version
from workloads import LAYERS

#: Calls of a turn at least.
LEAST_CALLS = 3


def turn(run: Callable[[], object], seconds: float) -> float:
    """The median of the calls of one turn, after one that is not counted."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fall_quiet(most: float = 0.3) -> None:
    """Wait until this process's threads have stopped spinning, which takes some libraries 50 ms."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        cpu, begin = time.process_time(), time.perf_counter()
        time.sleep(0.004)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - begin):
            return


class Library:
    """The forms of one library for the layer of the moment."""

    def __init__(self, name: str, threads: int):
        self.name, self.threads = name, threads
        self.forms: list[Form] = []

    def prepare(self, layer: int, folder: str) -> dict:
        self.forms = []  # frees the last layer's
        try:
            self.forms = LIBRARIES[self.name](LAYERS[layer], self.threads)
        except Unsupported as reason:
            return {"forms": [], "unsupported": str(reason)}
        return self._first(folder)

    def network(self, path: str, batch: int, precision: str, folder: str) -> dict:
        self.forms = []
        self.forms = list(networks.LIBRARIES[self.name](path, batch, self.threads, precision))
        return self._first(folder)

    def load(self, path: str, batch: int, precision: str) -> dict:
        return networks.loaded(self.name, path, batch, self.threads, precision)

    def tensors(self, path: str, batch: int, precision: str, folder: str) -> dict:
        """All outputs of a network's file, by name, in a .npz."""
        file = Path(folder) / f"{self.name}.npz"
        np.savez(file, **networks.EVERY[self.name](path, batch, self.threads, precision))
        return {"file": str(file)}

    def _first(self, folder: str) -> dict:
        """Every form's first answer."""
        answers = []
        for index, form in enumerate(self.forms):
            output = Path(folder) / f"{self.name}-{index}.npy"
            np.save(output, form.array(form.run()))
            told = form._asdict()
            answers.append({key: told[key] for key in told if key not in ("run", "array")} | {"output": str(output)})
        fall_quiet()
        return {"forms": answers}

    def time(self, form: int, seconds: float) -> dict:
        median = turn(self.forms[form].run, seconds)
        fall_quiet()
        return {"seconds": median}

    def regret(self, layer: int, rounds: int, seconds: float) -> dict:
        import regret

        answer = regret.measure(LAYERS[layer], self.threads, rounds, seconds)
        fall_quiet()
        return answer


def answers_of(name: str, threads: int) -> tuple[object, dict[str, Callable[..., dict]]]:
    """What the process says first, and its answer to each question; a question's first key is its name."""
    if name == "machine":
        from machine import Machine

        machine = Machine()
        return list(machine.isas), {
            "peak": lambda isa: {"flops_per_s": machine.peak(isa, threads)},
            "machine": lambda count: machine.figures(count),
        }
    library = Library(name, threads)
    return version(name), {
        "prepare": library.prepare, "network": library.network, "load": library.load, "tensors": library.tensors,
        "time": library.time, "regret": library.regret,
    }  # fmt: skip


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    hello, answers = answers_of(name, threads)
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        kind, *_ = question
        first = question.pop(kind)
        print(json.dumps(answers[kind](first, **question)), flush=True)


if __name__ == "__main__":
    main()
