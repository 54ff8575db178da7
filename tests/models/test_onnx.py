"""ONNX files as models: known costs, every tensor against onnx's own evaluator, sizes that a file leaves open."""

from math import prod
from pathlib import Path

import numpy as np
import pytest

import cconv
from cconv import Cost, ShapeError, reference
from cconv.planning import ArithmeticSpec, ConvSpec, PointwiseSpec

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

LIGHT = Path(onnx.__path__[0]) / "backend/test/data/light"
#: Multiply-accumulates at 224x224 of those of the suite's networks that others have published.
KNOWN = {
    "bvlc_alexnet": 654_560_384,
    "resnet50": 4_089_184_256,
    "squeezenet": 349_151_936,
    "vgg19": 19_632_062_464,
}
NETWORKS = sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("light_*.onnx"))


def _counted_from_inferred_shapes(path) -> int:
    """The products of a file of convolutions and dense layers, by the shapes that ONNX infers."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    macs = 0
    for node in graph.node:
        assert node.op_type != "MatMul"
        if node.op_type == "Conv":  # every output takes one filter's weights, which are of its group's channels alone
            macs += prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
        elif node.op_type == "Gemm":
            macs += prod(shapes[node.input[1]]) * shapes[node.output[0]][0]
    return macs


@pytest.mark.parametrize("name", NETWORKS)
def test_the_suites_networks_cost_what_their_shapes_say(name):
    model = cconv.load(LIGHT / f"light_{name}.onnx")
    bill = model.cost((1, *model.input_shape))
    macs = _counted_from_inferred_shapes(LIGHT / f"light_{name}.onnx")
    assert bill.total.macs == macs == KNOWN.get(name, macs)
    assert bill.total.flops == 2 * macs
    assert sum(bill.layers.values()) == bill.total
    assert model.cost((5, *model.input_shape)).total.macs == 5 * macs


def test_the_suite_has_nine_networks():
    assert len(NETWORKS) == 9
    assert set(KNOWN) < set(NETWORKS)


#: Networks of the suite that architectures are, too.
SAME = {"densenet121": "densenet121", "resnet50": "resnet50", "squeezenet": "squeezenet1_1", "vgg19": "vgg19"}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_the_same_network_are_counted_alike(name):
    """A file and code that know nothing of each other: they differ in how they write averages, sums and scales."""
    models = cconv.load(LIGHT / f"light_{name}.onnx"), cconv.load(SAME[name])
    for operators in (("Conv", "Gemm"), ("BatchNormalization",), ("MaxPool",), ("Relu",), ("Concat",)):
        macs, costs = [], []
        for model in models:
            layers = [layer for layer in model.layers if layer.operator in operators]
            macs.append([layer.cost.macs for layer in layers])
            # The last layer of the file's DenseNet is a convolution, which has other operands.
            costs.append(
                [layer.cost for layer in layers][: -1 if name == "densenet121" and "Conv" in operators else None]
            )
        assert macs[0] == macs[1]
        assert costs[0] == costs[1]
    assert models[0].cost((3, 224, 224)).total.macs == models[1].cost((3, 224, 224)).total.macs


def test_what_a_file_has_more_is_counted_by_its_own_rule():
    file, built_in = cconv.load(LIGHT / "light_vgg19.onnx"), cconv.load("vgg19")
    rest = {
        layer.operator: layer.cost for layer in file.layers if layer.operator not in ("Conv", "Gemm", "MaxPool", "Relu")
    }
    assert rest.pop("Softmax") == Cost(0, 4000, 8000)
    assert set(rest.values()) == {Cost()}
    assert sum(layer.parameters for layer in file.layers) == sum(layer.parameters for layer in built_in.layers)


class _Net:
    """An ONNX graph being written."""

    def __init__(self, seed=0):
        self.nodes, self.initializers, self.rng = [], [], np.random.default_rng(seed)

    def constant(self, array):
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def drawn(self, *shape):
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def add(self, operator, *inputs, outputs=1, **attributes):
        names = [f"{operator.lower()}{len(self.nodes)}" + (f".{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x, inputs, outputs, kernel=3, group=1, **attributes):
        attributes.setdefault("pads", [kernel // 2] * 4)
        weight = self.drawn(outputs, inputs // group, kernel, kernel)
        return self.add("Conv", x, weight, self.drawn(outputs), group=group, **attributes)

    def model(self, last, shape=("N", 3, "H", "W"), opset=21):
        names = [name for node in self.nodes for name in node.output]
        values = [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["any"])]
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)], values,
            self.initializers,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), names

    def save(self, folder, last, **rest):
        model, names = self.model(last, **rest)
        path = folder / "net.onnx"
        onnx.save(model, path)
        return path, names


def _mobile(net):
    """What MobileNetV3, EfficientNet and ShuffleNet have: squeeze and excitation, swishes, channel shuffles, sizes that
    are computed."""
    x = net.add("HardSwish", net.conv("image", 3, 8, strides=[2, 2]))
    norm = [net.constant(net.rng.uniform(0.5, 1.5, 8).astype(np.float32)) for _ in range(4)]
    x = net.add("BatchNormalization", net.conv(x, 8, 8, group=8), *norm)
    squeezed = net.add("GlobalAveragePool", x)
    gate = net.add("HardSigmoid", net.conv(net.add("Relu", net.conv(squeezed, 8, 4, 1)), 4, 8, 1), alpha=1 / 6)
    x = net.add("Mul", x, gate)
    x = net.add("Mul", x, net.add("Sigmoid", x))
    n = net.add(
        "Unsqueeze", net.add("Gather", net.add("Shape", x), net.constant(np.int64(0))), net.constant(np.int64([0]))
    )
    hw = net.add("Slice", net.add("Shape", x), net.constant(np.int64([2])), net.constant(np.int64([4])))
    cut = net.add("Concat", n, net.constant(np.int64([2, 4])), hw, axis=0)
    x = net.add("Transpose", net.add("Reshape", x, cut), perm=[0, 2, 1, 3, 4])
    x = net.add("Reshape", x, net.add("Concat", n, net.constant(np.int64([8])), hw, axis=0))
    left, right = net.add("Split", x, outputs=2, axis=1, num_outputs=2)
    right = net.add("Clip", net.conv(right, 4, 4), net.constant(np.float32(0)), net.constant(np.float32(6)))
    x = net.add("Concat", right, left, axis=1)
    x = net.add("Add", x, net.conv(x, 8, 8, 1))
    pooled = net.add("ReduceMean", x, net.constant(np.int64([2, 3])), keepdims=0)
    return net.add("Softmax", net.add("Gemm", pooled, net.drawn(5, 8), net.drawn(5), transB=1))


def _segmenting(net):
    """What U-Nets and feature pyramids have: pads of every kind, transposed convolutions, resizes, sums of three."""
    x = net.add("Pad", "image", net.constant(np.int64([0, 0, 1, 2, 0, 0, 1, 2])), mode="reflect")
    x = net.add("LeakyRelu", net.conv(x, 3, 6, pads=[0] * 4), alpha=0.1)
    x = net.add("Slice", x, *(net.constant(np.int64(v)) for v in ([1], [-1], [3])))
    deep = net.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=0)
    deep = net.add("PRelu", net.conv(deep, 6, 6), net.drawn(6, 1, 1))
    up = net.add("ConvTranspose", deep, net.drawn(6, 6, 2, 2), net.drawn(6), strides=[2, 2])
    nearest = net.add("Resize", deep, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest", nearest_mode="floor",
                      coordinate_transformation_mode="asymmetric")  # fmt: skip
    linear = net.add("Resize", deep, "", net.constant(np.float32([1, 1, 2, 2])), mode="linear")
    total = net.add("Sum", up, nearest, linear)
    x = net.add("Sub", net.constant(np.float32(1)), total)  # no LRN: the evaluator takes the batch for the channels
    x = net.add("Div", net.add("Tanh", x), net.constant(net.rng.uniform(1, 2, (6, 1, 1)).astype(np.float32)))
    x = net.add("Gelu", net.conv(x, 6, 8, dilations=[2, 2], pads=[2] * 4))
    return net.add("DepthToSpace", x, blocksize=2, mode="CRD")


def _sharing(net):
    """What detectors' heads and pyramids have: one weight for several convolutions, here of other strides, too."""
    x = net.add("Relu", net.conv("image", 3, 16))
    weight = net.drawn(16, 16, 3, 3)
    same = net.add("Conv", x, weight, pads=[1] * 4)
    half = net.add("Conv", x, weight, pads=[1] * 4, strides=[2, 2])
    wide = net.add("Conv", x, weight, pads=[2] * 4, dilations=[2, 2])
    return net.add("Add", net.add("Add", same, wide), net.add("GlobalMaxPool", half))


def _dense(net):
    """What DenseNets have: batch norms and ReLUs in front of 1x1 convolutions, one of them for two."""
    maps, channels = net.add("MaxPool", net.conv("image", 3, 8), kernel_shape=[2, 2], strides=[2, 2]), 8
    for _ in range(2):
        norm = [net.constant(net.rng.uniform(0.5, 1.5, channels).astype(np.float32)) for _ in range(4)]
        x = net.conv(net.add("Relu", net.add("BatchNormalization", maps, *norm)), channels, 12, 1)
        maps, channels = net.add("Concat", maps, net.conv(net.add("Relu", x), 12, 5), axis=1), channels + 5
    norm = [net.constant(net.rng.uniform(0.5, 1.5, channels).astype(np.float32)) for _ in range(4)]
    x = net.add("Relu", net.add("BatchNormalization", maps, *norm))
    return net.add("Add", net.conv(x, channels, 4, 1), net.conv(x, channels, 4, 1))


NETS = {"dense": _dense, "mobile": _mobile, "segmenting": _segmenting, "sharing": _sharing}


def _images(n, size, seed=3):
    return np.random.default_rng(seed).standard_normal((n, 3, *size)).astype(np.float32)


@pytest.fixture(params=NETS)
def net(request, tmp_path):
    """(Model, names of its tensors, f(x) -> every tensor by onnx's evaluator)."""
    made = _Net()
    path, names = made.save(tmp_path, NETS[request.param](made))
    graph = onnx.load(path)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    evaluator = ReferenceEvaluator(graph)

    def expected(x):
        """Image by image: sizes are those of one."""
        each = [evaluator.run(None, {"image": image[None]}) for image in x]
        return {name: np.concatenate([np.atleast_1d(value) for value in values])
                for name, *values in zip(names, *each, strict=True)}  # fmt: skip

    return cconv.load(path), names, expected


def test_outputs_may_be_added_by_name_alone(tmp_path):
    """The usual way to look into a network: other runtimes take a file of it, whose outputs then have no type."""
    made = _Net()
    path, names = made.save(tmp_path, made.add("Relu", made.conv("image", 3, 4)))
    file = onnx.load(path)
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[:1])
    file.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(file, path)
    model = cconv.load(path)
    assert set(model.run(_images(2, (8, 9)))) == set(names)


@pytest.mark.parametrize("size", [(24, 32), (16, 40)])
def test_every_tensor_is_what_onnxs_evaluator_says(net, size):
    model, names, expected = net
    x = _images(3, size)
    want = expected(x)
    results = model.run(x, names)
    assert set(results) == set(names)
    for name in names:
        if results[name].dtype == np.int64:  # sizes, once
            np.testing.assert_array_equal(np.tile(results[name].ravel(), len(x)), want[name], err_msg=name)
            continue
        assert results[name].shape == want[name].shape == model.shapes(x.shape, [name])[name]
        np.testing.assert_allclose(results[name], want[name], rtol=2e-4, atol=2e-5, err_msg=name)
        # Alone, where everything is folded and fused that may be.
        np.testing.assert_allclose(model.run(x, [name])[name], want[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_an_image_of_a_batch_gives_the_same_bits_as_alone(net):
    model, _, _ = net
    x = _images(3, (24, 32))
    np.testing.assert_array_equal(model(x), np.concatenate([model(image[None]) for image in x]))
    np.testing.assert_array_equal(model(x)[1], model(x[1]))


def test_asking_for_every_tensor_changes_no_bill(net):
    model, names, _ = net
    everything, default = model.cost((2, 3, 24, 32), names), model.cost((2, 3, 24, 32))
    assert {name: everything.layers[name] for name in default.layers} == default.layers
    assert [layer.name for layer in model.layers] == names
    table = {layer.name: layer for layer in model.layers_at((2, 3, 24, 32))}
    assert {name: table[name].cost for name in names} == everything.layers
    assert {name: table[name].output_shape for name in names} == model.shapes((2, 3, 24, 32), names)


def test_an_early_tensor_costs_and_runs_what_is_below_it(net):
    model, _, _ = net
    early = next(layer.name for layer in model.layers if layer.operator == "Conv")
    bill = model.cost((1, 3, 24, 32), [early])
    assert list(bill.layers)[-1] == early
    assert bill.total.macs < model.cost((1, 3, 24, 32)).total.macs
    model.run(_images(1, (24, 32)), [early])
    assert model.weights.nbytes < 4096


def test_what_is_folded_and_fused_is_no_operation_of_its_own(tmp_path):
    made = _Net()
    path, _ = made.save(tmp_path, _mobile(made))
    model = cconv.load(path)
    plan, _ = model._plan(reference.machine(), (3, 24, 32), model.outputs)
    kinds = [type(step.operation.spec).__name__ for step in plan.steps]
    # BatchNormalization, Relu, Clip, HardSwish and the last Add ride along; x * sigmoid(x) is one pass.
    assert kinds.count("ConvSpec") == 7
    assert [step.operation.spec.activation.name for step in plan.steps
            if type(step.operation.spec) is PointwiseSpec] == ["silu"]  # fmt: skip
    assert [step.operation.spec.kind for step in plan.steps if type(step.operation.spec) is ArithmeticSpec] == ["mul"]


def test_a_norm_and_its_relu_ride_with_the_one_convolution_behind_them(tmp_path):
    made = _Net()
    path, _ = made.save(tmp_path, _dense(made))
    model = cconv.load(path)
    plan, _ = model._plan(reference.machine(), (3, 24, 32), model.outputs)
    convs = [step.operation.spec for step in plan.steps if type(step.operation.spec) is ConvSpec]
    assert sum(spec.preactivated for spec in convs) == 2
    assert sum(spec.groups > 1 for spec in convs) == 1  # two convolutions read the last norm


def test_sizes_that_a_file_leaves_open_are_224_and_may_be_others(tmp_path):
    made = _Net()
    path, _ = made.save(tmp_path, _segmenting(made))
    model = cconv.load(path)
    assert model.input_shape == (3, 224, 224)
    assert model.shapes((3, 224, 224)) == {model.outputs[0]: (2, 448, 448)}
    assert model.shapes((7, 3, 64, 32)) == {model.outputs[0]: (7, 2, 128, 64)}


def test_a_file_for_batches_takes_multiples_of_its_batch(tmp_path):
    made = _Net()
    last = made.add("Transpose", made.add("Relu", "image"), perm=[1, 0, 2])  # mixes images: a run is a batch of 2
    path, _ = made.save(tmp_path, last, shape=(2, 3, 5))
    model = cconv.load(path)
    x = np.arange(-15.0, 45).reshape(4, 3, 5).astype(np.float32)
    want = np.concatenate([np.maximum(x[:2], 0).transpose(1, 0, 2), np.maximum(x[2:], 0).transpose(1, 0, 2)])
    np.testing.assert_array_equal(model(x), want)
    with pytest.raises(ShapeError, match="a multiple of 2 images"):
        model(x[:3])
    assert model.layers[0].output_shape == (2, 3, 5)


def test_a_tensor_that_no_image_changes_is_given_as_it_is(tmp_path):
    made = _Net()
    shape = made.add("Shape", made.conv("image", 3, 4))
    path, _ = made.save(tmp_path, made.add("Relu", conv := made.conv("image", 3, 4)))
    results = cconv.load(path).run(_images(1, (8, 9)), [shape, conv])
    assert results[shape].tolist() == [1, 4, 8, 9]
    assert results[shape].dtype == np.int64
    only = cconv.load(path).run(_images(1, (8, 9)), [shape])
    assert only[shape].tolist() == [1, 4, 8, 9]


def test_operators_of_old_opsets_are_what_their_opset_says(tmp_path):
    """Softmax over all axes from the one given; Upsample and Clip with attributes; Slice and Split too."""
    made = _Net()
    x = made.add("Clip", "image", min=-0.5, max=0.5)
    x = made.add("Slice", x, starts=[1], ends=[2**40], axes=[2])
    x = made.add("Upsample", x, made.constant(np.float32([1, 1, 2, 1])), mode="nearest")
    left, right = made.add("Split", x, outputs=2, axis=3, split=[1, 3])
    last = made.add("Softmax", made.add("Concat", right, left, axis=3), axis=1)
    path, names = made.save(tmp_path, last, shape=(1, 3, 4, 4), opset=9)
    x = _images(1, (4, 4))
    results = cconv.load(path).run(x, names)
    clipped = np.clip(x, -0.5, 0.5)[:, :, 1:].repeat(2, axis=2)
    turned = np.concatenate([clipped[..., 1:], clipped[..., :1]], axis=3)
    np.testing.assert_array_equal(results[names[-2]], turned)
    e = np.exp(turned - turned.max())
    np.testing.assert_allclose(results[last], e / e.sum(), rtol=1e-5)
