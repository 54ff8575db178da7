"""Servers: the service against LitServe and MLServer, which serve the same network through ONNX Runtime.

    python -m venv .venv-litserve && .venv-litserve/bin/pip install -r benchmarks/served/litserve.txt   # MLServer alike
    python benchmarks/servers.py --litserve .venv-litserve --mlserver .venv-mlserver [--clients 1,8,32] [--rounds 5]

In: virtual environments, one for each peer.  Out: answers per second, medians of turns, and how many times as many the
service gives, the median of neighbouring turns' ratios. A request is a photograph of 1 x 3 x 224 x 224 UINT8 for
squeezenet. The clients are one event loop on the servers' own cores. What the peers answer is compared with what the
service does. Peers run as one worker of all cores and as a worker per core.
"""

import argparse
import base64
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from networks import Network, write
from serving import SERVICE, Process, crowd, free_port, once, post

import cconv
from cconv import ledger

HERE = Path(__file__).resolve().parent / "served"
NAME, SHAPE = "squeezenet", (1, 3, 224, 224)
CORES = len(os.sched_getaffinity(0))
#: As for expected crowds: by default twelve requests are let in, and the others are asked to come again.
CROWD = {"CCONV_THREADS": "48", "CCONV_QUEUE_REQUESTS": "40"}
LARGEST_ERROR = 1e-4


class Served(NamedTuple):
    """A server that runs, how it is asked, and how its answer is read."""

    process: Process
    request: bytes
    read: Callable[[bytes], np.ndarray]


def service(folder: Path, models: Path, pixels: np.ndarray, **settings: str) -> Served:
    port = free_port()
    environment = {
        "PORT": str(port), "CCONV_MODELS": NAME, "CCONV_MODEL_REPOSITORY": str(models), **CROWD, **settings,
    }  # fmt: skip
    process = Process(SERVICE, folder / f"service-{port}.log", port, "/readyz", **environment)
    output = cconv.load(models / NAME / "1" / "model.onnx").outputs[0]
    tensor = {
        "name": "image", "datatype": "UINT8", "shape": SHAPE, "parameters": {"binary_data_size": pixels.nbytes},
    }  # fmt: skip
    asked = {"name": output, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [asked]}).encode()
    size = {"Inference_Header_Content_Length": str(len(head))}

    def read(body: bytes) -> np.ndarray:
        return np.frombuffer(body[-4 * 1000 :], np.float32)

    return Served(process, post(f"/v2/models/{NAME}/infer", head + pixels.tobytes(), **size), read)


def litserve(folder: Path, models: Path, pixels: np.ndarray, environment: Path, workers: int) -> Served:
    port = free_port()
    variables = {
        "PORT": str(port), "WORKERS": str(workers), "THREADS": str(CORES // workers),
        "NETWORK": str(models / NAME / "1" / "model.onnx"),
    }  # fmt: skip
    command = [environment.absolute() / "bin/python", HERE / "litserve_network.py"]
    process = Process(command, folder / f"litserve-{port}.log", port, "/health", cwd=folder, **variables)
    body = json.dumps({"shape": SHAPE, "data": base64.b64encode(pixels).decode()}).encode()
    return Served(
        process,
        post("/predict", body, Content_Type="application/json"),
        lambda answer: np.frombuffer(base64.b64decode(json.loads(answer)["data"]), np.float32),
    )


def mlserver(folder: Path, models: Path, pixels: np.ndarray, environment: Path, workers: int) -> Served:
    port = free_port()
    place = folder / f"mlserver-{port}"
    place.mkdir()
    (place / "mlserver_network.py").write_text((HERE / "mlserver_network.py").read_text())
    settings = {
        "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port(), "debug": False,
        # None is the server's own process, which ONNX Runtime then has all cores of.
        "parallel_workers": 0 if workers == 1 else workers,
    }  # fmt: skip
    (place / "settings.json").write_text(json.dumps(settings))
    model = {"name": NAME, "implementation": "mlserver_network.Network"}
    (place / "model-settings.json").write_text(json.dumps(model))
    variables = {
        "NETWORK": str(models / NAME / "1" / "model.onnx"), "THREADS": str(CORES // workers), "PYTHONPATH": str(place),
    }  # fmt: skip
    command = [environment.absolute() / "bin/mlserver", "start", place]
    process = Process(
        command, folder / f"mlserver-{port}.log", port, f"/v2/models/{NAME}/ready", cwd=place, **variables
    )
    data = [base64.b64encode(pixels).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}}
    body = json.dumps({"inputs": [{**tensor, "data": data}]}).encode()
    return Served(
        process,
        post(f"/v2/models/{NAME}/infer", body, Content_Type="application/json"),
        lambda answer: np.frombuffer(base64.b64decode(json.loads(answer)["outputs"][0]["data"][0]), np.float32),
    )


def start(folder: Path, given: argparse.Namespace, stack: ExitStack) -> dict[str, Served]:
    models = folder / "models"
    (models / NAME / "1").mkdir(parents=True)
    write(Network(NAME, 1.0), models / NAME / "1" / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    url = f"sqlite:///{folder}/usage.db"
    ledger.migrate(url)
    begins = {
        "cconv": partial(service, folder, models, pixels),
        "cconv, strict ledger": partial(service, folder, models, pixels, CCONV_LEDGER=url),
    }
    for name, begin, environment in (("LitServe", litserve, given.litserve), ("MLServer", mlserver, given.mlserver)):
        for workers in (1, CORES) if environment else ():
            label = f"{name}, {workers} worker{'s' * (workers > 1)}"
            begins[label] = partial(begin, folder, models, pixels, environment, workers)
    found = {}
    for label, begin in begins.items():
        found[label] = begin()
        stack.callback(found[label].process.stop)
    truth = found["cconv"].read(once(found["cconv"].process.port, found["cconv"].request))
    for name, one in found.items():
        try:
            answer = once(one.process.port, one.request)
        except OSError as failed:
            raise SystemExit(f"{name}: {failed}; {one.process.log.read_text()[-2000:]}") from failed
        error = np.linalg.norm(one.read(answer) - truth) / np.linalg.norm(truth)
        if not error <= LARGEST_ERROR:
            raise SystemExit(f"{name} answers something else: L2 {error:.1e}")
    return found


def measure(servers: dict[str, Served], counts: list[int], rounds: int, seconds: float) -> tuple[dict, Counter]:
    """Answers per second of every turn, by server and number of clients; and other answers, by server."""
    rates: dict[tuple[str, int], list[float]] = {}
    others: Counter[str] = Counter()
    for count in counts:
        for turn in range(rounds + 1):
            for label, one in servers.items():
                rate, statuses = crowd(one.process.port, one.request, count, seconds)
                if turn:  # the first one warms up
                    rates.setdefault((label, count), []).append(rate)
                    others[label] += statuses.total() - statuses[200]
    return rates, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--litserve", type=Path, help="a virtual environment with benchmarks/served/litserve.txt")
    parser.add_argument("--mlserver", type=Path, help="a virtual environment with benchmarks/served/mlserver.txt")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one turn")
    given = parser.parse_args()
    counts = [int(count) for count in given.clients.split(",")]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        servers = start(Path(name), given, stack)
        rates, others = measure(servers, counts, given.rounds, given.seconds)
    print(f"| answers/s | {' | '.join(f'{count} clients' for count in counts)} |\n|---|{'---|' * len(counts)}")
    for label in servers:
        found = [rates[label, count] for count in counts]
        # The rounds' own ratios: the machine's moods last longer than a round.
        ours = [rates["cconv", count] for count in counts]
        times = [statistics.median(a / b for a, b in zip(*two, strict=True)) for two in zip(ours, found, strict=True)]
        cells = " | ".join(
            f"{statistics.median(a):.0f} ({min(a):.0f} to {max(a):.0f}); {ratio:.2f}x"
            for a, ratio in zip(found, times, strict=True)
        )
        refused = f", {others[label]} not answered with 200" if others[label] else ""
        print(f"| {label}{refused} | {cells} |")


if __name__ == "__main__":
    main()
