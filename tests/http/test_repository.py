"""Repository: models of a folder: what is found, loaded and run once, in which versions; and what is wrong with others.

In: folders, with files of networks.  Out: states with their reasons, and versions; of names nothing beyond the folder.
"""

import json
import os
import threading
import time

import numpy as np
import pytest

import cconv
from service.config import Settings
from service.errors import NotFound
from service.repository import Repository

onnx = pytest.importorskip("onnx")
safetensors = pytest.importorskip("safetensors.numpy")
from onnx import helper  # noqa: E402
from own_models import bill_of, described, index, infer, maps_of, network  # noqa: E402

WAIT_S = 20


class TestVersions:
    def test_the_highest_is_served_and_each_by_its_path(self, serve, folder, rng):
        models = {
            version: cconv.load(network(folder / f"mine/{version}/model.onnx", filters))
            for version, filters in (("2", 4), ("9", 5), ("10", 6))
        }
        client, x = serve(), rng.random((1, 3, 8, 8), np.float32)
        assert client.get("/v2/models/mine").json["versions"] == ["10", "9", "2"]
        assert infer(client, "mine", x).json["model_version"] == "10"
        for version, model in models.items():
            answer = infer(client, "mine", x, version)
            assert answer.json["model_version"] == version
            assert np.array_equal(maps_of(answer)["features"], model.run(x)["features"])
            said = client.get(f"/v2/models/mine/versions/{version}").json
            assert said["outputs"][0]["shape"] == [-1, len(model.run(x)["features"][0])]
            cost = model.cost(x.shape).total
            dry = client.post(f"/v2/models/mine/versions/{version}/cost", json={"shape": [1, 3, 8, 8]}).json
            assert bill_of(dry) == bill_of(answer.json["parameters"]) == (cost.macs, cost.flops, cost.flops_other)

    def test_requests_for_different_versions_never_run_together(self, serve, folder, rng):
        for version in (1, 2):
            network(folder / f"mine/{version}/model.onnx")
        engine, x = serve().application.extensions["cconv"].engine, rng.random((1, 3, 8, 8), np.float32)
        keys = [engine.task(engine.model("mine", version), x).key for version in ("1", "2", None)]
        assert keys[0] != keys[1] == keys[2]

    def test_a_model_and_the_one_that_replaces_it_never_run_together(self, serve, folder, rng):
        network(folder / "mine/1/model.onnx")
        pipeline, x = serve().application.extensions["cconv"], rng.random((1, 3, 8, 8), np.float32)
        old = pipeline.engine.model("mine")
        pipeline.load("mine")
        new = pipeline.engine.model("mine")
        assert (old.name, old.version) == (new.name, new.version)
        assert pipeline.engine.task(old, x).key == pipeline.engine.task(old, x).key != pipeline.engine.task(new, x).key

    def test_a_request_ends_with_the_model_that_it_began_with(self, serve, folder, npy, rng, monkeypatch):
        network(folder / "mine/1/model.onnx")
        client = serve()
        pipeline, run = client.application.extensions["cconv"], cconv.Model.run

        def unloading(self, *arguments):
            maps = run(self, *arguments)
            pipeline.unload("mine")
            return maps

        monkeypatch.setattr(cconv.Model, "run", unloading)
        body = npy(rng.random((2, 3, 8, 8), np.float32))
        answer = client.post("/v1/features?model=mine&format=json", data=body)
        assert answer.status_code == 200
        assert sum(image["bill"]["macs"] for image in answer.json["images"]) == answer.json["macs"]
        assert client.post("/v1/features?model=mine&format=json", data=body).status_code == 503

    def test_no_version_stands_in_for_a_broken_one(self, serve, folder, rng):
        network(folder / "mine/1/model.onnx")
        (folder / "mine/2").mkdir()
        (folder / "mine/2/model.onnx").write_bytes(b"nonsense")
        client, x = serve(), rng.random((1, 3, 8, 8), np.float32)
        assert infer(client, "mine", x).status_code == 503
        assert infer(client, "mine", x, 1).status_code == 200
        assert client.get("/v2/models/mine/ready").status_code == 503
        assert client.get("/v2/models/mine/versions/1/ready").json == {"name": "mine", "ready": True}

    @pytest.mark.parametrize("name", ["0", "01", "-1", "1.0", "1e3", "latest", "１", "9" * 19, ".1", "1 "])
    def test_what_is_no_version_is_left_alone(self, serve, folder, name):
        network(folder / "mine/1/model.onnx")
        network(folder / "mine" / name / "model.onnx")
        client = serve(models=("mine",))
        assert list(index(client)) == [("mine", "1")]
        assert client.get(f"/v2/models/mine/versions/{name}").status_code == 404
        assert client.get("/v2/models/mine/versions/").status_code == 404

    def test_a_name_of_the_folder_hides_a_built_in_model_even_if_it_is_broken(self, serve, folder):
        network(folder / "edges/4/model.onnx")
        (folder / "gabor/1").mkdir(parents=True)
        client = serve()
        assert client.get("/v2/models/edges").json["versions"] == ["4"]
        assert client.get("/v2/models/edges/versions/1").status_code == 404
        assert client.get("/v2/models/gabor").status_code == 503
        assert client.get("/v2/models").json["models"].count("edges") == 1
        assert client.get("/").status_code == 200

    def test_the_setting_of_names_chooses_among_them(self, serve, folder):
        network(folder / "mine/1/model.onnx")
        network(folder / "other/1/model.onnx")
        client = serve(models=("mine", "edges"))
        assert sorted(index(client)) == [("edges", "1"), ("mine", "1")]
        assert client.get("/v2/models/other").status_code == 404
        with pytest.raises(ValueError, match=r"expected names of .*mine, other, got third"):
            serve(models=("third",))


class TestBroken:
    """Each is its own affair."""

    def test_what_cannot_be_loaded_is_told_and_stops_no_other(self, serve, folder, tmp_path, rng):
        network(folder / "good/1/model.onnx")
        network(folder / "unknown/1/model.onnx", more=[helper.make_node("Det", ["sum"], ["d"])])
        whole = network(folder / "cut/1/model.onnx").read_bytes()
        (folder / "cut/1/model.onnx").write_bytes(whole[: len(whole) // 2])
        (folder / "neither/1").mkdir(parents=True)
        network(folder / "both/1/model.onnx")
        described(folder / "both/1/model.safetensors")
        (folder / "nameless/1").mkdir(parents=True)
        safetensors.save_file({"w": np.zeros(3, np.float32)}, folder / "nameless/1/model.safetensors")
        (folder / "empty").mkdir()
        network(folder / "conv2d/1/model.onnx")
        (folder / "pipe/1").mkdir(parents=True)
        os.mkfifo(folder / "pipe/1/model.onnx")
        outside = network(tmp_path / "outside/1/model.onnx")
        (folder / "link/1").mkdir(parents=True)
        (folder / "link/1/model.onnx").symlink_to(outside)
        (folder / "away").symlink_to(tmp_path / "outside")
        reasons = {
            "unknown": "'Det'|Det",
            "cut": "model.onnx: expected",
            "neither": "got neither",
            "both": "got both",
            "nameless": "expected an architecture",
            "empty": "expected folders of versions",
            "conv2d": "expected a name of its own",
            "pipe": "expected a regular file",
            "link": "got a link out of it",
            "away": "got a link out of it",
        }
        client = serve()
        found = {name: one for (name, _), one in index(client).items()}
        x = rng.random((1, 3, 8, 8), np.float32)
        for name, reason in reasons.items():
            assert found[name]["state"] == "UNAVAILABLE", name
            assert any(word in found[name]["reason"] for word in reason.split("|")), found[name]
            assert str(tmp_path) not in json.dumps(found[name])
            for answer in (
                client.get(f"/v2/models/{name}/ready"),
                client.get(f"/v2/models/{name}"),
                client.post("/v1/cost", json={"model": name}),
                infer(client, name, x),
                client.post(f"/v1/features?model={name}", data=b"x"),
            ):
                assert answer.status_code == 503, (name, answer.data)
                assert found[name]["reason"] in answer.json["error"]
        assert found["good"] == {"name": "good", "version": "1", "state": "READY", "reason": ""}
        assert infer(client, "good", x).status_code == 200
        ready = client.post("/v2/repository/index", json={"ready": True}).json
        assert {one["name"] for one in ready} == {"good", *cconv.model_names()}

    def test_an_error_that_nobody_expects_is_in_the_log_and_not_in_the_answer(self, serve, folder, monkeypatch, caplog):
        network(folder / "a/1/model.onnx")
        network(folder / "b/1/model.onnx")
        load = cconv.load

        def broken(path):
            if "/a/" in str(path):
                raise ZeroDivisionError("a secret")
            return load(path)

        monkeypatch.setattr("cconv.load", broken)
        client = serve(models=("a", "b"))
        assert index(client)["a", "1"]["reason"] == "internal error; the server's log says more"
        assert index(client)["b", "1"]["state"] == "READY"
        assert "a secret" in caplog.text

    def test_links_within_the_folder_are_followed(self, serve, folder):
        network(folder / "mine/1/model.onnx")
        (folder / "mine/2").symlink_to("1")
        (folder / "alias").symlink_to("mine")
        states = {key: one["state"] for key, one in index(serve(models=("mine", "alias"))).items()}
        assert states == dict.fromkeys([("mine", "2"), ("mine", "1"), ("alias", "2"), ("alias", "1")], "READY")

    def test_names_that_no_model_may_have_are_left_alone(self, serve, folder, caplog):
        network(folder / "good-1.x_y/1/model.onnx")
        for name in (".hidden", "-x", "with space", "a:b", "a,b", "ü", "<b>"):
            network(folder / name / "1/model.onnx")
        (folder / "README.md").write_text("not a model")
        client = serve()
        assert {name for name, _ in index(client)} == {"good-1.x_y", *cconv.model_names()}
        assert "with space" in caplog.text
        assert ".hidden" not in caplog.text

    def test_a_folder_that_is_not_there_is_refused_at_the_start(self, make_app, tmp_path):
        with pytest.raises(ValueError, match="model repository: expected a folder that can be read"):
            make_app(model_repository=str(tmp_path / "no"))

    def test_an_empty_one_is_none(self, serve, folder):
        folder.mkdir()
        (folder / ".gitignore").write_text("*")
        assert {name for name, _ in index(serve())} == set(cconv.model_names())

    @pytest.mark.parametrize("body", [b"[]", b"{", b'{"ready": 1}', b'{"other": true}'])
    def test_an_index_request_of_nonsense_is_refused(self, client, body):
        assert client.post("/v2/repository/index", data=body).status_code == 400
        assert client.get("/v2/repository/index").status_code == 405


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", ".", "%2Fetc%2Fpasswd", "..%2F..%2Fetc", "/etc/passwd", "mine%00", "mine/..", "mine%2F1"]
)
def test_no_name_reaches_beyond_the_folder(serve, folder, tmp_path, name):
    network(folder / "mine/1/model.onnx")
    network(tmp_path / "1/model.onnx")
    client = serve(models=("mine",))
    for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1/ready", f"/v2/models/mine/versions/{name}"):
        assert client.get(path).status_code == 404, path
    assert client.post("/v1/cost", json={"model": name}).status_code == 404
    with pytest.raises(NotFound):
        Repository(str(folder)).find(name)


def test_a_very_long_name_is_refused_in_few_words(serve, folder):
    network(folder / "mine/1/model.onnx")
    client = serve(models=("mine",))
    for address, status in ((f"/v2/models/{'x' * 3000}", 400), (f"/v2/models/mine/versions/{'1' * 3000}", 404)):
        answer = client.get(address)
        assert answer.status_code == status
        assert b"model" in answer.data
        assert len(answer.data) < 200


class TestStart:
    """What happens before the first request."""

    def test_weights_are_packed_before_it(self, serve, folder, monkeypatch, rng):
        network(folder / "mine/1/model.onnx")
        for seconds, runs in ((60.0, 1), (0.0, 0)):
            seen, run = [], cconv.Model.run
            monkeypatch.setattr(
                "cconv.Model.run", lambda self, x, *a, seen=seen, run=run: seen.append(x) or run(self, x, *a)
            )
            client = serve(warm_up_s=seconds)
            assert [x.shape for x in seen] == [(1, 3, 224, 224)] * runs
            packed = client.application.extensions["cconv"].engine.model("mine").model.weights.nbytes
            assert (packed > 0) == bool(runs)
            monkeypatch.setattr("cconv.Model.run", run)

    def test_a_first_run_that_takes_too_long_is_left_and_the_model_is_ready(self, serve, folder, monkeypatch, caplog):
        network(folder / "mine/1/model.onnx")
        run, asked = cconv.Model.run, threading.Event()

        def slow(self, x, layers, cancel):
            asked.set()
            end = time.monotonic() + WAIT_S
            while not cancel.is_set():
                assert time.monotonic() < end
                time.sleep(0.005)
            return run(self, x, layers, cancel)

        monkeypatch.setattr("cconv.Model.run", slow)
        client = serve(warm_up_s=0.1)
        assert asked.is_set()
        assert index(client)["mine", "1"]["state"] == "READY"
        assert "not warmed up: the deadline passed" in caplog.text

    def test_health_tells_when_all_are_loaded(self, make_app, folder, monkeypatch):
        network(folder / "mine/1/model.onnx")
        opened, load = threading.Event(), cconv.load

        def waits(path):
            assert opened.wait(WAIT_S)
            return load(path)

        engine_load = {"edges": load("edges")}
        monkeypatch.setattr("cconv.load", lambda name: engine_load.get(name) or waits(name))
        client = make_app(model_repository=str(folder)).test_client()
        for path in ("/v2/health/ready", "/readyz"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.json["error"] == "models are being loaded: 1 to go"
        assert client.get("/livez").status_code == 200
        assert index(client)["mine", "1"]["state"] == "LOADING"
        assert client.get("/v2/models/mine/ready").json["ready"] is False
        assert client.get("/v2/models/edges/ready").status_code == 200
        opened.set()
        end = time.monotonic() + WAIT_S
        while client.get("/readyz").status_code != 200 and time.monotonic() < end:
            time.sleep(0.005)
        assert client.get("/v2/models/mine/ready").json == {"name": "mine", "ready": True}

    @pytest.mark.parametrize("warm_up_s", [0.0, 60.0])
    def test_a_file_that_is_replaced_changes_nothing(self, serve, folder, rng, warm_up_s):
        path = network(folder / "mine/1/model.onnx")
        model, x = cconv.load(path), rng.random((1, 3, 12, 12), np.float32)
        client = serve(warm_up_s=warm_up_s)
        os.replace(network(folder / "new.onnx", 5), path)
        network(folder / "mine/2/model.onnx", 6)
        network(folder / "late/1/model.onnx", 6)
        assert np.array_equal(maps_of(infer(client, "mine", x))["features"], model.run(x)["features"])
        path.unlink()
        assert np.array_equal(maps_of(infer(client, "mine", x))["features"], model.run(x)["features"])
        assert client.get("/v2/models/late").status_code == 404
        assert ("mine", "2") not in index(client)

    def test_a_service_that_closes_while_it_loads_ends_its_thread(self, make_app, folder):
        for number in range(3):
            network(folder / f"m{number}/1/model.onnx")
        app = make_app(model_repository=str(folder))
        app.extensions["cconv"].close()
        assert not [thread for thread in threading.enumerate() if thread.name == "cconv-loader"]


def test_settings_for_it_are_read():
    settings = Settings.from_env({"CCONV_MODEL_REPOSITORY": "/models", "CCONV_WARM_UP_SECONDS": "0"})
    assert settings == Settings(model_repository="/models", warm_up_s=0.0)
