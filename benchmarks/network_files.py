"""Network files: the ONNX files that networks.py measures, with weights that are drawn.

In: a Network.  Out: its file: nine of the ONNX package's suite, an architecture of ours put into ONNX's words, and the
lecture's ten layers.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: Operators whose tensors are compared.
COMPARED = ("Conv", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")
#: Networks that the suite has not.
ARCHITECTURES = ("mobilenet_v2",)


class Network(NamedTuple):
    """A network, and how many times faster than its best peer it has to be."""

    name: str
    bar: float
    batch: int = 1
    precision: str = "highest"

    @property
    def label(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return self.name + batch + (f', "{self.precision}"' if self.precision != "highest" else "")


NETWORKS = (
    Network("vgg19", 1.8), Network("resnet50", 1.3), Network("squeezenet", 1.1), Network("densenet121", 1.1),
    Network("inception_v1", 1.1), Network("inception_v2", 1.1), Network("shufflenet", 1.1),
    Network("mobilenet_v2", 1.1), Network("bvlc_alexnet", 1.0), Network("zfnet512", 1.0), Network("lecture", 2.2),
    Network("lecture", 2.2, batch=8), Network("lecture", 4, precision="high"),
)  # fmt: skip


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], positive: bool = False) -> np.ndarray:
    """Weights that keep the size of what passes through them; of scales and variances, numbers around 1."""
    if positive:
        array = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        array = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    else:
        array = rng.standard_normal(shape) * 0.1
    return array.astype(np.float32)


def _model(name: str, nodes: list, image: tuple[str, tuple[int, ...]], output: str, weights: dict[str, np.ndarray]):
    from onnx import TensorProto, helper, numpy_helper

    given = helper.make_tensor_value_info(image[0], TensorProto.FLOAT, image[1])
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, name, [given], [result], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _lecture(batch: int):
    """Ten 5x5 layers of 100 maps on 64x64."""
    from onnx import helper

    rng, nodes, weights = np.random.default_rng(0), [], {}
    for i in range(10):
        weights[f"w{i}"], weights[f"b{i}"] = _drawn(rng, (100, 100, 5, 5)), np.zeros(100, np.float32)
        nodes.append(helper.make_node("Conv", [f"c{i}", f"w{i}", f"b{i}"], [f"s{i}"], pads=[2] * 4))
        nodes.append(helper.make_node("Relu", [f"s{i}"], [f"c{i + 1}"]))
    return _model("lecture", nodes, ("c0", (batch, 100, 64, 64)), "c10", weights)


def _architecture(name: str):
    """One of cconv's architectures, whose nodes have ONNX's operators and, in convolutions, words of our own."""
    from onnx import helper

    from cconv.model.architectures import build

    rng = np.random.default_rng(0)
    norms = set()

    def source(key: str, shape: tuple[int, ...]) -> np.ndarray:
        return _drawn(rng, shape, positive=key in norms)

    graph = build(name, source, "with drawn weights")
    for node in graph.nodes:
        if node.operator == "BatchNormalization":
            norms |= {node.inputs[1], node.inputs[4]}
    weights = {key: constant.read() for key, constant in graph.constants.items()}
    nodes = []
    for node in graph.nodes:
        inputs, options = list(node.inputs), dict(node.options)
        if node.operator == "Conv":
            side = options.pop("padding", 0)
            options = {"strides": [options.pop("stride", 1)] * 2, "pads": [side] * 4, "group": options.pop("groups", 1)}
        elif node.operator == "Clip":
            for word in ("min", "max"):
                value = np.float32(options.pop(word))
                weights.setdefault(f"{word} {value}", np.array(value))
                inputs.append(f"{word} {value}")
        nodes.append(helper.make_node(node.operator, inputs, [node.name], **options))
    return _model(name, nodes, (graph.input, (1, *graph.input_shape)), graph.outputs[0], weights)


def _suites(name: str):
    """A network of the suite, whose weights, of one value each there, are drawn."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(Path(onnx.__path__[0]) / "backend/test/data/light" / f"light_{name}.onnx")
    graph, rng = model.graph, np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    positive = {node.input[i] for node in norms for i in (1, 4)}
    # A scale may be a layer of its own: Unsqueeze, then Mul.
    factors = {name for node in graph.node if node.op_type == "Mul" for name in node.input}
    positive |= {node.input[0] for node in graph.node if node.op_type == "Unsqueeze" and node.output[0] in factors}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        output = node.output[0]
        array = _drawn(rng, tuple(shapes[node.input[0]]), output in positive)
        graph.initializer.append(numpy_helper.from_array(array, output))
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    filled = {tensor.name for tensor in graph.initializer if tensor.name in used}
    images = [value for value in graph.input if value.name in used - filled]
    weights = [tensor for tensor in graph.initializer if tensor.name in filled]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(images)
    graph.initializer.extend(weights)
    model.ir_version = max(model.ir_version, 4)  # initializers need not be inputs
    return model


def write(network: Network, path: Path) -> None:
    """The network's file."""
    import onnx

    if network.name == "lecture":
        model = _lecture(network.batch)
    elif network.name in ARCHITECTURES:
        model = _architecture(network.name)
    else:
        model = _suites(network.name)
    onnx.save(model, path)


def give(path: Path, names: list[str]) -> Path:
    """A copy of a file whose outputs are tensors of these names."""
    import onnx

    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    copy = path.with_name("tensors.onnx")
    onnx.save(model, copy)
    return copy


def tensors_of(path: Path) -> list[str]:
    """The names of what the operators of COMPARED give."""
    import onnx

    return [node.output[0] for node in onnx.load(path).graph.node if node.op_type in COMPARED]
