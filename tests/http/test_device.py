"""Device: which one serves, who says so, and what happens when it cannot: a GPU is planted, or there is none.

In: the service in process with cconv's door to the GPU replaced, and under gunicorn.  Out: the same maps, other labels.
"""

import re
import time

import numpy as np
import pytest

import cconv
from cconv import backend as backends
from service import create_app
from service.config import Settings

NPY = "/v1/features?model=edges&format=npy"
CONV = '{"x": [[[0,1,2],[3,4,5],[6,7,8]]], "weight": [[[[1,1],[1,1]]]], "device": "%s"}'


class Gpu:
    """What cconv.devices asks of the GPU's twin, on the CPU; `most` images fit, and it may raise `error`."""

    name = "gpu"

    def __init__(self):
        self.error, self.most, self.calls, self.touched = None, 1000, [], False

    def machine(self):
        self.touched = True
        if isinstance(self.error, cconv.BackendUnavailable):
            raise self.error
        return backends.get("cpu").machine()

    def asarray(self, array):
        return array

    def synchronize(self):
        pass

    def chunk(self, images) -> int:
        return len(images)

    def feed(self, function, images, step, cancel):
        for begin in range(0, len(images), step):
            self.calls.append(len(images[begin : begin + step]))
            if self.calls[-1] > self.most:
                raise cconv.OutOfMemory("gpu: planted")
            if self.error is not None:
                raise self.error
            yield function(images[begin : begin + step])


@pytest.fixture
def gpu(monkeypatch):
    found, original = Gpu(), backends.get
    monkeypatch.setattr(backends, "get", lambda name: found if name == "gpu" else original(name))
    return found


@pytest.fixture
def make_app(make_app):
    """Of servers that take either device, unless a test says which."""
    return lambda **settings: make_app(**{"device": "auto", **settings})


@pytest.fixture
def no_gpu(gpu):
    gpu.error = cconv.BackendUnavailable("gpu: planted, there is none")


@pytest.fixture
def body(npy, rng):
    return npy(rng.random((5, 3, 20, 20), np.float32))


def _labels(client, metrics) -> set[str]:
    """The devices that something was billed on."""
    series = metrics(client.get("/metrics").get_data(as_text=True))
    return {
        re.search('device="(.*?)"', key)[1] for key, value in series.items() if "cconv_flops_total" in key and value
    }


class TestWithoutGpu:
    @pytest.mark.parametrize("ask", ["", "&device=auto", "&device=cpu"])
    def test_auto_computes_on_the_cpu_and_says_so(self, make_app, no_gpu, npy, rng, metrics, ask):
        client = make_app().test_client()
        answer = client.post(f"/v1/features?model=edges{ask}", data=npy(rng.random((1, 3, 20, 20), np.float32)))
        assert answer.json["device"] == "cpu"
        assert _labels(client, metrics) == {"cpu"}
        assert client.get("/v2/models/edges/config").json["instance_group"][0]["kind"] == "KIND_CPU"

    def test_cuda_is_refused_everywhere_and_nothing_is_billed(self, make_app, no_gpu, body, bill, infer_json):
        client = make_app().test_client()
        x = np.zeros((1, 3, 20, 20), np.float32)
        for answer in (
            client.post(NPY + "&device=cuda", data=body),
            client.post("/v1/conv2d", data=CONV % "cuda", content_type="application/json"),
            client.post("/v2/models/edges/infer", data=infer_json(x, parameters={"device": "cuda"})),
        ):
            assert answer.status_code == 503
            assert answer.json == {"error": "gpu: planted, there is none"}
        assert not any(bill(client).values())

    def test_a_server_for_cuda_is_alive_and_not_ready(self, make_app, no_gpu, body):
        client = make_app(device="cuda").test_client()
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json["error"]) == (503, "gpu: planted, there is none")
        for ask, text in (("", "there is none"), ("&device=cpu", "device: expected cuda")):
            answer = client.post(NPY + ask, data=body)
            assert answer.status_code == 503
            assert text in answer.json["error"]


class TestWithGpu:
    def test_it_gives_the_same_maps_and_says_who_did(self, make_app, gpu, body, npy, rng, metrics, infer_json):
        client = make_app().test_client()
        cpu = client.post(NPY + "&device=cpu", data=body)
        assert not gpu.calls[1:]  # one was a test of its own
        assert _labels(client, metrics) == {"cpu"}
        assert client.post(NPY, data=body).data == client.post(NPY + "&device=cuda", data=body).data == cpu.data
        assert _labels(client, metrics) == {"cpu", "cuda"}
        x = rng.random((1, 3, 20, 20), np.float32)
        assert client.post("/v1/features?model=edges", data=npy(x)).json["device"] == "cuda"
        infer = "/v2/models/edges/infer"
        for asked, used in (("auto", "cuda"), ("cpu", "cpu")):
            answer = client.post(infer, data=infer_json(x, parameters={"device": asked}))
            assert answer.json["parameters"]["device"] == used
        assert client.get("/v2/models/edges/config").json["instance_group"][0]["kind"] == "KIND_GPU"

    def test_a_convolution_that_came_along_is_computed_there_too(self, make_app, gpu):
        client = make_app().test_client()
        for asked in ("cuda", "cpu"):
            answer = client.post("/v1/conv2d?format=json", data=CONV % asked, content_type="application/json").json
            assert (answer["data"], answer["device"]) == ([[[8.0, 12.0], [20.0, 24.0]]], asked)

    @pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
    def test_a_server_for_one_device_takes_no_other(self, make_app, gpu, body, device, other):
        client = make_app(device=device).test_client()
        assert client.post(NPY, data=body).status_code == 200
        assert bool(gpu.calls) == (device == "cuda")
        answer = client.post(f"{NPY}&device={other}", data=body)
        assert answer.status_code == 503
        assert answer.json["error"] == f"device: expected {device}, on which alone this server computes, got {other}"

    def test_an_unknown_device_is_refused(self, make_app, gpu, body):
        client = make_app().test_client()
        for answer in (
            client.post(NPY + "&device=tpu", data=body),
            client.post("/v1/conv2d", data=CONV % "tpu", content_type="application/json"),
        ):
            assert answer.status_code == 400
            assert answer.json["error"] == "device: expected one of auto, cpu, cuda, got 'tpu'"
        with pytest.raises(ValueError, match="device: expected one of auto, cpu, cuda, got 'tpu'"):
            create_app(Settings(device="tpu"))

    def test_too_little_memory_means_fewer_images_at_a_time(self, make_app, gpu, body):
        client = make_app().test_client()
        want = client.post(NPY, data=body).data
        gpu.most = 2
        gpu.calls.clear()
        assert client.post(NPY, data=body).data == want
        assert gpu.calls == [5, 3, 2, 2, 1]

    def test_too_little_for_one_image_is_503_and_the_next_request_is_served(self, make_app, gpu, body, bill):
        client = make_app().test_client()
        assert client.get("/readyz").status_code == 200
        gpu.most = 0
        answer = client.post(NPY, data=body)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert "too little memory" in answer.json["error"]
        assert not any(bill(client).values())
        gpu.most = 1000
        assert client.post(NPY, data=body).status_code == 200

    @pytest.mark.parametrize("used_before", [True, False])
    def test_an_error_of_the_device_ends_the_worker_and_nothing_is_billed(
        self, make_app, gpu, body, bill, caplog, used_before
    ):
        app = make_app(device="cuda")
        client, ended = app.test_client(), []
        app.extensions["cconv"].when_lost(lambda: ended.append(True))
        if used_before:
            assert client.get("/readyz").status_code == 200
        gpu.error = cconv.DeviceError("gpu: cudaErrorIllegalAddress, planted")
        answer = client.post(NPY, data=body)
        assert answer.status_code == 503
        assert "Illegal" not in answer.json["error"]
        assert int(answer.headers["Retry-After"]) > 0
        assert "cudaErrorIllegalAddress" in caplog.text
        assert ended == [True]
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json["error"]) == (503, "the GPU failed")
        assert client.post(NPY, data=body).status_code == 503
        assert not any(bill(client).values())


class TestBills:
    """What the ledger has of devices, and what idempotency keys make of them."""

    @pytest.fixture
    def keeper(self, make_app, gpu, url):
        return make_app(ledger=url).test_client()

    @staticmethod
    def _ask(client, route, device, x, npy, infer_json):
        key = {"Idempotency-Key": route}
        if route == "features":
            return client.post(f"{NPY}&device={device}", data=npy(x), headers=key)
        if route == "conv2d":
            return client.post("/v1/conv2d", data=CONV % device, content_type="application/json", headers=key)
        return client.post("/v2/models/edges/infer", data=infer_json(x, parameters={"device": device}), headers=key)

    def test_a_bill_names_the_device_that_computed(self, keeper, body, rows, metrics):
        for ask in ("", "&device=cpu", "&device=cuda"):
            assert keeper.post(NPY + ask, data=body).status_code == 200
        assert [event.device for event in rows()] == ["cuda", "cpu", "cuda"]
        assert _labels(keeper, metrics) == {"cpu", "cuda"}

    @pytest.mark.parametrize("route", ["features", "conv2d", "infer"])
    def test_another_device_is_another_request(self, keeper, rows, npy, rng, infer_json, route):
        x = rng.random((1, 3, 20, 20), np.float32)
        answers = [self._ask(keeper, route, device, x, npy, infer_json) for device in ("cuda", "cpu", "cuda")]
        assert [answer.status_code for answer in answers] == [200, 422, 200]
        assert answers[2].headers["Idempotent-Replay"] == "true"
        assert len(rows()) == 1

    @pytest.mark.parametrize("route", ["features", "conv2d", "infer"])
    def test_a_request_for_any_device_is_the_same_where_the_gpu_has_gone(
        self, keeper, make_app, gpu, url, rows, npy, rng, infer_json, route
    ):
        x = rng.random((1, 3, 20, 20), np.float32)
        assert self._ask(keeper, route, "auto", x, npy, infer_json).headers["X-Cconv-Device"] == "cuda"
        gpu.error = cconv.BackendUnavailable("gpu: planted, there is none")
        again = self._ask(make_app(ledger=url).test_client(), route, "auto", x, npy, infer_json)
        assert (again.status_code, again.headers["X-Cconv-Device"]) == (200, "cpu")
        assert again.headers["Idempotent-Replay"] == "true"
        assert len(rows()) == 1

    def test_a_gpu_that_fails_leaves_no_bill_and_gives_the_key_back(self, keeper, make_app, gpu, url, rows, body):
        key = {"Idempotency-Key": "mine"}
        assert keeper.get("/readyz").status_code == 200
        gpu.error = cconv.DeviceError("gpu: planted")
        assert keeper.post(NPY, data=body, headers=key).status_code == 503
        assert rows() == []
        gpu.error = None
        answer = make_app(ledger=url).test_client().post(NPY, data=body, headers=key)
        assert (answer.status_code, "Idempotent-Replay" in answer.headers) == (200, False)
        assert len(rows()) == 1

    def test_requests_of_two_devices_are_never_stacked(self, make_app, gpu):
        engine = make_app().extensions["cconv"].engine
        served, x = engine.model("edges"), np.zeros((1, 3, 20, 20), np.float32)
        auto, cuda, cpu = (engine.task(served, x, None, device).key for device in ("auto", "cuda", "cpu"))
        assert auto == cuda != cpu


def test_by_default_nothing_touches_a_gpu(make_app, gpu, body):
    """Neither probes nor metrics nor requests may make a context of CUDA's."""
    client = make_app(device=Settings().device).test_client()
    for path in ("/livez", "/readyz", "/metrics", "/v2", "/v2/models/edges/config", "/"):
        assert client.get(path).status_code == 200, path
    answer = client.post("/v1/features?model=edges", data=body)
    assert (answer.status_code, answer.json["device"]) == (200, "cpu")
    assert client.post(NPY + "&device=cuda", data=body).status_code == 503
    assert not gpu.touched


def test_models_and_the_device_are_limited_apart(make_app, gpu, body):
    """Two settings of one engine."""
    client = make_app(models=("edges",), device="cpu").test_client()
    assert client.get("/v2/models").json == {"models": ["edges"]}
    assert client.post(NPY, data=body).status_code == 200
    assert client.post("/v1/features?model=texture", data=body).status_code == 404
    assert client.post(NPY + "&device=cuda", data=body).status_code == 503


LOST = """
import os, cconv
from service import create_app as original
run = cconv.Model.run
def failing(self, x, *rest):
    if x.shape[-1] == 21:
        raise cconv.DeviceError("gpu: planted")
    return run(self, x, *rest)
cconv.Model.run = failing
def create_app():
    app = original()
    app.after_request(lambda answer: (answer.headers.set("X-Worker", os.getpid()), answer)[1])
    return app
"""


@pytest.mark.alone
def test_gunicorn_replaces_a_worker_whose_device_failed(tmp_path, start_server, npy, rng):
    (tmp_path / "lost_device.py").write_text(LOST)
    server = start_server(app="lost_device:create_app()", PYTHONPATH=str(tmp_path))
    good, bad = (npy(rng.random((1, 3, 20, width), np.float32)) for width in (20, 21))
    status, headers, maps = server.ask(NPY, good)
    first = headers["X-Worker"]
    assert status == 200
    assert server.ask(NPY, bad)[0] == 503
    end, workers = time.monotonic() + 30, {first}
    while workers == {first} and time.monotonic() < end:
        try:
            status, headers, again = server.ask(NPY, good)
        except OSError:  # between the two
            continue
        if status == 200:  # else the old one, which is on its way out
            workers.add(headers["X-Worker"])
        time.sleep(0.05)
    assert len(workers) == 2
    assert (status, again) == (200, maps)
    assert server.process.poll() is None
    assert "the GPU failed; this process ends" in server.log.read_text()
