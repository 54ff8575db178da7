"""ONNX files read without their weights: what is left, where the weights lie, and files that are no messages."""

import mmap
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import cconv  # noqa: E402
from cconv import ModelError  # noqa: E402
from cconv.model import protobuf  # noqa: E402

LEAST = 1 << 12


def _in_memory(data: bytes) -> mmap.mmap:
    file = mmap.mmap(-1, len(data))
    file.write(data)
    return file


@pytest.fixture
def model():
    """Weights of more and of less than LEAST bytes, with raw data and without."""
    rng = np.random.default_rng(0)
    large, small = rng.standard_normal((40, 3, 5, 5), np.float32), rng.standard_normal(40, np.float32)
    weights = [numpy_helper.from_array(large, "large"), numpy_helper.from_array(small, "small")]
    weights.append(helper.make_tensor("listed", TensorProto.FLOAT, [2000], rng.standard_normal(2000)))
    conv = helper.make_node("Conv", ["image", "large", "small"], ["maps"], pads=[2] * 4)
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, channels, 16, 16))
        for name, channels in (("image", 3), ("maps", 40))
    ]
    graph = helper.make_graph([conv], "net", sides[:1], sides[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_file_without_its_weights_is_the_rest_of_it(model):
    data = model.SerializeToString()
    file = _in_memory(data)
    slim, places = protobuf.Reader(file).without(LEAST)
    large, small, _ = model.graph.initializer
    assert len(small.raw_data) < LEAST
    assert [place and file[slice(*place)] for place in places] == [large.raw_data, None, None]
    assert len(slim) < len(data) - len(large.raw_data)
    large.ClearField("raw_data")
    assert onnx.load_model_from_string(slim) == model


def test_weights_may_lie_at_any_byte(model, tmp_path):
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
    answers, places = [], set()
    for length in range(8):
        model.producer_name = "p" * length
        path = tmp_path / f"{length}.onnx"
        onnx.save(model, path)
        places.add(path.read_bytes().index(model.graph.initializer[0].raw_data) % 4)
        answers.append(cconv.load(path)(x))
    assert places == {0, 1, 2, 3}
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_a_program_reads_nothing_from_its_file_once_it_has_run(tmp_path):
    """Neither what is packed nor what is read as it is, a bias and a factor, wherever they lie."""
    rng, path, places = np.random.default_rng(2), tmp_path / "net.onnx", set()
    shapes = {"weight": (1100, 3, 1, 1), "bias": (1100,), "factor": (1100, 2, 2)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape, np.float32), name) for name, shape in shapes.items()]
    nodes = [helper.make_node("Conv", ["image", "weight", "bias"], ["maps"])]
    nodes.append(helper.make_node("Mul", ["maps", "factor"], ["scaled"]))
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, channels, 2, 2))
        for name, channels in (("image", 3), ("scaled", 1100))
    ]
    graph = helper.make_graph(nodes, "net", sides[:1], sides[1:], weights)
    x = rng.standard_normal((1, 3, 2, 2), np.float32)
    for length in range(1, 5):
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="p" * length), path)
        data = path.read_bytes()
        places |= {(tensor.name, data.index(tensor.raw_data) % 4) for tensor in weights}
        model = cconv.load(path)
        answer = model(x)
        with path.open("r+b") as file:
            file.write(bytes(len(data)))
        np.testing.assert_array_equal(model(x), answer)
    assert len(places) == 4 * len(weights)


BAD = {
    "a field that is longer than the file": (b"\x3a\x7f", "longer than what it is in"),
    "an initializer that is longer than the graph": (b"\x3a\x02\x2a\x7f", "longer than what it is in"),
    "a number without end": (b"\x08" + b"\xff" * 20, "a number without end"),
    "a number that stops": (b"\x08\xff", "a number without end"),
    "eight bytes of which three are there": (b"\x09\x00\x00\x00", "longer than what it is in"),
    "a group": (b"\x0b", "a field of kind 3"),
    "two million empty fields": (b"\x50\x00" * 2_000_000, "more than 1048576 fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_message_is_refused(tmp_path, name):
    data, reason = BAD[name]
    path = Path(tmp_path) / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        protobuf.Reader(_in_memory(data)).without(LEAST)
    with pytest.raises(
        ModelError, match=f"net.onnx: expected a valid ONNX model: {reason if 'kind' in reason else 'a|more'}"
    ):
        cconv.load(path)
