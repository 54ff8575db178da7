"""State dicts in safetensors files: torchvision's names and answers, half precision, graphs in a file's metadata."""

import hashlib
import json
import pickle
import re
import zlib
from math import prod

import numpy as np
import pytest

import cconv
from cconv import ArgumentError, ModelError, images, reference
from cconv.model import passes
from cconv.model.architectures import ARCHITECTURES
from cconv.weights import Weights

safetensors = pytest.importorskip("safetensors")
from safetensors.numpy import save_file  # noqa: E402

#: The hash of the names and shapes of each state dict of torchvision 0.29.2, as `_fingerprint` takes it.
FINGERPRINTS = {
    "alexnet": "935c1ea73a7869ee", "vgg11": "b11acd4f90d9643f", "vgg13": "79ca8fd7a1480aa7",
    "vgg16": "ba63c2556d912509", "vgg19": "393fac8b08b63fbe", "vgg11_bn": "eb52f2d89ad478d4",
    "vgg13_bn": "e71996a6a29bacd7", "vgg16_bn": "d8308b804a50efac", "vgg19_bn": "8f342fea647d72df",
    "resnet18": "2bb53b15765c4651", "resnet34": "b945021fb00b779b", "resnet50": "cf11dad974eadeaa",
    "resnet101": "d916ed2068e1af5d", "resnet152": "2fe195791c8ffb5f", "resnext50_32x4d": "f6c1ee50d9878439",
    "mobilenet_v2": "d613ea65450d5318", "squeezenet1_0": "142983e4c19c76ad", "squeezenet1_1": "3fbd2a746421cada",
    "densenet121": "222a58d1fd8d2818", "efficientnet_b0": "b5ec7b4b5e4fedbb",
}  # fmt: skip
#: What torchvision 0.29.2 computes of `_state` and `_image`: five of the numbers of an output or of an inner layer.
ANSWERS = {
    "alexnet": ("avgpool", [4.81753, 3.17738, 5.94884, 1.06766, 3.60497]),
    "vgg11": ("avgpool", [5.61589, 0.384488, 9.5277, 5.57682, 1.44235]),
    "vgg11_bn": ("avgpool", [0.0, 1.72167, 12.8038, 8.50458, 0.0]),
    "resnet18": ("fc", [36.1832, 57.6626, -4.55045, 58.4519, 6.74]),
    "resnet34": ("fc", [382.393, 676.851, -227.031, 522.645, -98.4832]),
    "resnet50": ("fc", [846.068, 191.033, 118.448, -430.057, -1646.44]),
    "resnext50_32x4d": ("fc", [255.097, -1383.77, -1039.34, 1117.48, -1208.22]),
    "mobilenet_v2": ("classifier.1", [-0.602514, -1.34461, -6.18559, 3.77385, 0.76649]),
    "squeezenet1_0": ("flatten", [0.0937272, 0.0, 0.098352, 0.425118, 0.953114]),
    "squeezenet1_1": ("flatten", [0.485596, 0.372049, 0.718078, 0.32468, 0.207475]),
    "densenet121": ("classifier", [-1.56553, 1.99033, 0.980715, 2.18458, 2.51965]),
    "efficientnet_b0": ("classifier.1", [0.24175, -0.084585, 0.0124272, 0.180578, 0.178678]),
}
#: Two inner layers of each, one of them a convolution behind which nothing is folded or fused.
INNER = {
    "alexnet": ("features.3", "features.5"), "vgg11": ("features.3", "features.10"),
    "vgg11_bn": ("features.4", "features.11"), "resnet18": ("layer1.0.conv2", "layer3.1.relu_1"),
    "resnet34": ("layer1.0.conv2", "layer3.5.relu_1"), "resnet50": ("layer1.0.conv2", "layer3.2.relu_2"),
    "resnext50_32x4d": ("layer1.0.conv2", "layer3.2.relu_2"),
    "mobilenet_v2": ("features.2.conv.1.0", "features.9.add"),
    "squeezenet1_0": ("features.3.squeeze", "features.7.cat"),
    "squeezenet1_1": ("features.3.squeeze", "features.7.cat"),
    "densenet121": ("features.denseblock1.denselayer2.conv1", "features.transition2.pool"),
    "efficientnet_b0": ("features.2.0.block.1.0", "features.4.1.add"),
}  # fmt: skip
SIZE = (64, 80)


def _scattered(name: str, shape) -> np.ndarray:
    """Numbers between -0.5 and 0.5 that are the same everywhere: a hash of a name and their places."""
    bits = np.arange(prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> np.uint32(shift)) * np.uint32(factor)
    return ((bits >> np.uint32(8)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)


def _tensor(name: str, shape) -> np.ndarray:
    """Weights that keep a signal's size; variances and scales are positive."""
    values = _scattered(name, shape)
    if len(shape) > 1:
        return values * np.float32((24 / prod(shape[1:])) ** 0.5)
    return values / 4 + (name.endswith(("weight", "running_var")))


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: constant.shape for key, constant in cconv.load(name)._graph.constants.items()}


def _state(name: str) -> dict[str, np.ndarray]:
    return {key: _tensor(key, shape) for key, shape in _shapes(name).items()}


def _image(n=1, size=SIZE) -> np.ndarray:
    return 4 * _scattered("image", (n, 3, *size))


def _written(path, name: str):
    """A state dict's file. The dense layers of the largest are a hole in it: they are zeros, and take no space."""
    header, end, parts = {}, 0, []
    for key, shape in _shapes(name).items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * prod(shape)]}
        if prod(shape) < 1 << 23:
            parts.append((header[key]["data_offsets"][0], _tensor(key, shape)))
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, array in parts:
            file.seek(8 + len(text) + begin)
            file.write(array)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="module", params=ANSWERS)
def network(request, tmp_path_factory):
    """(name, a model of its state dict in a file)."""
    path = _written(tmp_path_factory.mktemp("state") / f"{request.param}.safetensors", request.param)
    yield request.param, cconv.load(path, architecture=request.param)
    path.unlink()


def _close(got, expected, what=""):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max(), err_msg=what)


def test_a_state_dict_gives_what_torchvision_gives(network):
    name, model = network
    layer, expected = ANSWERS[name]
    got = model.run(_image(), [layer])[layer].ravel()
    at = np.linspace(0, got.size - 1, len(expected)).astype(int)
    np.testing.assert_allclose(got[at], expected, rtol=1e-4, atol=2e-5 * np.abs(got).max())


def test_a_state_dict_gives_what_the_reference_gives(network):
    """Planned for the reference and computed in float64; inner layers alone, and beside the output."""
    name, model = network
    asked = (*INNER[name], ANSWERS[name][0])
    x = _image(size=(64, 64))
    plan, values = model._plan(reference.machine(), x.shape[1:], asked)
    program = reference.build(plan, Weights(lambda key: passes.arrays(model._recipes[key])))
    expected = dict(zip(plan.outputs, program.run([x]), strict=True))
    got = model.run(x, asked)
    for layer in asked:
        _close(got[layer], expected[values[layer]].reshape(got[layer].shape), layer)
        assert np.ptp(got[layer]) > 0.1


def _fingerprint(name: str) -> str:
    text = "\n".join(f"{key} {shape}" for key, shape in sorted(_shapes(name).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_names_and_shapes_are_those_of_torchvisions_state_dict(name):
    assert _fingerprint(name) == FINGERPRINTS[name]


def test_every_architecture_is_compared_with_torchvisions():
    assert {*FINGERPRINTS, "resnet50_v1"} == set(ARCHITECTURES)  # the second is the paper's, not torchvision's


@pytest.fixture(scope="module")
def state():
    return _state("squeezenet1_1")


@pytest.fixture
def load(tmp_path):
    """f(tensors, architecture, metadata): the model of a file that is written for it."""

    def made(tensors, architecture=None, metadata=None, **options):
        path = tmp_path / "net.safetensors"
        save_file(tensors, path, metadata=metadata)
        return cconv.load(path, architecture=architecture, **options)

    return made


def test_the_metadata_may_name_the_architecture_and_the_caller_wins(state, load):
    given = load(state, None, {"architecture": "squeezenet1_1", "format": "pt"})
    np.testing.assert_array_equal(given(_image()), load(state, "squeezenet1_1")(_image()))
    load(state, "squeezenet1_1", {"architecture": "nonsense", "graph": "nonsense"})
    with pytest.raises(ModelError, match=r"net.safetensors: architecture: .*got 'resnet51'; the closest are resnet50"):
        load(state, None, {"architecture": "resnet51"})


def test_weights_are_mapped_and_read_only(state, load):
    model = load(state, "squeezenet1_1")
    weight = model._graph.constants["classifier.1.weight"].read()
    assert not weight.flags.owndata
    assert not weight.flags.writeable
    assert model.weights.nbytes == 0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(_image()), model(_image()))


def _bfloat16(path, arrays) -> None:
    """NumPy has no such type: a file is written by hand, its numbers cut off."""
    header, end = {}, 0
    for key, array in arrays.items():
        header[key] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [end, end := end + 2 * array.size]}
    text = json.dumps(header).encode()
    cut = b"".join((array.view(np.uint32) >> 16).astype("<u2").tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + cut)


def test_half_precision_is_converted_exactly(state, load, tmp_path):
    halves = {key: array.astype(np.float16) for key, array in state.items()}
    expected = load({key: array.astype(np.float32) for key, array in halves.items()}, "squeezenet1_1")(_image())
    np.testing.assert_array_equal(load(halves, "squeezenet1_1")(_image()), expected)

    _bfloat16(tmp_path / "bf16.safetensors", state)
    cut = {key: (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for key, array in state.items()}
    expected = load(cut, "squeezenet1_1")(_image())
    np.testing.assert_array_equal(
        cconv.load(tmp_path / "bf16.safetensors", architecture="squeezenet1_1")(_image()), expected
    )


def test_what_a_batch_norm_counts_in_training_is_ignored(load):
    state = _state("mobilenet_v2")
    counts = {f"{key.removesuffix('running_mean')}num_batches_tracked": np.array(7)
              for key in state if key.endswith("running_mean")}  # fmt: skip
    assert len(counts) == 52
    np.testing.assert_array_equal(load(state | counts, "mobilenet_v2")(_image()), load(state, "mobilenet_v2")(_image()))


def test_the_old_names_of_densenets_are_known(load):
    state = _state("densenet121")
    old = {re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", key): array for key, array in state.items()}
    assert len(set(old) - set(state)) == 58 * 10
    np.testing.assert_array_equal(load(old, "densenet121")(_image()), load(state, "densenet121")(_image()))


def test_the_last_layer_may_have_other_classes(state, load):
    few = state | {"classifier.1.weight": state["classifier.1.weight"][:7], "classifier.1.bias": np.zeros(7, "f4")}
    model = load(few, "squeezenet1_1")
    assert model.shapes((1, 3, 64, 64)) == {"flatten": (1, 7)}
    assert model(_image()).shape == (1, 7)


WRONG = {
    "missing": (lambda s: s.pop("features.3.squeeze.bias"), r"52 tensors .* got 1 missing \(features.3.squeeze.bias\)"),
    "unexpected": (lambda s: s.update(fc=np.ones(3, "f4")), r"got 1 unexpected \(fc\)"),
    "many": (lambda s: [s.pop(key) for key in list(s)[:9]], r"9 missing \(features.0.weight, .*, \.\.\.\)"),
    "shape": (
        lambda s: s.update({"features.0.weight": np.ones((64, 3, 5, 5), "f4")}),
        r"'features.0.weight': expected shape \(64, 3, 3, 3\) for squeezenet1_1, got \(64, 3, 5, 5\)",
    ),
    "float64": (lambda s: s.update({"features.0.bias": np.ones(64)}), "'features.0.bias': expected a type of F32.*F64"),
    "integers": (
        lambda s: s.update({"features.0.bias": np.ones(64, "i8")}), "'features.0.bias': expected weights of .*int64"
    ),
    "no classes": (
        lambda s: s.update({"classifier.1.bias": np.ones((), "f4")}), r"expected shape \(1000,\) .*got \(\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_tensors_that_are_not_the_architectures_are_refused(fault, state, load):
    damage, text = WRONG[fault]
    given = dict(state)
    damage(given)
    with pytest.raises(ModelError, match=f"^net.safetensors: .*{text}"):
        load(given, "squeezenet1_1")


def test_an_unknown_architecture_is_refused_with_the_nearest_names(state, load):
    with pytest.raises(ArgumentError, match=r"got 'resnet_50'; the closest are .*resnet50"):
        load(state, "resnet_50")
    with pytest.raises(ModelError, match=r"expected an architecture, as in .*or a graph in the file's metadata"):
        load(state)
    with pytest.raises(ArgumentError, match=r"architecture: expected only with a file \*.safetensors"):
        cconv.load("vgg16", architecture="vgg16")


GRAPH = {
    "input_shape": [3, 8, 8],
    "nodes": [
        {"name": "conv", "operator": "Conv", "inputs": ["input", "w", "b"], "options": {"padding": "same"}},
        {"name": "norm", "operator": "BatchNormalization", "inputs": ["conv", "b", "b", "b", "v"]},
        {"name": "pad", "operator": "Pad", "inputs": ["norm"],
         "options": {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"}},
        {"name": "act", "operator": "LeakyRelu", "inputs": ["pad"], "options": {"alpha": 0.25}},
        {"name": "flat", "operator": "Reshape", "inputs": ["act", "shape"]},
        {"name": "dense", "operator": "Gemm", "inputs": ["flat", "m"], "options": {"transB": 1}},
    ],
    "outputs": ["act", "dense"],
}  # fmt: skip


def _of_graph() -> dict[str, np.ndarray]:
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4,), "m": (5, 400)}
    state = {name: _scattered(name, shape) for name, shape in shapes.items()}
    return state | {"v": state["v"] + 1, "shape": np.array([1, 400])}


def test_a_graph_in_the_metadata_is_run_and_billed(load, by_definition):
    state = _of_graph()
    model = load(state, None, {"graph": json.dumps(GRAPH), "preprocessing": '{"size": 8, "resize": 9}'})
    x = _image(2, (8, 8))
    got = model(x)
    b, v = state["b"][:, None, None], state["v"][:, None, None]
    y = by_definition(x, state["w"], padding="same") + b
    y = np.pad((y - b) / np.sqrt(v + 1e-5) * b + b, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect")
    y = np.where(y < 0, y / 4, y)
    _close(got["act"], y)
    _close(got["dense"], y.reshape(2, 400) @ state["m"].T)
    assert model.cost(x.shape).total.macs == 2 * (4 * 64 * 27 + 5 * 400)
    assert model.prepare(np.ones((3, 20, 30), np.float32)).shape == (3, 8, 8)


def test_the_preprocessing_is_the_architectures_the_files_or_the_callers(state, load):
    imagenet = images.PREPROCESSING["imagenet"]
    assert load(state, "squeezenet1_1").preprocessing == imagenet
    own = {"preprocessing": '{"resize": null, "size": [32, 48], "channels": "BGR", "scale": 255}'}
    model = load(state, "squeezenet1_1", own)
    assert model.preprocessing == images.Preprocessing(resize=None, size=(32, 48), channels="BGR", scale=255)
    assert load(state, "squeezenet1_1", {"preprocessing": "none"}).preprocessing is None
    assert load(state, "squeezenet1_1", own, preprocessing="imagenet").preprocessing == imagenet
    assert load(state, "squeezenet1_1", own, preprocessing="none").preprocessing is None
    for text in ("imagenet22k", '{"sizes": 3}', '{"size": -1}', '{"std": [0, 1, 1]}', "{", '{"mean": [NaN, 0, 0]}', ""):
        with pytest.raises(ModelError, match=r"net\.safetensors: "):
            load(state, "squeezenet1_1", {"preprocessing": text})
