"""Auth: API keys: made, listed, revoked, and recognised in a request's headers. Only their digests are kept.

In: the file that CCONV_API_KEYS names, and the headers of a request.  Out: its Account; Unauthorized (401) or
Forbidden (403).

    cck_3f9ac01b77d2_pXk...   a key: its id, which is also its account's and no secret, and 256 random bits

The file is JSON, replaced as a whole by `python -m service keys` and read again when it has changed, so that a
revocation holds from the next second on. A digest of so many random bits needs neither salt nor a slow hash.
"""

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from .account import ANONYMOUS, SCOPES, Account
from .config import Settings
from .errors import Forbidden, Unauthorized

KEY = re.compile(r"cck_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
#: How long a change of the file may stay unseen.
LOOK_S = 1.0
#: Compared with where there is no such key, so that an id's existence does not show in the time that a refusal takes.
_NOBODY = hashlib.sha256(b"").hexdigest()
_NAME = re.compile(r"[ -~]{1,128}")
_MOST = 10**15

log = logging.getLogger(__name__)


class KeysError(ValueError):
    """The file of keys, or what should be written into it, is not what it should be."""


@dataclass(frozen=True)
class Key:
    """A key as the file keeps it: what is needed to recognise it, and not the key.

    Attributes
    ----------
    id, name : str
        The account, and whom it was given to.
    digest : str
        SHA-256 of the whole key, in hexadecimal.
    scopes : tuple of str
    created, revoked : str
        UTC; `revoked` is empty while the key is good.
    mflop_per_minute, mflop_per_month : int or None
    """

    id: str
    name: str
    digest: str
    scopes: tuple[str, ...]
    created: str
    revoked: str = ""
    mflop_per_minute: int | None = None
    mflop_per_month: int | None = None

    def __post_init__(self):
        texts = ((self.id, r"[0-9a-f]{12}"), (self.digest, r"[0-9a-f]{64}"), (self.created, r"[0-9T:Z-]{20}"))
        if not all(isinstance(text, str) and re.fullmatch(form, text) for text, form in texts):
            raise KeysError("expected an id, a digest and a time of making, got something else")
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise KeysError("name: expected 1 to 128 printable ASCII characters")
        if not self.scopes or set(self.scopes) - set(SCOPES):
            raise KeysError(f"scopes: expected some of {', '.join(SCOPES)}, got {', '.join(map(str, self.scopes))}")
        if not isinstance(self.revoked, str):
            raise KeysError("revoked: expected a time, or an empty text")
        for name in ("mflop_per_minute", "mflop_per_month"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= _MOST):
                raise KeysError(f"{name}: expected a whole number of 1 to {_MOST}, got {value!r}")

    def account(self) -> Account:
        return Account(self.id, frozenset(self.scopes), self.mflop_per_minute, self.mflop_per_month)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ------------------------------------------------------------------------------------------------------------ the file


def read(path: Path) -> dict[str, Key]:
    """The keys of a file by id; KeysError for one that is no such file. One that is not there has none."""
    try:
        content = json.loads(path.read_text())
        keys = [Key(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in content["keys"]]
    except FileNotFoundError:
        return {}
    except KeysError as error:
        raise KeysError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise KeysError(f"{path}: expected a file made by `python -m service keys`: {type(error).__name__}") from None
    if len({key.id for key in keys}) != len(keys):
        raise KeysError(f"{path}: expected every id once")
    return {key.id: key for key in keys}


@contextmanager
def _rewritten(path: Path) -> Iterator[dict[str, Key]]:
    """The keys, to be changed: written back as a whole, by one process at a time, and to nobody else's eyes."""
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read(path)
        yield keys
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as new:
            try:
                json.dump({"keys": [asdict(key) for key in keys.values()]}, new, indent=1)
                new.flush()
                if path.exists():
                    os.fchmod(new.fileno(), path.stat().st_mode & 0o777)
                os.fsync(new.fileno())
                os.replace(new.name, path)
            except BaseException:
                os.unlink(new.name)
                raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make(
    path: Path,
    name: str,
    scopes: tuple[str, ...] = ("infer", "usage"),
    mflop_per_minute: int | None = None,
    mflop_per_month: int | None = None,
) -> str:
    """A new key, shown this once: the file has its digest."""
    key = f"cck_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
    add(path, key, name, scopes, mflop_per_minute, mflop_per_month)
    return key


def add(
    path: Path,
    key: str,
    name: str,
    scopes: tuple[str, ...] = ("infer", "usage"),
    mflop_per_minute: int | None = None,
    mflop_per_month: int | None = None,
) -> str:
    """Know a key that was made elsewhere; its id. One that is known stays as it is, revoked or not."""
    found = KEY.fullmatch(key)
    if not found:
        raise KeysError("key: expected cck_, 12 hexadecimal digits, _ and 43 letters or digits, got something else")
    identity, digest = found[1], _digest(key)
    new = Key(identity, name, digest, tuple(scopes), _now(), "", mflop_per_minute, mflop_per_month)
    with _rewritten(path) as keys:
        if keys.setdefault(identity, new).digest != digest:
            raise KeysError(f"{identity}: expected the key that has this id already, got another")
    return identity


def revoke(path: Path, identity: str) -> Key:
    """The key with this id is good no more; it stays in the file, as bills name it. KeysError if there is none."""
    with _rewritten(path) as keys:
        if identity not in keys:
            raise KeysError(f"{identity}: expected the id of a key of {path}")
        if not keys[identity].revoked:
            keys[identity] = replace(keys[identity], revoked=_now())
        return keys[identity]


# ------------------------------------------------------------------------------------------------------------ requests


class Auth:
    """Whose request it is, by the settings' file of keys; everybody is ANONYMOUS where keys are not asked for.

    Raises
    ------
    KeysError
        If the file is there and cannot be read.
    """

    def __init__(self, settings: Settings):
        self.required = settings.auth_required
        self._path = Path(settings.api_keys)
        self._lock = threading.Lock()
        self._keys: dict[str, Key] = {}
        self._seen: tuple[int, ...] | None = None
        self._looked = 0.0
        if self.required:
            self._seen = self._stamp()
            self._keys = read(self._path)
            if not self._keys:
                log.warning("there are no API keys yet: all that needs one is refused; `python -m service keys make`")

    def account(self, headers: Mapping[str, str], scope: str) -> Account:
        """Who sends these headers; Unauthorized without a good key, Forbidden where its scopes do not reach."""
        if not self.required:
            return ANONYMOUS
        key = self._recognise(_presented(headers))
        if not key.account().may(scope):
            raise Forbidden(f"API key {key.id}: expected one with scope '{scope}', got {', '.join(key.scopes)}")
        return key.account()

    def _recognise(self, presented: str) -> Key:
        found = KEY.fullmatch(presented)
        key = self._current().get(found[1]) if found else None
        right = hmac.compare_digest(_digest(presented), key.digest if key else _NOBODY)
        if key is None or not right or key.revoked:
            raise Unauthorized("API key: expected one that is known here and not revoked, got another")
        return key

    def _current(self) -> dict[str, Key]:
        """The keys, read again if the file is another one now. One that cannot be read changes nothing."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_S:
                self._looked = now
                stamp = self._stamp()
                if stamp != self._seen:
                    self._seen = stamp
                    try:
                        self._keys = read(self._path)
                    except KeysError as error:
                        log.error("the API keys stay as they were: %s", error)
            return self._keys

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _presented(headers: Mapping[str, str]) -> str:
    """The key that came along: as Bearer, as Basic's password, or in X-API-Key; in one of these only."""
    authorization, plain = headers.get("Authorization", ""), headers.get("X-API-Key", "")
    if bool(authorization) == bool(plain):
        came = "both" if plain else "neither"
        raise Unauthorized(f"API key: expected one in Authorization (Bearer or Basic) or in X-API-Key, got {came}")
    if plain:
        return plain.strip()
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            raise Unauthorized("Authorization: expected user and key in base64, got something else") from None
    raise Unauthorized("Authorization: expected Bearer or Basic, got another scheme")
