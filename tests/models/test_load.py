"""Load: names, seeds, limits and precision of a model, and models that are copied and pickled."""

import copy
import pickle

import numpy as np
import pytest

from cconv import ArgumentError, ModelError
from cconv.model import Graph, Model, Node, load


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(ModelError, match=r"vgg16.*got 'vgg17'"):
        load("vgg17")


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": 0.5}, {"seed": True}, {"program_limit": -1}])
def test_a_seed_or_limit_that_is_no_count_is_refused(given):
    ((name, value),) = given.items()
    with pytest.raises(ArgumentError, match=f"{name}: expected an integer >= 0, got {value}"):
        load("resnet18", **given)


def test_seeds_and_limits_may_be_large():
    model = load("edges", seed=2**40, program_limit=1 << 40)
    assert model.program_limit == 1 << 40
    with pytest.raises(ArgumentError, match="program_limit"):
        model.program_limit = -1


def test_a_model_computes_at_its_precision_and_costs_the_same(normal):
    x, layers = normal((1, 3, 112, 112)), ["layer1.0.relu", "layer2.1.conv2"]
    exact, loose = (load("resnet18", precision=word) for word in ("highest", "high"))
    assert (exact.precision, loose.precision) == ("highest", "high")
    assert exact.cost(x.shape, layers) == loose.cost(x.shape, layers)
    assert loose.executed_flops(x.shape, layers) < exact.executed_flops(x.shape, layers)  # larger Winograd tiles
    for name, maps in exact.run(x, layers).items():
        other = loose.run(x, layers)[name]
        assert not np.array_equal(maps, other)
        assert np.linalg.norm(maps - other) <= 1e-3 * np.linalg.norm(maps)
    assert pickle.loads(pickle.dumps(loose)).precision == "high"
    with pytest.raises(ArgumentError, match="precision: expected one of highest, high, medium, got 'low'"):
        load("edges", precision="low")


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_built_in_is_copied_and_pickled_by_its_name_and_seed(again, normal):
    x = normal((1, 3, 40, 40))
    model = load("resnet18", seed=3)
    expected = model(x)
    model.program_limit = 12345
    assert len(pickle.dumps(model)) < 500
    twin = again(again(model))
    assert (twin.name, twin.program_limit) == ("resnet18", 12345)
    assert twin is not model
    np.testing.assert_array_equal(twin(x), expected)


def test_a_model_of_a_graph_says_why_it_cannot_be_pickled():
    graph = Graph("own", "One's own.", (3, 4, 4), (Node("same", "Identity", ("input",)),), ("same",))
    with pytest.raises(ModelError, match="own: expected a model made by load to pickle or copy"):
        pickle.dumps(Model(graph))
