"""The program behind `make run`: start the service, send it a photograph, check the maps and the bill, keep serving.

In: the environment's PORT (8080) and ONCE (1: take a free port and stop after the maps).  Out: a table of layers and
their bill, out/maps.png, out/access.log; the service in the foreground, its address as the last line. The exit code
is 0 only if maps and bill are right.
"""

import errno
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from math import prod
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

import cconv
from cconv import images

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "out")
#: What is asked of the service, and by how many weights each output of a convolution is made, counted by hand: the bill
#: is checked against these, and not only against the library's own formula.
ASKED = {
    "texture": (("level1.relu", "level2.relu"), {"level1.conv": 3 * 5 * 5, "level2.conv": 8 * 5 * 5}),
    "vgg16": (("features.0", "features.2", "features.4"), {"features.0": 3 * 3 * 3, "features.2": 64 * 3 * 3}),
}
PICTURE = ("texture", "level1.relu")
BILL = ("macs", "flops", "flops_other")
READY_S = 60


class Wrong(Exception):
    """A check that failed, or a service that does not start."""


def photograph() -> Path:
    """A real colour photograph: an astronaut, 512 x 512, which scikit-image ships."""
    spec = importlib.util.find_spec("skimage")
    path = Path(spec.submodule_search_locations[0]) / "data" / "astronaut.png" if spec else None
    if path is None or not path.is_file():
        raise Wrong("the photograph is part of scikit-image: pip install -e .[demo]")
    return path


class Service:
    """The service under gunicorn as a child process in a session of its own, so that Ctrl-C reaches only us."""

    def __init__(self, port: int):
        if port:
            _check_free(port)
        OUT.mkdir(parents=True, exist_ok=True)
        self.log = OUT / "server.log"
        for old in (self.log, OUT / "access.log"):
            old.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PORT": str(port),
            "CCONV_ACCESS_LOG": str(OUT / "access.log"),
            "CCONV_ERROR_LOG": str(self.log),
        }
        command = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app()"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        self.url = ""

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise Wrong(f"the service ended with code {self._process.returncode}:\n{self.tail()}")
            listening = re.search(r"Listening at: (http://\S+)", self.tail())
            if listening:
                self.url = listening[1]
                try:
                    self.ask("/readyz")
                    return
                except OSError:
                    pass
            time.sleep(0.1)
        raise Wrong(f"the service was not ready after {READY_S} s:\n{self.tail()}")

    def ask(self, path: str, body: bytes | None = None):
        """(headers, body) of GET, or of POST where there is a body."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body), timeout=120) as answer:
            return answer.headers, answer.read()

    def tail(self) -> str:
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def wait(self) -> None:
        raise Wrong(f"the service ended by itself with code {self._process.wait()}:\n{self.tail()}")

    def stop(self) -> None:
        """Let requests in flight finish; leave no process behind."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Wrong(f"port {port} is in use; choose another one: make run PORT={port + 1}") from None
            raise Wrong(f"port {port}: {error}") from None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the first is a name, the others stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def check(said: bool, what: str) -> None:
    if not said:
        raise Wrong(f"wrong: {what}")
    print(f"  right: {what}")


def show_model(service: Service, data: bytes, name: str) -> None:
    """One model: the table of its layers, and the checks of its bill and its maps."""
    layers, weights_per_output = ASKED[name]
    query = {"model": name, "layers": ",".join(layers)}
    summary = json.loads(service.ask(f"/v1/features?{urlencode(query)}", data)[1])
    (image,) = summary["images"]
    rows = [("layer", "shape (N, K, P, Q)", *BILL)]
    for layer in image["layers"]:
        rows.append((layer["layer"], "x".join(map(str, layer["shape"])), *(f"{layer[key]:,}" for key in BILL)))
    rows.append(("total (flops = 2 * macs)", "", *(f"{summary[key]:,}" for key in BILL)))
    print(f"\n{name}, {summary['compute_us'] / 1000:.1f} ms on {summary['device']}\n{table(rows)}")

    check_bill(service, name, summary, image, weights_per_output)
    headers, body = service.ask(f"/v1/features?{urlencode({**query, 'format': 'npys'})}", data)
    check(
        all(int(headers[f"X-Cconv-{key.replace('_', '-')}"]) == summary[key] for key in BILL),
        "headers say the same bill",
    )
    check_maps(name, layers, data, body)


def check_bill(service: Service, name: str, summary: dict, image: dict, weights_per_output: dict[str, int]) -> None:
    asked = {"model": name, "shape": [1, *image["shape"]], "layers": list(image["maps"])}
    predicted = json.loads(service.ask("/v1/cost", json.dumps(asked).encode())[1])
    check(all(predicted[key] == summary[key] for key in BILL), "the bill is what /v1/cost predicted")
    shapes = {layer["layer"]: layer["shape"] for layer in image["layers"]}
    macs = sum(prod(shapes[layer]) * weights for layer, weights in weights_per_output.items())
    check(summary["macs"] == macs and summary["flops"] == 2 * macs, "macs are outputs times weights, counted by hand")


def check_maps(name: str, layers: Sequence[str], data: bytes, body: bytes) -> None:
    local = cconv.load(name).run(images.decode(data), layers)
    stream = io.BytesIO(body)
    for layer in layers:
        maps = np.load(stream, allow_pickle=False)
        check(bool(np.isfinite(maps).all()) and float(np.ptp(maps)) > 0, f"{layer} is finite and not constant")
        check(np.array_equal(maps, local[layer]), f"{layer} equals what cconv computes here, bit for bit")


def show(service: Service) -> None:
    source = photograph()
    data = source.read_bytes()
    print(f"POST {source.name}, {len(data):,} bytes, to {service.url}/v1/features", flush=True)
    for name in ASKED:
        show_model(service, data, name)
    model, layer = PICTURE
    query = urlencode({"model": model, "layers": layer, "format": "png"})
    (OUT / "maps.png").write_bytes(service.ask(f"/v1/features?{query}", data)[1])
    print(f"\nthe maps of {model}, {layer}: {OUT / 'maps.png'}", flush=True)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    once = os.environ.get("ONCE", "") not in ("", "0")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    service = None
    try:
        port = os.environ.get("PORT") or "8080"
        if not port.isdecimal() or int(port) > 65535:
            raise Wrong(f"PORT: expected a number from 0 to 65535, got {port!r}")
        print("starting the service ...", flush=True)
        service = Service(0 if once else int(port))
        service.wait_until_ready()
        show(service)
        if not once:
            print(f"requests are logged in {OUT / 'access.log'}; Ctrl-C stops the service")
            print(service.url, flush=True)
            service.wait()
    except KeyboardInterrupt:
        print()
    except Wrong as error:
        print(error, file=sys.stderr)
        return 1
    except urllib.error.HTTPError as error:
        print(f"{error.url}: {error.code}: {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"the service does not answer: {error}", file=sys.stderr)
        return 1
    finally:
        if service:
            service.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
