"""Models at work: what runs, what is kept, what is refused; random graphs against every layer computed by itself."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from cconv import Cancelled, DTypeError, ModelError, ShapeError, model_names, reference
from cconv.model import Constant, Graph, Model, Node, load
from cconv.model.run import program_bytes

SEEDS = range(12)


def _close(got, expected, what):
    assert got.shape == expected.shape, what
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(expected).max()), err_msg=what)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_layer_of_a_random_graph_is_what_its_formula_gives(seed, random_model, oracle, normal):
    model, names, expected = random_model(seed, oracle)
    x = normal((2, *model.input_shape))
    results = expected(x)
    for name, got in model.run(x, names).items():
        _close(got, results[name], name)


@pytest.mark.parametrize("seed", SEEDS)
def test_folding_and_fusing_give_what_the_formulas_give(seed, random_model, oracle, normal):
    model, names, expected = random_model(seed, oracle)
    x = normal((2, *model.input_shape))
    results = expected(x)
    for name in names:
        _close(model.run(x, [name])[name], results[name], name)


@pytest.mark.parametrize("seed", SEEDS)
def test_asking_for_more_layers_changes_no_other_result_and_no_cost(seed, random_model, oracle, normal, rng):
    model, names, _ = random_model(seed, oracle)
    x = normal((2, *model.input_shape))
    alone = model(x)
    bill = model.cost(x.shape)
    asked = [str(name) for name in rng.choice(names, 4, replace=False)]
    needed = [name for name in asked if name in bill.layers]
    together = model.run(x, [*needed, *model.outputs])
    _close(together[model.outputs[0]], alone, "default output")
    assert model.cost(x.shape, [*needed, *model.outputs]) == bill


def test_random_graphs_do_fold_and_fuse(random_model, oracle):
    taken_in = set()
    for seed in SEEDS:
        model, names, _ = random_model(seed, oracle)
        plan, _ = model._plan(reference.machine(), model.input_shape, (names[-1],))
        for step in plan.steps:
            spec, key = step.operation.spec, step.operation.weights
            if key and "BatchNormalization" in key:
                taken_in.add("folded" if ".conv.0" in key else "batch norm alone")
            if key and any(f"'{kind}'" in key for kind in ("add", "sub", "mul", "div")):
                taken_in.add("arithmetic folded")
            if getattr(spec, "residual", False):
                taken_in.add("residual")
            if key and spec.activation:
                taken_in.add("activation")
            if getattr(spec, "kind", "") in ("add", "sub", "mul", "div"):
                taken_in.add("arithmetic alone")
            if getattr(spec, "add", False):
                taken_in.add("sum alone")
    assert taken_in == {
        "folded",
        "batch norm alone",
        "residual",
        "activation",
        "sum alone",
        "arithmetic folded",
        "arithmetic alone",
    }


def test_only_what_is_needed_is_billed_and_run():
    model = load("vgg16")
    bill = model.cost((1, 3, 224, 224), ["features.4"])
    assert list(bill.layers) == [f"features.{i}" for i in range(5)]
    assert bill.total.macs == 86_704_128 + 1_849_688_064
    model.run(np.zeros((3, 32, 32), np.float32), ["features.4"])
    # Nothing but the weights of the two convolutions was drawn, however they are packed.
    assert model.weights.nbytes < 10 * 4 * (64 * 27 + 64 + 64 * 576 + 64)


def test_a_branch_that_nobody_asked_for_is_not_billed():
    bill = load("resnet18").cost((1, 3, 64, 64), ["layer2.0.bn2"]).layers
    assert "layer2.0.bn2" in bill
    assert "layer2.0.downsample.0" not in bill


def test_costs_are_proportional_to_images_except_for_weights():
    model = load("resnet18")
    one, five = (model.cost((n, 3, 64, 64)).total for n in (1, 5))
    assert five.macs == 5 * one.macs
    assert five.flops_other == 5 * one.flops_other
    weights = sum(4 * layer.parameters for layer in model.layers)
    assert five.bytes - weights == 5 * (one.bytes - weights)


def test_one_image_runs_with_and_without_its_batch_axis(normal):
    model = load("texture")
    x = normal((3, 30, 34))
    single, batch = model.run(x), model.run(x[None])
    for name in model.outputs:
        assert single[name].shape == batch[name].shape[1:] == model.shapes(x.shape)[name]
        np.testing.assert_array_equal(single[name], batch[name][0])


def test_a_batch_gives_what_its_images_give(normal):
    model = load("resnet18")
    x = normal((3, 3, 40, 40))
    np.testing.assert_array_equal(model(x), np.stack([model(image) for image in x]))


def test_one_output_is_an_array_and_several_are_a_dict(normal):
    x = normal((1, 3, 32, 32))
    assert load("edges")(x).shape == (1, 8, 28, 28)
    assert set(load("texture")(x)) == {"level1.relu", "level2.relu"}


def test_the_input_is_not_written_and_may_have_any_strides(normal):
    model = load("texture")
    x = normal((32, 40, 3)).transpose(2, 0, 1)[:, ::-1]
    x.flags.writeable = False
    np.testing.assert_array_equal(model.run(x)["level2.relu"], model.run(x.copy())["level2.relu"])


def test_a_flattened_layer_has_its_features_on_one_axis(normal):
    model = load("resnet18")
    maps = model.run(normal((2, 3, 40, 40)), ["avgpool", "flatten", "fc"])
    assert [maps[name].shape for name in maps] == [(2, 512, 1, 1), (2, 512), (2, 1000)]
    np.testing.assert_array_equal(maps["flatten"], maps["avgpool"].reshape(2, 512))


def test_a_layer_that_renames_the_image_is_a_copy_of_it(normal):
    graph = Graph("nothing", "Does nothing.", (3, 4, 4), (Node("same", "Identity", ("input",)),), ("same",))
    model = Model(graph)
    x = normal((2, 3, 4, 4))
    y = model(x)
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(x, y)
    assert model.cost(x.shape).total.as_dict() == {"macs": 0, "flops": 0, "flops_other": 0, "bytes": 0}


def test_the_same_seed_gives_the_same_weights_in_any_order_of_drawing(normal):
    x = normal((1, 3, 40, 40))
    straight, late = load("resnet18"), load("resnet18")
    late.run(x, ["layer1.0.conv1"])
    np.testing.assert_array_equal(straight(x), late(x))
    assert not np.array_equal(straight(x), load("resnet18", seed=1)(x))


def test_two_threads_may_run_one_model(normal):
    model = load("resnet18")
    inputs = [normal((1, 3, 33 + 8 * (i % 3), 40)) for i in range(6)]
    expected = [load("resnet18")(x) for x in inputs]
    results, start = {}, threading.Barrier(2)

    def work(own):
        start.wait()
        for i in own:
            results[i] = model(inputs[i])

    threads = [threading.Thread(target=work, args=(own,)) for own in (range(6), range(5, -1, -1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        np.testing.assert_array_equal(results[i], y)


class _After:
    """A cancel flag that is set once it was asked `polls` times."""

    def __init__(self, polls):
        self.left = polls

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("polls", [0, 1, 5])
def test_a_flag_that_fails_ends_the_run_with_its_error(polls, normal):
    class Broken(_After):
        def is_set(self):
            if super().is_set():
                raise KeyError("flag")
            return False

    model = load("resnet18")
    x = normal((1, 3, 40, 40))
    expected = model(x)
    flag = Broken(polls)
    with pytest.raises(KeyError, match="flag"):
        model.run(x, cancel=flag)
    assert flag.left == -1
    np.testing.assert_array_equal(model(x), expected)


@pytest.mark.parametrize("polls", [0, 1, 5])
def test_a_cancelled_run_ends_between_steps_and_harms_no_later_one(polls, normal):
    model = load("resnet18")
    x = normal((1, 3, 40, 40))
    expected = model(x)
    flag = _After(polls)
    with pytest.raises(Cancelled):
        model.run(x, cancel=flag)
    assert flag.left == -1
    np.testing.assert_array_equal(model.run(x, cancel=threading.Event())["fc"], expected)


def test_programs_stay_below_their_limit_in_bytes():
    model = load("texture")
    sizes = range(14, 40)
    for size in sizes:
        model.run(np.zeros((3, size, size), np.float32))
    assert len(model._programs) == len(sizes)
    everything = model._programs.nbytes
    model.program_limit = everything // 4
    assert 0 < model._programs.nbytes <= everything // 4
    for size in sizes:
        model.run(np.zeros((3, size, size), np.float32))
        assert model._programs.nbytes <= model.program_limit
    # The last one used is among those that stayed.
    assert next(reversed(model._programs._held))[1] == (3, 39, 39)
    model.program_limit = 0
    assert model.run(np.zeros((3, 20, 20), np.float32))["level2.relu"].shape == (10, 4, 4)
    assert (len(model._programs), model._programs.nbytes) == (0, 0)


def test_a_larger_program_counts_for_more_bytes():
    model = load("resnet18")
    machine = reference.machine()
    small, large = (program_bytes(model._plan(machine, (3, 64, 64), (layer,))[0]) for layer in ("maxpool", "fc"))
    assert 0 < small < large


def test_what_is_executed_is_told_beside_the_bill_and_leaves_it_alone():
    model = load("resnet18")
    executed = model.executed_flops((2, 3, 64, 64))
    assert executed == 2 * model.executed_flops((3, 64, 64))
    billed = model.cost((2, 3, 64, 64)).total.flops
    assert billed / 4 < executed < 2 * billed  # Winograd issues less, whole vectors issue more


@pytest.mark.parametrize(
    ("shape", "element", "error", "text"),
    [
        ((3, 32), "float32", ShapeError, r"expected 3 or 4 axes .* got shape \(3, 32\)"),
        ((1, 1, 32, 32), "float32", ShapeError, "expected 3 channels for edges, got 1"),
        ((3, 4, 40), "float32", ShapeError, r"layer 'conv' .*no larger than the padded image"),
        ((0, 3, 32, 32), "float32", ShapeError, "every size: expected an integer >= 1, got 0"),
        ((3, 32, 32), "float64", DTypeError, "expected float32, got float64"),
        ((3, 32, 32), "uint8", DTypeError, "expected float32, got uint8"),
        ((3, 32, 32), "object", DTypeError, "expected float32, got object"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, element, error, text):
    with pytest.raises(error, match=text):
        load("edges").run(np.zeros(shape, element))


def test_something_that_is_no_array_is_refused():
    with pytest.raises(DTypeError, match="expected a NumPy, CuPy or DLPack array, got list"):
        load("edges").run([[1.0]])


@pytest.mark.parametrize(
    "describe",
    [
        lambda model, layers: model.cost((3, 64, 64), layers),
        lambda model, layers: model.shapes((3, 64, 64), layers),
        lambda model, layers: model.run(np.zeros((3, 64, 64), np.float32), layers),
    ],
)
def test_an_unknown_layer_is_refused_with_the_closest_names(describe):
    with pytest.raises(ModelError, match=r"69 layers, got 'layer9\.0\.conv1'; the closest are .*layer\d\.0\.conv1"):
        describe(load("resnet18"), ["fc", "layer9.0.conv1"])
    with pytest.raises(ModelError, match="at least one layer"):
        describe(load("resnet18"), [])
    with pytest.raises(ModelError, match="expected a list of layer names, got the string 'fc'"):
        describe(load("resnet18"), "fc")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([["fc"]], "expected layer names that are strings, got list"),
        (["fc", 7], "expected layer names that are strings, got int"),
        ([{}], "expected layer names that are strings, got dict"),
        (5, "expected a list of layer names, got int"),
    ],
)
def test_layers_that_are_no_names_are_refused(layers, text):
    model = load("texture")
    for describe in (model.shapes, model.cost, model.executed_flops):
        with pytest.raises(ModelError, match=text):
            describe((3, 64, 64), layers)
    with pytest.raises(ModelError, match=text):
        model.run(np.zeros((3, 64, 64), np.float32), layers)


def test_a_name_of_any_length_is_refused_in_few_words_and_little_memory():
    model, name = load("resnet18"), "layer9.0.conv1" * 100_000
    for asked in ([name], name):
        tracemalloc.start()
        with pytest.raises(ModelError) as caught:
            model.cost((3, 64, 64), asked)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "layer9.0.conv1" in str(caught.value)
        assert len(str(caught.value)) < 400
        assert peak < 1 << 20
    with pytest.raises(ModelError) as caught:
        load(name)
    assert len(str(caught.value)) < 400 + len(", ".join(model_names()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_a_thread_holds_the_programs_runs_and_does_not_hang():
    code = """
import os, sys, threading, warnings
import numpy as np
import cconv
warnings.simplefilter("ignore")
model, x = cconv.load("texture"), np.ones((3, 32, 32), np.float32)
expected = model.run(x)["level2.relu"]
held, done = threading.Event(), threading.Event()
def hold():
    with model._programs._lock:
        held.set()
        done.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(model.run(x)["level2.relu"], expected) else 3)
status = os.waitpid(child, 0)[1]
done.set()
sys.exit(os.waitstatus_to_exitcode(status))
"""
    # In a session of its own, so that a child that hangs ends with its parent.
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        errors = child.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, errors


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([Node("a", "Softmin", ("input",))], "expected an operator of Conv, .* got 'Softmin'"),
        ([Node("a", "Relu", ("b",)), Node("b", "Relu", ("a",))], "expected inputs that come before it, got b"),
        ([Node("a", "Relu", ("input",)), Node("a", "Relu", ("input",))], "expected a name of its own"),
        ([Node("a", "Add", ("input",))], "expected 2 inputs for Add, got 1"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused(nodes, text):
    with pytest.raises(ModelError, match=text):
        Model(Graph("bad", "Bad.", (3, 8, 8), tuple(nodes), ("a",)))


def _zeros(*shapes):
    return {f"w{i}": Constant.of(np.zeros(shape, np.float32), f"w{i}") for i, shape in enumerate(shapes)}


@pytest.mark.parametrize(
    ("operator", "shapes", "options", "text"),
    [
        ("Gemm", [(5, 100)], {"transB": 1}, "expected matrices"),
        ("BatchNormalization", [(4,)] * 4, {}, "expected 4 channels, got 3"),
        ("Conv", [(4, 2, 3, 3)], {}, "expected 2 input channels"),
        ("MaxPool", [], {"kernel_size": 9}, "expected a window no larger"),
        ("Add", [(2, 8, 8)], {}, "expected shapes that spread over each other"),
    ],
)
def test_a_layer_that_does_not_fit_is_named(operator, shapes, options, text):
    constants = _zeros(*shapes)
    node = Node("a", operator, ("input", *constants), options)
    model = Model(Graph("bad", "Bad.", (3, 8, 8), (node,), ("a",), constants))
    with pytest.raises(ShapeError, match=rf"layer 'a' \({operator}\) .*{text}"):
        model.shapes((3, 8, 8))


def test_a_dense_layer_says_how_many_features_it_expects():
    constants = _zeros((5, 100))
    nodes = (Node("flat", "Flatten", ("input",)), Node("a", "Gemm", ("flat", "w0"), {"transB": 1}))
    with pytest.raises(ShapeError, match="expected 100 features, got 192"):
        Model(Graph("bad", "Bad.", (3, 8, 8), nodes, ("a",), constants)).shapes((3, 8, 8))
