"""Compare: cconv against PyTorch on real layers, each in a process of its own, measured in turns.

In: workloads.py; a Python that has cconv, and with --peer-python one that has torch.  Out: a table, and a JSON file
with the date, the commit and the processor.

    python benchmarks/compare.py --peer-python .venv-bench/bin/python [--layers vgg] [--rounds 9] [--threads 2]

The driver asks one worker after the other, round after round, so that a slow phase of the machine meets all of them. A
worker holds the layer ready (weights packed where the library can), warms up, and answers with the median time of its
turn. A figure is the median over the rounds with its quartiles. Every output is checked against float64.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from workloads import LAYERS, Layer

ROOT = Path(__file__).resolve().parents[1]
#: The tolerance of a peer is PyTorch's own for float32 convolutions on a CPU, with room: a wrong answer is far outside.
LARGEST_ERROR = 1e-4


# ------------------------------------------------------------------------------------------------------- in a worker


def cconv_worker(layer: Layer) -> Callable[[], np.ndarray]:
    import cconv

    x, weight, bias = layer.arrays()
    ready = cconv.Conv2d(weight, bias, **layer.options)
    return lambda: ready(x)


def torch_worker(layer: Layer, channels_last: bool) -> Callable[[], np.ndarray]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    x, weight, bias = map(torch.from_numpy, layer.arrays())
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    ready = torch.nn.Conv2d(layer.x[1], layer.weight[0], layer.weight[2:], **layer.options).eval()
    ready.weight.data, ready.bias.data = weight, bias
    return lambda: ready(x)


WORKERS: dict[str, Callable[[Layer], Callable]] = {
    "cconv": cconv_worker,
    "torch": lambda layer: torch_worker(layer, channels_last=False),
    "torch channels_last": lambda layer: torch_worker(layer, channels_last=True),
}


def versions(name: str) -> dict:
    if name == "cconv":
        import cconv

        return cconv.show_config()
    import torch

    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def serve(name: str) -> None:
    """Answer the driver's questions, one JSON line each."""
    print(json.dumps(versions(name)), flush=True)
    run = None
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            run = WORKERS[name](LAYERS[question["prepare"]])
            np.save(question["output"], np.asarray(run()))
            answer = {}
        else:
            times, end = [], time.perf_counter() + question["seconds"]
            run()
            while len(times) < 3 or time.perf_counter() < end:
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            answer = {"median": statistics.median(times)}
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------------------------------------------ in the driver


class Worker:
    """A library's process."""

    def __init__(self, name: str, python: str, threads: int):
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CCONV_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the worker for {self.name} ended; see its message above")
        return json.loads(line)

    def ask(self, **question) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def exact(layer: Layer) -> np.ndarray:
    """The layer in float64, by cconv's reference twin."""
    from cconv import backend
    from cconv.planning import plan, specs
    from cconv.weights import Weights

    x, weight, bias = layer.arrays()
    twin = backend.get("reference")
    spec = specs.conv(layer.x[1:], layer.weight, bias=True, **layer.options)
    return twin.build(plan.single(spec, twin.machine()), Weights(lambda _: (weight, bias))).run([x])[0]


def measure(index: int, workers: list[Worker], rounds: int, seconds: float, folder: Path) -> dict:
    """One layer on every worker, in turns."""
    from cconv import conv2d_cost

    layer = LAYERS[index]
    cost = conv2d_cost(layer.x, layer.weight, bias=True, **layer.options)
    truth = exact(layer)
    row = {"layer": layer.name, "macs": cost.macs, "flops": cost.flops, "results": {}}
    for worker in workers:
        worker.ask(prepare=index, output=str(folder / "y.npy"))
        error = np.linalg.norm(np.load(folder / "y.npy") - truth) / np.linalg.norm(truth)
        if not error < LARGEST_ERROR:
            raise SystemExit(f"compare: {worker.name} is wrong on {layer.name}: L2 error {error:.1e} of the result")
        row["results"][worker.name] = {"l2_error": float(error), "times": []}
    for _ in range(rounds):
        for worker in workers:
            time.sleep(0.02)  # the threads of the one before stop spinning
            row["results"][worker.name]["times"].append(worker.ask(seconds=seconds)["median"])
    for result in row["results"].values():
        low, middle, high = statistics.quantiles(result["times"], n=4)
        result |= {"median_s": middle, "quartiles_s": [low, high], "gflops_per_s": cost.flops / middle / 1e9}
    return row


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The commit, marked where the tree differs from it."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def line(row: dict, names: list[str]) -> str:
    """Per worker: milliseconds, the quartiles' distance from the median, GFLOP/s counting 2 flops per mac."""
    cells = [f"{row['layer']:<37}"]
    for name in names:
        r = row["results"][name]
        spread = max(abs(q - r["median_s"]) for q in r["quartiles_s"]) / r["median_s"]
        cells.append(f"{r['median_s'] * 1e3:9.3f} ms ±{spread:4.0%} {r['gflops_per_s']:7.0f}")
    peers = [row["results"][name]["median_s"] for name in names[1:]]
    if peers:
        cells.append(f"{min(peers) / row['results'][names[0]]['median_s']:6.2f}x")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="cconv against PyTorch on real layers.")
    parser.add_argument("--peer-python", help="a Python that has torch; without it cconv is measured alone")
    parser.add_argument("--layers", default="", help="only layers whose name holds this text")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="the JSON file; default out/compare-DATE.json")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker)
        return
    names = list(WORKERS) if arguments.peer_python else ["cconv"]
    workers = [Worker(n, sys.executable if n == "cconv" else arguments.peer_python, arguments.threads) for n in names]
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "date": now.isoformat(timespec="seconds"), "commit": commit(), "processor": processor(),
        "threads": arguments.threads, "versions": {w.name: w.versions for w in workers}, "layers": [],
    }  # fmt: skip
    print(f"{record['date']}, commit {record['commit']}, {record['processor']}, {arguments.threads} threads")
    print(
        f"{'layer':<37} | " + " | ".join(f"{name + ': median, GFLOP/s':>28}" for name in names) + " | best peer / cconv"
    )
    with tempfile.TemporaryDirectory() as folder:
        for index, layer in enumerate(LAYERS):
            if arguments.layers in layer.name:
                row = measure(index, workers, arguments.rounds, arguments.seconds, Path(folder))
                record["layers"].append(row)
                print(line(row, names), flush=True)
    for worker in workers:
        worker.close()
    out = arguments.out or ROOT / "out" / f"compare-{now:%Y%m%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
