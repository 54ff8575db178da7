"""On device: the script for a real GPU, tested without one: it refuses, its page has what it got."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("on_device.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("on_device", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _result(script) -> dict:
    """Figures that nobody could take for measured ones."""
    rates = dict.fromkeys(("cconv", *script.FORMS), 2.0) | {"torch NHWC ieee": 4.0, "torch NCHW tf32": 8.0}
    layer = {"tflops": rates, "terabytes": rates, "errors": dict.fromkeys(rates, 0.5)}
    return {
        "about": dict.fromkeys(("device", "date", "commit", "torch", "cudnn", "cupy", "driver"), "planted"),
        "ceilings": {"copy_terabytes": 1, "matmul_tflops": 1, "call_microseconds": 1},
        "tests": {name: {"passed": True, "last": "planted"} for name in script.TESTS},
        "sanitizers": {"memcheck": {"passed": False, "last": "refused here"}},
        "layers": {"a layer": layer},
    }


def test_a_page_needs_every_test_and_every_layer(script):
    assert script.refusal(_result(script)) == ""
    for part, name, value in (
        ("tests", next(iter(script.TESTS)), {"passed": False, "last": "1 failed"}),
        ("layers", "another", {"failed": "planted"}),
    ):
        result = _result(script)
        result[part][name] = value
        assert name in script.refusal(result)
    assert "tests" in script.refusal({"layers": _result(script)["layers"]})
    assert "none" in script.refusal(_result(script) | {"layers": {}})


def test_what_fails_or_hangs_is_recorded_and_the_rest_goes_on(script, tmp_path, monkeypatch):
    """One after the other into one file, which a later command goes on with."""
    path = tmp_path / "out/gpu.json"
    record = script.Record(path, 3600)
    python = [sys.executable, "-c"]
    record.command("tests", "bad", [*python, "print('3 failed'); raise SystemExit(1)"])
    record.command("tests", "silent", [*python, ""])
    record.command("tests", "good", [*python, "print('== 4 passed in 1 s ==')"])
    hurried = script.Record(path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(script, "LEAST_SECONDS", 0)
        hurried.command("tests", "slow", [*python, "import time; time.sleep(60)"])
    hurried.command("tests", "late", [*python, "print('1 passed')"])
    found = json.loads(path.read_text())["tests"]
    assert {name: one["passed"] for name, one in found.items()} == {
        "bad": False, "silent": False, "good": True, "slow": False, "late": False,
    }  # fmt: skip
    assert found["bad"]["last"] == found["bad"]["output"][-1] == "3 failed"
    assert found["good"]["last"] == "4 passed in 1 s"
    assert "no time left" in found["slow"]["last"]
    assert "no time left" in found["late"]["last"]


def test_the_page_has_the_ratio_to_the_best_exact_form(script):
    row = script.page(_result(script)).splitlines()[-1]
    assert row.startswith("| a layer | 2.0 (2.00) |")
    assert "| 0.50 | 5.0e-01 |" in row


def test_the_job_is_told_with_its_floor(script):
    job = {"samples": 10, "seconds": 2.0, "million_seconds": 200_000.0, "million_transfer_seconds": 50.0}
    assert "2.00 s for 10, so 200000 s for a million; without the layers 50 s." in script.page(
        _result(script) | {"job": {"lecture": job}}
    )
    assert "job" not in script.page(_result(script))


def test_figures_replace_what_stood_between_the_marks(script):
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter"
    once = script.written(text, "new")
    assert once == f"before\n{script.BEGIN}\n\nnew\n\n{script.END}\nafter"
    assert script.written(once, "new") == once
    with pytest.raises(ValueError, match="expected"):
        script.written("no marks", "new")


def test_the_projects_page_has_the_marks(script):
    page = PATH.parents[2] / "docs/benchmarks.md"
    if not page.exists():
        pytest.skip("no documents here")
    assert script.written(page.read_text(), "x") != page.read_text()


def test_without_what_it_needs_it_says_so_and_writes_nothing(tmp_path):
    if all(importlib.util.find_spec(name) for name in ("cupy", "torch")):
        pytest.skip("all is here")
    done = subprocess.run(
        [sys.executable, PATH, "--json", tmp_path / "gpu.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "expected" in done.stderr
    assert not list(tmp_path.iterdir())
