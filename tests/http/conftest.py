"""Conftest: the service in the test's own process (`app`, `client`) and under gunicorn in another (`server`).

In: service/ of this checkout.  Out: fixtures; those that are functions make bodies or read the bill off /metrics.
"""

import contextlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from flask.testing import FlaskClient

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the service is an application of the checkout and is never installed
sys.path.insert(1, str(Path(__file__).parent))  # own_models.py, which some of these tests share

from service import create_app  # noqa: E402
from service.config import Settings  # noqa: E402

BILLED = ("cconv_inferences_total", "cconv_macs_total", "cconv_flops_total", "cconv_flops_other_total")
START_S = 30


class WholeAnswers(FlaskClient):
    """A client that reads every answer to its end, as a server does: only then is the request's place given back."""

    def open(self, *args, **kwargs):
        kwargs.setdefault("buffered", True)
        return super().open(*args, **kwargs)


@pytest.fixture
def make_app():
    """f(**settings) -> a Flask application that is closed after the test."""
    made = []

    def make(**settings):
        app = create_app(Settings(**settings))
        app.test_client_class = WholeAnswers
        made.append(app)
        return app

    yield make
    for app in made:
        app.extensions["cconv"].close()


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def url(tmp_path):
    """A ledger's."""
    from cconv import ledger

    url = f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    return url


@pytest.fixture
def rows(url):
    """f() -> the ledger's events, read by somebody else."""
    from cconv.ledger import Ledger

    def read():
        with Ledger(url) as book:
            return list(book.events())

    return read


@pytest.fixture
def folder(tmp_path):
    """A model repository's, not made yet."""
    return tmp_path / "models"


@pytest.fixture
def serve(make_app, folder):
    """f(**settings) -> a client of a service that has loaded all of the folder."""

    def make(**settings):
        client = make_app(model_repository=str(folder), **settings).test_client()
        end = time.monotonic() + START_S
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.005)
        return client

    return make


def _npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@pytest.fixture(scope="session")
def npy():
    """f(array) -> the bytes of a .npy file."""
    return _npy


def _png(height: int, width: int, rows: bytes | None = None) -> bytes:
    """An RGB PNG by hand; black unless `rows` (with a filter byte each) are given, so that it costs nothing to make."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    if rows is None:
        pack = zlib.compressobj(9)
        line = bytes(1 + 3 * width)
        packed = b"".join(pack.compress(line) for _ in range(height)) + pack.flush()
    else:
        packed = zlib.compress(rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def png():
    """f(height, width) -> a black RGB PNG; f(picture) -> one of a (H, W, 3) uint8 picture."""

    def make(height, width=None):
        if width is not None:
            return _png(height, width)
        picture = np.asarray(height, np.uint8)
        rows = b"".join(b"\0" + row.tobytes() for row in picture)
        return _png(*picture.shape[:2], rows)

    return make


@pytest.fixture
def picture(rng):
    """f(height, width) -> a (H, W, 3) uint8 picture of noise."""
    return lambda height, width: rng.integers(0, 256, (height, width, 3), np.uint8)


def _metrics(text: str) -> dict[str, float]:
    """Every series by its name and labels."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


@pytest.fixture(scope="session")
def metrics():
    """f(text of /metrics) -> {series: value}."""
    return _metrics


@pytest.fixture(scope="session")
def bill():
    """f(client) -> what has been billed since it began: the sums of the counters over all models."""

    def read(client) -> dict[str, float]:
        series = _metrics(client.get("/metrics").get_data(as_text=True))
        return {name: sum(v for key, v in series.items() if key.startswith(name + "{")) for name in BILLED}

    return read


class Server:
    """The service under gunicorn, as in production, on a free port."""

    def __init__(self, folder: Path, app: str = "service:create_app()", **environment: str):
        self.log = folder / "server.log"
        self.access_log = folder / "access.log"
        variables = {
            **os.environ,
            "PORT": "0",
            "HOST": "127.0.0.1",
            "CCONV_ERROR_LOG": str(self.log),
            "CCONV_ACCESS_LOG": str(self.access_log),
            **environment,
        }
        command = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py", app]
        self.process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
        self.url = ""

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"Listening at: (http://\S+)", self.log.read_text() if self.log.exists() else "")
            if found:
                self.url = found[1]
                with contextlib.suppress(OSError):  # the worker is not there yet, or has just ended
                    if self.ask("/readyz")[0] == 200:
                        return
            time.sleep(0.05)
        raise RuntimeError(f"the server is not ready: {self.log.read_text() if self.log.exists() else 'no log'}")

    @property
    def address(self) -> str:
        """HOST:PORT, as tritonclient takes it."""
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None):
        """(status, headers, body), whatever the status."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "text/plain", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def metrics(self) -> dict[str, float]:
        return _metrics(self.ask("/metrics")[2].decode())

    def billed(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics().items() if name.startswith(BILLED)}

    def stop(self) -> int:
        """SIGTERM and the exit code; SIGKILL to the whole group if that is not enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server with the default settings for all tests that leave it as it is."""
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def start_server(tmp_path):
    """f(**environment) -> a server of the test's own."""
    started = []

    def start(**environment):
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        started.append(Server(folder, **environment))
        started[-1].wait_until_ready()
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def triton():
    """tritonclient.http as it comes from its package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tritonclient.http

    return tritonclient.http


@pytest.fixture
def infer_json():
    """f(x, **more) -> an inference request with its tensor as JSON."""

    def make(x, **more) -> bytes:
        tensor = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
        return json.dumps({"inputs": [tensor], **more}).encode()

    return make


@pytest.fixture
def infer_binary():
    """f(x, **more) -> (body, headers) of an inference request with its tensor as bytes behind the JSON."""

    def make(x, **more) -> tuple[bytes, dict[str, str]]:
        size = {"binary_data_size": x.nbytes}
        tensor = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "parameters": size}
        header = json.dumps({"inputs": [tensor], **more}).encode()
        return header + x.tobytes(), {"Inference-Header-Content-Length": str(len(header))}

    return make
