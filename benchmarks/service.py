"""Service: what HTTP and the ledger add to a computation, and what is left of the rate under too many clients.

    python benchmarks/service.py [--rounds 9] [--folder FOLDER]

In: this checkout, a folder on the disk that will keep the ledger.  Out: a table. The service runs under gunicorn as
docs/service.md says, client and server on the same cores; the library, the service and the disk take turns.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

import cconv
from cconv import ledger

ROOT = Path(__file__).resolve().parents[1]
#: VGG16's third block, from pixels.
LARGE, LAYER, SHAPE = "vgg16", "features.16", (8, 3, 224, 224)
SMALL = "edges"
SMALL_SHAPE = (1, 3, 16, 16)
#: A request of the overload: some milliseconds of work.
BUSY, BUSY_LAYER, BUSY_SHAPE = "texture", "level2.relu", (1, 3, 112, 112)


#: Instead of a status, where the connection was closed without an answer.
CUT = 0


class Service:
    """The service on a port of its own."""

    def __init__(self, folder: Path, **settings: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        log = folder / f"service-{self.port}.log"
        environment = {
            **os.environ, "PORT": str(self.port), "CCONV_MODELS": f"{LARGE},{SMALL},{BUSY}", "CCONV_ACCESS_LOG": "",
            "CCONV_ERROR_LOG": str(log), **settings,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app()"],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            try:
                if self.client().get("/readyz") == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"the service did not start; see {log}")
            time.sleep(0.2)

    def client(self) -> "Client":
        return Client(self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Client:
    """One connection that is kept."""

    def __init__(self, port: int):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def get(self, path: str) -> int:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def infer(self, model: str, head: bytes, tensor: bytes) -> tuple[int, bytes]:
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        self._connection.request("POST", f"/v2/models/{model}/infer", head + tensor, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


def head_of(x: np.ndarray, datatype: str, layer: str) -> bytes:
    tensor = {
        "name": "image", "datatype": datatype, "shape": x.shape, "parameters": {"binary_data_size": x.nbytes},
    }  # fmt: skip
    output = {"name": layer, "parameters": {"binary_data": True}}
    return json.dumps({"inputs": [tensor], "outputs": [output]}).encode()


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sync_s(folder: Path) -> float:
    """Seconds of an fdatasync after a page was written, as a commit does it at least once."""
    with open(folder / "sync.bin", "wb") as file:

        def once() -> None:
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())

        return statistics.median(seconds(once) for _ in range(20))


def large(services: dict[str, Service], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the library, and of each service, in turns."""
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    model, head, body = cconv.load(LARGE), head_of(pixels, "UINT8", LAYER), pixels.tobytes()

    def library() -> None:
        model.run(np.divide(pixels, 255, dtype=np.float32), [LAYER])

    def asked(client: Client) -> None:
        status, _ = client.infer(LARGE, head, body)
        assert status == 200, status

    works = {"library": library, **{name: partial(asked, one.client()) for name, one in services.items()}}
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(1e3 * seconds(work))
    return taken


def small(services: dict[str, Service], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a small request, and of the disk's fdatasync, in turns."""
    x = np.zeros(SMALL_SHAPE, np.float32)
    model = cconv.load(SMALL)
    layer = model.outputs[0]
    head, body = head_of(x, "FP32", layer), x.tobytes()
    clients = {name: service.client() for name, service in services.items()}
    taken: dict[str, list[float]] = {name: [] for name in ("library", "fdatasync", *clients)}
    for _ in range(rounds):
        taken["library"].append(1e3 * statistics.median(seconds(lambda: model.run(x, [layer])) for _ in range(100)))
        taken["fdatasync"].append(1e3 * sync_s(folder))
        for name, client in clients.items():
            client.infer(SMALL, head, body)
            taken[name].append(1e3 * statistics.median(
                seconds(lambda c=client: c.infer(SMALL, head, body)) for _ in range(100)
            ))  # fmt: skip
    return taken


def crowd(service: Service, count: int, span_s: float) -> tuple[Counter, list[float], list[float]]:
    """The statuses, and the milliseconds of refusals and of /livez, when so many clients ask all the time."""
    x = np.zeros(BUSY_SHAPE, np.float32)
    head, body = head_of(x, "FP32", BUSY_LAYER), x.tobytes()
    statuses, refused, alive, lock = Counter(), [], [], threading.Lock()
    end = time.perf_counter() + span_s

    def ask() -> None:
        client = service.client()
        while (began := time.perf_counter()) < end:
            try:
                status, _ = client.infer(BUSY, head, body)
            except (OSError, http.client.HTTPException):  # no answer at all
                status, client = CUT, service.client()
            with lock:
                statuses[status] += 1
                if status not in (200, CUT):
                    refused.append(1e3 * (time.perf_counter() - began))
            if status != 200:
                time.sleep(0.02)

    def probe() -> None:
        client = service.client()
        while time.perf_counter() < end:
            alive.append(1e3 * seconds(lambda: client.get("/livez")))
            time.sleep(0.05)

    threads = [threading.Thread(target=ask) for _ in range(count)] + [threading.Thread(target=probe)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, refused, alive


def p99(values: list[float]) -> str:
    return f"{sorted(values)[int(0.99 * len(values))]:.1f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each number of clients")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that keeps the ledger")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        urls = {mode: f"sqlite:///{folder}/{mode}.db" for mode in ("strict", "lenient")}
        for url in urls.values():
            ledger.migrate(url)
        services = {
            "no ledger": Service(folder),
            "strict ledger": Service(folder, CCONV_LEDGER=urls["strict"]),
            "lenient ledger": Service(folder, CCONV_LEDGER=urls["lenient"], CCONV_LEDGER_SPOOL=str(folder / "spool")),
        }
        try:
            print(f"{os.cpu_count()} cores, client and server on them; medians of {given.rounds} rounds\n")
            print(
                f"| milliseconds | {' x '.join(map(str, SHAPE))} UINT8, {LARGE} to {LAYER} | over the library | small |"
            )
            print("|---|---|---|---|")
            few = large(services, given.rounds)
            many = small(services, folder, given.rounds)
            for row in ("library", "fdatasync", *services):
                whole = statistics.median(few[row]) if row in few else None
                share = (
                    statistics.median(a / b - 1 for a, b in zip(few[row], few["library"], strict=True))
                    if whole
                    else None
                )
                cells = (f"{whole:.1f}", f"{100 * share:+.1f} %") if whole else ("", "")
                print(f"| {row} | {cells[0]} | {cells[1]} | {statistics.median(many[row]):.2f} |")
            print("\n| clients | answers/s | others | refusals, p99 ms | /livez, p99 ms |\n|---|---|---|---|---|")
            for count in (1, 8, 32, 120):
                statuses, refused, alive = crowd(services["strict ledger"], count, given.seconds)
                named = {status: str(status) if status else "closed" for status in statuses if status != 200}
                others = ", ".join(f"{statuses[status]} x {text}" for status, text in sorted(named.items())) or "-"
                rate = statuses[200] / given.seconds
                print(f"| {count} | {rate:.0f} | {others} | {p99(refused)} | {p99(alive)} |")
        finally:
            for service in services.values():
                service.stop()


if __name__ == "__main__":
    main()
