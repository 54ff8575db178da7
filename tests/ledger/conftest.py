"""Conftest: a ledger's database, SQLite's and PostgreSQL's, fresh for each test.

In: tests/conftest.py's `postgres`.  Out: `url`, `book`, event makers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

from cconv import ledger


@pytest.fixture
def sqlite_url(tmp_path):
    url = f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    return url


@pytest.fixture
def postgres_url(postgres):
    url = postgres.create()
    ledger.migrate(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    """A database with its tables."""
    return request.getfixturevalue(f"{request.param.replace('postgresql', 'postgres')}_url")


@pytest.fixture
def book(url):
    with ledger.Ledger(url) as book:
        yield book


def _event(**fields) -> ledger.Event:
    bill = {"macs": 10, "flops": 20, "flops_other": 3}
    return ledger.Event(**{"account": "anna", "model": "vgg16", "shapes": {"x": [1, 3, 9, 9]}, **bill, **fields})


@pytest.fixture(scope="session")
def event():
    """f(**fields): an event."""
    return _event


@pytest.fixture
def python(tmp_path):
    """f(script, *arguments, **environment): a Python of its own, begun."""
    begun = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        path = tmp_path / f"script{len(begun)}.py"
        path.write_text(script)
        found = os.pathsep.join([str(Path(ledger.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env={**os.environ, "PYTHONPATH": found, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path):
    """Where a spool may lie."""
    return tmp_path / "spool"


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shim for fsync needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    library = folder / "syncs.so"
    source = Path(__file__).with_name("syncs.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
