"""Architecture: who may import whom, over Python, Cython, C and CUDA; and how long files and lines may be.

In: the files of cconv/ and service/.  Out: violations of design's floors, as sentences; the tests want none, and plant
some to see that they are found.

A file imports only from floors below its own, and enters another room only through that room's own front: `from
.planning import cost` is fine, `from .planning.cost import of` is not. Rooms on one floor do not import each other.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: From the ground up. A room is a module or a package with all that is in it.
FLOORS = (
    ("cconv.errors", "cconv.cpu.kernels", "cconv.gpu.kernels"),
    ("cconv.planning", "cconv.weights"),
    ("cconv.cpu", "cconv.gpu", "cconv.reference"),
    ("cconv.backend",),
    ("cconv.ops", "cconv.filters", "cconv.init", "cconv.images", "cconv.ledger"),
    ("cconv.devices",),
    ("cconv.model",),
    ("cconv",),  # the public names
    ("cconv.tables",),
    ("cconv.cli",),
    ("service.errors", "service.account", "service.config", "service.wire"),
    ("service.statistics", "service.trace", "service.log", "service.npy", "service.slices"),
    ("service.lanes", "service.pace"),
    ("service.repository", "service.outputs", "service.metrics", "service.body"),
    ("service.engine", "service.ledger"),
    ("service.auth", "service.admission"),
    ("service.scheduler", "service.door", "service.connection"),
    ("service.pipeline",),
    ("service.routes",),
    ("service.factory", "service.worker"),
    ("service", "service.gunicorn", "service.__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: A package's own __init__, not all that is in the package.
FRONTS = ("cconv", "service")

#: Which rooms, or modules, alone may use another's library; empty: nobody.
OWNERS = {
    "cupy": {"cconv.gpu"},
    "flask": {"service.routes", "service.factory", "service"},
    "PIL": {"cconv.images"},
    "limits": {"service.admission"},
    "sqlalchemy": {"cconv.ledger"},
    "alembic": {"cconv.ledger"},
    "sqlite3": {"cconv.ledger.sqlite"},
    "pysqlite3": {"cconv.ledger.sqlite"},
    "psycopg": {"cconv.ledger"},
    "cconv": {"service.engine"},
    "cconv.ledger": {"service.ledger"},
    "torch": set(),
    "tensorflow": set(),
}
STDLIB_ONLY = ("cconv.planning", "cconv.errors")
#: C below the Python line: no interpreter, no threads, no memory of its own.
KERNELS_WITHOUT = ("Python.h", "omp.h", "numpy/", "malloc(", "calloc(", "#pragma omp")

MOST_LINES = 450
#: Of a line of Cython or C; ruff counts Python's.
MOST_CHARACTERS = 120
PYTHON, CYTHON, C = {".py", ".pyi"}, {".pyx", ".pxd"}, {".c", ".h", ".inc", ".cu", ".cuh"}

_CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<base>[.\w]+)[ \t]+c?import[ \t]+(?P<names>\([^)]*\)|[^\n]*)"
    r"|c?import[ \t]+(?P<plain>[^\n]*))",
    re.M,
)
_CYTHON_INCLUDE = re.compile(r"^[ \t]*(?:include|cdef[ \t]+extern[ \t]+from)[ \t]+[\"']([^\"'<>]+)[\"']", re.M)
_C_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+\"([^\"]+)\"", re.M)


def sources(root: Path) -> Iterator[Path]:
    """Every file that a person wrote below cconv/ and service/."""
    for package in FRONTS:
        for path in sorted((root / package).rglob("*")):
            generated = path.suffix == ".c" and path.with_suffix(".pyx").exists()
            if path.suffix in PYTHON | CYTHON | C and not generated and "build" not in path.parts:
                yield path


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    stem = parts[-1].partition(".")[0]
    return ".".join(parts[:-1] if stem == "__init__" else (*parts[:-1], stem))


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None if it is not of this house, or has no floor yet."""
    while module:
        if module in FLOOR and module not in FRONTS:
            return module
        module = module.rpartition(".")[0]
    return None


def _room(module: str) -> str | None:
    return module if module in FRONTS else room_of(module)


def _written(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Imports as they are written: (".planning", ("cost",)), ("numpy", ())."""
    text = path.read_text()
    if path.suffix in PYTHON:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                yield from ((alias.name, ()) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)
    elif path.suffix in CYTHON:
        for match in _CYTHON_IMPORT.finditer(text):
            names = (match["names"] or match["plain"]).partition("#")[0].strip("() \n")
            words = tuple(word.split()[0] for word in names.replace("\n", " ").split(",") if word.strip())
            if match["base"]:
                yield match["base"], words
            else:
                yield from ((word, ()) for word in words)


def _resolved(base: str, path: Path, root: Path) -> str:
    """A relative module's full name."""
    dots = len(base) - len(base.lstrip("."))
    if not dots:
        return base
    package = path.parent.relative_to(root).parts
    return ".".join((*package[: len(package) - dots + 1], *filter(None, [base[dots:]])))


def _exists(module: str, root: Path) -> bool:
    place = root.joinpath(*module.split("."))
    return place.is_dir() or any(place.with_suffix(suffix).exists() for suffix in PYTHON | CYTHON)


def uses(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(what is used, the module through which it is entered), for every import, cimport and include."""
    for base, names in _written(path):
        through = _resolved(base, path, root)
        outside = path.relative_to(root).parts[0] not in through.split(".")
        if through in FRONTS and outside:  # its public names, some of which are modules
            yield through, through
            continue
        inner = [f"{through}.{name}" for name in names]
        found = [module for module in inner if _exists(module, root)]
        for module in found:
            # `from . import backend` enters backend by its own front; `from .planning import cost` enters planning.
            yield module, module if _room(module) == module else through
        if len(found) < len(names) or not names:
            yield through, through
    text = path.read_text()
    pattern = _CYTHON_INCLUDE if path.suffix in CYTHON else _C_INCLUDE if path.suffix in C else None
    for name in pattern.findall(text) if pattern else ():
        target = next((d / name for d in (path.parent, *path.parents) if (d / name).exists()), None)
        if target is None:
            yield f"missing file {name}", "missing"
        elif root in target.resolve().parents:
            module = module_of(target.resolve(), root)
            # Kernels have no __init__: their headers are their front.
            yield module, _room(module) if (_room(module) or "").endswith(".kernels") else module


def _import_violations(path: Path, root: Path) -> Iterator[str]:
    me = path.relative_to(root)
    room = _room(module_of(path, root))
    if room is None:
        yield f"{me} has no floor: give it one in FLOORS"
        return
    for module, through in uses(path, root):
        top = module.partition(".")[0]
        target = _room(module)
        if through == "missing":
            yield f"{me} uses {module}, which is not in the tree"
        elif target is not None and target != room:
            if FLOOR[target] >= FLOOR[room]:
                yield f"{me} (floor {FLOOR[room]}) uses {module} (floor {FLOOR[target]})"
            if through != target:
                yield f"{me} enters {target} through {through}, not through its front"
        elif target is None and top in FRONTS:
            yield f"{me} uses {module}, which has no floor"
        for library, owners in OWNERS.items():
            foreign = library not in FRONTS and top == library
            ours = target == library and not room.startswith("cconv")
            if (foreign or ours) and not owners & {room, module_of(path, root)}:
                yield f"{me} uses {library}, which belongs to {', '.join(sorted(owners)) or 'nobody'}"
        if any(room == r for r in STDLIB_ONLY) and top not in FRONTS and top not in sys.stdlib_module_names:
            yield f"{me} uses {module}; {room} needs the standard library only"
        if target is not None and room.split(".")[0] != top and target not in OWNERS:
            yield f"{me} uses {module}; the service sees the public names, the library no service"


def violations(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        text = path.read_text()
        found += _import_violations(path, root)
        if len(text.splitlines()) > MOST_LINES:
            found.append(f"{path.relative_to(root)} has {len(text.splitlines())} lines, expected at most {MOST_LINES}")
        if path.suffix in CYTHON | C:
            long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > MOST_CHARACTERS]
            found += [
                f"{path.relative_to(root)}:{number} has more than {MOST_CHARACTERS} characters" for number in long
            ]
        if "kernels" in path.parts:
            found += [f"{path.relative_to(root)} holds {word}" for word in KERNELS_WITHOUT if word in text]
    return found


def test_every_import_goes_down():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_whoever_opens_a_ledgers_file_takes_the_ledgers_sqlite():
    """Two SQLite libraries in one process would break each other's locks on it; scripts within tests count too."""
    direct = re.compile(r"^[ \t]*(?:import|from)[ \t]+(?:py)?sqlite3\b", re.M)
    files = [
        path for folder in ("tests", "benchmarks", "examples", "service") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert [str(path.relative_to(ROOT)) for path in files if direct.search(path.read_text())] == []
    assert direct.search((ROOT / "cconv/ledger/sqlite.py").read_text()), "the rule sees nothing"


def test_the_rule_reads_every_kind_of_file():
    """A rule that looks at nothing finds nothing."""
    seen = {path.suffix for path in sources(ROOT)}
    assert {".py", ".pyx", ".c", ".h", ".cu", ".cuh"} <= seen
    assert ("cconv.planning", "cconv.planning") in set(uses(ROOT / "cconv/ops.py", ROOT))
    assert any(module.startswith("cconv.cpu.kernels") for module, _ in uses(ROOT / "cconv/cpu/_core.pyx", ROOT))
    assert {_room(module_of(path, ROOT)) for path in sources(ROOT)} == set(FLOOR)


#: file -> what is planted there, and a word of the sentence that must be found.
PLANTED = [
    ("cconv/planning/cost.py", "import numpy", "standard library only"),
    ("cconv/planning/cost.py", "from ..ops import conv2d", "floor"),
    ("cconv/planning/cost.py", "def f():\n    from .. import backend", "floor"),
    ("cconv/cpu/__init__.py", "from .. import gpu", "floor"),
    ("cconv/cpu/__init__.py", "from ..reference import conv", "floor"),
    ("cconv/ops.py", "from .planning.cost import of", "not through its front"),
    ("cconv/ops.py", "import cconv.planning.cost", "not through its front"),
    ("cconv/ops.py", "import cupy", "belongs to cconv.gpu"),
    ("cconv/ops.py", "from flask import Flask", "belongs to"),
    ("cconv/ops.py", "import service", "the library no service"),
    ("cconv/ops.py", "import sqlite3", "belongs to cconv.ledger.sqlite"),
    ("cconv/ledger/ledger.py", "from pysqlite3 import dbapi2", "belongs to cconv.ledger.sqlite"),
    ("cconv/ledger/ledger.py", "import sqlite3", "belongs to cconv.ledger.sqlite"),
    ("cconv/ops.py", "from .ledger import Ledger", "floor"),
    ("cconv/ledger/ledger.py", "from ..ops import conv2d", "floor"),
    ("cconv/ledger/ledger.py", "from flask import Flask", "belongs to"),
    ("cconv/ops.py", "import torch", "nobody"),
    ("cconv/ops.py", "x = 1\n" * (MOST_LINES + 1), "lines"),
    ("cconv/cpu/_core.pyx", "#" * (MOST_CHARACTERS + 1), "characters"),
    ("cconv/cpu/kernels/conv.inc.c", f"/* {'long ' * MOST_CHARACTERS} */", "characters"),
    ("cconv/novelty.py", "", "no floor"),
    ("cconv/cpu/_core.pyx", "from ..ops cimport conv2d", "floor"),
    ("cconv/cpu/_core.pyx", "cimport numpy\nfrom .. import backend", "floor"),
    ("cconv/cpu/_core.pyx", 'cdef extern from "kernels/none.h":\n    pass', "not in the tree"),
    ("cconv/cpu/_core.pyx", 'include "../planning/rules.pxd"', "not through its front"),
    ("cconv/cpu/kernels/conv.inc.c", '#include "../inside.h"', "floor"),
    ("cconv/cpu/kernels/conv.inc.c", "#include <Python.h>", "Python.h"),
    ("cconv/cpu/kernels/kernels.h", "static void *f(void) { return malloc(1); }", "malloc"),
    ("cconv/gpu/kernels/conv.cu", '#include "../../cpu/kernels/kernels.h"', "floor"),
    ("service/pipeline.py", "import cconv", "service.engine"),
    ("service/engine.py", "from cconv.planning import cost", "public names"),
    ("service/scheduler.py", "from cconv import ledger", "service.engine"),
    ("service/scheduler.py", "from cconv.ledger import Ledger", "service.ledger"),
    ("service/scheduler.py", "from .routes import register", "floor"),
    ("service/scheduler.py", "import flask", "belongs to"),
]


@pytest.fixture
def house(tmp_path):
    """A small tree that keeps the rule."""
    for name, text in {
        "cconv/__init__.py": "from .ops import conv2d",
        "cconv/errors.py": "",
        "cconv/novelty.py": None,
        "cconv/backend.py": "import numpy",
        "cconv/ops.py": "from . import backend\nfrom .planning import cost\n",
        "cconv/reference.py": "from .planning import cost",
        "cconv/planning/__init__.py": "from . import cost",
        "cconv/planning/cost.py": "from math import prod\nfrom ..errors import ShapeError",
        "cconv/planning/rules.pxd": "",
        "cconv/ledger/__init__.py": "from .ledger import Ledger",
        "cconv/ledger/ledger.py": "import sqlalchemy\nfrom ..errors import ShapeError\nfrom .sqlite import sqlite3",
        "cconv/ledger/sqlite.py": "import sqlite3 as of_python\nimport pysqlite3 as of_package",
        "cconv/cpu/__init__.py": "from ._core import run\nfrom ..planning import cost",
        "cconv/cpu/_core.pyx": 'cimport cython\ncdef extern from "kernels/kernels.h":\n    pass',
        "cconv/cpu/inside.h": "",
        "cconv/cpu/kernels/kernels.h": "",
        "cconv/cpu/kernels/conv.inc.c": '#include "kernels.h"',
        "cconv/gpu/__init__.py": "",
        "cconv/gpu/kernels/conv.cu": "",
        "service/engine.py": "import cconv",
        "service/scheduler.py": "from .engine import Task",
        "service/pipeline.py": "from .scheduler import Scheduler",
        "service/routes/__init__.py": "import flask",
    }.items():
        if text is not None:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def test_a_tree_that_keeps_the_rule_has_no_violations(house):
    assert violations(house) == []


@pytest.mark.parametrize(
    ("name", "planted", "word"), PLANTED, ids=lambda value: value[:40] if isinstance(value, str) else value
)
def test_a_planted_violation_is_found(house, name, planted, word):
    path = house / name
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n{planted}\n")
    found = violations(house)
    assert any(word in sentence for sentence in found), found
