"""Conftest: what the tests of models share.

In: tests/conftest.py's oracle.  Out: a photograph, random graphs with their parameters, and their evaluation layer by
layer in float64, which knows nothing of pruning, folding and fusing.
"""

from importlib.resources import files

import numpy as np
import pytest

from cconv import images, reference
from cconv.model import Graph, Model, Node
from cconv.planning import specs

IMAGE = (3, 13, 11)


@pytest.fixture(scope="session")
def photograph():
    """A cat in colour, (3, 300, 451) float32; read-only, because everyone shares it."""
    x = images.read(files("skimage.data") / "chelsea.png")
    x.flags.writeable = False
    return x


def _random_nodes(rng) -> list[Node]:
    """A graph of every kind of branch: sums of equals, several readers of a map, activations before and after sums."""
    nodes: list[Node] = []
    shapes = {"input": IMAGE}

    def add(operator, inputs, output, **rest):
        name = f"{len(nodes)}.{operator.lower()}"
        nodes.append(Node(name, operator, tuple(inputs), **rest))
        shapes[name] = output
        return name

    def conv(before):
        c, h, w = shapes[before]
        groups = int(rng.choice([g for g in (1, 2, c) if c % g == 0]))
        k = groups * int(rng.integers(1, 5))
        kernel = int(rng.choice([1, 3]))
        options = {"padding": kernel // 2, "groups": groups}
        weight = (k, c // groups, kernel, kernel)
        return add("Conv", [before], (k, h, w), weight=weight, bias=bool(rng.integers(2)), options=options)

    def norm(before):
        return add("BatchNormalization", [before], shapes[before], weight=shapes[before][:1], options={"epsilon": 1e-3})

    def activation(before):
        operator = str(rng.choice(["Relu", "LeakyRelu", "Tanh", "Sigmoid", "HardSwish", "Gelu"]))
        return add(operator, [before], shapes[before], options={"alpha": 0.2} if operator == "LeakyRelu" else {})

    def total(before):
        others = [name for name in shapes if shapes[name] == shapes[before]]
        return add("Add", rng.permutation([before, str(rng.choice(others))]).tolist(), shapes[before])

    def alias(before):
        return add("Dropout", [before], shapes[before])

    makers = [conv, conv, norm, activation, total, total, alias]
    last = conv("input")
    for _ in range(14):
        # Mostly a chain, now and then a branch from further back.
        before = last if rng.random() < 0.75 else str(rng.choice([name for name in shapes if name != "input"]))
        last = makers[rng.integers(len(makers))](before)
    c, h, w = shapes[last]
    pooled = add("MaxPool", [last], (c, h // 2, w // 2), options={"kernel_size": 2})
    flat = add("Flatten", [pooled], (c * (h // 2) * (w // 2),))
    add("Gemm", [flat], (5,), weight=(5, c * (h // 2) * (w // 2)), bias=True)
    return nodes


def _parameters(rng, nodes) -> dict[str, tuple]:
    made = {}
    for node in nodes:
        if node.operator == "BatchNormalization":
            scale, shift, mean = rng.standard_normal((3, *node.weight)).astype(np.float32)
            made[node.name] = scale, shift, mean, rng.uniform(0.5, 2, node.weight).astype(np.float32)
        elif node.weight:
            weight = rng.standard_normal(node.weight).astype(np.float32) / np.sqrt(np.prod(node.weight[1:]))
            bias = rng.standard_normal(node.weight[0]).astype(np.float32) if node.bias else None
            made[node.name] = weight.astype(np.float32), bias
    return made


def _layer_by_layer(nodes, parameters, x, oracle) -> dict[str, np.ndarray]:
    """Every layer's result in float64, each by its own formula from the results before it."""
    results = {"input": x.astype(np.float64)}
    for node in nodes:
        first, *rest = (results[name] for name in node.inputs)
        match node.operator:
            case "Conv":
                weight, bias = parameters[node.name]
                y = oracle(first, weight.astype(np.float64), bias, **node.options)
            case "Gemm":
                weight, bias = parameters[node.name]
                y = first @ weight.astype(np.float64).T + bias
            case "BatchNormalization":
                scale, shift, mean, variance = (a.astype(np.float64)[:, None, None] for a in parameters[node.name])
                y = (first - mean) / np.sqrt(variance + node.options["epsilon"]) * scale + shift
            case "Add":
                y = first + rest[0]
            case "MaxPool":
                y = reference.pool(first, specs.pool("max", first.shape[1:], **node.options))
            case "Flatten":
                y = first.reshape(len(first), -1)
            case "Dropout":
                y = first
            case name:
                words = {"LeakyRelu": ("leaky_relu", 0.2)}
                y = reference.activate(first, specs.as_activation(words.get(name, name.lower())))
        results[node.name] = y
    return results


@pytest.fixture(scope="session")
def random_model():
    """f(seed) -> (Model, its layers' names, f(x) -> every layer's result in float64)."""

    def make(seed, oracle):
        rng = np.random.default_rng(seed)
        nodes = _random_nodes(rng)
        parameters = _parameters(rng, nodes)
        graph = Graph(f"random{seed}", "A random graph.", IMAGE, tuple(nodes), (nodes[-1].name,))
        model = Model(graph, lambda node: parameters[node.name])
        return model, [node.name for node in nodes], lambda x: _layer_by_layer(nodes, parameters, x, oracle)

    return make
