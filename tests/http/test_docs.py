"""Docs: the commands of docs/service.md do what they say, against the running service.

In: the fenced blocks of the document.  Out: exit codes, files and numbers.
"""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cconv
from cconv import images

TEXT = (Path(__file__).parents[2] / "docs/service.md").read_text()
BLOCKS = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", TEXT, re.M | re.S)
HERE = "127.0.0.1:8080"


@pytest.fixture
def folder(tmp_path, rng, npy, png, picture):
    """What the commands send."""
    Image.fromarray(picture(60, 50)).save(tmp_path / "photo.jpg")
    (tmp_path / "other.png").write_bytes(png(picture(40, 48)))
    (tmp_path / "x.npy").write_bytes(npy(rng.random((2, 3, 9, 9), np.float32)))
    (tmp_path / "weight.npy").write_bytes(npy(rng.random((4, 3, 3, 3), np.float32)))
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_curl_commands_work(server, folder):
    commands = [
        command.replace(HERE, server.address).replace("curl", "curl --silent --show-error --fail", 1)
        for language, text in BLOCKS
        if language == "sh"
        for command in text.replace("\\\n", " ").splitlines()
        if command.startswith("curl")
    ]
    assert len(commands) >= 7
    printed = []
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        if done.stdout:
            printed.append(json.loads(done.stdout))
    features, lecture, vgg, layer = printed
    photo, other = (images.read(folder / name) for name in ("photo.jpg", "other.png"))
    assert features["macs"] == cconv.load("texture").cost(photo.shape).total.macs
    assert lecture["data"] == [[[56, 72], [104, 120]]]
    assert lecture["macs"] == 32
    assert vgg["macs"] == cconv.load("vgg16").cost((8, 3, 224, 224), ["features.30"]).total.macs
    assert layer["macs"] == 1_024_000_000
    with Image.open(folder / "maps.png") as picture:
        assert picture.mode == "L"
    x, weight = (np.load(folder / name) for name in ("x.npy", "weight.npy"))
    assert np.array_equal(np.load(folder / "y.npy"), cconv.conv2d(x, weight, padding="same"))
    stream = io.BytesIO((folder / "maps.npys").read_bytes())
    for x in (photo, other):
        for maps in cconv.load("vgg16").run(x, ["features.0", "features.4"]).values():
            assert np.array_equal(np.load(stream), maps)


def test_the_python_example_works(server, triton):
    (example,) = [text for language, text in BLOCKS if language == "python"]
    exec(compile(example.replace(HERE, server.address), "docs/service.md", "exec"), {})


def test_every_route_is_in_the_document(app):
    documented = TEXT.replace("NAME", "<name>").replace("[/versions/1]", "")
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("/versions/<version>", "")
        if path.endswith(("/config", "/ready")) and "<name>" in path:
            path = path.rpartition("/")[0]
        if not path.startswith("/static"):
            assert f"{path}`" in documented or f"{path}/" in documented or f"{path}[" in documented, path
