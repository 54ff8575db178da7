"""Readme: what the documents show is what happens. Their snippets run in order, in an empty folder.

In: README.md, docs/*.md and the docstrings of cconv.  Out: a failure at the document's own line.

```python blocks of one file share one namespace; in ```console blocks a `$ cconv ...` line is run and compared with
what stands below it; `...` matches anything and white space counts for little. A block with `no-run` in its first line
is left out.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import cconv
from cconv.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
MODULES = ["cconv", *(m.name for m in pkgutil.walk_packages(cconv.__path__, "cconv.") if not m.name.endswith("._core"))]

_BLOCK = re.compile(r"^(?P<indent>[ ]*)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(document: str) -> list[Block]:
    """The blocks of a document that are to be run."""
    found = []
    for match in _BLOCK.finditer(document):
        language, *words = match["info"].split() or [""]
        if language in ("python", "console") and "no-run" not in words:
            line = document.count("\n", 0, match.start("body"))
            body = "".join(text.removeprefix(match["indent"]) for text in match["body"].splitlines(keepends=True))
            found.append(Block(language, line, body))
    return found


def commands(body: str) -> list[tuple[str, str]]:
    """(command, shown output) pairs of a console block; a backslash continues a command."""
    pairs = []
    for line in body.splitlines():
        if line.startswith("$ "):
            pairs.append((line[2:], ""))
        elif pairs and pairs[-1][0].endswith("\\"):
            pairs[-1] = (pairs[-1][0][:-1] + line, "")
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}{line}\n")
    return pairs


def matches(shown: str, got: str) -> bool:
    words = [re.escape(part) for part in " ".join(shown.split()).split("...")]
    return re.fullmatch(".*".join(words), " ".join(got.split()), re.S) is not None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_snippets_of_a_document_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {"__name__": path.stem}
    for block in blocks(path.read_text()):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(path), "exec"), namespace)
            continue
        for command, shown in commands(block.text):
            if command.split()[0] != "cconv":
                continue
            capsys.readouterr()
            code = main(shlex.split(command)[1:])
            output = capsys.readouterr()
            got = output.out + output.err
            assert matches(shown, got), (
                f"{path.name}:{block.line}: $ {command}\nshown:\n{shown}\ngot (exit code {code}):\n{got}"
            )


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_docstring_hold(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_tables_of_the_api_name_every_parameter():
    owners = {"": cconv, "model.": cconv.Model, "layer.": cconv.Conv2d}
    owners |= {f"{name}.": getattr(cconv, name) for name in ("filters", "images", "init")}
    rows = [line for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("|")]
    spans = re.findall(r"`(\w+\.|)(\w+)\(([^()`]*)\)`", "\n".join(rows))
    shown = {(owner, name): re.findall(r"(\w+)(?:=[^,]+)?(?:, |$)", parameters) for owner, name, parameters in spans}
    known = {
        (owner, name): [each for each in inspect.signature(getattr(owners[owner], name)).parameters if each != "self"]
        for owner, name in shown
        if callable(getattr(owners[owner], name, None))
    }
    assert len(known) > 25
    assert {key: shown[key] for key in known} == known


class TestTheTester:
    """A test of snippets that finds none, or forgives all, would be worth nothing."""

    DOCUMENT = (
        "text\n\n```python\nx = 1\n```\n\n"
        "1. list\n   ```console\n   $ cconv info\n   a\n   ...\n   $ ls \\\n   b\n   ```\n"
        "```python no-run\nboom\n```\n"
    )

    def test_blocks_are_found_with_their_lines(self):
        first, second = blocks(self.DOCUMENT)
        assert first == Block("python", 3, "x = 1\n")
        assert (second.language, second.line) == ("console", 8)
        assert commands(second.text) == [("cconv info", "a\n...\n"), ("ls b", "")]

    @pytest.mark.parametrize(
        ("shown", "got", "same"),
        [
            ("a b\n", "a    b", True),
            ("a\n...\nd\n", "a\nb\nc\nd\n", True),
            ("1,024 ... macs", "1,024 x macs", True),
            ("a", "a b", False),
            ("a.c", "abc", False),
            ("", "error", False),
        ],
    )
    def test_outputs_are_compared(self, shown, got, same):
        assert matches(shown, got) == same

    def test_some_documents_and_modules_are_there(self):
        assert DOCUMENTS
        assert {"cconv.ops", "cconv.planning.cost", "cconv.cli"} <= set(MODULES)
