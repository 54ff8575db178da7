"""Builtin: the registry of models that need no file.

In: a name and a seed.  Out: a Graph.

Filter banks and the texture model carry their weights. The published architectures carry none: theirs are drawn by He's
rule on the first run, so they cost and run like the trained networks, and recognise nothing. Their layers are named as
torchvision.models.feature_extraction.get_graph_node_names names them, and their constants as a state dict does.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np

from .. import filters, init
from . import texture
from .graph import INPUT, Constant, Graph, Node

IMAGE = (3, 224, 224)
CLASSES = 1000
#: A constant's name and shape -> its array.
Source = Callable[[str, tuple[int, ...]], np.ndarray]


class _Chain:
    """Nodes being collected, each reading the one before unless told otherwise, and their constants."""

    def __init__(self, source: Source, channels: int = IMAGE[0]):
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self.source = source
        self.last = INPUT
        self.channels = channels

    def add(self, name: str, operator: str, *inputs: str, **options) -> str:
        self.nodes.append(Node(name, operator, inputs or (self.last,), options))
        self.last = name
        return name

    def constant(self, name: str, *shape: int) -> str:
        self.constants[name] = Constant(name, shape, partial(self.source, name, shape))
        return name

    def conv(self, name: str, outputs: int, kernel: int, *inputs: str, bias=False, **options) -> str:
        own = [self.constant(f"{name}.weight", outputs, self.channels, kernel, kernel)]
        own += [self.constant(f"{name}.bias", outputs)] * bias
        self.channels = outputs
        return self.add(name, "Conv", *(inputs or (self.last,)), *own, **options)

    def norm(self, name: str) -> str:
        words = ("weight", "bias", "running_mean", "running_var")
        return self.add(
            name, "BatchNormalization", self.last, *(self.constant(f"{name}.{word}", self.channels) for word in words)
        )

    def dense(self, name: str, outputs: int, features: int) -> str:
        weight, bias = self.constant(f"{name}.weight", outputs, features), self.constant(f"{name}.bias", outputs)
        return self.add(name, "Gemm", self.last, weight, bias, transB=1)

    def graph(self, name: str, description: str, outputs: tuple[str, ...] | None = None) -> Graph:
        return Graph(name, description, IMAGE, tuple(self.nodes), outputs or (self.last,), self.constants)


def he_parameters(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """A constant drawn from the seed and its layer's name, so that the order of drawing does not matter."""
    layer, _, word = name.rpartition(".")
    if len(shape) == 1:
        return np.full(shape, word in ("weight", "running_var"), np.float32)
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{layer}".encode()).digest()[:16])
    return init.he_normal(shape, own_seed)


# Filter banks and the texture model ---------------------------------------------------------------------------------
# None of them pads: a frame of zeros around a picture would be its strongest edge.


def _given(weights: dict[str, np.ndarray]) -> Source:
    return lambda name, shape: weights[name].astype(np.float32)


def _bank(name: str, source: Source) -> Graph:
    weight = filters.bank(name)
    chain = _Chain(_given({"conv.weight": weight}))
    chain.conv("conv", len(weight), weight.shape[-1])
    return chain.graph(name, f"A bank of {len(weight)} filters: {filters.BANKS[name][0]}.")


def _texture(source: Source) -> Graph:
    edges = filters.bank("edges")
    combinations = np.stack(list(texture.combinations().values()))
    chain = _Chain(_given({"level1.conv.weight": edges, "level2.conv.weight": combinations}))
    chain.conv("level1.conv", len(edges), edges.shape[-1])
    rectified = chain.add("level1.relu", "Relu")
    chain.add("level1.pool", "MaxPool", kernel_size=2)
    chain.conv("level2.conv", len(combinations), texture.SIZE)
    top = chain.add("level2.relu", "Relu")
    return chain.graph("texture", "Two levels: edges, then stripes, corners and discs.", (rectified, top))


# Published architectures --------------------------------------------------------------------------------------------


def _alexnet(source: Source) -> Graph:
    """Krizhevsky 2014 (arXiv:1404.5997), as torchvision has it: one tower, adaptive average pooling to 6x6."""
    chain = _Chain(source)
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


def _vgg(depth: int, convs_per_block: tuple[int, ...], source: Source) -> Graph:
    """Simonyan & Zisserman 2014 (arXiv:1409.1556), configurations D and E."""
    chain = _Chain(source)
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


def _resnet(name: str, description: str, blocks: tuple[int, ...], block, expansion: int, source: Source) -> Graph:
    """He et al. 2015 (arXiv:1512.03385); `block` adds the residual branch of one block."""
    chain = _Chain(source)
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


def _resnet18(source: Source) -> Graph:
    return _resnet(
        "resnet18", "ResNet-18 (He et al. 2015); weights drawn at random.", (2, 2, 2, 2), _basic_block, 1, source
    )  # fmt: skip


def _resnet50(stride_on_1x1: bool, source: Source) -> Graph:
    name, where = ("resnet50_v1", "first 1x1") if stride_on_1x1 else ("resnet50", "3x3")
    return _resnet(
        name, f"ResNet-50 (He et al. 2015), strides on the {where} convolution; weights drawn at random.",
        (3, 4, 6, 3), partial(_bottleneck, stride_on_1x1=stride_on_1x1), 4, source,
    )  # fmt: skip


#: THE REGISTRY: name -> source of the constants -> graph. What carries its own constants asks the source for none.
MODELS: dict[str, Callable[[Source], Graph]] = {
    **{name: partial(_bank, name) for name in filters.names()},
    "texture": _texture,
    "alexnet": _alexnet,
    "vgg16": partial(_vgg, 16, (2, 2, 3, 3, 3)),
    "vgg19": partial(_vgg, 19, (2, 2, 4, 4, 4)),
    "resnet18": _resnet18,
    "resnet50": partial(_resnet50, False),
    "resnet50_v1": partial(_resnet50, True),
}


def model_names() -> tuple[str, ...]:
    """The names that :func:`cconv.load` knows.

    Examples
    --------
    >>> "vgg16" in model_names()
    True
    """
    return tuple(MODELS)


def make(name: str, seed: int) -> Graph:
    """A built-in's graph; KeyError for an unknown name."""
    return MODELS[name](partial(he_parameters, seed=seed))
