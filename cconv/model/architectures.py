"""Architectures: published networks, built by code.

In: an architecture's name and where its constants come from.  Out: a Graph.

Layers are named as torchvision.models.feature_extraction.get_graph_node_names names them, but for the blocks of
torchvision.ops, which it takes for one layer each: here they are the layers that they are made of. Constants are named
as in a state dict. One builder per family; the table at the end has its members.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from .graph import INPUT, Constant, Graph, Node

IMAGE = (3, 224, 224)
CLASSES = 1000
#: A constant's name and shape -> its array.
Source = Callable[[str, tuple[int, ...]], np.ndarray]


class Chain:
    """Nodes being collected, each reading the one before unless told otherwise, and their constants.

    Attributes
    ----------
    last : str
        The node that was added last, and its `channels`.
    classes : int
        Outputs of a network's last layer.
    """

    def __init__(self, source: Source, classes: int = CLASSES):
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self.source = source
        self.last = INPUT
        self.channels = IMAGE[0]
        self.classes = classes

    def add(self, name: str, operator: str, *inputs: str, **options) -> str:
        self.nodes.append(Node(name, operator, inputs or (self.last,), options))
        self.last = name
        return name

    def constant(self, name: str, *shape: int) -> str:
        self.constants[name] = Constant(name, shape, partial(self.source, name, shape))
        return name

    def conv(self, name: str, outputs: int, kernel: int, *inputs: str, bias=False, **options) -> str:
        depth = self.channels // options.get("groups", 1)
        own = [self.constant(f"{name}.weight", outputs, depth, kernel, kernel)]
        if bias:
            own.append(self.constant(f"{name}.bias", outputs))
        self.channels = outputs
        return self.add(name, "Conv", *(inputs or (self.last,)), *own, **options)

    def norm(self, name: str) -> str:
        words = ("weight", "bias", "running_mean", "running_var")
        return self.add(
            name, "BatchNormalization", self.last, *(self.constant(f"{name}.{word}", self.channels) for word in words)
        )

    def unit(self, name: str, outputs: int, kernel: int, activation: Callable | None = None, **options) -> str:
        """A convolution that keeps the size, its batch norm and an activation, numbered as a Sequential's parts."""
        self.conv(f"{name}.0", outputs, kernel, padding=kernel // 2, **options)
        self.norm(f"{name}.1")
        return activation(self, f"{name}.2") if activation else self.last

    def concat(self, name: str, *inputs: str, channels: int) -> str:
        self.channels = channels
        return self.add(name, "Concat", *inputs, axis=1)

    def dense(self, name: str, outputs: int, features: int) -> str:
        weight, bias = self.constant(f"{name}.weight", outputs, features), self.constant(f"{name}.bias", outputs)
        return self.add(name, "Gemm", self.last, weight, bias, transB=1)

    def graph(self, name: str, description: str, outputs: tuple[str, ...] | None = None) -> Graph:
        return Graph(name, description, IMAGE, tuple(self.nodes), outputs or (self.last,), self.constants)


def _relu6(chain: Chain, name: str) -> str:
    return chain.add(name, "Clip", min=0.0, max=6.0)


def _silu(chain: Chain, name: str) -> str:
    return chain.add(name, "Swish")


def _sequence(name: str) -> Iterable[str]:
    """The names of a Sequential's parts."""
    return (f"{name}.{index}" for index in range(1000))


def _three_dense(chain: Chain, features: int, operators: tuple[str, ...]) -> None:
    """The classifier of AlexNet and VGG, which order its parts differently."""
    chain.add("flatten", "Flatten")
    wide = [(4096, features), (4096, 4096), (chain.classes, 4096)]
    for index, operator in enumerate(operators):
        if operator == "Gemm":
            chain.dense(f"classifier.{index}", *wide.pop(0))
        else:
            chain.add(f"classifier.{index}", operator)


def _alexnet(chain: Chain) -> None:
    """One tower, adaptive average pooling to 6x6."""
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
    _three_dense(chain, 256 * 6 * 6, ("Dropout", "Gemm", "Relu", "Dropout", "Gemm", "Relu", "Gemm"))


def _vgg(convs_per_block: tuple[int, ...], norms: bool, chain: Chain) -> None:
    names = iter(_sequence("features"))
    for outputs, convs in zip((64, 128, 256, 512, 512), convs_per_block, strict=True):
        for _ in range(convs):
            chain.conv(next(names), outputs, 3, bias=True, padding=1)
            if norms:
                chain.norm(next(names))
            chain.add(next(names), "Relu")
        chain.add(next(names), "MaxPool", kernel_size=2)
    chain.add("avgpool", "AdaptiveAveragePool", output_size=(7, 7))
    _three_dense(chain, 512 * 7 * 7, ("Gemm", "Relu", "Dropout", "Gemm", "Relu", "Dropout", "Gemm"))


def _basic_block(chain: Chain, name: str, width: int, stride: int) -> str:
    """Two 3x3 convolutions; the name of the last batch norm."""
    chain.conv(f"{name}.conv1", width, 3, stride=stride, padding=1)
    chain.norm(f"{name}.bn1")
    chain.add(f"{name}.relu", "Relu")
    chain.conv(f"{name}.conv2", width, 3, padding=1)
    return chain.norm(f"{name}.bn2")


def _bottleneck(chain: Chain, name: str, width: int, stride: int, stride_on_1x1=False, groups=1, wider=1) -> str:
    """1x1, 3x3 and 1x1 to four times the width; the name of the last batch norm."""
    first, second = (stride, 1) if stride_on_1x1 else (1, stride)
    chain.conv(f"{name}.conv1", wider * width, 1, stride=first)
    chain.norm(f"{name}.bn1")
    chain.add(f"{name}.relu", "Relu")
    chain.conv(f"{name}.conv2", wider * width, 3, stride=second, padding=1, groups=groups)
    chain.norm(f"{name}.bn2")
    chain.add(f"{name}.relu_1", "Relu")
    chain.conv(f"{name}.conv3", 4 * width, 1)
    return chain.norm(f"{name}.bn3")


def _resnet(blocks: tuple[int, ...], block: Callable, expansion: int, chain: Chain) -> None:
    """`block` adds the residual branch of one block."""
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
    chain.dense("fc", chain.classes, chain.channels)


def _mobilenet_v2(chain: Chain) -> None:
    names = iter(_sequence("features"))
    chain.unit(next(names), 32, 3, _relu6, stride=2)
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, stride in stages:
        for index in range(count):
            name, given, shortcut = next(names), chain.channels, chain.last
            parts = iter(_sequence(f"{name}.conv"))
            if expansion > 1:
                chain.unit(next(parts), given * expansion, 1, _relu6)
            wide, pace = given * expansion, 1 if index else stride
            chain.unit(next(parts), wide, 3, _relu6, stride=pace, groups=wide)
            chain.conv(next(parts), outputs, 1)
            branch = chain.norm(next(parts))
            if pace == 1 and given == outputs:
                chain.add(f"{name}.add", "Add", shortcut, branch)
    chain.unit(next(names), 1280, 1, _relu6)
    chain.add("adaptive_avg_pool2d", "GlobalAveragePool")
    chain.add("flatten", "Flatten")
    chain.add("classifier.0", "Dropout")
    chain.dense("classifier.1", chain.classes, chain.channels)


def _fire(chain: Chain, name: str, squeezed: int, expanded: int) -> None:
    """1x1 to few channels, then 1x1 and 3x3 side by side."""
    chain.conv(f"{name}.squeeze", squeezed, 1, bias=True)
    few = chain.add(f"{name}.squeeze_activation", "Relu")
    both = []
    for part, kernel in (("expand1x1", 1), ("expand3x3", 3)):
        chain.channels = squeezed
        chain.conv(f"{name}.{part}", expanded, kernel, few, bias=True, padding=kernel // 2)
        both.append(chain.add(f"{name}.{part}_activation", "Relu"))
    chain.concat(f"{name}.cat", *both, channels=2 * expanded)


def _squeezenet(first: tuple[int, int], pools: tuple[int, ...], chain: Chain) -> None:
    """`pools` are the places of the max pools among the features."""
    chain.conv("features.0", *first, bias=True, stride=2)
    chain.add("features.1", "Relu")
    squeezed = iter((16, 16, 32, 32, 48, 48, 64, 64))
    for index in range(2, 13):
        if index in pools:
            chain.add(f"features.{index}", "MaxPool", kernel_size=3, stride=2, ceil_mode=True)
        else:
            few = next(squeezed)
            _fire(chain, f"features.{index}", few, 4 * few)
    chain.add("classifier.0", "Dropout")
    chain.conv("classifier.1", chain.classes, 1, bias=True)
    chain.add("classifier.2", "Relu")
    chain.add("classifier.3", "GlobalAveragePool")
    chain.add("flatten", "Flatten")


def _densenet(blocks: tuple[int, ...], growth: int, chain: Chain) -> None:
    """Every layer of a block reads all maps before it."""
    chain.conv("features.conv0", 2 * growth, 7, stride=2, padding=3)
    chain.norm("features.norm0")
    chain.add("features.relu0", "Relu")
    chain.add("features.pool0", "MaxPool", kernel_size=3, stride=2, padding=1)
    for stage, count in enumerate(blocks, start=1):
        maps, channels = [chain.last], chain.channels
        for index in range(1, count + 1):
            name = f"features.denseblock{stage}.denselayer{index}"
            if index == 1:  # torch concatenates a list of one
                chain.add(f"{name}.cat", "Identity")
            else:
                chain.concat(f"{name}.cat", *maps, channels=channels)
            for part, outputs, kernel in ((1, 4 * growth, 1), (2, growth, 3)):
                chain.norm(f"{name}.norm{part}")
                chain.add(f"{name}.relu{part}", "Relu")
                chain.conv(f"{name}.conv{part}", outputs, kernel, padding=kernel // 2)
            maps, channels = [*maps, chain.last], channels + growth
        chain.concat(f"features.denseblock{stage}.cat", *maps, channels=channels)
        if stage < len(blocks):
            name = f"features.transition{stage}"
            chain.norm(f"{name}.norm")
            chain.add(f"{name}.relu", "Relu")
            chain.conv(f"{name}.conv", channels // 2, 1)
            chain.add(f"{name}.pool", "AveragePool", kernel_size=2)
    chain.norm("features.norm5")
    chain.add("relu", "Relu")
    chain.add("adaptive_avg_pool2d", "GlobalAveragePool")
    chain.add("flatten", "Flatten")
    chain.dense("classifier", chain.classes, chain.channels)


def _squeeze_excitation(chain: Chain, name: str, squeezed: int) -> None:
    """Every map times a number that is made of the means of all."""
    maps, channels = chain.last, chain.channels
    chain.add(f"{name}.avgpool", "GlobalAveragePool")
    chain.conv(f"{name}.fc1", squeezed, 1, bias=True)
    _silu(chain, f"{name}.activation")
    chain.conv(f"{name}.fc2", channels, 1, bias=True)
    gates = chain.add(f"{name}.scale_activation", "Sigmoid")
    chain.add(f"{name}.mul", "Mul", gates, maps)


def _efficientnet_b0(chain: Chain) -> None:
    chain.unit("features.0", 32, 3, _silu, stride=2)
    stages = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )  # fmt: skip
    for stage, (expansion, kernel, stride, outputs, count) in enumerate(stages, start=1):
        for index in range(count):
            name, given, shortcut = f"features.{stage}.{index}", chain.channels, chain.last
            parts = iter(_sequence(f"{name}.block"))
            if expansion > 1:
                chain.unit(next(parts), given * expansion, 1, _silu)
            wide, pace = given * expansion, 1 if index else stride
            chain.unit(next(parts), wide, kernel, _silu, stride=pace, groups=wide)
            _squeeze_excitation(chain, next(parts), max(1, given // 4))
            branch = chain.unit(next(parts), outputs, 1)
            if pace == 1 and given == outputs:
                chain.add(f"{name}.stochastic_depth", "Identity")  # it drops nothing but in training
                branch = chain.last
                chain.add(f"{name}.add", "Add", branch, shortcut)
    chain.unit("features.8", 1280, 1, _silu)
    chain.add("avgpool", "GlobalAveragePool")
    chain.add("flatten", "Flatten")
    chain.add("classifier.0", "Dropout")
    chain.dense("classifier.1", chain.classes, chain.channels)


class Architecture(NamedTuple):
    """Adds a network's nodes to a chain; what it is, and whose; what torchvision does to its pictures."""

    build: Callable[[Chain], None]
    description: str
    preprocessing: str = "imagenet"


def _resnets() -> dict[str, Architecture]:
    he, xie = "(He et al. 2015, arXiv:1512.03385)", "(Xie et al. 2016, arXiv:1611.05431)"
    deep = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    found = {
        f"resnet{depth}": Architecture(partial(_resnet, blocks, _basic_block, 1), f"ResNet-{depth} {he}")
        for depth, blocks in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)))
    }
    for depth, blocks in deep.items():
        text = f"ResNet-{depth} {he}, strides on the 3x3 convolution"
        found[f"resnet{depth}"] = Architecture(partial(_resnet, blocks, _bottleneck, 4), text)
    papers, grouped = partial(_bottleneck, stride_on_1x1=True), partial(_bottleneck, groups=32, wider=2)
    text = f"ResNet-50 {he}, strides on the first 1x1 convolution"
    found["resnet50_v1"] = Architecture(partial(_resnet, deep[50], papers, 4), text)
    text = f"ResNeXt-50, 32 groups of 4 {xie}"
    return {**found, "resnext50_32x4d": Architecture(partial(_resnet, deep[50], grouped, 4), text)}


def _vggs() -> dict[str, Architecture]:
    simonyan, found = "(Simonyan & Zisserman 2014, arXiv:1409.1556)", {}
    depths = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
    for depth, convs in depths.items():
        found[f"vgg{depth}"] = Architecture(partial(_vgg, convs, False), f"VGG-{depth} {simonyan}")
        text = f"VGG-{depth} with batch norms {simonyan}"
        found[f"vgg{depth}_bn"] = Architecture(partial(_vgg, convs, True), text)
    return found


#: THE TABLE, by torchvision's names; resnet50_v1 is the paper's.
ARCHITECTURES: dict[str, Architecture] = {
    "alexnet": Architecture(_alexnet, "AlexNet, one tower (Krizhevsky 2014, arXiv:1404.5997)"),
    **_vggs(),
    **_resnets(),
    "mobilenet_v2": Architecture(_mobilenet_v2, "MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)"),
    "squeezenet1_0": Architecture(
        partial(_squeezenet, (96, 7), (2, 6, 11)), "SqueezeNet 1.0 (Iandola et al. 2016, arXiv:1602.07360)"
    ),
    "squeezenet1_1": Architecture(
        partial(_squeezenet, (64, 3), (2, 5, 8)), "SqueezeNet 1.1 (Iandola et al. 2016, arXiv:1602.07360)"
    ),
    "densenet121": Architecture(
        partial(_densenet, (6, 12, 24, 16), 32), "DenseNet-121 (Huang et al. 2016, arXiv:1608.06993)"
    ),
    "efficientnet_b0": Architecture(
        _efficientnet_b0, "EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946)", "imagenet_bicubic"
    ),
}


def build(name: str, source: Source, weights: str, classes: int = CLASSES) -> Graph:
    """An architecture's graph; KeyError for an unknown name. `weights` says in a word or two where they come from."""
    architecture, chain = ARCHITECTURES[name], Chain(source, classes=classes)
    architecture.build(chain)
    return chain.graph(name, f"{architecture.description}; weights {weights}.")
