"""Outputs: what may go in beside FP32, and what a client may want of an output beside all of it.

In: requests of the protocol with parameters of outputs, pictures and numbers of other types.  Out: what NumPy makes of
the library's own maps, at the same bill.
"""

import json
import struct
import tracemalloc

import numpy as np
import pytest

import cconv
from service.admission import Permit
from service.outputs import Form

MODEL, LAYER = "texture", "level1.relu"
INFER = f"/v2/models/{MODEL}/infer"
HEADER = "Inference-Header-Content-Length"


@pytest.fixture
def x(rng):
    return rng.random((2, 3, 37, 41), np.float32)


@pytest.fixture
def maps(x):
    return cconv.load(MODEL).run(x, [LAYER])[LAYER]


def tensor(datatype, shape, data: bytes, **more) -> tuple[bytes, dict]:
    """A request for LAYER in binary, as (body, headers)."""
    one = {"name": "image", "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": len(data)}}
    content = {"inputs": [one], "outputs": [{"name": LAYER, "parameters": {"binary_data": True}}], **more}
    header = json.dumps(content).encode()
    return header + data, {HEADER: str(len(header))}


def elements(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(data)) + data for data in files)


def read(answer) -> tuple[np.ndarray, dict]:
    """The one output of an answer, and its parameters."""
    assert answer.status_code == 200, answer.data[:300]
    length = int(answer.headers[HEADER]) if HEADER in answer.headers else len(answer.data)
    (output,) = json.loads(answer.data[:length])["outputs"]
    dtype = {"FP32": "<f4", "FP16": "<f2", "UINT8": "u1"}[output["datatype"]]
    data = output["data"] if "data" in output else np.frombuffer(answer.data[length:], dtype)
    return np.array(data, dtype).reshape(output["shape"]), output.get("parameters", {})


@pytest.fixture
def ask(client, x, infer_json):
    """f(**parameters of the output) -> the answer."""
    return lambda **parameters: client.post(
        INFER, data=infer_json(x, outputs=[{"name": LAYER, "parameters": parameters}])
    )


FORMS = [
    {"channels": "0:5"}, {"channels": "7,1,1"}, {"pool": "gap"}, {"pool": "max2"}, {"pool": "max7"}, {"dtype": "FP16"},
    {"dtype": "UINT8"}, {"channels": "3:8", "pool": "max3", "dtype": "UINT8"},
    {"channels": "1", "pool": "gap", "dtype": "FP16"}, {"pool": "max2", "dtype": "FP16"},
]  # fmt: skip


class TestRoom:
    """What a form takes beside the maps is held like everything else."""

    @pytest.mark.parametrize("parameters", FORMS, ids=str)
    def test_is_no_less_than_what_is_allocated(self, parameters, rng):
        maps = rng.random((3, 8, 211, 199), np.float32)
        form = Form.read("y", parameters, maps.shape, binary=True)
        form.apply(maps, "y")
        tracemalloc.start()
        try:
            form.apply(maps, "y")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        room = form.room(maps.shape, maps.itemsize)
        assert peak <= room + 100_000, "NumPy casts some thousand numbers at a time"
        assert room <= 3 * peak + 100_000, "and not many times as much"

    def test_of_an_output_as_it_is_nothing(self):
        assert Form().room((1, 8, 9, 9), 4) == 0

    @pytest.mark.parametrize("parameters", FORMS, ids=str)
    def test_is_admitted(self, app, client, x, maps, infer_json, parameters, monkeypatch):
        held = []
        take = Permit.take

        def taken(permit, **more):
            take(permit, **more)
            held.append(permit.bytes)

        monkeypatch.setattr(Permit, "take", taken)
        most = []
        for one in ({}, parameters):
            held.clear()
            wanted = [{"name": LAYER, "parameters": {"binary_data": True, **one}}]
            body = infer_json(x, outputs=wanted).ljust(400_000)  # JSON takes room by its length
            assert client.post(INFER, data=body).status_code == 200
            most.append(max(held))
        assert most[1] - most[0] == Form.read(LAYER, parameters, maps.shape, True).room(maps.shape, 4)
        assert app.extensions["cconv"]._admission._bytes == 0

    def test_too_much_of_it_is_refused_beforehand(self, make_app, x, infer_json):
        wanted = [{"name": LAYER, "parameters": {"binary_data": True}}]
        body = infer_json(x, outputs=wanted)
        probe = make_app(models=(MODEL,)).test_client()
        held = []
        admission = probe.application.extensions["cconv"]._admission
        grow = admission.grow
        admission.grow = lambda permit, *more: (grow(permit, *more), held.append(permit.bytes))
        assert probe.post(INFER, data=body).status_code == 200
        client = make_app(models=(MODEL,), queue_bytes=max(held) + 5_000, max_body_bytes=len(body) * 2).test_client()
        assert client.post(INFER, data=body).status_code == 200
        wanted[0]["parameters"]["pool"] = "max2"
        refused = client.post(INFER, data=infer_json(x, outputs=wanted))
        assert (refused.status_code, "bytes of body, images and maps" in refused.json["error"]) == (413, True)


class TestForms:
    """channels, pool, dtype"""

    @pytest.mark.parametrize(
        ("channels", "chosen"),
        [("0:4", [0, 1, 2, 3]), ("3", [3]), (3, [3]), ("5,1:3,0", [5, 1, 2, 0]), ("2,2", [2, 2]), ("0:8", range(8))],
    )
    def test_channels_are_picked_in_their_order(self, ask, maps, channels, chosen):
        for binary in (False, True):
            got, _ = read(ask(channels=channels, binary_data=binary))
            assert np.array_equal(got, maps[:, list(chosen)])

    def test_gap_is_the_mean_of_every_map(self, ask, maps):
        got, _ = read(ask(pool="gap", binary_data=True))
        assert got.shape == (*maps.shape[:2], 1, 1)
        np.testing.assert_allclose(got, maps.astype(np.float64).mean(axis=(2, 3), keepdims=True), rtol=1e-6)

    @pytest.mark.parametrize("side", [1, 2, 3, 7])
    def test_max_is_max_pool2d_with_windows_side_by_side(self, ask, maps, side):
        got, _ = read(ask(pool=f"max{side}", binary_data=True))
        assert np.array_equal(got, cconv.max_pool2d(maps, side, side))

    def test_fp16_is_rounded_once(self, ask, maps):
        got, _ = read(ask(dtype="FP16", binary_data=True))
        assert np.array_equal(got, maps.astype(np.float16))

    @pytest.mark.parametrize("binary", [True, False])
    def test_uint8_is_within_half_a_step_by_its_scale_and_offset(self, ask, maps, binary):
        got, parameters = read(ask(dtype="UINT8", binary_data=binary))
        assert (got.min(), got.max()) == (0, 255)
        back = parameters["scale"] * got.astype(np.float64) + parameters["offset"]
        assert np.abs(back - maps).max() <= parameters["scale"] * 0.5000001

    def test_all_of_it_together(self, ask, maps):
        got, _ = read(ask(channels="1:3", pool="max2", dtype="FP16", binary_data=True))
        assert np.array_equal(got, cconv.max_pool2d(maps[:, 1:3], 2, 2).astype(np.float16))

    def test_the_bill_is_that_of_the_layer(self, ask):
        whole, part = ask(binary_data=False), ask(channels="0", pool="gap", dtype="UINT8")
        assert len(part.data) < len(whole.data) / 100
        for name in ("macs", "flops", "flops_other"):
            assert part.json["parameters"][name] == whole.json["parameters"][name]

    def test_a_constant_map_has_a_scale(self, client, infer_json):
        x = np.zeros((1, 3, 8, 8), np.float32)
        got, parameters = read(
            client.post(INFER, data=infer_json(x, outputs=[{"name": LAYER, "parameters": {"dtype": "UINT8"}}]))
        )
        assert np.isfinite(parameters["scale"])
        back = parameters["scale"] * got + parameters["offset"]
        assert np.array_equal(back, cconv.load(MODEL).run(x, [LAYER])[LAYER])

    @pytest.mark.parametrize(
        ("parameters", "text"),
        [
            ({"channels": "0:9"}, "channels of output 'level1.relu': expected at most 8 of 0 to 7"),
            ({"channels": "8"}, "channels of"),
            ({"channels": "0:8,0"}, "channels of"),
            ({"channels": "3:3"}, "channels of"),
            ({"channels": "4:2"}, "channels of"),
            ({"channels": "-1"}, "channels of"),
            ({"channels": ""}, "channels of"),
            ({"channels": "0:99999"}, "channels of"),
            ({"channels": "0::2"}, "channels of"),
            ({"channels": [0]}, "channels of"),
            ({"channels": True}, "channels of"),
            ({"channels": "٣"}, "channels of"),
            ({"channels": "0," * 5000}, "channels of"),
            ({"pool": "max0"}, "pool of"),
            ({"pool": "max99"}, "pool of output 'level1.relu': expected maps of at least 99 x 99, got shape"),
            ({"pool": "max9999"}, "pool of"),
            ({"pool": "avg"}, "pool of"),
            ({"pool": 2}, "pool of"),
            ({"dtype": "INT8"}, "dtype of output 'level1.relu': expected one of FP32, FP16, UINT8, got 'INT8'"),
            ({"dtype": ["FP16"]}, "dtype of"),
            ({"dtype": "FP16"}, "sending FP16 data via JSON is not supported. Please use the binary data format"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_runs(self, client, ask, parameters, text):
        answer = ask(**parameters)
        assert answer.status_code == 400
        assert text in answer.json["error"]
        assert "cconv_executions_total{" not in client.get("/metrics").get_data(as_text=True)

    def test_not_finite_is_for_fp32_and_fp16(self, client, x, bill):
        x[0, 0, 0, 0] = np.inf
        for dtype, status in (("UINT8", 400), ("FP16", 200)):
            wanted = [{"name": LAYER, "parameters": {"binary_data": True, "dtype": dtype}}]
            body, headers = tensor("FP32", x.shape, x.tobytes(), outputs=wanted)
            assert client.post(INFER, data=body, headers=headers).status_code == status
            assert any(bill(client).values()) == (status == 200)


class TestInputs:
    """FP16, UINT8, BYTES and a body that is a picture."""

    def test_uint8_is_divided_by_255(self, client, picture, infer_json):
        pixels = np.ascontiguousarray(picture(20, 24).transpose(2, 0, 1)[None])
        expected = cconv.load(MODEL).run(np.divide(pixels, 255, dtype=np.float32), [LAYER])[LAYER]
        body, headers = tensor("UINT8", pixels.shape, pixels.tobytes())
        assert np.array_equal(read(client.post(INFER, data=body, headers=headers))[0], expected)
        content = json.loads(infer_json(pixels, outputs=[{"name": LAYER}]))
        content["inputs"][0]["datatype"] = "UINT8"
        assert np.array_equal(read(client.post(INFER, json=content))[0], expected)
        for odd in (256, -1, 0.5):
            content["inputs"][0]["data"][0][0][0][0] = odd
            assert client.post(INFER, json=content).status_code == 400

    def test_fp16_is_taken_in_binary_alone(self, client, x, infer_json):
        half = x.astype(np.float16)
        body, headers = tensor("FP16", half.shape, half.tobytes())
        expected = cconv.load(MODEL).run(half.astype(np.float32), [LAYER])[LAYER]
        assert np.array_equal(read(client.post(INFER, data=body, headers=headers))[0], expected)
        content = json.loads(infer_json(x))
        content["inputs"][0]["datatype"] = "FP16"
        answer = client.post(INFER, json=content)
        assert answer.status_code == 400
        assert "receiving FP16 data via JSON is not supported" in answer.json["error"]

    @pytest.mark.parametrize("shape", [(2,), (2, 1)])
    def test_bytes_are_pictures(self, client, png, picture, shape):
        pictures = [picture(20, 24) for _ in range(2)]
        body, headers = tensor("BYTES", shape, elements(*map(png, pictures)))
        got, _ = read(client.post(INFER, data=body, headers=headers))
        x = np.stack([one.transpose(2, 0, 1) for one in pictures]) / np.float32(255)
        assert np.array_equal(got, cconv.load(MODEL).run(x.astype(np.float32), [LAYER])[LAYER])

    def test_a_body_may_be_a_picture_and_nothing_else(self, client, png, picture):
        data = png(picture(20, 24))
        answer = client.post(INFER, data=data, headers={HEADER: "0"})
        default = cconv.load(MODEL).outputs
        assert answer.status_code == 200
        content = json.loads(answer.data[: int(answer.headers[HEADER])])
        assert [output["name"] for output in content["outputs"]] == list(default)
        assert all("binary_data_size" in output["parameters"] for output in content["outputs"])
        body, headers = tensor("BYTES", (1,), elements(data), outputs=[{"name": name} for name in default])
        assert (
            content["parameters"]["macs"] == client.post(INFER, data=body, headers=headers).json["parameters"]["macs"]
        )

    @pytest.mark.parametrize(
        ("shape", "data"),
        [
            ((2,), lambda good: elements(good)),
            ((1,), lambda good: elements(good, good)),
            ((1,), lambda good: elements(good)[:-1]),
            ((1,), lambda good: elements(good) + b"x"),
            ((1,), lambda good: good),
            ((1,), lambda good: b"\xff\xff\xff\xff" + good),
            ((1,), lambda good: b"\0\0\0"),
            ((1,), lambda good: elements(b"")),
            ((1,), lambda good: elements(b"GIF89a")),
            ((1,), lambda good: elements(good[:40])),
            ((1, 2), lambda good: elements(good)),
            ((1, 1, 1), lambda good: elements(good)),
            ((300,), lambda good: elements(*[good] * 300)),
            ((2**40,), lambda good: elements(good)),
        ],
    )
    def test_broken_elements_are_refused(self, client, bill, png, shape, data):
        body, headers = tensor("BYTES", shape, data(png(8, 8)))
        answer = client.post(INFER, data=body, headers=headers)
        assert answer.status_code == 400
        assert "expected" in answer.json["error"].lower()
        assert not any(bill(client).values())

    def test_many_empty_elements_are_refused_by_their_number(self, client):
        body, headers = tensor("BYTES", (1_000_000,), bytes(4_000_000))
        answer = client.post(INFER, data=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json["error"].startswith("input 'image': expected at most")

    def test_pictures_of_two_sizes_are_refused(self, client, png):
        body, headers = tensor("BYTES", (2,), elements(png(8, 8), png(9, 8)))
        answer = client.post(INFER, data=body, headers=headers)
        assert (answer.status_code, answer.json["error"]) == (
            400,
            "input 'image': expected images of one size, got [8, 8] and [9, 8]",
        )

    @pytest.mark.parametrize("data", [b"", b"\0" * 768, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"{}"])
    def test_a_raw_body_that_is_no_picture_is_refused(self, client, bill, data):
        for zero in ("0", "000"):
            answer = client.post(INFER, data=data, headers={HEADER: zero})
            assert answer.status_code == 400
            assert not any(bill(client).values())


def test_an_answer_says_how_it_came_about(client, x, infer_json):
    answer = client.post(INFER, data=infer_json(x))
    said = answer.json["parameters"]
    for name in ("macs", "flops", "flops_other", "device", "algorithm", "batch_size", "queue_us", "compute_us"):
        assert answer.headers[f"X-Cconv-{name.replace('_', '-').title()}"] == str(said[name])
    parts = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
    assert list(parts) == ["input", "queue", "compute"]
    assert float(parts["compute"]) == said["compute_us"] / 1000
    assert float(parts["input"]) > 0


class TestStatistics:
    """/stats"""

    def test_count_requests_images_runs_and_the_bill(self, client, x, infer_json):
        for _ in range(3):
            said = client.post(INFER, data=infer_json(x)).json["parameters"]
        bad = x.copy()
        bad[0, 0, 0, 0] = np.nan
        body, headers = tensor("FP32", x.shape, bad.tobytes(), outputs=[{"name": LAYER}])
        assert client.post(INFER, data=body, headers=headers).status_code == 400
        addresses = (f"/v2/models/{MODEL}/stats", f"/v2/models/{MODEL}/versions/1/stats", "/v2/models/stats")
        answers = [client.get(address).json["model_stats"] for address in addresses]
        assert len(answers[2]) == len(client.get("/v2/models").json["models"])
        for entries in answers:
            (one,) = (entry for entry in entries if entry["name"] == MODEL)
            assert (one["version"], one["inference_count"], one["execution_count"]) == ("1", 6, 4)
            stats = one["inference_stats"]
            assert {name: stats[name]["count"] for name in ("success", "fail", "queue", "cache_hit")} == {
                "success": 3, "fail": 1, "queue": 3, "cache_hit": 0,
            }  # fmt: skip
            inside = sum(stats[f"compute_{part}"]["ns"] for part in ("input", "infer", "output"))
            assert 0 < inside + stats["queue"]["ns"] <= stats["success"]["ns"]
            assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in one["batch_stats"]] == [(2, 4)]
            assert one["flops"] == 3 * said["flops"]

    def test_of_what_is_not_there_are_404(self, client):
        assert client.get("/v2/models/nonesuch/stats").status_code == 404
        assert client.get(f"/v2/models/{MODEL}/versions/7/stats").status_code == 404
