"""Post a folder of photographs to the service in batches; write their feature maps and a CSV of the bills.

In: JPEG and PNG files, a server's address.  Out: OUT/IMAGE.LAYER.npy per image and layer (K, P, Q), float32, and
OUT/bills.csv with a line per batch. Standard library and numpy only, so that it can be copied anywhere.

    python examples/post_folder.py --images photographs --out maps --model texture --layers level1.relu,level2.relu

An API key comes from the environment, CCONV_API_KEY, where other users of this machine do not see it.
"""

import argparse
import csv
import http.client
import io
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")
BILL = ("macs", "flops", "flops_other")
#: How often a full server is asked again.
ATTEMPTS = 30


class Refused(Exception):
    """An answer other than 200, or none."""


class Server:
    """One connection to the service."""

    def __init__(self, url: str, timeout_s: float, key: str = ""):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"--url: expected http://HOST:PORT, got {url!r}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url = url
        self._base = parts.path.rstrip("/")
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, method: str, path: str, body: bytes | None = None, content_type: str = ""):
        """(status, headers, body); a broken connection is Refused, and closed."""
        headers = {**self._authorization, **({"Content-Type": content_type} if content_type else {})}
        try:
            self._connection.request(method, self._base + path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Refused(f"{self.url}: no answer: {error or type(error).__name__}") from error

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = ""):
        """(headers, body) of a 200; a full server is asked again after the time that it names."""
        for _ in range(ATTEMPTS):
            status, headers, content = self.request(method, path, body, content_type)
            if status == 200:
                return headers, content
            if status != 503:
                break
            time.sleep(float(headers.get("Retry-After", "1")))
        try:
            reason = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            reason = repr(content[:200])
        raise Refused(f"{method} {path}: {status}: {reason}")

    def wait(self, seconds: float) -> None:
        """Until the server is ready."""
        end = time.monotonic() + seconds
        while True:
            try:
                status, _, content = self.request("GET", "/readyz")
                if status == 200:
                    return
                problem = f"answered {status}: {content[:200]!r}"
            except Refused as error:
                problem = str(error)
            if time.monotonic() > end:
                raise Refused(f"{self.url}: not ready after {seconds:g} s: {problem}")
            time.sleep(0.2)


def multipart(paths: list[Path]) -> tuple[bytes, str]:
    """The files as one multipart/form-data body, and its content type."""
    boundary = secrets.token_hex(16)
    body = io.BytesIO()
    for path in paths:
        name = quote(path.name, safe=" .-_()")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'
        body.write(head.encode() + path.read_bytes() + b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())
    return body.getvalue(), f"multipart/form-data; boundary={boundary}"


def arrays(content: bytes) -> Iterator[np.ndarray]:
    """The .npy files that stand one after the other in an answer."""
    stream = io.BytesIO(content)
    while stream.tell() < len(content):
        yield np.load(stream, allow_pickle=False)


def post(server: Server, paths: list[Path], model: str, layers: list[str], out: Path) -> dict:
    """One batch: its maps as files, and its bill."""
    query = urlencode({"model": model, "layers": ",".join(layers), "format": "npys"})
    body, content_type = multipart(paths)
    began = time.monotonic()
    headers, content = server.ask("POST", f"/v1/features?{query}", body, content_type)
    seconds = time.monotonic() - began
    maps = list(arrays(content))
    if len(maps) != len(paths) * len(layers):
        raise Refused(f"answer: expected {len(paths)} x {len(layers)} arrays, got {len(maps)}")
    for index, array in enumerate(maps):
        path, layer = paths[index // len(layers)], layers[index % len(layers)]
        np.save(out / f"{path.name}.{layer}.npy", array)
    bill = {name: int(headers[f"X-Cconv-{name.replace('_', '-')}"]) for name in BILL}
    return {
        "images": " ".join(path.name for path in paths),
        "layers": " ".join(layers),
        **bill,
        "seconds": f"{seconds:.3f}",
    }


def layer_names(text: str | None) -> list[str]:
    """The names between commas, each once: the service answers with a layer as often as it is there, once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def run(options: argparse.Namespace) -> None:
    if not options.images.is_dir():
        raise Refused(f"--images: expected a folder, got {options.images}")
    photographs = sorted(path for path in options.images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not photographs:
        raise Refused(f"--images: expected {', '.join(SUFFIXES)} files in {options.images}, got none")
    server = Server(options.url, options.timeout, os.environ.get("CCONV_API_KEY", ""))
    server.wait(options.wait)
    about = json.loads(server.ask("GET", f"/v2/models/{quote(options.model, safe='')}")[1])
    layers = layer_names(options.layers) or [output["name"] for output in about["outputs"]]
    options.out.mkdir(parents=True, exist_ok=True)
    total = dict.fromkeys(BILL, 0)
    with (options.out / "bills.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, ["images", "layers", *BILL, "seconds"])
        lines.writeheader()
        for first in range(0, len(photographs), options.batch):
            batch = photographs[first : first + options.batch]
            line = post(server, batch, options.model, layers, options.out)
            lines.writerow(line)
            file.flush()
            total = {name: total[name] + line[name] for name in BILL}
            print(
                f"{first + len(batch)}/{len(photographs)} images: {line['macs']:,} macs in {line['seconds']} s",
                flush=True,
            )
    print(f"{len(photographs)} images, " + ", ".join(f"{value:,} {name}" for name, value in total.items()))
    print(f"maps and bills.csv in {options.out}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 after one line on stderr about what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the service (%(default)s)")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG and PNG files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if it is not there")
    parser.add_argument("--batch", type=positive, default=8, help="images per request (%(default)s)")
    parser.add_argument("--model", default="texture", help="%(default)s")
    parser.add_argument("--layers", help="names with commas; the model's default outputs unless given")
    parser.add_argument("--wait", type=float, default=60, help="seconds until the server must be ready (%(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one answer (%(default)s)")
    try:
        run(parser.parse_args(arguments))
    except (Refused, OSError) as error:
        print(f"post_folder: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
