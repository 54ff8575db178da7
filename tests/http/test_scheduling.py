"""Scheduling: a bounded house, deadlines, and batches and lanes that change no byte of an answer.

In: the service in process, or with an engine that waits for the test.  Out: each client's own answer.
"""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cconv
from cconv import filters
from service.errors import DeadlineExceeded, InvalidRequest

pytestmark = pytest.mark.alone
NPY = "/v1/features?model=edges&format=npy"
WAIT_S = 20


@pytest.fixture
def edges():
    """f(x) -> the maps, each image computed alone."""
    return lambda x: np.concatenate([cconv.conv2d(image[None], filters.bank("edges")) for image in x])


class Gate:
    """Holds every run of a model at its beginning until the test opens it; keeps what was asked to run together."""

    def __init__(self, pipeline):
        self.opened = threading.Event()
        #: Lets as many single runs pass as it was released times.
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.batches = []
        self.cancelled = 0
        self._make = pipeline.engine.task
        pipeline.engine.task = self._task

    def _task(self, *arguments):
        task = self._make(*arguments)

        def run(images, cancel, run=task.run):
            self.batches.append(len(images))
            self.entered.release()
            end = time.monotonic() + WAIT_S
            while not self.opened.is_set() and not self.passes.acquire(timeout=0.005):
                if cancel.is_set():
                    self.cancelled += 1
                    break
                assert time.monotonic() < end
            return run(images, cancel)

        object.__setattr__(task, "run", run)
        return task


@pytest.fixture
def crowd(metrics):
    """f(app, bodies) -> their pending answers, once all of them are in the house."""
    pool = ThreadPoolExecutor(64)

    def post(app, bodies, path=NPY):
        def pending():
            return metrics(app.test_client().get("/metrics").get_data(as_text=True))["cconv_pending_requests"]

        before = pending()
        answers = [pool.submit(lambda body=body: app.test_client().post(path, data=body)) for body in bodies]
        end = time.monotonic() + WAIT_S
        while pending() < before + len(bodies) and time.monotonic() < end:
            time.sleep(0.005)
        return answers

    yield post
    pool.shutdown()


def array(answer):
    assert answer.status_code == 200, answer.data[:300]
    return np.load(io.BytesIO(answer.data))


class TestBatches:
    """Requests that wait at the same moment run together."""

    def test_waiting_requests_of_one_shape_run_as_one_and_nothing_changes(self, make_app, crowd, npy, rng, edges):
        app = make_app(threads=32, queue_requests=20, lanes=1)
        gate = Gate(app.extensions["cconv"])
        images = [rng.random((n, 3, 33, 29), np.float32) for n in (1, 2, 1, 3, 1)]
        other = rng.random((1, 3, 28, 30), np.float32)
        first = crowd(app, [npy(images[0])])
        assert gate.entered.acquire(timeout=WAIT_S)
        rest = crowd(app, [npy(image) for image in [*images[1:], other]])
        gate.opened.set()
        for image, answer in zip([*images, other], [*first, *rest], strict=True):
            assert np.array_equal(array(answer.result()), edges(image))
        assert sorted(gate.batches) == [1, 1, 7]

    def test_a_batch_is_not_larger_than_the_limit(self, make_app, crowd, npy, rng, edges):
        app = make_app(threads=32, queue_requests=20, max_batch=4, lanes=1)
        gate = Gate(app.extensions["cconv"])
        first = crowd(app, [npy(rng.random((1, 3, 20, 20), np.float32))])
        assert gate.entered.acquire(timeout=WAIT_S)
        images = [rng.random((1, 3, 20, 20), np.float32) for _ in range(9)]
        rest = crowd(app, [npy(image) for image in images])
        gate.opened.set()
        for image, answer in zip(images, rest, strict=True):
            assert np.array_equal(array(answer.result()), edges(image))
        first[0].result()
        assert gate.batches == [1, 4, 4, 1]

    def test_other_layers_are_not_mixed_in(self, make_app, crowd, npy, rng):
        app = make_app(threads=32, queue_requests=20, lanes=1)
        gate = Gate(app.extensions["cconv"])
        x = rng.random((1, 3, 40, 40), np.float32)
        crowd(app, [npy(x)])
        assert gate.entered.acquire(timeout=WAIT_S)
        model = cconv.load("texture")
        layers = ["level1.conv", "level1.relu", "level2.relu"]
        pending = [crowd(app, [npy(x)], f"/v1/features?model=texture&format=npy&layers={name}")[0] for name in layers]
        gate.opened.set()
        for name, answer in zip(layers, pending, strict=True):
            assert np.array_equal(array(answer.result()), model.run(x, [name])[name])
        assert gate.batches == [1, 1, 1, 1]

    def test_an_idle_server_waits_for_nobody(self, app, npy, rng):
        gate = Gate(app.extensions["cconv"])
        gate.opened.set()
        client = app.test_client()
        for _ in range(5):
            client.post(NPY, data=npy(rng.random((1, 3, 20, 20), np.float32)))
        assert gate.batches == [1] * 5

    @pytest.mark.parametrize("lanes", [1, 2, 5])
    def test_16_threads_get_their_own_answers(self, make_app, npy, rng, edges, lanes):
        app = make_app(threads=40, queue_requests=32, lanes=lanes)
        shapes = [(1, 3, 24 + i % 4, 30) for i in range(16)]
        images = [[rng.random(shape, np.float32) for _ in range(6)] for shape in shapes]

        def work(mine):
            client = app.test_client()
            return [array(client.post(NPY, data=npy(image))) for image in mine]

        with ThreadPoolExecutor(16) as pool:
            for mine, got in zip(images, pool.map(work, images), strict=True):
                for image, maps in zip(mine, got, strict=True):
                    assert np.array_equal(maps, edges(image))


class TestFull:
    """Beyond its bounds the house refuses at once and says when to come again."""

    def test_a_full_queue_is_503_with_retry_after(self, make_app, crowd, npy, rng, bill):
        app = make_app(queue_requests=3)
        gate = Gate(app.extensions["cconv"])
        body = npy(rng.random((1, 3, 20, 20), np.float32))
        pending = crowd(app, [body] * 3)
        refused = app.test_client().post(NPY, data=body)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "the server is full" in refused.json["error"]
        assert app.test_client().get("/livez").status_code == 200
        gate.opened.set()
        assert [answer.result().status_code for answer in pending] == [200] * 3
        assert app.test_client().post(NPY, data=body).status_code == 200
        assert bill(app.test_client())["cconv_inferences_total"] == 4

    @pytest.mark.parametrize(
        "limit", [{"max_flops": 500_000, "queue_flops": 900_000}, {"max_body_bytes": 9_000, "queue_bytes": 30_000}]
    )
    def test_the_bounds_count_flops_and_bytes_too(self, make_app, crowd, npy, rng, limit):
        app = make_app(**limit)
        gate = Gate(app.extensions["cconv"])
        body = npy(rng.random((1, 3, 24, 24), np.float32))
        pending = crowd(app, [body])
        assert gate.entered.acquire(timeout=WAIT_S)
        refused = app.test_client().post(NPY, data=body)
        assert refused.status_code == 503, refused.data
        gate.opened.set()
        assert pending[0].result().status_code == 200
        assert app.test_client().post(NPY, data=body).status_code == 200

    def test_places_come_back_whatever_happens(self, make_app, npy, rng, png):
        app = make_app(queue_requests=1)
        client = app.test_client()
        good = npy(rng.random((1, 3, 20, 20), np.float32))
        for body in (b"junk", good[:-1], png(8, 8)[:40], good):
            client.post(NPY, data=body)
        assert client.post(NPY, data=good).status_code == 200


class TestDeadlines:
    """A request is answered in time, or not at all and for nothing."""

    def test_work_that_expires_in_the_queue_is_never_computed(self, make_app, crowd, npy, rng, bill, infer_json):
        app = make_app(queue_requests=8, lanes=1)
        gate = Gate(app.extensions["cconv"])
        x = rng.random((1, 3, 20, 20), np.float32)
        first = crowd(app, [npy(x)])
        assert gate.entered.acquire(timeout=WAIT_S)
        late = infer_json(rng.random((1, 3, 21, 21), np.float32), parameters={"timeout": 50_000})
        answer = app.test_client().post("/v2/models/edges/infer", data=late)
        assert answer.status_code == 504
        assert "deadline" in answer.json["error"]
        gate.opened.set()
        assert first[0].result().status_code == 200
        assert gate.batches == [1]
        cost = cconv.load("edges").cost(x.shape).total
        assert bill(app.test_client())["cconv_macs_total"] == cost.macs

    def test_a_run_that_nobody_waits_for_is_cancelled_and_not_billed(self, make_app, crowd, npy, rng, bill, metrics):
        app = make_app(deadline_s=1)
        gate = Gate(app.extensions["cconv"])
        pending = crowd(app, [npy(rng.random((2, 3, 20, 20), np.float32))])
        assert pending[0].result().status_code == 504
        end = time.monotonic() + WAIT_S
        while not gate.cancelled and time.monotonic() < end:
            time.sleep(0.005)
        gate.opened.set()
        client = app.test_client()
        assert client.post(NPY, data=npy(rng.random((1, 3, 20, 20), np.float32))).status_code == 200
        assert gate.cancelled == 1
        cost = cconv.load("edges").cost((1, 3, 20, 20)).total
        assert bill(client)["cconv_macs_total"] == cost.macs
        series = metrics(client.get("/metrics").get_data(as_text=True))
        assert series['cconv_discarded_flops_total{device="cpu",model="edges"}'] == 2 * (cost.flops + cost.flops_other)

    def test_a_run_that_somebody_still_waits_for_goes_on(self, make_app, crowd, npy, rng, infer_json, edges):
        app = make_app(queue_requests=8, lanes=1)
        gate = Gate(app.extensions["cconv"])
        x = rng.random((1, 3, 22, 22), np.float32)
        crowd(app, [npy(rng.random((1, 3, 20, 20), np.float32))])
        assert gate.entered.acquire(timeout=WAIT_S)
        patient = crowd(app, [npy(x)])
        hasty = crowd(app, [infer_json(x, parameters={"timeout": 300_000})], "/v2/models/edges/infer")
        gate.passes.release()
        assert gate.entered.acquire(timeout=WAIT_S)
        assert hasty[0].result().status_code == 504
        gate.opened.set()
        assert np.array_equal(array(patient[0].result()), edges(x))
        assert gate.cancelled == 0


class TestThread:
    """The threads that compute, and the one that watches them."""

    def test_one_starts_with_the_first_task(self, make_app, npy, rng):
        before = threading.active_count()
        app = make_app()
        app.test_client().get("/livez")
        assert threading.active_count() == before
        app.test_client().post(NPY, data=npy(rng.random((1, 3, 20, 20), np.float32)))
        assert threading.active_count() == before + 2
        app.extensions["cconv"].close()
        assert threading.active_count() == before

    def test_they_survive_a_run_that_fails(self, app, npy, rng, bill, caplog):
        pipeline, client = app.extensions["cconv"], app.test_client()
        body = npy(rng.random((1, 3, 20, 20), np.float32))
        make = pipeline.engine.task
        for error, status in ((ZeroDivisionError("boom"), 500), (MemoryError(), 503)):

            def broken(*arguments, error=error):
                def fail(images, cancel):
                    raise error

                task = make(*arguments)
                object.__setattr__(task, "run", fail)
                return task

            pipeline.engine.task = broken
            assert client.post(NPY, data=body).status_code == status
        pipeline.engine.task = make
        assert not any(bill(client).values())
        assert client.post(NPY, data=body).status_code == 200

    def test_a_closed_service_refuses(self, app, npy, rng):
        app.extensions["cconv"].close()
        client = app.test_client()
        assert client.post(NPY, data=npy(rng.random((1, 3, 20, 20), np.float32))).status_code == 503
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json["error"]) == (503, "the server is shutting down")
        assert client.get("/v2/health/ready").json["ready"] is False
        assert client.get("/livez").status_code == 200

    def test_a_failing_self_test_is_not_ready(self, app, monkeypatch, caplog):
        monkeypatch.setattr("cconv.conv2d", lambda *_, **__: np.zeros((1, 1, 1, 1), np.float32))
        assert app.test_client().get("/readyz").status_code == 503
        monkeypatch.undo()
        assert app.test_client().get("/readyz").status_code == 200

    def test_a_self_test_behind_other_work_is_not_ready_and_holds_no_other_probe(self, make_app, crowd, npy, rng):
        app = make_app(lanes=1)
        gate = Gate(app.extensions["cconv"])
        answers = crowd(app, [npy(rng.random((1, 3, 20, 20), np.float32))])
        gate.entered.acquire(timeout=WAIT_S)
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            first = pool.submit(app.test_client().get, "/readyz")
            while not app.extensions["cconv"]._scheduler._queues["cpu"]:
                assert time.monotonic() < began + WAIT_S
                time.sleep(0.005)
            begun = time.monotonic()
            second = app.test_client().get("/readyz")
            assert time.monotonic() - begun < 1
            assert (second.status_code, second.json["error"]) == (503, "the self-test is running")
            assert first.result().status_code == 503
            assert time.monotonic() - began < 4
        gate.opened.set()
        assert [answer.result().status_code for answer in answers] == [200]
        assert app.test_client().get("/readyz").status_code == 200


class TestDeadlinesWithinARequest:
    """What one request does is looked at in between: a deadline ends it soon, and not when all is done."""

    @pytest.mark.parametrize("one_image", [False, True])
    @pytest.mark.parametrize(
        "options", [{}, {"groups": 2}, {"padding": "same", "stride": (1, 2), "activation": "tanh"}]
    )
    def test_a_sliced_convolution_is_bit_for_bit_one_call(self, app, rng, monkeypatch, options, dtype, one_image):
        x = rng.standard_normal((5, 4, 21, 19)).astype(dtype)
        weight = rng.standard_normal((50, 4 // options.get("groups", 1), 3, 5)).astype(dtype)
        bias = rng.standard_normal(50).astype(dtype)
        x = x[0] if one_image else x
        whole, calls, conv2d = cconv.conv2d(x, weight, bias, **options), [], cconv.conv2d
        monkeypatch.setattr("cconv.conv2d", lambda *a, **k: calls.append(1) or conv2d(*a, **k))
        flops = cconv.conv2d_cost(x.shape, weight.shape, bias=True, **options).flops // (1 if one_image else 5)
        for limit in (flops * 10, flops * 5 // 2, flops // 3, flops // 20):
            monkeypatch.setattr("service.slices.FLOPS", limit)
            task = app.extensions["cconv"].engine.conv2d_task(x, weight, bias, options)
            calls.clear()
            got = task.run(x, threading.Event())["y"]
            assert got.shape == whole.shape
            assert got.dtype == whole.dtype
            assert np.array_equal(got, whole)
            in_images = 1 if one_image else {flops * 10: 1, flops * 5 // 2: 3}.get(limit, 5)
            assert len(calls) == in_images if limit >= flops or "groups" in options else len(calls) > 3 * in_images

    @pytest.mark.parametrize("length", [20, 41, 64])
    def test_a_bias_that_does_not_fit_is_refused_however_it_is_sliced(self, app, monkeypatch, length):
        monkeypatch.setattr("service.slices.FLOPS", 1000)
        x, weight, bias = np.ones((1, 3, 9, 9)), np.ones((40, 3, 3, 3)), np.ones(length)
        with pytest.raises(InvalidRequest, match="bias: expected shape"):
            app.extensions["cconv"].engine.conv2d_task(x, weight, bias, {}).run(x, threading.Event())

    def test_a_cancelled_convolution_stops_at_the_next_slice(self, app, monkeypatch):
        x, weight = np.ones((1, 3, 9, 9)), np.ones((64, 3, 3, 3))
        cancel, calls, conv2d = threading.Event(), [], cconv.conv2d

        def once(*arguments, **options):
            calls.append(1)
            cancel.set()
            return conv2d(*arguments, **options)

        monkeypatch.setattr("cconv.conv2d", once)
        monkeypatch.setattr("service.slices.FLOPS", 1000)
        with pytest.raises(DeadlineExceeded):
            app.extensions["cconv"].engine.conv2d_task(x, weight, None, {}).run(x, cancel)
        assert len(calls) == 1

    def test_decoding_ends_between_two_images_and_waits_no_longer_than_the_deadline(self, app, monkeypatch):
        pipeline, decoded, opened = app.extensions["cconv"], [], threading.Event()

        def slow(data, name, pixels):
            decoded.append(name)
            opened.wait(0.3 if name == "slow" else WAIT_S)
            return np.zeros((3, 8, 8), np.float32)

        monkeypatch.setattr(pipeline.engine, "decode", slow)
        late, blocking, waiting = (pipeline.enter(0) for _ in range(3))
        late.shorten(0.2)
        with pytest.raises(DeadlineExceeded):
            pipeline.images(late, [("slow", b"x"), ("next", b"x")])
        assert decoded == ["slow"]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(pipeline.images, blocking, [("blocks", b"x")])
            while "blocks" not in decoded:
                time.sleep(0.005)
            waiting.shorten(0.1)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                pipeline.images(waiting, [("waits", b"x")])
            assert time.monotonic() - began < WAIT_S / 2
            opened.set()
        assert "waits" not in decoded
