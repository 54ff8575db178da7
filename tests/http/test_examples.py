"""Examples: `make run` and the compose file's demo, run as they are.

In: examples/*.py.  Out: exit codes, files and tables that are checked against cconv itself.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cconv
from cconv import images

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "examples" / script, *arguments],
        env={**os.environ, "PORT": "", "ONCE": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_listen,
    )


def _listen() -> None:
    """What a shell starts in the background ignores SIGINT, and so would what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    with start(script, *arguments, **environment) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def demo_servers(out: Path) -> set[str]:
    """The processes of services that run_demo.py started, told by where they write their log."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"CCONV_ERROR_LOG={out / 'server.log'}".encode() in (entry / "environ").read_bytes():
                found.add(entry.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.fixture
def folder(tmp_path, png, picture):
    """Five photographs of several sizes, and a file that is none."""
    place = tmp_path / "photographs"
    place.mkdir()
    for index, (height, width) in enumerate([(40, 48), (40, 48), (33, 64), (48, 40), (50, 50)]):
        (place / f"photo {index}.png").write_bytes(png(picture(height, width)))
    (place / "notes.txt").write_text("not a photograph")
    return place


class TestPostFolder:
    """The compose file's demo client."""

    @pytest.mark.parametrize(("batch", "lines"), [(1, 5), (2, 3), (8, 1)])
    def test_it_writes_the_maps_and_a_bill_for_every_batch(self, server, folder, tmp_path, batch, lines):
        out = tmp_path / "out"
        done = run("post_folder.py", "--url", server.url, "--images", folder, "--out", out, "--batch", str(batch))
        assert done.returncode == 0, done.stderr
        model = cconv.load("texture")
        expected = 0
        for path in sorted(folder.glob("*.png")):
            x = images.decode(path.read_bytes())
            expected += model.cost(x.shape).total.macs
            for layer, maps in model.run(x).items():
                assert np.array_equal(np.load(out / f"{path.name}.{layer}.npy"), maps)
        with (out / "bills.csv").open(newline="") as file:
            bills = list(csv.DictReader(file))
        assert len(bills) == lines
        assert sum(int(bill["macs"]) for bill in bills) == expected
        assert all(int(bill["flops"]) == 2 * int(bill["macs"]) for bill in bills)
        assert f"{expected:,} macs" in done.stdout

    def test_it_asks_for_the_layers_it_is_told(self, server, folder, tmp_path):
        out = tmp_path / "out"
        arguments = ["--model", "vgg16", "--layers", "features.0, features.4,features.0"]
        done = run("post_folder.py", "--url", server.url, "--images", folder, "--out", out, *arguments)
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in out.glob("photo 0*")) == [
            "photo 0.png.features.0.npy",
            "photo 0.png.features.4.npy",
        ]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--model", "nonesuch"], "Request for unknown model: 'nonesuch'"),
            (["--layers", "nonesuch"], "layers: expected names of texture"),
            (["--images", "/nonesuch"], "expected a folder"),
            (["--url", "ftp://x"], "expected http://HOST:PORT"),
            (["--url", "http://127.0.0.1:1", "--wait", "0.1"], "not ready"),
        ],
    )
    def test_a_mistake_is_one_line_on_stderr(self, server, folder, tmp_path, arguments, text):
        usual = ["--url", server.url, "--images", folder, "--out", tmp_path / "out"]
        done = run("post_folder.py", *usual, *arguments)
        assert done.returncode == 1
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_a_broken_photograph_is_named(self, server, folder, tmp_path):
        (folder / "photo 2.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
        done = run("post_folder.py", "--url", server.url, "--images", folder, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert "photo 2.png" in done.stderr


class TestRunDemo:
    """The program behind `make run`."""

    def test_once_shows_maps_and_bill_and_ends(self, tmp_path):
        out = tmp_path / "new" / "out"
        done = run("run_demo.py", ONCE="1", OUT=str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "wrong" not in done.stdout
        for name in ("level1.conv", "features.2"):
            assert name in done.stdout
        total = cconv.load("vgg16").cost((1, 3, 512, 512), ["features.0", "features.2", "features.4"]).total
        assert f"{total.macs:,}" in done.stdout
        assert f"{total.flops:,}" in done.stdout
        assert (out / "maps.png").read_bytes().startswith(b"\x89PNG")
        assert "POST /v1/features" in (out / "access.log").read_text()
        assert not demo_servers(out)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_serves_until_it_is_interrupted_and_leaves_nothing_behind(self, number, tmp_path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with start("run_demo.py", PORT=str(port), OUT=str(tmp_path)) as process:
            lines = []
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith("http://"):
                    break
            assert lines[-1] == f"http://127.0.0.1:{port}"
            assert demo_servers(tmp_path)
            taken = run("run_demo.py", PORT=str(port), OUT=str(tmp_path / "other"))
            assert taken.returncode == 1
            assert taken.stderr.strip() == f"port {port} is in use; choose another one: make run PORT={port + 1}"
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in out + err
        assert not demo_servers(tmp_path)

    @pytest.mark.parametrize("port", ["http", "99999"])
    def test_a_port_that_cannot_be_is_said(self, port):
        done = run("run_demo.py", PORT=port)
        assert done.returncode == 1
        assert "PORT: expected a number" in done.stderr
