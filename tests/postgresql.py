"""Postgresql: a PostgreSQL server for tests, on a socket of its own.

In: PostgreSQL's own programs, where they are installed; elsewhere the tests that want it skip.  Out: Server.
"""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

PROGRAMS = [Path(shutil.which("postgres") or "/none").parent, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]


class Server:
    """A PostgreSQL server on a socket of its own, of a user that it accepts: it refuses to run as root."""

    def __init__(self, programs: Path):
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="cconv-pg-", dir="/tmp"))  # a socket's path has 107 characters
        self._as = []
        if os.geteuid() == 0:
            owner = next((name for name in ("postgres", "nobody") if _is_user(name)), None)
            shutil.chown(self.folder, owner)
            self._as = ["setpriv", f"--reuid={owner}", "--clear-groups"]
        self.user = pwd.getpwnam(owner).pw_name if self._as else pwd.getpwuid(os.geteuid()).pw_name
        self._run("initdb", "-D", self.data, "-U", self.user, "--auth=trust", "--encoding=UTF8", "--locale=C")

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c max_connections=50"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self.data, "-l", log, "-o", options, "-w", "-t", "60", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", self.data, "-m", mode, "-w", "-t", "60", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://{self.user}@/{database}?host={self.folder}"

    def sql(self, statement: str, database: str = "postgres") -> list[tuple]:
        import psycopg

        with psycopg.connect(f"host={self.folder} user={self.user} dbname={database}", autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def create(self) -> str:
        name = f"ledger_{uuid.uuid4().hex}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def server_or_skip(needed: bool):
    """A server that runs, until the generator goes on."""
    lacking = None
    programs = next((folder for folder in PROGRAMS if (folder / "initdb").exists()), None)
    if importlib.util.find_spec("psycopg") is None:
        lacking = "psycopg is not installed"
    elif programs is None:
        lacking = "PostgreSQL is not installed: no initdb"
    elif os.geteuid() == 0 and not shutil.which("setpriv"):
        lacking = "PostgreSQL does not run as root, and there is no setpriv"
    if lacking and needed:
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    server = Server(programs.resolve())
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(server.folder, ignore_errors=True)
