"""Protocol: the Open Inference Protocol v2, spoken by tritonclient as it comes and by hand.

In: the service under gunicorn and in process.  Out: maps equal to cconv's own bit for bit, and the bill.
"""

import json
import re

import numpy as np
import pytest

import cconv
from cconv import filters

BANK = "edges"


@pytest.fixture
def weights():
    return filters.bank(BANK)


@pytest.fixture
def x(rng):
    return rng.random((2, 3, 37, 41), np.float32)


@pytest.fixture
def triton_client(server, triton):
    client = triton.InferenceServerClient(server.address)
    yield client
    client.close()


@pytest.fixture
def refusal(triton):
    """What tritonclient raises for any status but 200."""
    from tritonclient.utils import InferenceServerException

    return InferenceServerException


@pytest.fixture
def tensor(triton):
    def make(array, binary=True):
        made = triton.InferInput("image", array.shape, "FP32")
        made.set_data_from_numpy(array, binary_data=binary)
        return made

    return make


class TestTritonclient:
    """tritonclient, unmodified."""

    def test_health_and_metadata_are_understood(self, triton_client):
        assert triton_client.is_server_live()
        assert triton_client.is_server_ready()
        assert triton_client.is_model_ready(BANK)
        assert triton_client.is_model_ready(BANK, "1")
        assert not triton_client.is_model_ready("nonesuch")
        assert not triton_client.is_model_ready(BANK, "2")
        assert "binary_tensor_data" in triton_client.get_server_metadata()["extensions"]
        metadata = triton_client.get_model_metadata(BANK)
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
        config = triton_client.get_model_config(BANK)
        assert config["input"][0]["dims"] == metadata["inputs"][0]["shape"][1:]
        assert [o["dims"] for o in config["output"]] == [o["shape"][1:] for o in metadata["outputs"]]

    def test_binary_both_ways_gives_conv2ds_maps_and_conv2d_costs_bill(self, triton_client, tensor, x, weights):
        result = triton_client.infer(BANK, [tensor(x)])
        answer = result.get_response()
        (output,) = answer["outputs"]
        assert np.array_equal(result.as_numpy(output["name"]), cconv.conv2d(x, weights))
        assert output["parameters"]["binary_data_size"] == result.as_numpy(output["name"]).nbytes
        cost = cconv.conv2d_cost(x.shape, weights.shape)
        said = {name: answer["parameters"][name] for name in ("macs", "flops", "flops_other")}
        assert said == {"macs": cost.macs, "flops": 2 * cost.macs, "flops_other": cost.flops_other}
        assert answer["parameters"]["batch_size"] == len(x)
        assert {"device", "algorithm", "queue_us", "compute_us"} <= set(answer["parameters"])

    @pytest.mark.parametrize("binary_in", [True, False])
    @pytest.mark.parametrize("binary_out", [True, False])
    def test_json_and_binary_carry_the_same_numbers(
        self, triton_client, triton, tensor, x, weights, binary_in, binary_out
    ):
        outputs = [triton.InferRequestedOutput("conv", binary_data=binary_out)]
        result = triton_client.infer(BANK, [tensor(x, binary_in)], outputs=outputs)
        assert np.array_equal(result.as_numpy("conv"), cconv.conv2d(x, weights))

    def test_every_output_may_choose_its_own_form(self, triton_client, triton, tensor, x):
        wanted = {"level2.relu": True, "level1.pool": False, "level1.conv": True}
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name, binary in wanted.items()]
        result = triton_client.infer("texture", [tensor(x)], outputs=outputs, request_id="a-7")
        expected = cconv.load("texture").run(x, list(wanted))
        assert result.get_response()["id"] == "a-7"
        assert [o["name"] for o in result.get_response()["outputs"]] == list(wanted)
        for name in wanted:
            assert np.array_equal(result.as_numpy(name), expected[name]), name

    def test_every_layer_is_an_output_and_only_what_ran_is_billed(self, triton_client, triton, tensor, x):
        model = cconv.load("texture")
        for layer in model.layers:
            result = triton_client.infer("texture", [tensor(x)], outputs=[triton.InferRequestedOutput(layer.name)])
            assert result.as_numpy(layer.name).shape == model.shapes(x.shape, [layer.name])[layer.name]
            assert result.get_response()["parameters"]["macs"] == model.cost(x.shape, [layer.name]).total.macs

    def test_many_requests_at_once_get_their_own_answers(self, server, triton, tensor, rng, weights):
        client = triton.InferenceServerClient(server.address, concurrency=8)
        images = [rng.random((1, 3, 20 + i % 3, 24), np.float32) for i in range(24)]
        pending = [client.async_infer(BANK, [tensor(image)]) for image in images]
        for image, request in zip(images, pending, strict=True):
            assert np.array_equal(request.get_result().as_numpy("conv"), cconv.conv2d(image, weights))
        client.close()

    @pytest.mark.parametrize(
        ("model", "datatype", "shape", "status", "text"),
        [
            ("nonesuch", "FP32", (1, 3, 8, 8), "404", "Request for unknown model: 'nonesuch' is not found"),
            (BANK, "FP64", (1, 3, 8, 8), "400", "data-type is 'FP64', but model 'edges' expects 'FP32'"),
            (BANK, "FP32", (1, 4, 8, 8), "400", "Expected [-1,3,-1,-1], got [1,4,8,8]"),
            (BANK, "FP32", (3, 8, 8), "400", "Expected [-1,3,-1,-1], got [3,8,8]"),
            (BANK, "FP32", (1, 3, 2, 2), "400", "kernel no larger than the padded image"),
        ],
    )
    def test_a_refusal_reads_as_tritons(self, triton_client, triton, refusal, model, datatype, shape, status, text):
        wrong = triton.InferInput("image", shape, datatype)
        wrong.set_data_from_numpy(np.zeros(shape, {"FP32": np.float32, "FP64": np.float64}[datatype]))
        with pytest.raises(refusal, match=re.escape(text)) as caught:
            triton_client.infer(model, [wrong])
        assert caught.value.status() == status

    def test_a_body_that_is_too_long_is_413_with_a_text(self, triton_client, tensor, server, refusal):
        with pytest.raises(refusal, match="expected at most 67108864 bytes, got") as caught:
            triton_client.infer(BANK, [tensor(np.zeros((12, 3, 700, 700), np.float32))])
        assert caught.value.status() == "413"
        assert server.ask("/livez")[0] == 200


class TestByHand:
    """What tritonclient does not show."""

    def test_the_binary_answers_header_is_a_multiple_of_eight_bytes(self, client, x, infer_json):
        for name in ("", "a", "ab", "abc"):  # of any length
            body = infer_json(x, id=name, parameters={"binary_data_output": True})
            answer = client.post(f"/v2/models/{BANK}/infer", data=body)
            length = int(answer.headers["Inference-Header-Content-Length"])
            header = json.loads(answer.data[:length])
            assert length % 8 == 0
            assert header["id"] == name
            (output,) = header["outputs"]
            assert len(answer.data) == length + output["parameters"]["binary_data_size"]
            assert answer.content_length == len(answer.data)

    def test_an_answer_in_json_alone_has_no_binary_header(self, client, x, infer_json, weights):
        answer = client.post(f"/v2/models/{BANK}/versions/1/infer", data=infer_json(x))
        assert answer.mimetype == "application/json"
        assert "Inference-Header-Content-Length" not in answer.headers
        assert "id" not in answer.json
        (output,) = answer.json["outputs"]
        got = np.array(output["data"], np.float32).reshape(output["shape"])
        assert np.array_equal(got, cconv.conv2d(x, weights))

    def test_data_may_be_flat_or_nested(self, client, x):
        def maps(data):
            tensor = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": data}
            return client.post(f"/v2/models/{BANK}/infer", json={"inputs": [tensor]}).json["outputs"]

        assert maps(x.tolist()) == maps(x.ravel().tolist())

    def test_without_outputs_the_ones_in_the_metadata_come_back(self, client, x, infer_json):
        metadata = client.get("/v2/models/texture").json
        answer = client.post("/v2/models/texture/infer", data=infer_json(x)).json
        assert [o["name"] for o in answer["outputs"]] == [o["name"] for o in metadata["outputs"]]
        for output, promised in zip(answer["outputs"], metadata["outputs"], strict=True):
            assert all(want in (-1, got) for want, got in zip(promised["shape"], output["shape"], strict=True))

    def test_metadata_lists_every_layer(self, client):
        for name in client.get("/v2/models").json["models"]:
            properties = client.get(f"/v2/models/{name}").json["properties"]
            assert properties["layers"].split(",") == [layer.name for layer in cconv.load(name).layers]
            assert all(isinstance(value, str) for value in properties.values())

    def test_a_map_that_json_cannot_carry_is_refused_and_not_billed(self, client, bill, infer_binary, x):
        x[1, 2, 3, 4] = np.nan
        body, headers = infer_binary(x)
        answer = client.post(f"/v2/models/{BANK}/infer", data=body, headers=headers)
        assert answer.status_code == 400
        assert "NaN or infinity" in answer.json["error"]
        assert not any(bill(client).values())
        body, headers = infer_binary(x, parameters={"binary_data_output": True})
        assert client.post(f"/v2/models/{BANK}/infer", data=body, headers=headers).status_code == 200

    def test_errors_name_the_request(self, client, x, infer_json):
        answer = client.post(f"/v2/models/{BANK}/infer", data=infer_json(x, id="q1", outputs=[{"name": "no"}]))
        assert answer.status_code == 400
        assert answer.json["error"].startswith("[request id: q1] unexpected inference output 'no'")
