"""Repository: the models of a folder by name and version, and how each of them fares. Nothing in here opens a model.

In: `<folder>/<name>/<version>/model.onnx` or `model.safetensors`.  Out: entries, LOADING until somebody has loaded
them: then READY, or UNAVAILABLE with the reason.

The folder is looked through once, at the start. Names that clients send are compared with what was found and never
become paths. Links may point to other places of the folder, and not out of it.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .errors import NotFound
from .wire import LONGEST_NAME, brief

FILES = ("model.onnx", "model.safetensors")
#: What may be typed into an address, a query and the page's form as it is; names that begin with a dot are skipped.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
#: One way to write each number.
VERSION = re.compile(r"[1-9][0-9]{0,17}")
#: Characters of a reason: it is shown to clients.
LONGEST_REASON = 500

log = logging.getLogger(__name__)


class State(StrEnum):
    """The protocol's words."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(eq=False)
class Entry:
    """One version of a model; `version` is empty where a name has none."""

    name: str
    version: str
    path: Path
    state: State = State.LOADING
    reason: str = ""
    #: What the file was made into, once the state is READY.
    model: object = None

    def succeed(self, model: object) -> None:
        self.model, self.reason = model, ""
        self.state = State.READY  # last: other threads look at it first

    def unload(self) -> None:
        """Requests under way keep the model until they are done."""
        self.state, self.reason, self.model = State.UNAVAILABLE, "unloaded", None

    def fail(self, reason: str) -> None:
        self.reason = " ".join(reason.split())[:LONGEST_REASON]
        self.state = State.UNAVAILABLE
        log.warning("model %s version %s is not available: %s", self.name, self.version or "-", self.reason)

    def as_dict(self) -> dict[str, str]:
        """As the protocol's index shows it."""
        return {"name": self.name, "version": self.version, "state": self.state.value, "reason": self.reason}


class Repository:
    """What was found in a folder.

    Parameters
    ----------
    folder : str
        None if empty. One that cannot be listed is a ValueError.
    reserved : names that no model may have
    """

    def __init__(self, folder: str = "", reserved: Iterable[str] = ()):
        self._models: dict[str, dict[str, Entry]] = {}
        self._folder, self._reserved = Path(folder) if folder else None, frozenset(reserved)
        if not folder:
            return
        try:
            children = sorted(Path(folder).iterdir())
        except OSError as error:
            raise ValueError(f"model repository: expected a folder that can be read, got {folder}: {error}") from None
        for child in children:
            if child.name.startswith(".") or not child.is_dir():
                continue
            if not _is_name(child.name):
                log.warning("model repository: skipped a folder whose name no model may have: %s", brief(child.name))
                continue
            self.put(self._look(child))

    def _look(self, folder: Path) -> list[Entry]:
        entries = _versions(folder, Path(os.path.realpath(self._folder)))
        if folder.name in self._reserved:
            for entry in entries:
                entry.fail("expected a name of its own, got one that the service uses itself")
        return entries

    def look(self, name: str) -> list[Entry]:
        """What the folder has of a model now, not yet loaded and not yet in here; NotFound if it has nothing."""
        if self._folder is None or not _is_name(name) or not (self._folder / name).is_dir():
            raise NotFound(f"failed to load '{name}', no such model in the repository")
        return self._look(self._folder / name)

    def put(self, entries: list[Entry]) -> None:
        """These are the versions of their model from now on, at once for everybody who looks."""
        self._models = {**self._models, entries[0].name: {entry.version: entry for entry in entries}}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for versions in self._models.values() for entry in versions.values())

    @property
    def pending(self) -> tuple[Entry, ...]:
        """What nobody has loaded yet."""
        return tuple(entry for entry in self.entries if entry.state is State.LOADING)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all others."""
        self._models = {name: self._models[name] for name in self._models if name in set(names)}

    def find(self, name: str, version: str | None = None) -> Entry:
        """A version of a model in whatever state it is, the highest unless given; NotFound if there is none."""
        versions = self._models.get(name, {})
        found = versions.get(version) if version is not None else next(iter(versions.values()), None)
        if found is None or (version is not None and not version):
            raise NotFound(unknown(name, version))
        return found

    def versions(self, name: str) -> tuple[str, ...]:
        """All versions of a model, from the highest down."""
        return tuple(version for version in self._models.get(name, {}) if version)


def _is_name(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and len(name) <= LONGEST_NAME


def unknown(name: str, version: str | None = None) -> str:
    """Triton's words for a model that there is not."""
    shown = "" if version is None else f" version {version[:16]}"
    return f"Request for unknown model: '{name}'{shown} is not found"


def _versions(folder: Path, base: Path) -> list[Entry]:
    """The versions of one model, from the highest down; what cannot be loaded has failed already."""
    entries = []
    try:
        children = list(folder.iterdir()) if _inside(folder, base) else None
    except OSError as error:
        return [_failed(Entry(folder.name, "", folder), f"expected a folder that can be read: {error.strerror}")]
    if children is None:
        return [_failed(Entry(folder.name, "", folder), "expected a folder of the repository, got a link out of it")]
    for child in sorted((child for child in children if VERSION.fullmatch(child.name)), key=lambda c: -int(c.name)):
        entry = Entry(folder.name, child.name, child)
        entries.append(entry)
        if reason := _locate(entry, base):
            entry.fail(reason)
    if not entries:
        return [_failed(Entry(folder.name, "", folder), "expected folders of versions, 1 and up, got none")]
    return entries


def _failed(entry: Entry, reason: str) -> Entry:
    entry.fail(reason)
    return entry


def _locate(entry: Entry, base: Path) -> str:
    """Set the entry's path to its file; what is wrong with it, if anything."""
    try:
        found = [entry.path / name for name in FILES if os.path.lexists(entry.path / name)]
        if len(found) != 1:
            return f"expected one file, {' or '.join(FILES)}, got {'both' if found else 'neither'}"
        entry.path = found[0]
        if not _inside(entry.path, base):
            return f"{entry.path.name}: expected a file of the repository's folder, got a link out of it"
        if not entry.path.is_file():  # a pipe would never end
            return f"{entry.path.name}: expected a regular file, got none"
    except OSError as error:
        return f"expected a folder that can be read: {error.strerror}"
    return ""


def _inside(path: Path, base: Path) -> bool:
    return base in Path(os.path.realpath(path)).parents
