"""Conftest: what the tests of models share.

In: tests/conftest.py's oracle.  Out: a photograph, random graphs with their parameters, and their evaluation layer by
layer in float64, which knows nothing of pruning, folding and fusing.
"""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from cconv import images, reference
from cconv.model import Constant, Graph, Model, Node
from cconv.planning import specs

IMAGE = (3, 13, 11)


@pytest.fixture(scope="session")
def photograph():
    """A cat in colour, (3, 300, 451) float32; read-only, because everyone shares it."""
    x = images.read(files("skimage.data") / "chelsea.png")
    x.flags.writeable = False
    return x


def _random_nodes(rng) -> tuple[list[Node], dict[str, np.ndarray]]:
    """A graph of every kind of branch: sums of equals, several readers of a map, activations before and after sums."""
    nodes: list[Node] = []
    arrays: dict[str, np.ndarray] = {}
    shapes = {"input": IMAGE}

    def add(operator, inputs, output, *own, **options):
        name = f"{len(nodes)}.{operator.lower()}"
        for i, array in enumerate(own):
            arrays[f"{name}.{i}"] = array.astype(np.float32)
        names = (f"{name}.{i}" for i in range(len(own)))
        nodes.append(Node(name, operator, (*inputs, *names), options))
        shapes[name] = output
        return name

    def drawn(*shape):
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))

    def conv(before):
        c, h, w = shapes[before]
        groups = int(rng.choice([g for g in (1, 2, c) if c % g == 0]))
        k = groups * int(rng.integers(1, 5))
        kernel = int(rng.choice([1, 3]))
        own = [drawn(k, c // groups, kernel, kernel), drawn(k)][: 1 + rng.integers(2)]
        return add("Conv", [before], (k, h, w), *own, padding=kernel // 2, groups=groups)

    def norm(before):
        c = shapes[before][0]
        own = *rng.standard_normal((3, c)), rng.uniform(0.5, 2, c)
        return add("BatchNormalization", [before], shapes[before], *own, epsilon=1e-3)

    def affine(before):
        operator, shape = (
            str(rng.choice(["Add", "Sub", "Mul", "Div"])),
            [(shapes[before][0], 1, 1), ()][rng.integers(2)],
        )
        name = add(operator, [before], shapes[before], rng.uniform(0.5, 2, shape))
        if rng.integers(2) and operator != "Div":  # what divides may come close to 0
            nodes[-1] = replace(nodes[-1], inputs=nodes[-1].inputs[::-1])
        return name

    def activation(before):
        operator = str(rng.choice(["Relu", "LeakyRelu", "Tanh", "Sigmoid", "HardSwish", "Gelu"]))
        return add(operator, [before], shapes[before], **({"alpha": 0.2} if operator == "LeakyRelu" else {}))

    def total(before):
        others = [name for name in shapes if shapes[name] == shapes[before]]
        return add("Add", rng.permutation([before, str(rng.choice(others))]).tolist(), shapes[before])

    def alias(before):
        return add("Dropout", [before], shapes[before])

    makers = [conv, conv, norm, activation, total, total, alias, affine]
    last = conv("input")
    for _ in range(14):
        # Mostly a chain, now and then a branch from further back.
        before = last if rng.random() < 0.75 else str(rng.choice([name for name in shapes if name != "input"]))
        last = makers[rng.integers(len(makers))](before)
    c, h, w = shapes[last]
    pooled = add("MaxPool", [last], (c, h // 2, w // 2), kernel_size=2)
    flat = add("Flatten", [pooled], (c * (h // 2) * (w // 2),))
    add("Gemm", [flat], (5,), drawn(5, c * (h // 2) * (w // 2)), drawn(5), transB=1)
    return nodes, arrays


def _layer_by_layer(nodes, arrays, x, oracle) -> dict[str, np.ndarray]:
    """Every layer's result in float64, each by its own formula from the results before it."""
    results = {"input": x.astype(np.float64)}
    arithmetic = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
    for node in nodes:
        first, *rest = (results[name] if name in results else arrays[name].astype(np.float64) for name in node.inputs)
        match node.operator:
            case "Conv":
                y = oracle(first, *rest, **node.options)
            case "Gemm":
                weight, bias = rest
                y = first @ weight.T + bias
            case "BatchNormalization":
                scale, shift, mean, variance = (a[:, None, None] for a in rest)
                y = (first - mean) / np.sqrt(variance + node.options["epsilon"]) * scale + shift
            case "Add" | "Sub" | "Mul" | "Div":
                y = arithmetic[node.operator](first, rest[0])
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
        nodes, arrays = _random_nodes(rng)
        constants = {name: Constant.of(array, name) for name, array in arrays.items()}
        graph = Graph(f"random{seed}", "A random graph.", IMAGE, tuple(nodes), (nodes[-1].name,), constants)
        return Model(graph), [node.name for node in nodes], lambda x: _layer_by_layer(nodes, arrays, x, oracle)

    return make
