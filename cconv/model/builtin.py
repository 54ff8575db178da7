"""Builtin: the registry of models that need no file.

In: a name and a seed.  Out: a Graph and a function Node -> its arrays.

Filter banks and the texture model carry their weights. The published architectures carry none: theirs are drawn by He's
rule on the first run, so they cost and run like the trained networks, and recognise nothing. Their layers are named as
torchvision.models.feature_extraction.get_graph_node_names names them.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np

from .. import filters, init
from . import texture
from .graph import INPUT, Graph, Node

IMAGE = (3, 224, 224)
CLASSES = 1000
Parameters = Callable[[Node], tuple]


class _Chain:
    """Nodes being collected, each reading the one before unless told otherwise."""

    def __init__(self, channels: int = IMAGE[0]):
        self.nodes: list[Node] = []
        self.last = INPUT
        self.channels = channels

    def add(self, name: str, operator: str, *inputs: str, weight=None, bias=False, **options) -> str:
        self.nodes.append(Node(name, operator, inputs or (self.last,), weight, bias, options))
        self.last = name
        return name

    def conv(self, name: str, outputs: int, kernel: int, *inputs: str, bias=False, **options) -> str:
        weight = (outputs, self.channels, kernel, kernel)
        self.channels = outputs
        return self.add(name, "Conv", *inputs, weight=weight, bias=bias, **options)

    def norm(self, name: str) -> str:
        return self.add(name, "BatchNormalization", weight=(self.channels,))

    def dense(self, name: str, outputs: int, features: int) -> str:
        return self.add(name, "Gemm", weight=(outputs, features), bias=True)

    def graph(self, name: str, description: str, outputs: tuple[str, ...] | None = None) -> Graph:
        return Graph(name, description, IMAGE, tuple(self.nodes), outputs or (self.last,))


def he_parameters(node: Node, *, seed: int) -> tuple:
    """A node's arrays, drawn from the seed and the node's name, so that the order of drawing does not matter."""
    if node.operator == "BatchNormalization":
        one, zero = np.ones(node.weight, np.float32), np.zeros(node.weight, np.float32)
        return one, zero, zero, one
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{node.name}".encode()).digest()[:16])
    bias = np.zeros(node.weight[0], np.float32) if node.bias else None
    return init.he_normal(node.weight, own_seed), bias


# Filter banks and the texture model ---------------------------------------------------------------------------------
# None of them pads: a frame of zeros around a picture would be its strongest edge.


def _given(weights: dict[str, np.ndarray]) -> Parameters:
    return lambda node: (weights[node.name].astype(np.float32), None)


def _bank(name: str, seed: int) -> tuple[Graph, Parameters]:
    weight = filters.bank(name)
    chain = _Chain()
    chain.conv("conv", len(weight), weight.shape[-1])
    return chain.graph(name, f"A bank of {len(weight)} filters: {filters.BANKS[name][0]}."), _given({"conv": weight})


def _texture(seed: int) -> tuple[Graph, Parameters]:
    edges = filters.bank("edges")
    combinations = np.stack(list(texture.combinations().values()))
    chain = _Chain()
    chain.conv("level1.conv", len(edges), edges.shape[-1])
    rectified = chain.add("level1.relu", "Relu")
    chain.add("level1.pool", "MaxPool", kernel_size=2)
    chain.conv("level2.conv", len(combinations), texture.SIZE)
    top = chain.add("level2.relu", "Relu")
    graph = chain.graph("texture", "Two levels: edges, then stripes, corners and discs.", (rectified, top))
    return graph, _given({"level1.conv": edges, "level2.conv": combinations})


# Published architectures --------------------------------------------------------------------------------------------


def _alexnet() -> Graph:
    """Krizhevsky 2014 (arXiv:1404.5997), as torchvision has it: one tower, adaptive average pooling to 6x6."""
    chain = _Chain()
    kernels = {0: (64, 11, 4, 2), 3: (192, 5, 1, 2), 6: (384, 3, 1, 1), 8: (256, 3, 1, 1), 10: (256, 3, 1, 1)}
    for index in range(13):
        name = f"features.{index}"
        if index in kernels:
            outputs, kernel, stride, padding = kernels[index]
            chain.conv(name, outputs, kernel, bias=True, stride=stride, padding=padding)
        elif index - 1 in kernels:
            chain.add(name, "Relu")
        else:
            chain.add(name, "MaxPool", kernel_size=3, stride=2)
    chain.add("avgpool", "AdaptiveAveragePool", output_size=(6, 6))
    chain.add("flatten", "Flatten")
    chain.add("classifier.0", "Dropout")
    chain.dense("classifier.1", 4096, 256 * 6 * 6)
    chain.add("classifier.2", "Relu")
    chain.add("classifier.3", "Dropout")
    chain.dense("classifier.4", 4096, 4096)
    chain.add("classifier.5", "Relu")
    chain.dense("classifier.6", CLASSES, 4096)
    return chain.graph("alexnet", "AlexNet, one tower (Krizhevsky 2014); weights drawn at random.")


def _vgg(depth: int, convs_per_block: tuple[int, ...]) -> Graph:
    """Simonyan & Zisserman 2014 (arXiv:1409.1556), configurations D and E."""
    chain = _Chain()
    names = (f"features.{index}" for index in range(100))
    for outputs, convs in zip((64, 128, 256, 512, 512), convs_per_block, strict=True):
        for _ in range(convs):
            chain.conv(next(names), outputs, 3, bias=True, padding=1)
            chain.add(next(names), "Relu")
        chain.add(next(names), "MaxPool", kernel_size=2)
    chain.add("avgpool", "AdaptiveAveragePool", output_size=(7, 7))
    chain.add("flatten", "Flatten")
    chain.dense("classifier.0", 4096, 512 * 7 * 7)
    chain.add("classifier.1", "Relu")
    chain.add("classifier.2", "Dropout")
    chain.dense("classifier.3", 4096, 4096)
    chain.add("classifier.4", "Relu")
    chain.add("classifier.5", "Dropout")
    chain.dense("classifier.6", CLASSES, 4096)
    return chain.graph(f"vgg{depth}", f"VGG-{depth} (Simonyan & Zisserman 2014); weights drawn at random.")


def _basic_block(chain: _Chain, name: str, width: int, stride: int) -> str:
    """Two 3x3 convolutions; the name of the last batch norm."""
    chain.conv(f"{name}.conv1", width, 3, stride=stride, padding=1)
    chain.norm(f"{name}.bn1")
    chain.add(f"{name}.relu", "Relu")
    chain.conv(f"{name}.conv2", width, 3, padding=1)
    return chain.norm(f"{name}.bn2")


def _bottleneck(chain: _Chain, name: str, width: int, stride: int, stride_on_1x1: bool) -> str:
    """1x1, 3x3 and 1x1 to four times the width; the name of the last batch norm."""
    first, second = (stride, 1) if stride_on_1x1 else (1, stride)
    chain.conv(f"{name}.conv1", width, 1, stride=first)
    chain.norm(f"{name}.bn1")
    chain.add(f"{name}.relu", "Relu")
    chain.conv(f"{name}.conv2", width, 3, stride=second, padding=1)
    chain.norm(f"{name}.bn2")
    chain.add(f"{name}.relu_1", "Relu")
    chain.conv(f"{name}.conv3", 4 * width, 1)
    return chain.norm(f"{name}.bn3")


def _resnet(name: str, description: str, blocks: tuple[int, ...], block, expansion: int) -> Graph:
    """He et al. 2015 (arXiv:1512.03385); `block` adds the residual branch of one block."""
    chain = _Chain()
    chain.conv("conv1", 64, 7, stride=2, padding=3)
    chain.norm("bn1")
    chain.add("relu", "Relu")
    shortcut = chain.add("maxpool", "MaxPool", kernel_size=3, stride=2, padding=1)
    for stage, count in enumerate(blocks):
        for index in range(count):
            at = f"layer{stage + 1}.{index}"
            given, width, stride = chain.channels, 64 << stage, 2 if stage and index == 0 else 1
            branch = block(chain, at, width, stride)
            if stride > 1 or given != expansion * width:
                chain.channels = given
                chain.conv(f"{at}.downsample.0", expansion * width, 1, shortcut, stride=stride)
                shortcut = chain.norm(f"{at}.downsample.1")
            chain.add(f"{at}.add", "Add", branch, shortcut)
            # A block has one ReLU in torch, and its calls are numbered: relu, relu_1, ...
            calls = sum(node.operator == "Relu" for node in chain.nodes if node.name.startswith(f"{at}."))
            shortcut = chain.add(f"{at}.relu_{calls}", "Relu")
    chain.add("avgpool", "GlobalAveragePool")
    chain.add("flatten", "Flatten")
    chain.dense("fc", CLASSES, chain.channels)
    return chain.graph(name, description)


def _resnet18() -> Graph:
    return _resnet(
        "resnet18", "ResNet-18 (He et al. 2015); weights drawn at random.", (2, 2, 2, 2), _basic_block, 1
    )  # fmt: skip


def _resnet50(stride_on_1x1: bool) -> Graph:
    name, where = ("resnet50_v1", "first 1x1") if stride_on_1x1 else ("resnet50", "3x3")
    return _resnet(
        name, f"ResNet-50 (He et al. 2015), strides on the {where} convolution; weights drawn at random.",
        (3, 4, 6, 3), partial(_bottleneck, stride_on_1x1=stride_on_1x1), 4,
    )  # fmt: skip


def _drawn(graph: Callable[[], Graph], seed: int) -> tuple[Graph, Parameters]:
    return graph(), partial(he_parameters, seed=seed)


#: THE REGISTRY: name -> seed -> (graph, parameters).
MODELS: dict[str, Callable[[int], tuple[Graph, Parameters]]] = {
    **{name: partial(_bank, name) for name in filters.names()},
    "texture": _texture,
    "alexnet": partial(_drawn, _alexnet),
    "vgg16": partial(_drawn, partial(_vgg, 16, (2, 2, 3, 3, 3))),
    "vgg19": partial(_drawn, partial(_vgg, 19, (2, 2, 4, 4, 4))),
    "resnet18": partial(_drawn, _resnet18),
    "resnet50": partial(_drawn, partial(_resnet50, False)),
    "resnet50_v1": partial(_drawn, partial(_resnet50, True)),
}


def model_names() -> tuple[str, ...]:
    """The names that :func:`cconv.load` knows.

    Examples
    --------
    >>> "vgg16" in model_names()
    True
    """
    return tuple(MODELS)


def make(name: str, seed: int) -> tuple[Graph, Parameters]:
    """A built-in's graph and the source of its arrays; KeyError for an unknown name."""
    return MODELS[name](seed)
