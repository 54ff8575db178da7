"""Compose: what the containers of docker-compose.yml run, run here, one after the other as `make up` does it.

In: the file's own commands and environments, a .env that `make` wrote, PostgreSQL from the system's packages.  Out: a
service that knows the first API key and no stranger, and its bill in the database.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from service import auth

ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

ROOT = Path(__file__).parents[2]


def make_env(folder: Path) -> dict[str, str]:
    subprocess.run(["make", "-s", "-f", str(ROOT / "Makefile"), "-C", str(folder), "env"], check=True)
    return dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())


def interpolated(value, variables: dict[str, str]):
    """As Compose reads it; KeyError for a variable that must be there and is not."""
    if isinstance(value, list):
        return [interpolated(one, variables) for one in value]
    if isinstance(value, dict):
        return {name: interpolated(one, variables) for name, one in value.items()}

    def put(found: re.Match) -> str:
        name, default = found[1], found[3]
        return variables[name] if found[2] == ":?" else variables.get(name) or default

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", put, str(value)).replace("$$", "$")


class Containers:
    """The file's containers, with folders of this machine in place of their volumes."""

    def __init__(self, folder: Path, variables: dict[str, str], places: dict[str, str]):
        self._services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self._folder, self._variables, self._places = folder, variables, places

    def _placed(self, text: str) -> str:
        for inside, here in self._places.items():
            text = re.sub(rf"(?<!\w){re.escape(inside)}", here, text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        found = interpolated(self._services[name]["environment"], self._variables)
        return {variable: self._placed(value) for variable, value in found.items()}

    def run(self, name: str, what: str = "command", path: str = "") -> subprocess.CompletedProcess:
        command = [self._placed(part) for part in interpolated(self._services[name][what], self._variables)]
        programs = os.pathsep.join(filter(None, (path, str(Path(sys.executable).parent), os.environ["PATH"])))
        environment = {"PATH": programs, "PYTHONPATH": str(ROOT), "HOST": "0.0.0.0", **self.environment(name)}
        return subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )


def test_make_writes_what_is_missing_once_and_for_its_owner_alone(tmp_path):
    first = make_env(tmp_path)
    assert set(first) == {"CCONV_DB_PASSWORD", "GRAFANA_PASSWORD", "CCONV_API_KEY", "CCONV_METRICS_KEY"}
    assert len(set(first.values())) == 4
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert all(auth.KEY.fullmatch(first[name]) for name in ("CCONV_API_KEY", "CCONV_METRICS_KEY"))
    assert min(len(value) for value in first.values()) >= 32
    assert make_env(tmp_path) == first
    (tmp_path / ".env").write_text("CCONV_DB_PASSWORD=mine\n")
    again = make_env(tmp_path)
    assert again["CCONV_DB_PASSWORD"] == "mine"
    assert again["CCONV_API_KEY"] != first["CCONV_API_KEY"]


@pytest.fixture
def variables(tmp_path):
    return make_env(tmp_path)


@pytest.fixture
def containers(tmp_path, variables, database):
    (tmp_path / "keys").mkdir()
    (tmp_path / "models").mkdir()
    places = {
        "postgresql://cconv@db/cconv": database, "/keys": f"{tmp_path}/keys", "/models": f"{tmp_path}/models",
        "/tmp/key": f"{tmp_path}/key",
    }  # fmt: skip
    return Containers(tmp_path, variables, places)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/usage.db"
    return request.getfixturevalue("postgres").create()


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_containers_make_a_service_that_knows_its_first_key_and_bills_it(
    containers, variables, database, start_server, tmp_path, picture, png
):
    ok(containers.run("migrate"))
    for _ in range(2):  # each `up` runs them again
        said = ok(containers.run("keys"))
        assert not [key for key in variables.values() if key in said]
    assert stat.S_IMODE((tmp_path / "keys/keys.json").stat().st_mode) == 0o600
    server = start_server(**{**containers.environment("service"), "CCONV_MODELS": "texture"})
    photo = png(picture(24, 24))
    address, mine = "/v1/features?model=texture&format=json", {"X-API-Key": variables["CCONV_API_KEY"]}
    assert server.ask("/readyz")[0] == 200
    assert server.ask(address, photo)[0] == 401
    assert server.ask(address, photo, {"X-API-Key": variables["CCONV_METRICS_KEY"]})[0] == 403
    assert server.ask(address, photo, mine)[0] == 200
    assert server.ask("/metrics", headers=mine)[0] == 403

    # What README tells a newcomer.
    if shutil.which("curl"):
        (tmp_path / "photo.jpg").write_bytes(photo)
        command = re.search(r"`(\(\. \./\.env; curl .*?\))`", (ROOT / "README.md").read_text())[1]
        command = command.replace("localhost:8080", server.address).replace("curl -s", "curl -sf")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)

    # Prometheus: what it would read its key from.
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/prometheus"
    program.write_text('#!/bin/sh\necho "$@"; test -z "${CCONV_METRICS_KEY:-}"\n')
    program.chmod(0o755)
    assert "--config.file=" in ok(containers.run("prometheus", "entrypoint", str(tmp_path / "bin")))
    key = tmp_path / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert server.ask("/metrics", headers={"Authorization": f"Bearer {key.read_text()}"})[0] == 200

    # The demo's client.
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/a.png").write_bytes(photo)
    script = [sys.executable, ROOT / "examples/post_folder.py", "--url", server.url]
    script += ["--images", tmp_path / "photographs", "--out", tmp_path / "out"]
    for key, code in ((containers.environment("demo")["CCONV_API_KEY"], 0), ("", 1)):
        environment = {**os.environ, "CCONV_API_KEY": key}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == code, done.stderr
    assert "401" in done.stderr

    account = variables["CCONV_API_KEY"].split("_")[1]
    with ledger.Ledger(database) as book:
        assert {event.account for event in book.events()} == {account}

    auth.revoke(tmp_path / "keys/keys.json", account)
    ok(containers.run("keys"))
    assert auth.read(tmp_path / "keys/keys.json")[account].revoked
