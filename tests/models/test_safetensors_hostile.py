"""Hostile safetensors files: whatever the bytes, a ModelError or a model, soon and in little memory; never a crash."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import cconv
from cconv import ModelError
from cconv.model import folding, layers

pytest.importorskip("safetensors")

SEEDED, SLOW = 100, 1000
#: A mutation that asks for more than this is not run: it is valid, and large.
MOST_MACS = 10**8
EXTREMES = (-(2**63), -1, 0, 1, 2, 3, 7, 2**20, 2**31, 2**40, 2**63 - 1, 10**400, 0.5, 1e38, True, None, "SAME", [], {})

WEIGHTS = {"w": (4, 3, 3, 3), "b": (4,), "m": (5, 256)}
NODES = [
    {"name": "conv", "operator": "Conv", "inputs": ["input", "w", "b"], "options": {"padding": [1, 1, 1, 1]}},
    {"name": "act", "operator": "Clip", "inputs": ["conv"], "options": {"min": 0.0, "max": 6.0}},
    {"name": "pool", "operator": "MaxPool", "inputs": ["act"], "options": {"kernel_size": 2, "stride": [1, 2]}},
    {"name": "pad", "operator": "Pad", "inputs": ["pool"], "options": {"pads": [0] * 6 + [1, 0], "mode": "edge"}},
    {"name": "join", "operator": "Concat", "inputs": ["act", "act"], "options": {"axis": 1}},
    {"name": "flat", "operator": "Flatten", "inputs": ["act"]},
    {"name": "dense", "operator": "Gemm", "inputs": ["flat", "m"], "options": {"transB": 1}},
]
GRAPH = {"input_shape": [3, 8, 8], "nodes": NODES, "outputs": ["dense", "pad", "join"]}


def _header(graph=GRAPH, shapes=WEIGHTS, **metadata) -> dict:
    """What precedes the numbers of a file, as an object."""
    end, entries = 0, {}
    for name, shape in shapes.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * int(np.prod(shape))]}
    return entries | {"__metadata__": {"graph": json.dumps(graph), **metadata}}


def _file(header, size=4 * (108 + 4 + 1280)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + np.linspace(-1, 1, size // 4, dtype="<f4").tobytes()


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes set to others, pieces cut out or repeated, the end cut off."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(min(len(mutated), 2000)), rng.choice((1, 2, 8, 64))
        match rng.randrange(5):
            case 0:
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at] = rng.choice(b'0123456789-"[]{},:\0\xff')
            case 2:
                del mutated[at : at + size]
            case 3:
                mutated[at:at] = mutated[at : at + size]
            case 4:
                del mutated[rng.randrange(len(mutated)) :]
        if not mutated:
            break
    return bytes(mutated)


def _replaced(value, rng: random.Random):
    """The same JSON with one thing in it, however deep, at an extreme, dropped or exchanged."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        value = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        if rng.random() < 0.05:
            del value[key]
        elif rng.random() < 0.05:
            value[key] = value[rng.choice(keys)]
        else:
            value[key] = _replaced(value[key], rng)
        return value
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice(
            [*layers.OPERATORS, *folding.FOLD, *WEIGHTS, "input", "", "act", "padding", "\ud800", "x" * 999]
        )
    return rng.choice(EXTREMES)


def _mutations(seed: int, count: int):
    rng = random.Random(seed)
    for i in range(count):
        match i % 4:
            case 0:
                yield _mutated(_file(_header()), rng)
            case 1:
                yield _file(_replaced(_header(preprocessing="imagenet"), rng))
            case _:
                yield _file(_header(_replaced(GRAPH, rng)))


def _survives(data: bytes, path: Path) -> bool:
    """Loads, describes, and runs what is small; True if it was a model after all."""
    begin, said = time.perf_counter(), ""
    path.write_bytes(data)
    try:
        model = cconv.load(path)
        if sum(layer.cost.macs + layer.cost.bytes for layer in model.layers) < MOST_MACS:
            model.run(np.zeros((1, *model.input_shape), np.float32))
    except ModelError as error:
        said = str(error)
    assert time.perf_counter() - begin < 10
    assert len(said) < 3000
    said.encode()  # what is said can be written
    return not said


def _assert_survived(seed: int, count: int, folder: Path) -> None:
    with np.errstate(all="ignore"):
        survived = [_survives(data, folder / "net.safetensors") for data in _mutations(seed, count)]
    assert 0 < sum(survived) < count  # some mutations hurt nothing, some do


def test_damaged_files_are_refused_or_run(tmp_path):
    _assert_survived(1, SEEDED, tmp_path)


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_run(tmp_path):
    _assert_survived(2, SLOW, tmp_path)


def test_the_net_that_is_damaged_is_whole(tmp_path):
    assert _survives(_file(_header()), tmp_path / "net.safetensors")


@pytest.mark.parametrize("end", [0, 1, 7, 8, 9, 500, -4, -1])
def test_a_truncated_file_is_refused(end, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(_file(_header())[:end])
    with pytest.raises(ModelError, match=r"net\.safetensors: "):
        cconv.load(path)


def _one(shape, offsets, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


REFUSED = {
    "a header of more than the file": ((2**40).to_bytes(8, "little") + b"{}", "header of at most"),
    "a header of a little more": ((99).to_bytes(8, "little") + b"{}" + bytes(50), "valid safetensors"),
    "no JSON": (_file(b"{'a'}", 0), "valid safetensors"),
    "a list": (_file(b"[]", 0), "valid safetensors"),
    "JSON without end": (_file(b"[" * 10**6, 0), "valid safetensors"),
    "more than the file": (_file(_one([2**20], [0, 2**22]), 4), "valid safetensors"),
    "less than the file": (_file(_one([1], [0, 4]), 8), "valid safetensors"),
    "a gap": (_file(_one([1], [4, 8]), 8), "valid safetensors"),
    "an overflow": (_file(_one([2**62, 4], [0, 0]), 0), "valid safetensors"),
    "a negative size": (_file(_one([-1], [0, 4]), 4), "valid safetensors"),
    "a shape that is not what lies there": (_file(_one([3], [0, 4]), 4), "valid safetensors"),
    "axes without end": (_file(_one([1] * 99, [0, 4]), 4), "dimension"),
    "overlapping tensors": (_file(_one([1], [0, 4]) | {"v": _one([1], [0, 4])["w"]}, 4), "valid safetensors"),
    "an unknown type": (_file(_one([1], [0, 4], "F33"), 4), "valid safetensors"),
    "a type that is not taken": (_file(_one([4], [0, 4], "F8_E4M3"), 4), "'w': expected a type of F32, F16"),
    "metadata that is no text": (_file({"__metadata__": {"graph": 3}}, 0), "valid safetensors"),
    "a graph that is no JSON": (_file({"__metadata__": {"graph": "{"}}, 0), "graph: expected JSON"),
    "a graph without end": (_file({"__metadata__": {"graph": "[" * 10**5}}, 0), "graph: expected JSON"),
    "half a character": (_file(_header({"\ud800": 1}), 5568), "graph: expected JSON"),
    "a graph of nothing": (_file({"__metadata__": {"graph": "{}"}}, 0), "expected an object of input_shape"),
    "an unknown field": (_file(_header(GRAPH | {"code": "x"})), "expected an object of input_shape"),
    "a node without inputs": (_file(_header(GRAPH | {"nodes": [{"name": "a"}]})), "expected an object of name"),
    "an image that overflows": (_file(_header(GRAPH | {"input_shape": [3, 2**40, 2**40]})), r"2\^31 elements"),
    "an unknown operator": (
        _file(_header(GRAPH | {"nodes": [*NODES, {"name": "x", "operator": "Einsum", "inputs": ["act"]}]})),
        "'x': expected an operator of .*Einsum",
    ),
    "a loop": (
        _file(_header(GRAPH | {"nodes": [*NODES, {"name": "x", "operator": "Relu", "inputs": ["x"]}]})), "comes? before"
    ),
    "an unknown output": (_file(_header(GRAPH | {"outputs": ["dens"]})), "got 'dens'; the closest are dense"),
    "a missing tensor": (_file(_header(shapes={"w": (4, 3, 3, 3), "m": (5, 256)}), 5552), r"1 missing \(b\)"),
    "weights that do not fit": (_file(_header(shapes=WEIGHTS | {"w": (3, 4, 3, 3)})), r"'conv' \(Conv\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_run_is_refused_with_its_reason(name, tmp_path):
    data, text = REFUSED[name]
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=f"net.safetensors: .*{text}"):
            cconv.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.safetensors: expected a file that can be read"):
        cconv.load(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"folder\.safetensors"):
        cconv.load(tmp_path / "folder.safetensors")


def test_numbers_that_are_not_aligned_are_read(tmp_path):
    path, x = tmp_path / "net.safetensors", np.ones((3, 8, 8), np.float32)
    results = []
    for spaces in range(4):
        path.write_bytes(_file(json.dumps(_header()).encode() + b" " * spaces))
        results.append(cconv.load(path).run(x)["dense"])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_name_that_is_long_takes_no_time(tmp_path):
    path, begin = tmp_path / "net.safetensors", time.perf_counter()
    for name in ("denselayer1" * 10**5, "a" * 10**6):
        path.write_bytes(_file({name: _one([1], [0, 4])["w"]}, 4))
        with pytest.raises(ModelError, match="1 unexpected"):
            cconv.load(path, architecture="densenet121")
    assert time.perf_counter() - begin < 5
