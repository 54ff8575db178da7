"""Models: built-in networks from their first layer to their last on the kernels run on the host, against the CPU."""

import numpy as np
import pytest

import cconv


@pytest.mark.parametrize("name", ["edges", "gabor", "texture"])
def test_a_built_in_model_gives_the_cpus_maps(name, twin_of_arrays, rng):
    model = cconv.load(name)
    x = rng.random((2, model.input_shape[0], 24, 27), dtype=np.float32)
    layers = [layer.name for layer in model.layers]
    given = twin_of_arrays.asarray(x)
    want, got = model.run(x, layers), model.run(given, layers)
    for layer in layers:
        assert type(got[layer]) is type(given)
        scale = np.abs(want[layer]).max()
        np.testing.assert_allclose(
            twin_of_arrays.to_numpy(got[layer]), want[layer], rtol=1e-4, atol=2e-5 * max(1.0, scale), err_msg=layer
        )


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "resnet18", "efficientnet_b0", "densenet121"])
def test_a_network_gives_the_cpus_features(name, twin_of_arrays, rng):
    """Fire modules, depthwise layers, residuals, SiLU with gates, and batch norms that ride before a convolution."""
    model = cconv.load(name)
    x = rng.random((1, 3, 33, 40), dtype=np.float32)
    want, got = model(x), twin_of_arrays.to_numpy(model(twin_of_arrays.asarray(x)))
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def test_a_cancelled_run_stops_before_its_next_step(twin_of_arrays, rng):
    class Set:
        def is_set(self) -> bool:
            return True

    model = cconv.load("edges")
    with pytest.raises(cconv.Cancelled):
        model.run(twin_of_arrays.asarray(rng.random((1, *model.input_shape), dtype=np.float32)), cancel=Set())


def test_tiles_follow_the_batch_and_bits_do_not(twin_of_arrays, rng):
    model = cconv.load("texture")
    x, machine = rng.random((16, model.input_shape[0], 30, 31), dtype=np.float32), twin_of_arrays.machine()
    asked = model.outputs
    found = {
        runs: [step.tiling.label for step in model._plan(machine, x.shape[1:], asked, runs)[0].steps if step.tiling]
        for runs in (1, 16)
    }
    assert found[1] != found[16]
    together = model.run(twin_of_arrays.asarray(x))
    for i in (0, 9, 15):
        for layer, alone in model.run(twin_of_arrays.asarray(x[i : i + 1])).items():
            got, want = (twin_of_arrays.to_numpy(a) for a in (alone, together[layer]))
            assert got[0].tobytes() == want[i].tobytes()
    assert len(model._programs) == 2
