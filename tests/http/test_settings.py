"""Settings: the environment is read in one place, checked, and described in one table.

In: service/config.py and docs/env.md.  Out: the same variables, defaults and meanings.
"""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import cconv
from service.config import Settings

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| `?([^|`]*)`? \| ([^|]*) \|$", re.M)


def shown(value) -> str:
    return (
        ",".join(value)
        if isinstance(value, tuple)
        else f"{value:_}"
        if isinstance(value, int) and value > 99_999
        else str(value)
    )


def test_the_table_in_env_md_is_what_the_code_reads():
    rows = {
        name: (default.strip(), meaning) for name, default, meaning in ROW.findall((ROOT / "docs/env.md").read_text())
    }
    for entry in fields(Settings):
        variable = entry.metadata["variable"]
        assert rows.pop(variable) == (shown(entry.default) or "empty", entry.metadata["meaning"]), variable
    assert set(rows) == {"CCONV_CACHE_DIR", "CCONV_ISA", "CCONV_NUM_THREADS"}  # the library's own


def test_only_config_reads_the_environment():
    for path in (ROOT / "service").rglob("*.py"):
        if path.name != "config.py":
            assert not re.search(r"os\.environ|getenv", path.read_text()), path


def test_a_variable_overrides_its_default_and_an_empty_one_does_not():
    settings = Settings.from_env({"PORT": "81", "CCONV_MODELS": " edges , gabor ", "CCONV_THREADS": "", "HOME": "/"})
    assert settings == Settings(port=81, models=("edges", "gabor"))


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"PORT": "http"}, "PORT: expected int, got 'http'"),
        ({"PORT": "-1"}, "PORT: expected"),
        ({"PORT": "65536"}, "PORT: expected"),
        ({"CCONV_POOL_BYTES": "-1"}, "CCONV_POOL_BYTES: expected a number of at least 0, got -1"),
        ({"CCONV_THREADS": "0"}, "CCONV_THREADS: expected a number of at least 1, got 0"),
        ({"CCONV_DEADLINE_SECONDS": "nan"}, "CCONV_DEADLINE_SECONDS: expected a number of at least"),
        ({"CCONV_DEADLINE_SECONDS": "inf"}, "CCONV_DEADLINE_SECONDS: expected a number of at most 86400, got inf"),
        ({"CCONV_THREADS": "12"}, "CCONV_QUEUE_REQUESTS: expected less than CCONV_THREADS = 12, got 12"),
        ({"CCONV_MAX_FLOPS": "1e9"}, "CCONV_MAX_FLOPS: expected int"),
        ({"CCONV_QUEUE_FLOPS": "10"}, "CCONV_QUEUE_FLOPS: expected at least CCONV_MAX_FLOPS"),
        ({"CCONV_QUEUE_BYTES": "10"}, "CCONV_QUEUE_BYTES: expected at least CCONV_MAX_BODY_BYTES"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_variables_name(environment, text):
    with pytest.raises(ValueError, match=text):
        Settings.from_env(environment)


def test_health_always_has_a_thread():
    """A full house leaves request threads free."""
    assert Settings().queue_requests < Settings().threads


@pytest.mark.parametrize(("host", "bind"), [("::1", "[::1]:8080"), ("127.0.0.1", "127.0.0.1:8080")])
def test_an_address_with_colons_gets_brackets(monkeypatch, host, bind):
    monkeypatch.setenv("HOST", host)
    monkeypatch.delenv("PORT", raising=False)
    assert runpy.run_path(str(ROOT / "service/gunicorn.conf.py"))["bind"] == bind


def test_what_may_lie_idle_is_the_library_s_limit(make_app):
    try:
        for limit in (0, 7 << 20):
            make_app(pool_bytes=limit)
            assert cconv.show_config()["pool_limit_bytes"] == limit
    finally:
        cconv.set_pool_limit(None)
