"""Service: what HTTP and the ledger add to a computation, and what is left of the rate under too many clients.

    python benchmarks/service.py [--rounds 9] [--folder FOLDER]

In: this checkout, a folder on the disk that will keep the ledger.  Out: a table. The service runs under gunicorn as
docs/service.md says, client and server on the same cores; the library, the service and the disk take turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

import crowd
import numpy as np

import cconv
from cconv import ledger
from cconv.ledger.database import Database

ROOT = Path(__file__).resolve().parents[1]
#: VGG16's third block, from pixels.
LARGE, LAYER, SHAPE = "vgg16", "features.16", (8, 3, 224, 224)
SMALL = "edges"
SMALL_SHAPE = (1, 3, 16, 16)
#: A request of the overload: some milliseconds of work.
BUSY, BUSY_LAYER, BUSY_SHAPE = "vgg16", "features.4", (1, 3, 112, 112)


class Service:
    """The service on a port of its own."""

    def __init__(self, folder: Path, **settings: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        log = folder / f"service-{self.port}.log"
        environment = {
            **os.environ, "PORT": str(self.port), "CCONV_MODELS": f"{LARGE},{SMALL}", "CCONV_ACCESS_LOG": "",
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
    """One connection that is kept, and as little work as can be: what is measured is the service."""

    def __init__(self, port: int):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> int:
        return self.ask(crowd.request("GET", path))

    def ask(self, sent: bytes) -> int:
        """The status, once the whole answer is there."""
        self._socket.sendall(sent)
        answer = bytearray()
        while (end := answer.find(b"\r\n\r\n")) < 0:
            self._receive(answer, 1 << 16)
        head = bytes(answer[:end]).lower()
        left = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r")[0]) - (len(answer) - end - 4)
        while left > 0:
            left -= self._receive(bytearray(), 1 << 20)
        return int(head.split()[1])

    def _receive(self, into: bytearray, most: int) -> int:
        data = self._socket.recv(most)
        if not data:
            raise OSError("the connection was closed")
        into += data
        return len(data)


def infer(model: str, head: bytes, tensor: bytes) -> bytes:
    """A request for inference as it is sent."""
    fields = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return crowd.request("POST", f"/v2/models/{model}/infer", head + tensor, fields)


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


class Commits:
    """Commits of the ledger: a row in its own tables, on a connection such as it keeps, by SQLite alone."""

    def __init__(self, url: str):
        ledger.migrate(url)
        self._base = Database(url).open_writer()
        self._row = ledger.Event(
            account="benchmark", model=SMALL, shapes={"x": SMALL_SHAPE}, macs=1, flops=2, flops_other=0
        ).row()

    def median_s(self) -> float:
        return statistics.median(seconds(self._once) for _ in range(50))

    def _once(self) -> None:
        driver, names = self._base.connection.driver_connection, ", ".join(self._row)
        values = tuple({**self._row, "id": uuid.uuid4().hex, "at": time.time_ns() // 1000}.values())
        driver.execute("BEGIN IMMEDIATE")
        driver.execute(f"INSERT INTO usage_event ({names}) VALUES ({', '.join('?' for _ in values)})", values)
        driver.execute("COMMIT")


def large(services: dict[str, Service], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the library, and of each service, in turns."""
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    model, sent = cconv.load(LARGE), infer(LARGE, head_of(pixels, "UINT8", LAYER), pixels.tobytes())

    def library() -> None:
        model.run(np.divide(pixels, 255, dtype=np.float32), [LAYER])

    def asked(client: Client) -> None:
        status = client.ask(sent)
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
    """Milliseconds of a small request, and of the disk's fdatasync and a commit of the ledger, in turns."""
    x = np.zeros(SMALL_SHAPE, np.float32)
    model = cconv.load(SMALL)
    layer = model.outputs[0]
    sent = infer(SMALL, head_of(x, "FP32", layer), x.tobytes())
    commits = Commits(f"sqlite:///{folder}/commit.db")
    clients = {name: service.client() for name, service in services.items()}
    taken: dict[str, list[float]] = {name: [] for name in ("library", "fdatasync", "commit", *clients)}
    for _ in range(rounds):
        taken["library"].append(1e3 * statistics.median(seconds(lambda: model.run(x, [layer])) for _ in range(100)))
        taken["fdatasync"].append(1e3 * sync_s(folder))
        taken["commit"].append(1e3 * commits.median_s())
        for name, client in clients.items():
            client.ask(sent)
            taken[name].append(1e3 * statistics.median(seconds(lambda c=client: c.ask(sent)) for _ in range(100)))
    return taken


def rush(service: Service, count: int, pause_s: float, span_s: float) -> str:
    """A row of what so many clients saw that ask all the time, and come again so soon after a refusal."""
    x = np.zeros(BUSY_SHAPE, np.float32)
    sent = infer(BUSY, head_of(x, "FP32", BUSY_LAYER), x.tobytes())
    seen, alive = crowd.crowd(service.port, sent, count, span_s, pause_s, crowd.request("GET", "/livez"))
    known = {200, 503}
    others = ", ".join(f"{n} x {status or 'closed'}" for status, n in seen.statuses.items() if status not in known)
    rates = " | ".join(f"{seen.statuses[status] / span_s:.0f}" for status in (200, 503))
    times = " | ".join(
        p99(taken) for taken in (seen.taken_ms.get(200), seen.taken_ms.get(503), alive.taken_ms.get(200))
    )
    asked = sum(seen.statuses.values()) / span_s
    return f"| {count}, {1e3 * pause_s:.0f} ms | {asked:.0f} | {rates} | {others or '-'} | {times} |"


def p99(values: list[float] | None) -> str:
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
            for row in ("library", "fdatasync", "commit", *services):
                whole = statistics.median(few[row]) if row in few else None
                share = (
                    statistics.median(a / b - 1 for a, b in zip(few[row], few["library"], strict=True))
                    if whole
                    else None
                )
                cells = (f"{whole:.1f}", f"{100 * share:+.1f} %") if whole else ("", "")
                print(f"| {row} | {cells[0]} | {cells[1]} | {statistics.median(many[row]):.2f} |")
            beyond = statistics.median(a - b for a, b in zip(many["strict ledger"], many["commit"], strict=True))
            lenient = statistics.median(many["lenient ledger"])
            print(f"\nsmall: strict {beyond:.2f} ms beyond a commit (bar 1), lenient {lenient:.2f} in all (bar 1.5)")
            print("\n| clients, pause | asked/s | answers/s | refused/s | others | answers | refusals | /livez, p99 |")
            print("|---|---|---|---|---|---|---|---|")
            for count, pause_s in ((1, 0.1), (8, 0.1), (32, 0.1), (120, 0.1), (120, 0.035), (120, 0.02)):
                print(rush(services["strict ledger"], count, pause_s, given.seconds))
        finally:
            for service in services.values():
                service.stop()


if __name__ == "__main__":
    main()
