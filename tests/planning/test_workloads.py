"""Workloads: the layers of the benchmark, their bars, and the arithmetic of its report.

In: benchmarks/workloads.py, report.py and machine.py, which are files of a checkout and not of the wheel.
"""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import cconv

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks belong to a checkout, not to the wheel")


@pytest.fixture(scope="module")
def bench():
    """name -> module of the folder; they import each other by their bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in ("workloads", "report", "machine", "peers", "compare")}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def layers(bench):
    return bench["workloads"].LAYERS


def _class(layer) -> str:
    """The class of a layer, from its geometry alone: the bar's own words."""
    n, inputs, height, width = layer.x
    outputs, _, kernel, _ = layer.weight
    least = min(inputs, outputs)
    if max(inputs, outputs) <= 16:
        return "tiny"
    if layer.groups > 1:
        return "depthwise" if layer.groups == inputs else "grouped"
    if kernel == 3 and inputs == 3:
        return "3 channels"
    if layer.stride > 1 or layer.dilation > 1 or least < 64 or layer.dtype == "float64":
        return "direct"
    if kernel == 5:
        return "5x5, batch" if n > 1 else "5x5"
    if kernel != 3:
        return "direct"
    if min(height, width) >= 56:
        return "3x3, large map"
    if min(height, width) == 28:
        return "3x3, 28x28"
    return "3x3, small map, batch" if n > 1 else "3x3, small map"


def test_every_layer_has_the_bar_of_its_class(layers):
    assert [layer.bar for layer in layers] == [_class(layer) for layer in layers]


def test_every_class_has_a_layer_and_every_name_is_one_layer(bench, layers):
    assert {layer.bar for layer in layers} == set(bench["workloads"].CLASSES)
    assert len({layer.name for layer in layers}) == len(layers)


def test_a_layer_knows_its_output_and_its_cost(layers):
    for layer in layers:
        cost = cconv.conv2d_cost(layer.x, layer.weight, bias=True, **layer.options)
        assert cost.macs == math.prod(layer.output) * math.prod(layer.weight[1:]), layer.name


def test_a_layers_arrays_are_the_same_in_every_process(layers):
    for layer in layers[-4:]:
        first, again = layer.arrays(), layer.arrays()
        for a, b, shape in zip(first, again, (layer.x, layer.weight, layer.weight[:1]), strict=True):
            assert a.shape == shape
            assert a.dtype == layer.dtype
            np.testing.assert_array_equal(a, b)


def _form(name: str, milliseconds: float, *, variant="", layout="NCHW", executed=None) -> dict:
    seconds = milliseconds / 1e3
    return {
        "name": name, "variant": variant, "layout": layout, "plan": "direct", "executed_flops": executed,
        "median_s": seconds, "quartiles_s": [0.9 * seconds, 1.2 * seconds],
    }  # fmt: skip


def _record(layer, forms: list[dict], **row) -> dict:
    """A run of one layer."""
    cost = cconv.conv2d_cost(layer.x, layer.weight, bias=True, **layer.options)
    row = {"layer": layer.name, "flops": cost.flops, "forms": forms, "foreign_share": 0.01, **row}
    machine = {
        "peak_flops_per_s": {"avx2": {"1": 5e10, "2": 1e11}},
        "bytes_per_s": {"1": {"read": 2e10, "copy": 1e10}},
        "fault_s": {"page_4k": 1e-6, "page_2m": None},
    }
    return {
        "date": "2026-11-21T00:00:00+00:00", "commit": "abc", "processor": "none", "threads": 2, "rounds": 5,
        "versions": {"cconv": {}, "torch": "2.13.0"}, "machine": machine, "layers": [row],
        "peak_flops_per_s": {"avx2": 1e11, "avx512": 2e11}, "foreign_share": 0.01,
    }  # fmt: skip


def _layer(layers, bar: str):
    return next(layer for layer in layers if layer.bar == bar)


def test_a_ratio_is_to_the_fastest_variant_of_the_fastest_peer(bench, layers):
    record = _record(
        _layer(layers, "direct"),
        [
            _form("cconv", 2.0),
            _form("torch", 9.0, variant="slow"),
            _form("torch", 3.0, variant="fast"),
            _form("openvino NHWC", 4.0, layout="NHWC"),
        ],
    )
    (row,) = record["layers"]
    assert bench["report"].ratio(row) == pytest.approx(1.5)
    assert bench["report"].best_peer(row)["variant"] == "fast"


def test_a_result_that_no_array_can_hold_is_not_compared_with(bench, layers):
    forms = [_form("cconv", 2.0), _form("torch", 3.0), _form("ncnn blocked", 1.0, layout="blocked")]
    (row,) = _record(_layer(layers, "direct"), forms)["layers"]
    assert bench["report"].ratio(row) == pytest.approx(1.5)


def test_looped_ncnn_has_a_bar_of_its_own_on_batches_of_small_maps(bench, layers):
    forms = [_form("cconv", 1.0), _form("torch", 2.6), _form("ncnn", 1.1)]
    (row,) = _record(_layer(layers, "3x3, small map, batch"), forms)["layers"]
    verdicts = {check.what: (check.got, check.met) for check in bench["report"].checks(row)}
    assert verdicts["highest"] == (pytest.approx(2.6), True)
    assert verdicts["over looped ncnn"] == (pytest.approx(1.1), False)


def test_the_function_is_judged_by_torchs_function_and_by_the_layer(bench, layers):
    layer = _layer(layers, "3x3, large map")
    forms = [_form("cconv", 1.0), _form("cconv conv2d", 1.4), _form("torch", 0.1), _form("torch functional", 2.8)]
    verdicts = {check.what: check for check in bench["report"].checks(_record(layer, forms)["layers"][0])}
    assert verdicts["conv2d over torch's function"].got == pytest.approx(2.0)
    assert verdicts["conv2d over torch's function"].met
    assert verdicts["conv2d's time over Conv2d's"].got == pytest.approx(1.4)
    assert not verdicts["conv2d's time over Conv2d's"].met


def test_a_layer_that_no_peer_computes_has_no_ratio_and_no_verdict(bench, layers):
    record = _record(_layer(layers, "direct"), [_form("cconv", 1.0)])
    assert bench["report"].ratio(record["layers"][0]) is None
    assert bench["report"].summary(record) == []
    assert "–" in bench["report"].markdown(record)


def test_the_share_of_the_peak_counts_what_was_issued(bench, layers):
    layer = _layer(layers, "5x5")
    record = _record(layer, [_form("cconv", 10.0, executed=1e9)])
    (row,) = record["layers"]
    assert bench["report"].executed_share(record, row, row["forms"][0]) == pytest.approx(0.5)
    assert bench["report"].executed_share(record, row, row["forms"][0], "avx2") == pytest.approx(1.0)
    assert bench["report"].nominal(row, row["forms"][0]) == pytest.approx(204.8)


def test_the_summary_is_the_geometric_mean_the_worst_row_and_the_mean_regret(bench, layers):
    slow = _record(_layer(layers, "direct"), [_form("cconv", 2.0), _form("torch", 1.0)], regret={"regret": 0.1})
    fast = _record(_layer(layers, "5x5"), [_form("cconv", 1.0), _form("torch", 8.0)], regret={"regret": 0.0})
    summary = bench["report"].summary(slow | {"layers": slow["layers"] + fast["layers"]})
    assert [check.got for check in summary] == pytest.approx([2.0, 0.5, 0.05])
    assert [check.met for check in summary] == [True, False, True]


def test_tables_go_between_the_marks_of_a_file(bench, layers, tmp_path):
    report = bench["report"]
    record = _record(_layer(layers, "direct"), [_form("cconv", 1.0, executed=1e9), _form("torch", 2.0)])
    path = tmp_path / "page.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # writing again replaces
        report.write_markdown(record, path)
        text = path.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count(_layer(layers, "direct").name) == 2
    assert "2.00 / 1" in text
    assert "1.000 ±20%" in text


def test_the_page_of_benchmarks_has_the_marks(bench):
    text = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert text.count(bench["report"].BEGIN) == text.count(bench["report"].END) == 1
    assert text.index(bench["report"].BEGIN) < text.index(bench["report"].END)


def test_every_peer_is_pinned_and_torch_exactly(bench):
    lines = [line for line in (BENCHMARKS / "peers.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    for peer in bench["peers"].PEERS:
        assert any(line.startswith((f"{peer}==", f"{peer}>=")) for line in lines), peer


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_machines_figures_are_those_of_a_machine(bench):
    machine = bench["machine"].Machine()
    for isa in machine.isas:
        assert 1e9 < machine.peak(isa, 1, rounds=1) < 1e12
    faults = machine.faults(rounds=1)
    assert 0 < faults["page_4k"] < 1e-2
    assert faults["page_2m"] is None or 0 < faults["page_2m"] < 1


def test_the_command_names_what_it_does_not_know(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--peers", "torch,tensorflow"])
    with pytest.raises(SystemExit):
        bench["compare"].parsed()
    assert "tensorflow" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["compare.py", "--layers", "no such layer"])
    with pytest.raises(SystemExit, match="no such layer"):
        bench["compare"].chosen_layers(bench["compare"].parsed())


def test_malloc_is_told_to_keep_memory_in_the_peers_timed_processes_alone(bench, monkeypatch):
    """Whatever the caller's own environment tells it."""
    compare = bench["compare"]
    for name in (*compare.RECYCLING, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "1")

    def told(name, recycling):
        found = compare.environment(name, 2, None, recycling)
        assert found["OMP_NUM_THREADS"] == found["CCONV_NUM_THREADS"] == "2"
        return {key: value for key, value in found.items() if "MALLOC" in key or "GLIBC" in key}

    for name in ("cconv", "direct", "reference", "machine", *bench["peers"].PEERS):
        assert told(name, recycling=True) == (compare.RECYCLING if name in bench["peers"].PEERS else {})
        assert told(name, recycling=False) == {}


@pytest.mark.slow
def test_a_run_without_peers_writes_its_record(bench, monkeypatch, tmp_path):
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    options = ["--layers", "tiny", "--rounds", "2", "--seconds", "0.001", "--out", str(record), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    bench["compare"].main()
    read = json.loads(record.read_text())
    assert [row["layer"] for row in read["layers"]] == ["tiny 8->8 3x3 16x16", "tiny 16->16 1x1 14x14"]
    for row in read["layers"]:
        assert {form["name"] for form in row["forms"]} == set(bench["report"].OURS)
        assert all(form["l2_error"] < 1e-5 and form["median_s"] > 0 for form in row["forms"])
    assert "tiny 8->8 3x3 16x16" in page.read_text()
