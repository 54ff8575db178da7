"""Config: the only reader of the environment. Every limit of the service stands here once; docs/env.md is its table.

In: environment variables.  Out: Settings, a frozen value that the factory hands down.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

MIB = 1 << 20
DAY_S = 86_400
#: Settings that may be 0; the other numbers are at least 1.
_FROM_ZERO = ("port", "lanes", "warm_up_s", "ledger_timeout_s", "pool_bytes")


def _setting(variable: str, default, meaning: str):
    return field(default=default, metadata={"variable": variable, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """The service's settings; `from_env` reads them, tests make them directly.

    Raises
    ------
    ValueError
        For a value below 1, or limits that contradict each other.
    """

    host: str = _setting("HOST", "127.0.0.1", "address to listen on")
    port: int = _setting("PORT", 8080, "port to listen on; 0 takes a free one")
    api_keys: str = _setting(
        "CCONV_API_KEYS", "", "file of API keys, which `python -m service keys` makes; empty: none"
    )
    auth: str = _setting(
        "CCONV_AUTH", "auto", "`on`, `off`, or `auto`: on where there is CCONV_API_KEYS or HOST is no loopback address"
    )
    threads: int = _setting("CCONV_THREADS", 16, "request threads: they parse, wait, write, and compute what is short")
    lanes: int = _setting(
        "CCONV_LANES", 0, "runs on the CPU at a time, of as many as wait; 0: one for every core, 1: one of all cores"
    )
    device: str = _setting(
        "CCONV_DEVICE", "cpu", "where to compute: cpu, cuda, or auto, a GPU that works or else the CPU"
    )
    models: tuple[str, ...] = _setting("CCONV_MODELS", (), "names of the models to serve, comma-separated; empty: all")
    model_repository: str = _setting(
        "CCONV_MODEL_REPOSITORY", "", "folder of `NAME/VERSION/model.onnx` or `model.safetensors`; empty: none"
    )
    warm_up_s: float = _setting(
        "CCONV_WARM_UP_SECONDS", 60.0, "longest first run of each model of the folder, at the start; 0: no such run"
    )
    access_log: str = _setting("CCONV_ACCESS_LOG", "", "file for the access log; `-` is standard output, empty is none")
    error_log: str = _setting("CCONV_ERROR_LOG", "-", "file for the error log; `-` is standard error")
    log_format: str = _setting("CCONV_LOG_FORMAT", "text", "`text`, or `json`: a line per record and per request")
    watchdog_s: float = _setting(
        "CCONV_WATCHDOG_SECONDS", 120.0, "how long a run may go on after its deadline; then the worker is started anew"
    )
    grace_s: int = _setting("CCONV_GRACE_SECONDS", 60, "after SIGTERM, how long requests in flight may take to finish")
    deadline_s: float = _setting("CCONV_DEADLINE_SECONDS", 60.0, "longest time from a request's arrival to its answer")
    max_body_bytes: int = _setting("CCONV_MAX_BODY_BYTES", 64 * MIB, "largest request body")
    max_json_bytes: int = _setting("CCONV_MAX_JSON_BYTES", 16 * MIB, "largest JSON in a body; parsed it takes far more")
    max_images: int = _setting("CCONV_MAX_IMAGES", 256, "most images in one request")
    max_pixels: int = _setting("CCONV_MAX_PIXELS", 25_000_000, "most pixels of all JPEG and PNG images of one request")
    max_flops: int = _setting(
        "CCONV_MAX_FLOPS", 2 * 10**12, "most floating-point operations (flops + flops_other) of one request"
    )
    max_output_bytes: int = _setting("CCONV_MAX_OUTPUT_BYTES", 256 * MIB, "most bytes of maps in one answer")
    max_batch: int = _setting("CCONV_MAX_BATCH", 32, "most images of several requests that are computed together")
    queue_requests: int = _setting(
        "CCONV_QUEUE_REQUESTS", 12, "most requests in the house at once; fewer than the threads, so that health answers"
    )
    queue_flops: int = _setting("CCONV_QUEUE_FLOPS", 4 * 10**12, "most floating-point operations waiting and running")
    queue_bytes: int = _setting(
        "CCONV_QUEUE_BYTES", 1024 * MIB, "most bytes of bodies, images and maps in the house at once"
    )
    pool_bytes: int = _setting(
        "CCONV_POOL_BYTES", 256 * MIB, "most bytes of the library's memory that lie idle between runs; 0 keeps none"
    )
    ledger: str = _setting(
        "CCONV_LEDGER", "", "URL of the ledger, `sqlite:////path` or `postgresql://...`; empty: bills are not recorded"
    )
    ledger_spool: str = _setting(
        "CCONV_LEDGER_SPOOL", "", "folder of the ledger's lenient mode; empty: an answer waits for the disk"
    )
    ledger_timeout_s: float = _setting(
        "CCONV_LEDGER_TIMEOUT_SECONDS", 5.0, "longest wait for the ledger; then the answer is 503"
    )

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            least = 0 if entry.name in _FROM_ZERO else 1
            if isinstance(value, (int, float)) and not value >= least:
                raise ValueError(f"{entry.metadata['variable']}: expected a number of at least {least}, got {value}")
        for variable, seconds in (("CCONV_DEADLINE", self.deadline_s), ("CCONV_WARM_UP", self.warm_up_s)):
            if seconds > DAY_S:
                raise ValueError(f"{variable}_SECONDS: expected a number of at most {DAY_S}, got {seconds}")
        if not 0 < self.ledger_timeout_s <= DAY_S:
            raise ValueError(f"CCONV_LEDGER_TIMEOUT_SECONDS: expected more than 0, got {self.ledger_timeout_s}")
        if self.log_format not in ("text", "json"):
            raise ValueError(f"CCONV_LOG_FORMAT: expected text or json, got {self.log_format!r}")
        if self.auth not in ("on", "off", "auto"):
            raise ValueError(f"CCONV_AUTH: expected on, off or auto, got {self.auth!r}")
        if self.auth_required and not self.api_keys:
            raise ValueError(
                f"CCONV_API_KEYS: expected a file, as others than this machine may reach {self.host} or CCONV_AUTH is "
                f"on, got none; CCONV_AUTH=off lets anybody compute"
            )
        if self.ledger_spool and not self.ledger:
            raise ValueError("CCONV_LEDGER_SPOOL: expected CCONV_LEDGER too, got none")
        if self.queue_requests >= self.threads:
            raise ValueError(
                f"CCONV_QUEUE_REQUESTS: expected less than CCONV_THREADS = {self.threads}, got {self.queue_requests}"
            )
        if self.port > 65_535:
            raise ValueError(f"PORT: expected a number of at most 65535, got {self.port}")
        for one, together in (("max_flops", "queue_flops"), ("max_body_bytes", "queue_bytes")):
            if getattr(self, together) < getattr(self, one):
                names = {entry.name: entry.metadata["variable"] for entry in fields(self)}
                raise ValueError(f"{names[together]}: expected at least {names[one]} = {getattr(self, one)}")

    @property
    def auth_required(self) -> bool:
        """Whether requests need an API key."""
        return self.auth == "on" or (self.auth == "auto" and (bool(self.api_keys) or not _is_loopback(self.host)))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """The settings with what the environment overrides; a variable that cannot be read is a ValueError."""
        environ = os.environ if environ is None else environ
        given = {}
        for entry in fields(cls):
            variable = entry.metadata["variable"]
            text = environ.get(variable, "").strip()
            if text:
                given[entry.name] = _read(variable, text, type(entry.default))
        return cls(**given)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anything's
        return False


def _read(variable: str, text: str, kind: type):
    if kind is tuple:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{variable}: expected {kind.__name__}, got {text!r}") from None
