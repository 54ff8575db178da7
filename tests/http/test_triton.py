"""Triton: what a server must answer for tritonclient to work as it comes, blocking and with asyncio.

In: tritonclient[http] from its package against the service under gunicorn; a folder of models.  Out: research's list of
what passes as a server of the Open Inference Protocol, one test each; what others test is not tested again.
"""

import asyncio
import json
import re
import shutil
import time

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")

import own_models

import cconv
from service import auth

MODEL, LAYER = "texture", "level1.relu"


@pytest.fixture
def refusal(triton):
    from tritonclient.utils import InferenceServerException

    return InferenceServerException


@pytest.fixture
def x(rng):
    return rng.random((2, 3, 32, 40), np.float32)


@pytest.fixture
def aio():
    """f(coroutine function of a client, address) -> what it returns; tritonclient.http.aio as it comes."""
    import tritonclient.http.aio as package

    def run(work, address):
        async def main():
            async with package.InferenceServerClient(address) as client:
                return await work(client, package)

        return asyncio.run(main())

    return run


def tensor(package, array, datatype="FP32", binary=True):
    made = package.InferInput("image", array.shape, datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


@pytest.fixture
def client(server, triton):
    made = triton.InferenceServerClient(server.address)
    yield made
    made.close()


@pytest.fixture
def pictures(png, picture):
    """(encoded, as arrays)"""
    arrays = [picture(24, 20) for _ in range(3)]
    return np.array([png(one) for one in arrays], np.object_), np.stack([one.transpose(2, 0, 1) for one in arrays])


class TestBlocking:
    """tritonclient.http"""

    @pytest.mark.parametrize("one_way", ["gzip", "deflate", None])
    @pytest.mark.parametrize("other_way", ["gzip", "deflate", None])
    def test_compression_both_ways(self, client, triton, x, one_way, other_way):
        result = client.infer(
            MODEL,
            [tensor(triton, x)],
            outputs=[triton.InferRequestedOutput(LAYER)],
            request_compression_algorithm=one_way,
            response_compression_algorithm=other_way,
        )
        assert np.array_equal(result.as_numpy(LAYER), cconv.load(MODEL).run(x, [LAYER])[LAYER])

    def test_pictures_in_bytes(self, client, triton, pictures):
        encoded, arrays = pictures
        result = client.infer(MODEL, [tensor(triton, encoded, "BYTES")], outputs=[triton.InferRequestedOutput(LAYER)])
        expected = cconv.load(MODEL).run(np.divide(arrays, 255, dtype=np.float32), [LAYER])[LAYER]
        assert np.array_equal(result.as_numpy(LAYER), expected)

    @pytest.mark.parametrize(("datatype", "kind"), [("FP16", np.float16), ("UINT8", np.uint8)])
    def test_other_numbers_in(self, client, triton, x, datatype, kind):
        given = (255 * x if kind is np.uint8 else x).astype(kind)
        meant = np.divide(given, 255 if kind is np.uint8 else 1, dtype=np.float32)
        result = client.infer(MODEL, [tensor(triton, given, datatype)], outputs=[triton.InferRequestedOutput(LAYER)])
        assert np.array_equal(result.as_numpy(LAYER), cconv.load(MODEL).run(meant, [LAYER])[LAYER])

    def test_fp16_out(self, client, triton, x):
        wanted = triton.InferRequestedOutput(LAYER)
        wanted._parameters["dtype"] = "FP16"  # it has no argument for parameters of an output
        result = client.infer(MODEL, [tensor(triton, x)], outputs=[wanted])
        got = result.as_numpy(LAYER)
        assert got.dtype == np.float16
        assert np.array_equal(got, cconv.load(MODEL).run(x, [LAYER])[LAYER].astype(np.float16))

    def test_statistics(self, client, triton, x):
        def count(**which):
            return {
                entry["name"]: entry["inference_count"]
                for entry in client.get_inference_statistics(**which)["model_stats"]
            }

        before = count()[MODEL]
        client.infer(MODEL, [tensor(triton, x)])
        assert count()[MODEL] == count(model_name=MODEL)[MODEL] == before + 2
        assert count(model_name=MODEL, model_version="1") == {MODEL: before + 2}
        assert "statistics" in client.get_server_metadata()["extensions"]

    def test_parameters_of_ones_own_and_request_ids_are_taken(self, client, triton, x):
        result = client.infer(MODEL, [tensor(triton, x)], request_id="r-1", parameters={"colour": "blue", "n": 7})
        assert result.get_response()["id"] == "r-1"

    def test_flops_are_the_oracles(self, client, triton, x):
        result = client.infer(MODEL, [tensor(triton, x)], outputs=[triton.InferRequestedOutput(LAYER)])
        total = cconv.load(MODEL).cost(x.shape, [LAYER]).total
        assert result.get_response()["parameters"]["flops"] == 2 * total.macs

    @pytest.mark.slow
    def test_a_connection_may_rest_between_requests(self, client, triton, x):
        for _ in range(2):
            client.infer(MODEL, [tensor(triton, x)])
            time.sleep(5)
        client.infer(MODEL, [tensor(triton, x)])

    def test_loading_needs_an_admin(self, client, refusal):
        with pytest.raises(refusal, match="expected a service with API keys") as caught:
            client.load_model(MODEL)
        assert caught.value.status() == "403"


class TestAsyncio:
    """tritonclient.http.aio"""

    def test_health_metadata_and_statistics(self, aio, server):
        async def work(client, _):
            return [
                await client.is_server_live(),
                await client.is_server_ready(),
                await client.is_model_ready(MODEL),
                not await client.is_model_ready("nonesuch"),
                (await client.get_server_metadata())["name"] == "cconv",
                (await client.get_model_metadata(MODEL))["inputs"][0]["name"] == "image",
                (await client.get_model_config(MODEL))["max_batch_size"] > 0,
                {one["state"] for one in await client.get_model_repository_index()} == {"READY"},
                (await client.get_inference_statistics(MODEL))["model_stats"][0]["version"] == "1",
            ]

        assert all(aio(work, server.address))

    @pytest.mark.parametrize("coding", ["gzip", "deflate", None])
    def test_many_at_once_get_their_own_maps(self, aio, server, rng, coding):
        images = [rng.random((1, 3, 20 + i % 3, 24), np.float32) for i in range(12)]

        async def work(client, package):
            outputs = [package.InferRequestedOutput(LAYER)]
            limit = asyncio.Semaphore(8)

            async def one(image):
                async with limit:
                    return await client.infer(
                        MODEL,
                        [tensor(package, image)],
                        outputs=outputs,
                        request_compression_algorithm=coding,
                        response_compression_algorithm=coding,
                    )

            return [result.as_numpy(LAYER) for result in await asyncio.gather(*map(one, images))]

        for image, got in zip(images, aio(work, server.address), strict=True):
            assert np.array_equal(got, cconv.load(MODEL).run(image, [LAYER])[LAYER])

    def test_a_refusal_reads_as_tritons(self, aio, server, refusal, x):
        async def work(client, package):
            await client.infer("nonesuch", [tensor(package, x)])

        with pytest.raises(refusal, match="Request for unknown model: 'nonesuch' is not found") as caught:
            aio(work, server.address)
        assert caught.value.status() == "404"


class TestRepository:
    """load and unload, for admins"""

    @pytest.fixture
    def served(self, start_server, triton, tmp_path, folder):
        own_models.network(folder / "mine/1/model.onnx", 4)
        keys = tmp_path / "keys.json"
        self.admin, self.user = (
            {"Authorization": f"Bearer {auth.make(keys, 'a', scopes)}"} for scopes in (("admin",), ("infer",))
        )
        server = start_server(CCONV_API_KEYS=str(keys), CCONV_MODEL_REPOSITORY=str(folder))
        client = triton.InferenceServerClient(server.address)
        yield client
        client.close()

    def width(self, client, triton, x, name="mine", version="") -> int:
        image = tensor(triton, x)
        return client.infer(name, [image], model_version=version, headers=self.admin).as_numpy("features").shape[1]

    def states(self, client) -> dict:
        index = client.get_model_repository_index(headers=self.admin)
        return {(one["name"], one["version"]): one["state"] for one in index if one["name"] in ("mine", "new")}

    def test_models_come_change_and_go_while_the_service_runs(self, served, triton, refusal, folder, x):
        assert self.width(served, triton, x) == 4
        own_models.network(folder / "mine/2/model.onnx", 6)
        own_models.network(folder / "new/1/model.onnx", 5)
        assert self.width(served, triton, x) == 4
        for name in ("mine", "new"):
            served.load_model(name, headers=self.admin)
        assert self.width(served, triton, x) == 6
        assert self.width(served, triton, x, version="1") == 4
        assert self.width(served, triton, x, "new") == 5
        assert self.states(served) == dict.fromkeys((("mine", "2"), ("mine", "1"), ("new", "1")), "READY")
        served.unload_model("mine", headers=self.admin)
        assert not served.is_model_ready("mine", headers=self.admin)
        with pytest.raises(refusal, match="unloaded") as caught:
            self.width(served, triton, x)
        assert caught.value.status() == "503"
        assert served.is_server_ready()
        shutil.rmtree(folder / "mine/2")
        served.load_model("mine", headers=self.admin)
        assert self.width(served, triton, x) == 4

    def test_a_file_that_is_broken_leaves_what_was_served(self, served, triton, refusal, folder, x):
        path = folder / "mine/1/model.onnx"
        (folder / "part").write_bytes(path.read_bytes()[:100])
        (folder / "part").rename(path)
        with pytest.raises(refusal, match="failed to load 'mine'"):
            served.load_model("mine", headers=self.admin)
        assert self.width(served, triton, x) == 4
        (folder / "new/1").mkdir(parents=True)
        with pytest.raises(refusal, match="failed to load 'new'"):
            served.load_model("new", headers=self.admin)
        assert self.states(served)["new", "1"] == "UNAVAILABLE"

    def test_what_may_not_be_is_refused(self, served, refusal, folder):
        for call, status, text in (
            (lambda: served.load_model("mine", headers=self.user), "403", "expected one with scope 'admin'"),
            (lambda: served.unload_model("mine", headers=self.user), "403", "expected one with scope 'admin'"),
            (lambda: served.load_model("mine"), "401", "API key: expected one"),
            (lambda: served.load_model("nonesuch", headers=self.admin), "404", "no such model"),
            (lambda: served.load_model("..", headers=self.admin), "404", "no such model"),
            (lambda: served.load_model("%2e%2e%2fmodels", headers=self.admin), "404", "no such model"),
            (lambda: served.load_model("mine", headers=self.admin, config=json.dumps({})), "400", "expected only"),
            (
                lambda: served.load_model("mine", headers=self.admin, config="{}", files={"file:1/model.onnx": b"x"}),
                "400",
                "expected only unload_dependents",
            ),
            (lambda: served.unload_model("edges", headers=self.admin), "400", "got a built-in one"),
            (lambda: served.unload_model("nonesuch", headers=self.admin), "404", "not found"),
        ):
            with pytest.raises(refusal, match=re.escape(text)) as caught:
                call()
            assert caught.value.status() == status, text
        served.unload_model("mine", unload_dependents=True, headers=self.admin)
