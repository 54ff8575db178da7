"""Own models over all routes: maps and bills of a repository's files are the library's own.

In: files that onnx and safetensors write.  Out: the same integers and, bit for bit, the same maps by every route.
"""

import io
import json

import numpy as np
import pytest

import cconv

pytest.importorskip("onnx")
pytest.importorskip("safetensors.numpy")
from onnx import TensorProto, helper, numpy_helper
from own_models import bill_of, described, index, infer, maps_of, network, save


class TestServing:
    """A good file, over every route."""

    def test_every_layer_comes_back_as_the_library_gives_it_and_is_billed_so(self, serve, folder, rng, bill):
        model = cconv.load(network(folder / "mine/1/model.onnx"))
        client, x = serve(), rng.random((2, 3, 20, 24), np.float32)
        assert not any(bill(client).values())  # nobody pays for the warm-up
        total = np.zeros(4)
        for layers in (None, ["relu"], ["sum", "conv"], [layer.name for layer in model.layers]):
            answer, cost = infer(client, "mine", x, outputs=layers), model.cost(x.shape, layers).total
            expected = model.run(x, layers)
            assert maps_of(answer).keys() == expected.keys()
            assert all(np.array_equal(got, expected[name]) for name, got in maps_of(answer).items())
            assert bill_of(answer.json["parameters"]) == (cost.macs, cost.flops, cost.flops_other)
            names = {} if layers is None else {"layers": layers}
            dry = client.post("/v1/cost", json={"model": "mine", "shape": list(x.shape), **names}).json
            assert dry == client.post("/v2/models/mine/cost", json={"shape": list(x.shape), **names}).json
            assert bill_of(dry) == (cost.macs, cost.flops, cost.flops_other)
            total += (2, *bill_of(dry))
        assert tuple(bill(client).values()) == tuple(total)

    def test_metadata_says_what_varies(self, serve, folder):
        network(folder / "mine/1/model.onnx", outputs=(("features", 2), ("sum", 4)))
        client = serve()
        metadata, config = (client.get(f"/v2/models/mine{end}").json for end in ("", "/config"))
        assert metadata["inputs"] == [{"name": "data", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
        assert {o["name"]: o["shape"] for o in metadata["outputs"]} == {"features": [-1, 8], "sum": [-1, 8, -1, -1]}
        assert metadata["properties"]["layers"] == "conv,relu,branch,sum,pool,features"
        cost = cconv.load(folder / "mine/1/model.onnx").cost((1, 3, 224, 224)).total
        assert metadata["properties"]["macs_per_default_image"] == str(cost.macs)
        assert config["input"][0] | {"optional": None} == {
            "name": "data", "data_type": "TYPE_FP32", "format": "FORMAT_NCHW", "dims": [3, -1, -1], "optional": None,
        }  # fmt: skip

    def test_the_input_may_be_called_image_too_and_nothing_else(self, serve, folder, rng):
        network(folder / "mine/1/model.onnx")
        client, x = serve(), rng.random((1, 3, 9, 9), np.float32)
        assert infer(client, "mine", x).json["outputs"] == infer(client, "mine", x, image="image").json["outputs"]
        assert "expected 'data'" in infer(client, "mine", x, image="input").json["error"]

    def test_tritonclient_asks_for_the_index_and_infers_in_binary(self, start_server, triton, folder, rng):
        network(folder / "mine/3/model.onnx")
        model, x = cconv.load(folder / "mine/3/model.onnx"), rng.random((2, 3, 16, 16), np.float32)
        (folder / "broken/1").mkdir(parents=True)
        server = start_server(CCONV_MODEL_REPOSITORY=str(folder), CCONV_MODELS="mine,broken,edges")
        client = triton.InferenceServerClient(server.address)
        states = {(one["name"], one["version"]): one["state"] for one in client.get_model_repository_index()}
        assert states == {("edges", "1"): "READY", ("mine", "3"): "READY", ("broken", "1"): "UNAVAILABLE"}
        assert client.is_model_ready("mine")
        assert client.is_model_ready("mine", "3")
        assert not client.is_model_ready("broken")
        image = triton.InferInput(client.get_model_metadata("mine")["inputs"][0]["name"], x.shape, "FP32")
        image.set_data_from_numpy(x)
        result = client.infer("mine", [image], outputs=[triton.InferRequestedOutput("sum")])
        assert np.array_equal(result.as_numpy("sum"), model.run(x, ["sum"])["sum"])
        assert result.get_response()["parameters"]["macs"] == model.cost(x.shape, ["sum"]).total.macs
        client.close()
        log = server.log.read_text()
        assert "model mine version 3 is ready after" in log
        assert "model broken version 1 is not available: expected one file" in log

    def test_photographs_are_prepared_as_the_file_declares(self, serve, folder, png, picture, npy):
        declared = {"resize": None, "size": 4, "mean": [0.5, 0.25, 0], "std": [2, 1, 0.5], "channels": "BGR"}
        path = described(folder / "mine/1/model.safetensors", preprocessing=json.dumps(declared))
        described(folder / "plain/1/model.safetensors")
        client, model, photograph = serve(), cconv.load(path), png(picture(6, 8))
        decoded = cconv.images.decode(photograph)
        for name, x in (("mine", model.prepare(decoded)), ("plain", decoded)):
            answer = client.post(f"/v1/features?model={name}&format=npy", data=photograph)
            assert np.array_equal(np.load(io.BytesIO(answer.data)), model.run(x[None])["conv"]), name
            cost = model.cost((1, *x.shape)).total
            assert int(answer.headers["X-Cconv-Macs"]) == cost.macs
        tensor = client.post("/v1/features?model=mine&format=npy", data=npy(decoded))  # as it is
        assert np.array_equal(np.load(io.BytesIO(tensor.data)), model.run(decoded[None])["conv"])
        properties = client.get("/v2/models/mine").json["properties"]
        assert json.loads(properties["preprocessing"])["channels"] == "BGR"
        assert "preprocessing" not in client.get("/v2/models/plain").json["properties"]

    def test_an_onnx_file_may_declare_it_too(self, serve, folder, png, picture):
        model = cconv.load(network(folder / "mine/1/model.onnx", preprocessing="imagenet"))
        network(folder / "odd/1/model.onnx", preprocessing='{"mean": 1e999}')
        network(folder / "word/1/model.onnx", preprocessing="nonsense")
        client, photograph = serve(), png(picture(40, 30))
        x = cconv.images.Preprocessing()(cconv.images.decode(photograph))
        answer = client.post("/v1/features?model=mine&format=npy", data=photograph)
        assert np.array_equal(np.load(io.BytesIO(answer.data)), model.run(x[None])["features"])
        for name in ("odd", "word"):
            assert "model.onnx: " in index(client)[name, "1"]["reason"]

    def test_a_thin_photograph_is_refused_before_it_is_made_large(self, serve, folder, png):
        described(folder / "mine/1/model.safetensors", preprocessing="imagenet")
        client = serve(max_pixels=1_000_000)
        answer = client.post("/v1/features?model=mine", data=png(1, 5000))
        assert answer.status_code == 400
        assert "expected at most 1000000 pixels when its short side is made 256" in answer.json["error"]

    def test_the_page_shows_its_layers(self, serve, folder, png, picture):
        network(folder / "mine/1/model.onnx")
        client = serve()
        assert "mine: sum (Add)" in client.get("/").get_data(as_text=True)
        form = {"choice": "mine:sum", "photograph": (io.BytesIO(png(picture(12, 12))), "x.png")}
        answer = client.post("/", data=form)
        assert answer.status_code == 200
        assert "mine, sum" in answer.get_data(as_text=True)

    def test_limits_hold_for_it_as_for_any_other(self, serve, folder, rng):
        network(folder / "mine/1/model.onnx")
        client = serve(max_flops=10**6, max_output_bytes=10**5)
        assert infer(client, "mine", rng.random((1, 3, 16, 16), np.float32)).status_code == 200
        refused = infer(client, "mine", rng.random((1, 3, 64, 64), np.float32))
        assert refused.status_code == 413
        assert "floating-point operations" in refused.json["error"]
        assert index(client)["mine", "1"]["state"] == "READY"  # though its own size is beyond the limit

    def test_maps_in_between_take_a_place_in_the_house(self, serve, folder, rng):
        """Of a chain two lie there at a time, of branches more."""
        model = cconv.load(network(folder / "mine/1/model.onnx"))
        x = rng.random((2, 3, 32, 32), np.float32)
        one_map = 2 * 8 * 32 * 32 * 4
        assert model.working_bytes(x.shape) >= 2 * one_map
        assert model.working_bytes(x.shape, ["conv"]) == 0
        client = serve(queue_bytes=x.nbytes * 40, max_body_bytes=x.nbytes * 8)
        permits, pipeline = [], client.application.extensions["cconv"]
        enter = pipeline.enter
        pipeline.enter = lambda *of: permits.append(enter(*of)) or permits[-1]
        body = io.BytesIO()
        np.save(body, x)
        answer = client.post("/v1/features?model=mine", data=body.getvalue())
        assert answer.status_code == 200
        features = 2 * 8 * 4
        assert permits[0].bytes == len(body.getvalue()) + model.working_bytes(x.shape) + features


class TestOtherShapes:
    """Files that take no single images."""

    @pytest.fixture
    def dense(self, folder):
        """Rows of five numbers in, three out."""
        weight = numpy_helper.from_array(np.arange(15, dtype=np.float32).reshape(5, 3), "w")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["row", "w"], ["y"])], "dense",
            [helper.make_tensor_value_info("row", TensorProto.FLOAT, ["N", 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])], [weight],
        )  # fmt: skip
        return cconv.load(save(graph, folder / "dense/1/model.onnx"))

    def test_rows_are_served_and_billed(self, serve, dense, rng):
        client, x = serve(), rng.random((7, 5), np.float32)
        assert client.get("/v2/models/dense").json["inputs"][0]["shape"] == [-1, 5]
        answer = infer(client, "dense", x, image="row")
        assert np.array_equal(maps_of(answer)["y"], dense.run(x)["y"])
        assert answer.json["parameters"]["macs"] == dense.cost(x.shape).total.macs == 7 * 15
        assert answer.json["parameters"]["batch_size"] == 7

    def test_batches_are_served_whole(self, serve, folder, rng):
        model = cconv.load(network(folder / "four/1/model.onnx", batch=4))
        client, x = serve(), rng.random((8, 3, 8, 8), np.float32)
        answer = infer(client, "four", x)
        assert np.array_equal(maps_of(answer)["features"], model.run(x)["features"])
        assert answer.json["parameters"]["macs"] == model.cost(x.shape).total.macs
        odd = infer(client, "four", x[:3])
        assert odd.status_code == 400
        assert "expected a multiple of 4 images" in odd.json["error"]
        own = model.cost((4, 3, 224, 224)).total.macs
        assert client.get("/v2/models/four").json["properties"]["macs_per_default_batch_of_4"] == str(own)
        assert client.post("/v1/cost", json={"model": "four"}).json["macs"] == own

    def test_photographs_for_them_are_refused(self, serve, folder, dense, png):
        network(folder / "four/1/model.onnx", batch=4)
        client = serve()
        for name in ("four", "dense"):
            answer = client.post(f"/v1/features?model={name}", data=png(8, 8))
            assert answer.status_code == 400
            assert f"POST /v2/models/{name}/infer" in answer.json["error"]
            assert f"{name}: " not in client.get("/").get_data(as_text=True)

    def test_what_is_no_map_of_an_image_is_given_once_and_never_cut(self, serve, folder, npy, rng):
        network(folder / "mine/1/model.onnx", more=[helper.make_node("Shape", ["sum"], ["size"])])
        client, x = serve(), rng.random((4, 3, 8, 8), np.float32)
        answer = infer(client, "mine", x, outputs=["size", "features"])
        size = answer.json["outputs"][0]
        assert (size["datatype"], size["shape"], size["data"]) == ("INT64", [4], [1, 8, 8, 8])
        engine = client.application.extensions["cconv"].engine
        served = engine.model("mine")
        assert engine.task(served, x, ("size", "features")).key is None  # never stacked with another request's
        assert engine.task(served, x, ("features",)).key is not None
        refused = client.post("/v1/features?model=mine&layers=size", data=npy(x))
        assert refused.status_code == 400
        assert "size [4] for 4 images" in refused.json["error"]
