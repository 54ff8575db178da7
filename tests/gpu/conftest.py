"""Conftest: what the tests of the GPU kernels share: a device that is none (host.py), and the tests of other folders.

In: host.py; tests/kernels and tests/backends.  Out: fixtures; `borrow` gives a module of another folder, so that its
tests run here on these kernels too: with `isa` "host", and `cpu` a twin on the host device.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from cconv import backend as backends

TESTS = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Doubles are the same sources with another T: `make test` has floats of them, `make test-all` both."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if Path(__file__).parent in item.path.parents and params.get("dtype") == "float64":
            item.add_marker("slow")


def _load(name: str, path: Path):
    """By its path: under --import-mode=importlib test files cannot import each other by name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOST = _load("gpu_host", TESTS / "gpu/host.py")
STAND_IN = _load("gpu_stand_in", TESTS / "gpu/stand_in.py")


@pytest.fixture(scope="session")
def lacking(request):
    """f(reason): a compiler is missing, and nothing is proven: `make test-all` fails, elsewhere tests skip."""
    return pytest.fail if request.config.getoption("--need-compilers") else pytest.skip


@pytest.fixture(scope="session")
def host(lacking):
    """The module host.py."""
    if shutil.which("g++") is None:
        lacking("expected g++ to compile the kernels for the host, found none")
    return HOST


@pytest.fixture(scope="session")
def stand_in():
    """The module stand_in.py."""
    return STAND_IN


@pytest.fixture(scope="session")
def libraries(request, tmp_path_factory):
    """Where compiled kernels are kept: for the next run, if pytest keeps anything."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("gpu-kernels") if cache is not None else tmp_path_factory.mktemp("gpu-kernels")


@pytest.fixture(scope="session")
def sanitize(request) -> bool:
    return request.config.getoption("--sanitize")


@pytest.fixture(scope="session")
def device(host, libraries, sanitize):
    """A device on the host whose arrays are NumPy's."""
    return host.HostDevice(libraries, sanitize=sanitize)


@pytest.fixture(scope="session")
def machine_twin(host, device):
    """A twin on it."""
    return host.HostTwin(device)


@pytest.fixture(params=["host", pytest.param("device", marks=pytest.mark.gpu)])
def twin_of_arrays(request, libraries, sanitize, monkeypatch):
    """A twin whose arrays are no NumPy arrays, to which the public functions go with them: a host's, the GPU's."""
    if request.param == "device":
        if reason := backends.available()["gpu"]:
            pytest.skip(reason)
        return backends.get("gpu")
    host = request.getfixturevalue("host")
    twin = host.HostTwin(host.HostDevice(libraries, sanitize=sanitize, wrap=True))
    original = backends.of

    def of(array, name="x"):
        return (twin, array) if isinstance(array, host.HostArray) else original(array, name)

    monkeypatch.setattr(backends, "of", of)
    return twin


def _borrow(name: str, **replaced):
    module = _load(f"gpu_{Path(name).stem}", TESTS / name)
    vars(module).update(replaced)
    return module


@pytest.fixture(scope="session")
def borrow():
    """f("kernels/grid.py", name=value): a module of its own, in which names mean something else."""
    return _borrow


@pytest.fixture(scope="session")
def grid(machine_twin):
    """tests/kernels/grid.py, its programs on the host device; threads are multiprocessors."""
    return _borrow("kernels/grid.py", cpu=machine_twin, ISAS=("host",))


@pytest.fixture
def isa() -> str:
    return "host"


@pytest.fixture
def sampled(request):
    """f(items): some of them; all of them, or as many as --one-in says, in slow tests."""
    slow = request.node.get_closest_marker("slow") is not None
    step = request.config.getoption("--one-in") * (1 if slow else 12)
    return lambda items: list(items)[::step]


@pytest.fixture(scope="session")
def scratch():
    """A folder for what one test compiles and nobody else needs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
