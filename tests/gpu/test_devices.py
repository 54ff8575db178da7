"""Devices: images of the host computed where the caller says: chunks, order, too little memory; and what is refused."""

import numpy as np
import pytest

import cconv
from cconv import backend as backends
from cconv import devices


@pytest.fixture
def cuda(twin_of_arrays, monkeypatch):
    """The device "cuda": on the host's twin, or the GPU's."""
    original = backends.get
    monkeypatch.setattr(backends, "get", lambda name: twin_of_arrays if name == "gpu" else original(name))
    return cconv.device("cuda")


@pytest.fixture
def layer(cuda, whole):
    """f(x): maps of a convolution and a constant, and how many images each call had."""
    weight = cuda.put(whole((5, 3, 3, 3)))
    convolve = cconv.Conv2d(weight, padding=1)

    def run(x):
        run.calls.append(len(x))
        return {"y": convolve(x), "pooled": cconv.global_max_pool2d(x)}

    run.calls = []
    return run


@pytest.mark.parametrize("step", [1, 2, 3, 7, 8])
def test_chunks_come_back_in_order(cuda, layer, whole, monkeypatch, step):
    x = whole((7, 3, 9, 10))
    want = cuda.run(layer, x)
    monkeypatch.setattr(cuda._twin, "chunk", lambda images: step)
    layer.calls.clear()
    got = cuda.run(layer, x)
    assert layer.calls == [min(step, 7 - begin) for begin in range(0, 7, step)]
    for name in want:
        assert isinstance(got[name], np.ndarray)
        np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_array_equal(got["pooled"], x.max(axis=(2, 3), keepdims=True))


@pytest.mark.parametrize("twin_of_arrays", ["host"], indirect=True)
@pytest.mark.parametrize("left_out", ["wait_event", "_until"])
def test_a_wait_left_out_is_seen(cuda, layer, whole, monkeypatch, host, left_out):
    """Trust check: without them what has not come yet is computed or returned."""
    monkeypatch.setattr(cuda._twin, "chunk", lambda images: 2)
    monkeypatch.setattr(host.Lane, left_out, lambda *_: None)
    assert not np.isfinite(cuda.run(layer, whole((7, 3, 9, 10)))["y"]).all()


def test_the_next_chunk_is_under_way_before_one_is_waited_for(cuda, layer, whole):
    """How many chunks have been queued whenever one comes back."""
    assert [len(layer.calls) for _ in cuda._twin.feed(layer, whole((7, 3, 9, 10)), 2)] == [2, 3, 4, 4]


@pytest.mark.parametrize("twin_of_arrays", ["host"], indirect=True)
def test_nothing_is_uploaded_over_what_the_pools_memory_was_used_for(cuda, layer, whole, monkeypatch):
    """The first of all: the stream up waits for the stream of whom the memory is."""
    streams, waits = cuda._twin._device.streams(), []
    up, work, _ = streams
    done = work.record()
    for stream in streams:
        monkeypatch.setattr(stream, "queue", lambda copy, q=stream.queue: (waits.append("a copy"), q(copy))[1])
    monkeypatch.setattr(up, "wait_event", lambda event: waits.append(event))
    monkeypatch.setattr(work, "record", lambda: done)
    monkeypatch.setattr(cuda._twin._device, "streams", lambda: streams)
    cuda.run(layer, whole((1, 3, 9, 10)))
    assert waits == [done, "a copy", "a copy", "a copy"]


def test_maps_in_any_order_come_back(cuda, layer, whole, monkeypatch):
    """Views that no transfer can take as they lie: each is copied once it is computed, and not before."""
    x = whole((7, 3, 9, 10))
    want = cuda.run(layer, x)["y"]
    monkeypatch.setattr(cuda._twin, "chunk", lambda images: 2)
    for view in (np.s_[:, ::2], np.s_[:, :, ::-1], np.s_[..., 3:5]):
        np.testing.assert_array_equal(cuda.run(lambda x, view=view: {"y": layer(x)["y"][view]}, x)["y"], want[view])


def test_no_images_are_an_error_anywhere(cuda, layer, whole):
    for device in (cuda, cconv.device("cpu")):
        with pytest.raises(cconv.ShapeError, match="images: expected one or more, got none"):
            device.run(layer, whole((1, 3, 9, 10))[:0])
    assert layer.calls == []


def test_what_is_no_image_of_its_own_comes_whole(cuda, layer, whole, monkeypatch):
    monkeypatch.setattr(cuda._twin, "chunk", lambda images: 2)
    maps = cuda.run(lambda x: {"one": layer(x)["y"][:1], "sizes": np.arange(4)}, whole((7, 3, 9, 10)), whole=True)
    assert layer.calls == [7]
    assert maps["one"].shape == (1, 5, 9, 10)
    np.testing.assert_array_equal(maps["sizes"], np.arange(4))


class TestTooLittleMemory:
    @pytest.fixture
    def most(self, cuda, layer):
        """f(x) that cannot take more than two images, or fails at its third call."""

        def run(x):
            if len(x) > run.images or len(layer.calls) == run.fails_at:
                layer.calls.append(-len(x))
                raise cconv.OutOfMemory("gpu: planted")
            return layer(x)

        run.images, run.fails_at = 2, None
        return run

    def test_chunks_are_halved_until_they_fit(self, cuda, layer, most, whole):
        x = whole((7, 3, 9, 10))
        want = cuda.run(layer, x)
        layer.calls.clear()
        got = cuda.run(most, x)
        assert layer.calls == [-7, -4, 2, 2, 2, 1]
        np.testing.assert_array_equal(got["y"], want["y"])

    def test_what_has_come_back_is_not_computed_again(self, cuda, layer, most, whole, monkeypatch):
        monkeypatch.setattr(cuda._twin, "chunk", lambda images: 2)
        x, most.fails_at = whole((9, 3, 9, 10)), 3
        got = cuda.run(most, x)
        assert layer.calls == [2, 2, 2, -2, *[1] * 5]
        most.fails_at = None
        np.testing.assert_array_equal(got["y"], cuda.run(layer, x)["y"])

    def test_one_image_that_does_not_fit_is_an_error(self, cuda, most, whole):
        most.images = 0
        with pytest.raises(cconv.OutOfMemory, match="planted"):
            cuda.run(most, whole((4, 3, 9, 10)))

    def test_images_that_must_stay_together_are_not_halved(self, cuda, layer, most, whole):
        with pytest.raises(MemoryError, match="planted"):
            cuda.run(most, whole((4, 3, 9, 10)), whole=True)
        assert layer.calls == [-4]


def test_a_set_flag_stops_before_the_next_chunk(cuda, layer, whole, monkeypatch):
    class Flag:
        def is_set(self) -> bool:
            return len(layer.calls) == 2

    monkeypatch.setattr(cuda._twin, "chunk", lambda images: 2)
    with pytest.raises(cconv.Cancelled):
        cuda.run(layer, whole((9, 3, 9, 10)), Flag())
    assert layer.calls == [2, 2]


def test_errors_come_as_they_are(cuda, whole):
    with pytest.raises(cconv.ShapeError, match="channels"):
        cuda.run(lambda x: {"y": cconv.conv2d(x, cuda.put(whole((1, 4, 1, 1))))}, whole((2, 3, 9, 10)))


def test_a_model_gives_the_cpus_maps(cuda, rng):
    model = cconv.load("edges")
    x = rng.random((3, 3, 20, 21), dtype=np.float32)
    got, want = cuda.run(lambda x: model.run(x), x), cconv.device("cpu").run(lambda x: model.run(x), x)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4)


def test_auto_takes_a_gpu_that_works(cuda):
    assert cconv.device().name == cconv.device("auto").name == "cuda"


@pytest.mark.parametrize("twin_of_arrays", ["host"], indirect=True)
def test_auto_takes_no_gpu_that_computes_wrongly(cuda, monkeypatch):
    original = devices.Device.run
    monkeypatch.setattr(
        devices.Device, "run", lambda self, *a: {name: maps + 1 for name, maps in original(self, *a).items()}
    )
    assert cconv.device("auto").name == "cpu"
    with pytest.raises(cconv.BackendUnavailable, match="expected 36 of the first convolution, got 37"):
        cconv.device("cuda")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(monkeypatch, whole):
    def unavailable():
        raise cconv.BackendUnavailable("gpu: planted")

    monkeypatch.setattr(backends.get("gpu"), "machine", unavailable)
    assert cconv.device("auto").name == cconv.device("cpu").name == "cpu"
    with pytest.raises(cconv.BackendUnavailable, match="planted"):
        cconv.device("cuda")
    x = whole((2, 3))
    assert cconv.device("auto").run(lambda x: {"x": x}, x)["x"] is x


def test_another_name_is_refused():
    with pytest.raises(cconv.ArgumentError, match="device: expected one of auto, cpu, cuda, got 'tpu'"):
        cconv.device("tpu")
