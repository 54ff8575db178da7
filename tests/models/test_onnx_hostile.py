"""Hostile ONNX files: whatever the bytes, a ModelError or a model, soon and in little memory; never a crash."""

import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import cconv
from cconv import CconvError, ModelError
from cconv.model import folding, layers

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

LIGHT = Path(onnx.__path__[0]) / "backend/test/data/light"
SEEDED, SLOW = 200, 2000
#: A mutation that asks for more than this is not run: it is valid, and large.
MOST_MACS = 10**8


def _tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def _model(nodes, initializers=(), shape=(1, 3, 8, 8), outputs=("y",), opset=21, kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["any"]) for name in outputs], list(initializers),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _conv_net():
    """Small, with every kind of thing in it: weights, shapes that are computed, branches."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["p", "", "scales"], ["u"], mode="linear"),
        helper.make_node("Concat", ["u", "r"], ["k"], axis=1),
        helper.make_node("Shape", ["k"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "zeros"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["k", "target"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["g"], name="gemm"),
        helper.make_node("Softmax", ["g"], ["y"]),
    ]
    initializers = [
        _tensor("w", weight), _tensor("b", np.zeros(4, np.float32)), _tensor("scales", np.float32([1, 1, 2, 2])),
        _tensor("zero", np.int64(0)), _tensor("zeros", np.int64([0])), _tensor("rest", np.int64([-1])),
        _tensor("m", rng.standard_normal((512, 5)).astype(np.float32)),
    ]  # fmt: skip
    return _model(nodes, initializers)


def _saved(model, folder, name="model.onnx"):
    path = folder / name
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes set to extremes, pieces cut out, repeated or swapped, the end cut off."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(mutated))
        size = rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del mutated[at : at + size]
            case 3:
                mutated[at:at] = mutated[at : at + size]
            case 4:
                mutated[at:at] = bytes(rng.randrange(256) for _ in range(size))
            case 5:
                del mutated[rng.randrange(len(mutated)) :]
        if not mutated:
            mutated = bytearray(b"\x08")
    return bytes(mutated)


def _rewritten(model, rng: random.Random) -> bytes:
    """A file that parses, with numbers at their extremes, operands exchanged, and operators that are others."""
    model = onnx.ModelProto.FromString(model)
    nodes, names = model.graph.node, [tensor.name for tensor in model.graph.initializer] + ["x", "", "r", "k", "f"]
    extremes = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 2**20, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = rng.choice(nodes)
        match rng.randrange(6):
            case 0 if node.attribute:
                attribute = rng.choice(node.attribute)
                if attribute.ints:
                    attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(extremes)
                else:
                    attribute.i, attribute.f = rng.choice(extremes), rng.choice((0.0, -1.0, 1e38, float("nan")))
            case 1:
                node.input[rng.randrange(len(node.input))] = rng.choice(names)
            case 2:
                node.op_type = rng.choice([*layers.OPERATORS, *folding.FOLD, "Loop"])
            case 3:
                word = rng.choice(
                    ("axis", "group", "alpha", "size", "blocksize", "keepdims", "to", "num_outputs", "beta")
                )
                node.attribute.append(helper.make_attribute(word, rng.choice(extremes)))
            case 4:
                word = rng.choice(("pads", "strides", "dilations", "kernel_shape", "perm", "axes", "output_shape"))
                sizes = [rng.choice(extremes) for _ in range(rng.choice((0, 1, 2, 4)))]
                node.attribute.append(helper.make_attribute(word, sizes, attr_type=onnx.AttributeProto.INTS))
            case 5:
                tensor = rng.choice(model.graph.initializer)
                array = numpy_helper.to_array(tensor)
                if array.size < 8:
                    array = np.full_like(array, np.clip(rng.choice(extremes), -(2**62), 2**62))
                else:
                    array = array.reshape(rng.choice([array.shape[::-1], (-1,), (1, *array.shape), array.shape]))
                tensor.CopyFrom(_tensor(tensor.name, array))
    return model.SerializeToString()


def _survives(data: bytes, folder: Path) -> bool:
    """Loads, describes, and runs what is small; True if it was a model after all."""
    begin, said = time.perf_counter(), ""
    try:
        model = cconv.load(_saved(data, folder))
        cost = sum(layer.cost.macs + layer.cost.bytes for layer in model.layers)
        if cost < MOST_MACS:
            model.run(np.zeros((model._graph.batch, *model.input_shape), np.float32))
    except CconvError as error:
        said = str(error)
    assert time.perf_counter() - begin < 10
    assert len(said) < 3000
    return not said


def _mutations(seed: int, count: int):
    rng = random.Random(seed)
    sources = [_conv_net().SerializeToString()] + [
        (LIGHT / f"light_{name}.onnx").read_bytes() for name in ("bvlc_alexnet", "squeezenet", "shufflenet")
    ]
    for i in range(count):
        match i % 4:
            case 0:
                yield _mutated(rng.choice(sources), rng)
            case 1:
                yield _mutated(sources[0], rng)
            case _:
                yield _rewritten(sources[0], rng)


def _assert_survived(seed: int, count: int, folder: Path) -> None:
    with np.errstate(all="ignore"):
        survived = [_survives(data, folder) for data in _mutations(seed, count)]
    assert 0 < sum(survived) < count  # some mutations hurt nothing, some do


def test_damaged_files_are_refused_or_run(tmp_path):
    _assert_survived(1, SEEDED, tmp_path)


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_run(tmp_path):
    _assert_survived(2, SLOW, tmp_path)


def test_the_net_that_is_damaged_is_whole(tmp_path):
    model = cconv.load(_saved(_conv_net(), tmp_path))
    y = model(np.ones((2, 3, 8, 8), np.float32))
    assert y.shape == (2, 5)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("end", [0, 1, 7, 100, -1])
def test_a_truncated_file_is_refused(end, tmp_path):
    data = _conv_net().SerializeToString()
    with pytest.raises(ModelError):
        cconv.load(_saved(data[:end], tmp_path))


RELU = helper.make_node("Relu", ["x"], ["y"], name="act")
REFUSED = {
    "unknown operator": (_model([helper.make_node("Einsum", ["x"], ["y"], name="odd", equation="...")]), "odd.*Einsum"),
    "foreign domain": (
        _model([helper.make_node("Gelu", ["x"], ["y"], name="odd", domain="com.microsoft")]), "valid ONNX|odd"
    ),
    "a loop": (
        _model([helper.make_node("Relu", ["b"], ["y"]), helper.make_node("Relu", ["y"], ["b"])]), "topologically|before"
    ),
    "an option of no Relu": (_model([helper.make_node("Relu", ["x"], ["y"], slope=1.0)]), "valid ONNX model.*slope"),
    "that and an unknown operator, of which the checker speaks first": (
        _model([helper.make_node("Relu", ["x"], ["r"], slope=1.0), helper.make_node("Einsum", ["r"], ["y"])]),
        "valid ONNX model.*slope",
    ),
    "itself": (_model([helper.make_node("Relu", ["y"], ["y"])]), "valid ONNX"),
    "missing input": (_model([helper.make_node("Add", ["x", "nowhere"], ["y"])]), "nowhere"),
    "missing output": (_model([RELU], outputs=("z",)), "z|valid ONNX"),
    "the same name twice": (_model([RELU, RELU]), "valid ONNX|name of its own"),
    "opset too old": (_model([RELU], opset=5), "expected one from 6 to"),
    "opset too new": (_model([RELU], opset=9999), "expected one from 6 to|valid ONNX"),
    "integers": (_model([RELU], kind=TensorProto.INT64), "float32"),
    "float64": (_model([RELU], kind=TensorProto.DOUBLE), "float32"),
    "an image that overflows": (_model([RELU], shape=(1, 2**40, 2**40, 2**40)), "2\\^31"),
    "a negative size": (_model([RELU], shape=(1, 3, -8, 8)), "elements|valid ONNX"),
    "no shape": (_model([RELU], shape=None), "expected a shape|shape. of"),
    "weights of another type": (
        _model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], [_tensor("w", np.ones((4, 3, 3, 3)))]),
        "float32",
    ),
    "weights that do not fit": (
        _model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
               [_tensor("w", np.ones((4, 5, 3, 3), np.float32))]), "'y'.*Conv.*5 of weight",
    ),
    "padding without end": (
        _model([helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[2**40] * 4)]), "MaxPool"
    ),
    "a result that overflows": (
        _model([helper.make_node("Resize", ["x", "", "s"], ["y"])], [_tensor("s", np.float32([1, 1, 1e9, 1e9]))]),
        "expected a result of 1 to",
    ),
    "a constant that overflows": (
        _model([helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
               [_tensor("s", np.int64([2**40, 2**40]))]), "constant of at most",
    ),
    "constants that multiply": (
        _model([helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("ConstantOfShape", ["t"], ["d"]),
                helper.make_node("Mul", ["c", "d"], ["e"]), helper.make_node("Add", ["x", "e"], ["y"])],
               [_tensor("s", np.int64([1, 2**20])), _tensor("t", np.int64([2**20, 1]))]), "constant of at most",
    ),
    "a stride of nothing": (
        _model([helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[0, 0])]), "stride"
    ),
    "too few operands": (_model([helper.make_node("Add", ["x"], ["y"])]), "Add"),
    "two images": (_model([helper.make_node("Add", ["x", "z"], ["y"])]), "z"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_run_is_refused_with_its_reason(name, tmp_path):
    model, text = REFUSED[name]
    path = _saved(model, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=text):
            cconv.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def _promised(shape, raw: bytes):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, raw_data=raw)
    return _model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2**31, 2**31), (2**62, 4), (-1, 4)])
def test_a_tensor_promised_larger_than_the_file_is_refused(shape, tmp_path):
    with pytest.raises(ModelError):
        cconv.load(_saved(_promised(shape, b"\0" * 16), tmp_path))


def test_numbers_that_are_fewer_than_promised_are_refused(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(1, 3, 1, 1), float_data=[1.0])
    with pytest.raises(ModelError, match="w"):
        cconv.load(_saved(_model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]), tmp_path))


def _outside(location, folder, offset="0", length="12"):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(3, 1, 1), data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return _saved(_model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]), folder)


def test_external_data_in_the_models_folder_is_mapped(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"\0" * 8 + np.float32([1, 2, 3]).tobytes())
    model = cconv.load(_outside("w.bin", tmp_path, offset="8"))
    y = model(np.zeros((1, 3, 8, 8), np.float32))
    np.testing.assert_array_equal(y[0, :, 0, 0], [1, 2, 3])


@pytest.mark.parametrize("where", ["../w.bin", "/etc/hostname", "link.bin", "away/w.bin", "", ".", "missing.bin"])
def test_external_data_elsewhere_is_refused(where, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for outside in (tmp_path / "w.bin", tmp_path / "other/w.bin"):
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes(b"\0" * 12)
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "away").symlink_to(tmp_path / "other")
    with pytest.raises(ModelError):
        cconv.load(_outside(where, folder))


@pytest.mark.parametrize(("offset", "length"), [("4", "12"), ("-4", "12"), ("0", "11"), ("x", "12"), ("0", "9" * 30)])
def test_external_data_that_is_not_there_is_refused(offset, length, tmp_path):
    (tmp_path / "w.bin").write_bytes(b"\0" * 12)
    with pytest.raises(ModelError):
        cconv.load(_outside("w.bin", tmp_path, offset, length))


def test_an_unknown_layer_of_a_file_is_refused_with_the_nearest_names():
    model = cconv.load(LIGHT / "light_squeezenet.onnx")
    with pytest.raises(ModelError, match=r"got 'softmaxout_2'; the closest are softmaxout_1"):
        model.cost((1, 3, 224, 224), ["softmaxout_2"])


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        cconv.load(tmp_path / "nothing.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ModelError, match=r"folder\.onnx"):
        cconv.load(tmp_path / "folder.onnx")
