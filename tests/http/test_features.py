"""Features: photographs and tensors in, maps and the bill out, in every form of body and of answer.

In: the service in process.  Out: the numbers that cconv computes when it is called directly, and one bill everywhere.
"""

import io
import json
from math import prod

import numpy as np
import pytest
from PIL import Image

import cconv
from cconv import filters, images

BILL = ("macs", "flops", "flops_other")


def cost_of(document: dict) -> dict:
    return {name: document[name] for name in BILL}


@pytest.fixture
def post(client):
    """f(path, data, **query) -> the answer."""
    return lambda path, data, **query: client.post(path, data=data, query_string=query)


@pytest.fixture
def jpeg(picture):
    def make(height, width) -> bytes:
        file = io.BytesIO()
        Image.fromarray(picture(height, width)).save(file, "JPEG")
        return file.getvalue()

    return make


def form(*parts, **fields) -> dict:
    """A multipart body: files in order under one field, and fields."""
    return {"images": [(io.BytesIO(data), f"{i}.bin") for i, data in enumerate(parts)], **fields}


class TestOneNumber:
    """Predicted, answered, in the headers, metered, and the library's own: the same integers."""

    @pytest.mark.parametrize(
        ("model", "layers"), [("texture", None), ("edges", None), ("vgg16", ["features.1", "features.4"])]
    )
    def test_the_bill_is_one_number(self, client, npy, rng, bill, model, layers):
        x = rng.random((3, 3, 32, 40), np.float32)
        query = {"model": model, "layers": ",".join(layers or [])}
        predicted = client.post("/v1/cost", json={"model": model, "shape": list(x.shape), "layers": layers}).json
        before = bill(client)
        answer = client.post("/v1/features", data=npy(x), query_string=query)
        after = bill(client)
        own = cconv.load(model).cost(x.shape, layers).total
        expected = cost_of(own.as_dict())
        assert expected["macs"] > 0
        assert cost_of(predicted) == expected
        assert cost_of(answer.json) == expected
        assert {name: int(answer.headers[f"X-Cconv-{name.replace('_', '-').title()}"]) for name in BILL} == expected
        metered = {name: after[f"cconv_{name}_total"] - before[f"cconv_{name}_total"] for name in BILL}
        assert metered == expected
        assert after["cconv_inferences_total"] == 3

    def test_the_images_bills_add_up_to_the_total(self, post, png, picture, npy, rng):
        parts = [png(picture(20, 30)), npy(rng.random((2, 3, 24, 24), np.float32)), png(picture(31, 17))]
        answer = post("/v1/features", form(*parts), model="texture").json
        assert [tuple(i["shape"]) for i in answer["images"]] == [(3, 20, 30), (3, 24, 24), (3, 24, 24), (3, 31, 17)]
        for name in BILL:
            assert sum(i["bill"][name] for i in answer["images"]) == answer[name]
        for image in answer["images"]:
            assert image["bill"] == cost_of(cconv.load("texture").cost((1, *image["shape"])).total.as_dict())
            assert sum(layer["macs"] for layer in image["layers"]) == image["bill"]["macs"]

    def test_a_dry_run_computes_and_bills_nothing(self, client, bill):
        answer = client.post("/v2/models/vgg16/cost", json={})
        assert answer.json["macs"] == 15_470_264_320
        assert sum(layer["macs"] for layer in answer.json["layers"]) == answer.json["macs"]
        assert not any(bill(client).values())
        assert "X-Cconv-Macs" not in answer.headers

    def test_the_cost_of_one_layer_is_exact_however_large(self, client):
        lecture = {"x_shape": [1, 100, 64, 64], "w_shape": [100, 100, 5, 5], "padding": 2}
        assert client.post("/v1/cost", json=lecture).json["macs"] == 1_024_000_000
        huge = {"x_shape": [60_000, 60_000, 60_000, 60_000], "w_shape": [60_000, 60_000, 1, 1], "stride": [1, 1]}
        assert client.post("/v1/cost", json=huge).json["macs"] == 60_000**5


class TestBodies:
    """What may be sent."""

    def test_an_image_is_recognised_by_its_bytes_whatever_it_is_called(self, client, png, picture, jpeg):
        for data in (png(picture(20, 24)), jpeg(20, 24)):
            for kind in (
                "image/png",
                "image/jpeg",
                "application/octet-stream",
                "application/x-www-form-urlencoded",
                None,
            ):
                answer = client.post("/v1/features?model=edges&format=npy", data=data, content_type=kind)
                got = np.load(io.BytesIO(answer.data))
                assert np.array_equal(got, cconv.conv2d(images.decode(data), filters.bank("edges"))[None])

    @pytest.mark.parametrize("shape", [(3, 18, 20), (1, 3, 18, 20), (4, 3, 18, 20)])
    def test_a_npy_is_one_image_or_many(self, post, npy, rng, shape):
        x = rng.random(shape, np.float32)
        got = np.load(io.BytesIO(post("/v1/features", npy(x), model="edges", format="npy").data))
        assert np.array_equal(got, cconv.conv2d(x.reshape(-1, *shape[-3:]), filters.bank("edges")))

    def test_uint8_is_divided_by_255(self, post, npy, picture, png):
        pixels = picture(18, 20)
        one = post("/v1/features", npy(pixels.transpose(2, 0, 1)), model="edges", format="npy")
        assert one.data == post("/v1/features", png(pixels), model="edges", format="npy").data

    def test_fortran_order_is_refused_with_what_to_do(self, post, npy, picture):
        answer = post("/v1/features", npy(picture(18, 20).T), model="edges")
        assert answer.status_code == 400
        assert "numpy.ascontiguousarray" in answer.json["error"]

    def test_options_may_stand_in_a_form(self, post, png, picture):
        answer = post("/v1/features", form(png(picture(20, 20)), model="texture", layers="level1.pool", format="png"))
        assert answer.mimetype == "image/png"

    def test_float64_images_are_refused(self, post, npy):
        answer = post("/v1/features", npy(np.zeros((3, 8, 8))), model="edges")
        assert answer.status_code == 400
        assert "expected float32, or uint8 (divided by 255), got float64" in answer.json["error"]


class TestAnswers:
    """What may be asked for."""

    def test_statistics_are_those_of_the_maps(self, post, npy, rng):
        x = rng.random((1, 3, 40, 44), np.float32)
        (image,) = post("/v1/features", npy(x), model="texture").json["images"]
        for layer, maps in cconv.load("texture").run(x).items():
            said = image["maps"][layer]
            assert said["shape"] == list(maps.shape[1:])
            assert (said["min"], said["max"]) == (maps.min(), maps.max())
            assert said["mean"] == pytest.approx(maps.mean(dtype=np.float64), rel=1e-6)
            assert said["std"] == pytest.approx(maps.std(dtype=np.float64), rel=1e-6)

    def test_what_is_not_finite_is_counted_apart(self, post, npy):
        x = np.zeros((1, 3, 20, 20), np.float32)
        x[0, 0, 10, 10] = np.nan
        said = post("/v1/features", npy(x), model="edges").json["images"][0]["maps"]["conv"]
        assert said["not_finite"] > 0
        assert (said["min"], said["max"]) == (0, 0)

    def test_npys_holds_every_layer_of_every_image_in_order(self, post, png, picture):
        pictures = [png(picture(20, 30)), png(picture(26, 22)), png(picture(20, 30))]
        answer = post("/v1/features", form(*pictures), model="texture", format="npys", layers="level2.relu,level1.conv")
        stream = io.BytesIO(answer.data)
        for data in pictures:
            expected = cconv.load("texture").run(images.decode(data), ["level2.relu", "level1.conv"])
            for maps in expected.values():
                assert np.array_equal(np.load(stream), maps)
        assert not stream.read()

    def test_a_picture_is_the_grid_of_the_maps(self, post, png, picture):
        data = png(picture(20, 30))
        answer = post("/v1/features", data, model="edges", format="png")
        expected = images.grid(cconv.conv2d(images.decode(data), filters.bank("edges")))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.data))), expected)

    @pytest.mark.parametrize(
        ("accept", "got"),
        [
            ("image/png", "image/png"),
            ("application/x-npy", "application/x-npy"),
            ("text/html, image/*;q=0.9, application/json;q=0.1", "image/png"),
            ("*/*", "application/json"),
            (None, "application/json"),
        ],
    )
    def test_the_accept_header_chooses(self, client, png, picture, accept, got):
        headers = {"Accept": accept} if accept else {}
        answer = client.post("/v1/features?model=edges", data=png(picture(9, 9)), headers=headers)
        assert answer.mimetype == got

    def test_an_answer_that_nobody_accepts_is_406_and_not_computed(self, client, png, picture, bill):
        answer = client.post("/v1/features?model=edges", data=png(picture(9, 9)), headers={"Accept": "text/csv"})
        assert answer.status_code == 406
        assert "application/json" in answer.json["error"]
        assert not any(bill(client).values())

    @pytest.mark.parametrize("wanted", ["npy", "png"])
    def test_one_array_holds_one_layer_of_one_size(self, client, post, png, picture, bill, wanted):
        two = post("/v1/features", png(picture(20, 20)), model="texture", format=wanted)
        sizes = post("/v1/features", form(png(picture(9, 9)), png(picture(9, 8))), model="edges", format=wanted)
        assert (two.status_code, sizes.status_code) == (400, 400)
        assert "expected one layer" in two.json["error"]
        assert "images of one size" in sizes.json["error"]
        assert not any(bill(client).values())


class TestConv2d:
    """One convolution of tensors that came along."""

    LECTURE = {  # noqa: RUF012
        "x": [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]],
        "weight": [[[[0, 1], [2, 3]], [[1, 2], [3, 4]]]],
    }

    def test_the_lectures_layer_in_json(self, client):
        answer = client.post("/v1/conv2d?format=json", json=self.LECTURE).json
        assert answer["data"] == [[[56.0, 72.0], [104.0, 120.0]]]
        assert cost_of(answer) == {"macs": 32, "flops": 64, "flops_other": 0}

    def test_npy_parts_and_options_give_what_conv2d_gives(self, client, npy, rng, dtype, bill):
        x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((2, 4, 15, 17), (6, 2, 3, 3), (6,)))
        parts = {name: (io.BytesIO(npy(a)), name) for name, a in (("x", x), ("weight", weight), ("bias", bias))}
        options = {"stride": "2,1", "padding": "same", "dilation": "1", "groups": "2", "activation": "leaky_relu,0.5"}
        answer = client.post("/v1/conv2d", data={**parts, **options})
        given = {"stride": (2, 1), "padding": "same", "groups": 2, "activation": ("leaky_relu", 0.5)}
        got = np.load(io.BytesIO(answer.data))
        assert got.dtype == dtype
        assert np.array_equal(got, cconv.conv2d(x, weight, bias, **given))
        cost = cconv.conv2d_cost(x.shape, weight.shape, bias=True, **given)
        assert int(answer.headers["X-Cconv-Flops-Other"]) == cost.flops_other > 0
        assert bill(client)["cconv_macs_total"] == cost.macs

    def test_json_tensors_may_be_float64(self, client):
        answer = client.post("/v1/conv2d", json={**self.LECTURE, "dtype": "float64", "bias": [1]})
        got = np.load(io.BytesIO(answer.data))
        assert got.dtype == np.float64
        assert got.tolist() == [[[57, 73], [105, 121]]]

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"x": [[1, 2], [3]]}, "ragged"),
            ({"x": [["1"]]}, "expected lists of numbers"),
            ({"x": [[True]]}, "expected lists of numbers"),
            ({"x": 3}, "expected lists of numbers"),
            ({"x": None}, "x: expected a tensor"),
            ({"weight": [[[1]]]}, "weight: expected 4 axes"),
            ({"stride": 0}, "stride: expected an integer >= 1"),
            ({"stride": True}, "stride: expected an integer"),
            ({"stride": 1.5}, "stride: expected an integer"),
            ({"stride": [[1]]}, "stride: expected an integer"),
            ({"padding": "much"}, '"same"'),
            ({"padding": -1}, "padding: expected an integer >= 0"),
            ({"dilation": 9}, "kernel no larger than the padded image"),
            ({"groups": 3}, "groups: expected a divisor"),
            ({"activation": "softmax"}, "activation: expected"),
            ({"activation": ["relu", "x", 1]}, "activation: expected"),
            ({"algorithm": "magic"}, "algorithm: expected"),
            ({"precision": "low"}, "precision: expected"),
            ({"bias": [1, 2]}, "bias: expected shape"),
            ({"dtype": "int8"}, "dtype: expected float32 or float64"),
            ({"colour": 1}, "colour"),
            ({"x": [[[1e39]]]}, "fit float32"),
        ],
    )
    def test_wrong_tensors_and_options_are_400_and_not_billed(self, client, bill, change, text):
        answer = client.post("/v1/conv2d", json={**self.LECTURE, **change})
        assert answer.status_code == 400, answer.data
        assert text in answer.json["error"]
        assert not any(bill(client).values())
        assert "cconv_discarded_flops_total{" not in client.get("/metrics").get_data(as_text=True)

    @pytest.mark.parametrize(
        "change", [{"padding": 30_000}, {"padding": 2**31 - 1}, {"stride": 2**40}, {"padding": [0, 0, 65_535, 65_535]}]
    )
    def test_a_small_request_for_a_huge_answer_is_413(self, client, change, bill):
        answer = client.post("/v1/conv2d", json={**self.LECTURE, **change})
        assert answer.status_code == 413
        assert not any(bill(client).values())


class TestPage:
    """The form at /."""

    def test_the_page_offers_every_layer_and_needs_nothing_from_elsewhere(self, client):
        page = client.get("/")
        text = page.get_data(as_text=True)
        for name in client.get("/v2/models").json["models"]:
            for layer in cconv.load(name).layers:
                assert f'value="{name}:{layer.name}"' in text
        assert "<script" not in text
        assert "http://" not in text
        assert "https://" not in text
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert client.get("/static/page.css").status_code == 200

    def test_a_photograph_comes_back_as_maps_and_a_bill(self, client, png, picture, bill):
        photograph = (io.BytesIO(png(picture(40, 40))), "<b>me.png")
        page = client.post("/", data={"choice": "texture:level2.relu", "photograph": photograph})
        text = page.get_data(as_text=True)
        cost = cconv.load("texture").cost((1, 3, 40, 40), ["level2.relu"]).total
        assert page.status_code == 200
        assert "data:image/png;base64," in text
        assert f"{cost.macs:,}" in text
        assert "&lt;b&gt;me.png" in text
        assert bill(client)["cconv_macs_total"] == cost.macs

    @pytest.mark.parametrize(
        ("choice", "data", "status"),
        [
            ("texture:nonesuch", "png", 400),
            ("nonesuch:x", "png", 404),
            ("edges:conv", b"GIF89a", 400),
            ("edges:conv", b"", 400),
        ],
    )
    def test_errors_are_shown_on_the_page(self, client, png, picture, choice, data, status):
        data = png(picture(9, 9)) if data == "png" else data
        page = client.post("/", data={"choice": choice, "photograph": (io.BytesIO(data), "a")})
        assert page.status_code == status
        assert 'role="alert"' in page.get_data(as_text=True)


def test_every_answer_has_security_headers(client):
    for path in ("/", "/livez", "/v2", "/nonesuch", "/v2/models/nonesuch"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_a_wrong_verb_is_405_and_names_the_right_ones(client):
    answer = client.get("/v1/features")
    assert (answer.status_code, answer.json) == (405, {"error": "Method Not Allowed"})
    assert "POST" in answer.headers["Allow"]


def test_shapes_in_the_dry_run_are_those_of_the_run(client, npy, rng):
    x = rng.random((2, 3, 30, 31), np.float32)
    promised = client.post("/v1/cost", data=json.dumps({"model": "texture", "shape": list(x.shape)})).json
    maps = cconv.load("texture").run(x)
    assert promised["outputs"] == {name: list(array.shape) for name, array in maps.items()}
    assert all(prod(layer["shape"]) > 0 for layer in promised["layers"])
