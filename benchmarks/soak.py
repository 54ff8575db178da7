"""Soak: thousands of mixed requests to one server: does its memory stay; does the ledger say what clients were told?

    python benchmarks/soak.py [--requests 10000] [--warm 4000] [--seed 0]

In: this checkout.  Out: a table, and 1 if a bar is missed: once it is warm, all resident memory of the worker grows by
at most 1 MB per 1,000 requests; every 2xx of a computing route has its record, with the bill that the client was told,
and nothing else has one, but for those whose client left before it was told.

The library's pool of memory that is used again may hold 32 MiB (CCONV_POOL_BYTES), so that it is full when the requests
are counted: until a pool is full it grows, whatever its limit, and that is no leak.

Good requests are of several models, sizes, forms and idempotency keys; hostile ones are broken, too large or of models
that there are not; others give up, by a deadline that has nearly passed, or by closing the connection midway.
"""

import argparse
import gzip
import http.client
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from serving import ROOT, SERVICE, Process, free_port

from cconv import ledger

CLIENTS = 6
#: With the image's own settings of malloc.
ENVIRONMENT = {"CCONV_MODELS": "edges,texture,gabor", "CCONV_POOL_BYTES": str(32 << 20), **dict(
    re.findall(r"(MALLOC_\w+)=(\d+)", (ROOT / "Dockerfile").read_text())
)}  # fmt: skip
#: MB per thousand requests.
BAR_MB = 1.0
#: How often the clients pause, so that the server has nothing to do while its memory is looked at; and for how long.
PAUSES, PAUSE_S = 40, 0.3
BILL = ("macs", "flops", "flops_other")
MODELS = ("edges", "texture", "gabor")
SIZES = (17, 24, 32, 64, 96, 112)
JSON, BYTES = "application/json", "application/octet-stream"


class Asked(dict):
    """A request: path, body, headers; what may be answered; whether its client leaves, and after how much of it."""


def _infer(draw: random.Random, *, count: int | None = None, **parameters) -> Asked:
    model, side = draw.choice(MODELS), draw.choice(SIZES)
    x = np.full((count or draw.choice((1, 1, 2, 4)), 3, side, side), draw.random(), np.float32)
    tensor = {"name": "image", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    size = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": BYTES}
    return Asked(path=f"/v2/models/{model}/infer", body=head + x.tobytes(), headers=size, wanted={200})


def _infer_json(draw: random.Random) -> Asked:
    side = draw.choice(SIZES[:3])
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, side, side], "data": [0.5] * (3 * side * side)}
    return Asked(
        path=f"/v2/models/{draw.choice(MODELS)}/infer", body=json.dumps({"inputs": [tensor]}).encode(),
        headers={"Content-Type": JSON}, wanted={200},
    )  # fmt: skip


def _npy(draw: random.Random) -> Asked:
    file = io.BytesIO()
    np.save(file, np.full((3, draw.choice(SIZES[2:4]), draw.choice(SIZES)), draw.random(), np.float32))
    form = draw.choice(("json", "npys"))
    return Asked(
        path=f"/v1/features?model={draw.choice(MODELS)}&format={form}", body=file.getvalue(),
        headers={"Content-Type": BYTES}, wanted={200},
    )  # fmt: skip


def _conv2d(draw: random.Random) -> Asked:
    side = draw.choice((3, 5, 9))
    content = {"x": np.ones((2, side, side)).tolist(), "weight": np.ones((3, 2, 3, 3)).tolist(), "padding": 1}
    return Asked(
        path="/v1/conv2d?format=json", body=json.dumps(content).encode(), headers={"Content-Type": JSON}, wanted={200}
    )


def _again(draw: random.Random) -> Asked:
    """One of few keys: the first time billed, then free, then refused; of another body a mismatch."""
    one = _conv2d(draw)
    one["headers"]["Idempotency-Key"] = f"k{draw.randrange(400)}"
    return Asked(one, wanted={200, 409, 422})


def _hostile(draw: random.Random) -> Asked:
    good = _infer(draw, count=1)
    path, body, headers = good["path"], good["body"], good["headers"]
    bomb = gzip.compress(bytes(70_000_000)) if draw.random() < 0.02 else gzip.compress(b"{" * 100_000)
    return draw.choice((
        Asked(good, body=body[: draw.randrange(len(body))], wanted={400}),
        Asked(good, body=b"\x00" * 999, headers={"Content-Type": JSON}, wanted={400}),
        Asked(good, body=b"[" * 50_000, headers={"Content-Type": JSON}, wanted={400}),
        Asked(good, body=bomb, headers={"Content-Encoding": "gzip"}, wanted={400, 413}),
        Asked(good, headers={**headers, "Inference-Header-Content-Length": "99999999999"}, wanted={400}),
        Asked(good, path=path.replace("/models/", "/models/no-"), wanted={404}),
        Asked(good, path=f"/v1/features?model=edges&format={draw.randrange(99)}", wanted={400}),
        Asked(path="/v1/cost", body=b'{"x_shape":[1,1,9,9],"w_shape":[1,1,3,3],"padding":1e400}', headers={},
              wanted={400}),
        Asked(path="/v1/conv2d", body=b'{"x":[[[1]]],"weight":[[[[1]]]],"padding":65000}', headers={},
              wanted={400, 413}),
        Asked(path="/v1/features?model=edges", body=b"\x89PNG\r\n\x1a\n" + bytes(5000), headers={}, wanted={400}),
    ))  # fmt: skip


def _late(draw: random.Random) -> Asked:
    return Asked(_infer(draw, count=16, timeout=draw.choice((1, 500, 2000))), wanted={200, 504})


def _leaves(draw: random.Random) -> Asked:
    one = _infer(draw)
    return Asked(one, leaves=draw.choice((draw.randrange(len(one["body"])), len(one["body"]))), wanted=set())


def _looks(draw: random.Random) -> Asked:
    path = draw.choice(("/v2", "/v2/models/texture", "/readyz", "/metrics", "/v2/models/stats", "/v1/usage?by=model"))
    return Asked(path=path, body=None, headers={}, wanted={200})


#: How often each kind comes, in a hundred.
MIX = {_infer: 34, _infer_json: 8, _npy: 8, _conv2d: 8, _again: 8, _hostile: 18, _late: 5, _leaves: 6, _looks: 5}


class Soak:
    """All clients, and what they were told."""

    def __init__(self, port: int, requests: int, seed: int):
        self._port, self._requests, self._seed = port, requests, seed
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._go.set()
        self._busy = 0
        self.done = 0
        self.kinds: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        #: Request ids: billed, and how much; and those who left.
        self.told: dict[str, tuple[int, ...]] = {}
        self.left: set[str] = set()
        self.wrong: list[str] = []

    def client(self, number: int) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        connection = None
        while True:
            self._go.wait()
            with self._lock:
                if self.done >= self._requests:
                    return
                self.done += 1
                self._busy += 1
                name = f"r{self.done}"
            kind = draw.choices(list(MIX), list(MIX.values()))[0]
            asked = kind(draw)
            if "leaves" in asked:
                self._leave(name, asked)
            else:
                connection = self._request(connection, kind.__name__, name, asked)
            with self._lock:
                self._busy -= 1

    def _request(self, connection, kind: str, name: str, asked: Asked):
        """One request over a connection that may have been kept; the connection, if it can be kept on."""
        kept = connection is not None
        connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        while True:
            try:
                closed = self._ask(connection, kind, name, asked)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept:  # the server may have closed it meanwhile: a client asks again, once
                    kept = False
                    continue
                closed = True
                if 200 in asked["wanted"]:  # of what is refused unread the connection may be closed at once
                    self._note(f"{kind} {name}: {error!r}")
            break
        if not closed:
            return connection
        connection.close()
        return None

    def _ask(self, connection, kind: str, name: str, asked: Asked) -> bool:
        method = "GET" if asked["body"] is None else "POST"
        while True:
            connection.request(method, asked["path"], asked["body"], {**asked["headers"], "X-Request-Id": name})
            answer = connection.getresponse()
            content = answer.read()
            with self._lock:
                self.statuses[answer.status] += 1
            if answer.status != 503:
                break
            time.sleep(0.05)
            if answer.will_close or answer.getheader("Connection") == "close":
                connection.close()
        if answer.status not in asked["wanted"]:
            self._note(f"{kind} {name}: {answer.status} {content[:200]!r}")
        with self._lock:
            self.kinds[kind] += 1
            if answer.status == 200 and "X-Cconv-Macs" in answer.headers and "Idempotent-Replay" not in answer.headers:
                self.told[name] = tuple(int(answer.headers[f"X-Cconv-{one.replace('_', '-')}"]) for one in BILL)
        return answer.getheader("Connection") == "close"

    def _leave(self, name: str, asked: Asked) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        with self._lock:
            self.left.add(name)
            self.kinds["_leaves"] += 1
        try:
            connection.putrequest("POST", asked["path"])
            headers = {**asked["headers"], "X-Request-Id": name, "Content-Length": str(len(asked["body"]))}
            for header, value in headers.items():
                connection.putheader(header, value)
            connection.endheaders(asked["body"][: asked["leaves"]])
        except OSError:
            pass
        connection.close()

    def _note(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)

    def run(self, worker: int) -> list[tuple[int, float, float]]:
        """(requests, MB, of these idle in the library's pool) at every pause, from the beginning to the end."""
        threads = [threading.Thread(target=self.client, args=[number]) for number in range(CLIENTS)]
        samples = [(0, resident_mb(worker), self._pool_mb())]
        for thread in threads:
            thread.start()
        for pause in range(1, PAUSES + 1):
            while self.done < pause * self._requests // PAUSES:
                time.sleep(0.02)
            self._go.clear()
            while self._busy:
                time.sleep(0.02)
            time.sleep(PAUSE_S)  # for those whose client has left
            samples.append((self.done, resident_mb(worker), self._pool_mb()))
            self._go.set()
        for thread in threads:
            thread.join()
        return samples

    def _pool_mb(self) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=60) as answer:
            return float(re.search(r"^cconv_pool_idle_bytes (\S+)$", answer.read().decode(), re.M)[1]) / 1e6

    def check(self, url: str) -> list[str]:
        """What the ledger has that it should not have, and the other way round."""
        with ledger.Ledger(url) as book:
            found: dict[str, list[tuple[int, ...]]] = {}
            for event in book.events():
                found.setdefault(event.request_id, []).append(tuple(getattr(event, one) for one in BILL))
        told = [
            f"{name}: told {bill}, recorded {found.get(name)}"
            for name, bill in self.told.items()
            if found.get(name) != [bill]
        ]
        others = [f"{name}: {bills} of nobody" for name, bills in found.items() if name not in {*self.told, *self.left}]
        twice = [f"{name}: {len(bills)} records" for name, bills in found.items() if len(bills) > 1]
        return told + others + twice


def resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def worker_of(process: int) -> int:
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def slope(requests: np.ndarray, megabytes: np.ndarray) -> float:
    """MB per 1,000 requests, by least squares."""
    return 1000 * float(np.polyfit(requests, megabytes, 1)[0])


def soaked(folder: Path, requests: int, seed: int) -> tuple[Soak, list[tuple[int, float, float]], float, str]:
    """What the clients saw, samples of memory, the seconds it took, and what the audit says of the ledger."""
    url, port = f"sqlite:///{folder}/usage.db", free_port()
    ledger.migrate(url)
    environment = {**ENVIRONMENT, "PORT": str(port), "CCONV_LEDGER": url}
    log = folder / "service.log"
    server = Process(SERVICE, log, port, "/readyz", **environment)
    try:
        soak, worker = Soak(port, requests, seed), worker_of(server.process.pid)
        began = time.perf_counter()
        samples = soak.run(worker)
        seconds = time.perf_counter() - began
        if worker_of(server.process.pid) != worker:
            soak.wrong.append("the worker was started anew")
    finally:
        code = server.stop()
    if code:
        soak.wrong.append(f"the server ended with {code}")
    soak.wrong += soak.check(url)
    if "Traceback" in (text := log.read_text()):
        soak.wrong.append(f"a traceback in the log: {text[text.index('Traceback') :][:2000]}")
    audit = [sys.executable, "-m", "service", "audit"]
    variables = {**os.environ, **environment}
    done = subprocess.run(audit, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        soak.wrong.append(f"audit: {done.stdout[-500:]}{done.stderr[-500:]}")
    return soak, samples, seconds, done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=4_000, help="requests before these, until memory is looked at")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak, samples, seconds, audit = soaked(Path(folder), given.warm + given.requests, given.seed)
    requests, resident, idle = np.array(samples).T
    warm = requests >= given.warm
    growth, beyond = slope(requests[warm], resident[warm]), slope(requests[warm], (resident - idle)[warm])
    kinds = ", ".join(f"{count} {kind.strip('_')}" for kind, count in sorted(soak.kinds.items()))
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(soak.statuses.items()))
    print(f"{soak.done} requests in {seconds:.0f} s, the first {given.warm} to warm up: {kinds}\n")
    print(f"answers: {statuses}; {len(soak.told)} bills told\n\naudit: {audit}\n")
    print("| MB | at first | warm | largest | at the end | growth per 1,000 requests |\n|---|---|---|---|---|---|")
    for label, row, rate in (
        (f"resident memory (bar {BAR_MB:g})", resident, growth), ("of it idle in the pool", idle, growth - beyond),
        ("the rest", resident - idle, beyond),
    ):  # fmt: skip
        values = (row[0], row[warm][0], row[warm].max(), row[-1])
        print(f"| {label} | {' | '.join(f'{value:.1f}' for value in values)} | {rate:+.2f} |")
    print(f"\nat the pauses since it was warm: {' '.join(f'{value:.0f}' for value in resident[warm])}")
    for text in soak.wrong[:20]:
        print(f"wrong: {text}")
    return 1 if soak.wrong or growth > BAR_MB else 0


if __name__ == "__main__":
    sys.exit(main())
