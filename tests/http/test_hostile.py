"""Hostile: bytes that nobody should send. Each is refused with a text, nothing is computed or billed, the server lives.

In: broken and malicious .npy files, JSON, images, bodies and shapes.  Out: 4xx and {"error": ...}, every time.
"""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cconv
from service import npy as npy_files
from service import wire

FEATURES = "/v1/features?model=edges&format=npy"
INFER = "/v2/models/edges/infer"
#: As many bytes as (1, 3, 8, 8) float32 takes.
PAYLOAD = bytes(768)


def npy_file(header: str | bytes, payload: bytes = PAYLOAD, *, version=(1, 0), length: int | None = None) -> bytes:
    """A .npy with any header, right or wrong."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text + payload


def npy_header(descr="'<f4'", order="False", shape="(1, 3, 8, 8)", more="") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {more}}}\n"


GOOD = npy_header()
NPY = {
    "only_the_magic": b"\x93NUMPY",
    "bad_magic": b"\x93NUMPX" + npy_file(GOOD)[6:],
    "version_9_9": npy_file(GOOD, version=(9, 9)),
    "version_0_0": npy_file(GOOD, version=(0, 0)),
    "header_length_0": npy_file("", length=0),
    "header_length_beyond_the_file": npy_file(GOOD, length=65_535),
    "header_length_4_gib": npy_file(GOOD, version=(2, 0), length=2**32 - 1)[:12],
    "header_too_long": npy_file(GOOD.rstrip() + " " * 2000),
    "header_no_dict": npy_file("[1, 2, 3]"),
    "header_cut": npy_file(GOOD[:30]),
    "key_missing": npy_file("{'descr': '<f4', 'shape': (1, 3, 8, 8), }"),
    "key_extra": npy_file(npy_header(more="'x': 1, ")),
    "key_twice": npy_file(npy_header(more="'descr': '<f4', ")),
    "descr_tuple": npy_file(npy_header("('|u1',)")),
    "descr_empty": npy_file(npy_header("()")),
    "descr_structured": npy_file(npy_header("[('a', '<f4')]")),
    "descr_object": npy_file(npy_header("'|O'")),
    "descr_void": npy_file(npy_header("'|V0'")),
    "descr_text_of_10_9": npy_file(npy_header("'<U1000000000'")),
    "descr_datetime": npy_file(npy_header("'<M8[ns]'")),
    "descr_complex": npy_file(npy_header("'<c8'")),
    "descr_big_endian": npy_file(npy_header("'>f4'")),
    "descr_float16": npy_file(npy_header("'<f2'")),
    "descr_int64": npy_file(npy_header("'<i8'")),
    "descr_escape": npy_file(npy_header("'\\x3cf4'")),
    "descr_call": npy_file(npy_header("__import__('os').system('true')")),
    "fortran_order": npy_file(npy_header(order="True")),
    "fortran_order_number": npy_file(npy_header(order="0")),
    "shape_negative": npy_file(npy_header(shape="(-1, 3, 8, 8)")),
    "shape_bool": npy_file(npy_header(shape="(True, 3, 8, 8)")),
    "shape_zero": npy_file(npy_header(shape="(0, 3, 8, 8)"), b""),
    "shape_empty": npy_file(npy_header(shape="()"), bytes(4)),
    "shape_flat": npy_file(npy_header(shape="(192,)")),
    "shape_list": npy_file(npy_header(shape="[1, 3, 8, 8]")),
    "shape_2_64": npy_file(npy_header(shape=f"({2**64}, 3, 8, 8)")),
    "shape_overflows_to_zero": npy_file(npy_header(shape=f"({2**32}, {2**32}, 8, 8)")),
    "shape_overflows_to_the_payload": npy_file(npy_header(shape=f"({2**62 + 1}, 3, 8, 8)")),
    "shape_65_axes": npy_file(npy_header(shape=f"({'1, ' * 65})"), bytes(4)),
    "shape_10_000_digits": npy_file(npy_header(shape=f"({'9' * 500}, 1)")),
    "deep_parentheses": npy_file("(" * 9_999),
    "nul_bytes": npy_file("\0" * 118),
    "not_ascii": npy_file("{'descr': 'ÿþ', 'fortran_order': False, 'shape': (1,)}"),
    "payload_short": npy_file(GOOD, PAYLOAD[:-1]),
    "payload_long": npy_file(GOOD, PAYLOAD + b"x"),
    "payload_none": npy_file(GOOD, b""),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
    "zip": b"PK\x03\x04" + bytes(64),
}


@pytest.fixture
def refused(client, bill):
    """f(path, data, headers, status) -> the error's text; the bill is 0, the server alive, its places free."""

    def post(path, data, headers=None, status=400, **arguments) -> str:
        answer = client.post(path, data=data, headers=headers, **arguments)
        assert answer.status_code == status, answer.data[:300]
        assert answer.mimetype == "application/json"
        assert isinstance(answer.json["error"], str)
        assert len(answer.json["error"]) < 1000
        assert client.get("/livez").status_code == 200
        assert not any(bill(client).values())
        text = client.get("/metrics").get_data(as_text=True)
        assert "cconv_pending_requests 0.0" in text
        assert "cconv_pending_bytes 0.0" in text
        assert 'cconv_executions_total{model="edges"}' not in text
        return answer.json["error"]

    return post


@pytest.mark.parametrize("name", NPY)
def test_a_broken_npy_is_refused(refused, name):
    assert "expected" in refused(FEATURES, NPY[name])


def test_the_corpus_is_broken_in_just_one_way_each(client):
    """The file that all of these were made from is a good one."""
    assert client.post(FEATURES, data=npy_file(GOOD)).status_code == 200
    for version in ((2, 0), (3, 0)):
        assert client.post(FEATURES, data=npy_file(GOOD, version=version)).status_code == 200


@given(st.binary(max_size=300))
def test_any_bytes_behind_the_magic_give_an_array_or_a_wire_error(data):
    for prefix in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x76\x00{'descr': "):
        try:
            array = npy_files.read(prefix + data, "x")
        except wire.WireError:
            continue
        assert array.nbytes <= len(prefix + data)


@given(
    st.sampled_from(["<f4", "<f8", "|u1"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_what_numpy_saves_is_read_back(dtype, shape, seed):
    array = np.random.default_rng(seed).integers(0, 255, shape).astype(dtype)
    file = io.BytesIO()
    np.save(file, array)
    # Any offset: a part of a form begins anywhere.
    got = npy_files.read(memoryview(b"x" + file.getvalue())[1:], "x")
    assert np.array_equal(got, array)
    assert got.flags.aligned
    assert not got.flags.writeable
    assert npy_files.header(got.dtype, got.shape) + got.tobytes() == file.getvalue()


def tensor(**change) -> dict:
    return {"name": "image", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192, **change}


def request(*tensors, **more) -> bytes:
    return json.dumps({"inputs": list(tensors), **more}).encode()


WITHOUT_DATA = {key: value for key, value in tensor().items() if key != "data"}
JSON = {
    "nothing": b"",
    "not_json": b"hello",
    "cut": request(tensor())[:-3],
    "not_utf8": b'{"inputs": "\xff\xfe"}',
    "list": b"[]",
    "null": b"null",
    "deep_lists": b"[" * 250_000,
    "deep_objects": b'{"a":' * 250_000,
    "deep_and_closed": b'{"inputs": ' + b"[" * 250_000 + b"]" * 250_000 + b"}",
    "deep_data": request(tensor(data=None)).replace(b"null", b"[" * 900 + b"1" + b"]" * 900),
    "nan": request(tensor()).replace(b"0.0", b"NaN", 1),
    "infinity": request(tensor()).replace(b"0.0", b"1e999", 1),
    "no_inputs": b"{}",
    "inputs_empty": request(),
    "inputs_twice": request(tensor(), tensor()),
    "inputs_no_list": b'{"inputs": {"name": "image"}}',
    "inputs_no_object": request(7),
    "input_unknown": request(tensor(name="picture")),
    "input_unnamed": request({}),
    "datatype_unknown": request(tensor(datatype="FP128")),
    "datatype_other": request(tensor(datatype="INT8")),
    "datatype_number": request(tensor(datatype=32)),
    "shape_missing": request(tensor(shape=None)),
    "shape_text": request(tensor(shape="1,3,8,8")),
    "shape_float": request(tensor(shape=[1.0, 3, 8, 8])),
    "shape_bool": request(tensor(shape=[True, 3, 8, 8])),
    "shape_negative": request(tensor(shape=[-1, 3, 8, 8])),
    "shape_zero": request(tensor(shape=[0, 3, 8, 8], data=[])),
    "shape_3_axes": request(tensor(shape=[3, 8, 8])),
    "shape_4_channels": request(tensor(shape=[1, 4, 8, 6])),
    "shape_2_60": request(tensor(shape=[2**4, 3, 2**60 + 2, 1])),
    "shape_2_64": request(tensor(shape=[2**64, 3, 8, 8])),
    "shape_of_1000": request(tensor(shape=[1] * 1000)),
    "data_short": request(tensor(data=[0.0] * 191)),
    "data_long": request(tensor(data=[0.0] * 193)),
    "data_ragged": request(tensor(data=[[0.0] * 64, [0.0] * 64, [0.0] * 63])),
    "data_other_nesting": request(tensor(data=[[0.0] * 96] * 2)),
    "data_strings": request(tensor(data=["0"] * 192)),
    "data_one_long_string": request(tensor(data=["0"] * 191 + ["9" * 100_000])),
    "data_nulls": request(tensor(data=[None] * 192)),
    "data_booleans": request(tensor(data=[True] * 192)),
    "data_number": request(tensor(data=0)),
    "data_beyond_float32": request(tensor(data=[1e39] * 192)),
    "data_and_binary": request(tensor(parameters={"binary_data_size": 768})),
    "neither_data_nor_binary": request(WITHOUT_DATA),
    "shared_memory": request({**WITHOUT_DATA, "parameters": {"shared_memory_region": "r"}}),
    "parameters_list": request(tensor(parameters=[])),
    "shared_memory_beside_data": request(tensor(parameters={"shared_memory_region": "r"})),
    "output_shared_memory": request(tensor(), outputs=[{"name": "conv", "parameters": {"shared_memory_offset": 0}}]),
    "output_classification": request(tensor(), outputs=[{"name": "conv", "parameters": {"classification": 3}}]),
    "output_unknown": request(tensor(), outputs=[{"name": "nonesuch"}]),
    "output_twice": request(tensor(), outputs=[{"name": "conv"}, {"name": "conv"}]),
    "outputs_names": request(tensor(), outputs=["conv"]),
    "outputs_number": request(tensor(), outputs=3),
    "output_flag_text": request(tensor(), outputs=[{"name": "conv", "parameters": {"binary_data": "yes"}}]),
    "id_number": request(tensor(), id=3),
    "id_long": request(tensor(), id="x" * 10_000),
    "timeout_text": request(tensor(), parameters={"timeout": "soon"}),
    "timeout_negative": request(tensor(), parameters={"timeout": -1}),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_a_broken_inference_request_is_refused(refused, name):
    assert refused(INFER, JSON[name])


def test_the_requests_are_broken_in_just_one_way_each(client):
    assert client.post(INFER, data=request(tensor())).status_code == 200


HEADER = request(tensor(parameters={"binary_data_size": 768}, data=None)).replace(b', "data": null', b"")


@pytest.mark.parametrize(
    ("length", "body"),
    [
        ("0", HEADER + PAYLOAD),
        ("-1", HEADER + PAYLOAD),
        ("+5", HEADER + PAYLOAD),
        ("x", HEADER + PAYLOAD),
        ("99999999999", HEADER + PAYLOAD),
        ("9" * 4000, HEADER + PAYLOAD),
        (str(len(HEADER) + 769), HEADER + PAYLOAD),
        (str(len(HEADER) - 1), HEADER + PAYLOAD),
        (str(len(HEADER) + 1), HEADER + PAYLOAD),
        (str(len(HEADER)), HEADER + PAYLOAD[:-1]),
        (str(len(HEADER)), HEADER + PAYLOAD + b"x"),
        (str(len(HEADER)), HEADER),
        (str(len(HEADER)), HEADER.replace(b"768", b"764") + PAYLOAD),
        (str(len(HEADER)), HEADER.replace(b"768", b"1e3") + PAYLOAD),
        (str(len(HEADER)), HEADER.replace(b"768", b"-76")[: len(HEADER)] + PAYLOAD),
        (None, HEADER + PAYLOAD),
    ],
)
def test_a_binary_body_that_does_not_add_up_is_refused(refused, length, body):
    assert refused(INFER, body, {"Inference-Header-Content-Length": length} if length else None)


def test_the_binary_body_is_a_good_one(client):
    answer = client.post(INFER, data=HEADER + PAYLOAD, headers={"Inference-Header-Content-Length": str(len(HEADER))})
    assert answer.status_code == 200


class TestImages:
    """Photographs that are none."""

    @pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
    def test_a_truncated_image_is_refused(self, refused, picture, png, part):
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(picture(64, 64)).save(file, "JPEG")
        for data in (file.getvalue(), png(picture(64, 64))):
            assert "expected" in refused(FEATURES, data[: int(len(data) * part)])

    def test_a_100_megapixel_png_is_refused_from_its_header(self, refused, png):
        bomb = png(10_000, 10_000)
        assert len(bomb) < 400_000
        assert "10000 x 10000" in refused(FEATURES, bomb).replace(",", "")

    def test_many_images_share_the_limit_of_pixels(self, make_app, png, bill):
        client = make_app(max_pixels=2_000).test_client()
        parts = {"images": [(io.BytesIO(png(30, 30)), f"{i}.png") for i in range(3)]}
        answer = client.post(FEATURES, data=parts)
        assert answer.status_code == 400
        assert answer.json["error"].startswith("2.png: ")
        assert not any(bill(client).values())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"GIF89a" + bytes(64),
            b"BM" + bytes(64),
            b"RIFF\x10\0\0\0WEBPVP8 " + bytes(64),
            b"II*\0" + bytes(64),
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            b"%PDF-1.4\n",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"\x89PNG\r\n\x1a\n" + bytes(200),
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            b"http://127.0.0.1/cat.png",
        ],
    )
    def test_what_is_no_jpeg_or_png_is_refused(self, refused, data):
        assert "expected" in refused(FEATURES, data)

    def test_a_png_with_a_lying_header_is_refused(self, refused, png):
        data = png(8, 8)
        for size in ((0, 8), (8, 0), (2**31, 2**31), (64, 8)):
            ihdr = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
            lying = data[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + data[33:]
            assert refused(FEATURES, lying)

    def test_a_form_without_files_is_refused(self, refused):
        assert "got nothing" in refused(FEATURES, {"layers": "conv"}, content_type="multipart/form-data")
        assert "got ['images']" in refused(FEATURES, {"images": "text"}, content_type="multipart/form-data")

    def test_a_broken_form_is_refused(self, refused):
        broken = b'--b\r\nContent-Disposition: form-data; name="x"; filename="x"\r\n\r\nhalf of'
        refused(FEATURES, broken, content_type="multipart/form-data; boundary=b")
        refused(FEATURES, broken, content_type="multipart/form-data")


class TestLimits:
    """More than one request may ask for: 413, from the sizes alone."""

    def test_a_body_that_is_announced_too_long(self, refused, app):
        limit = app.extensions["cconv"].settings.max_body_bytes
        assert f"expected at most {limit} bytes" in refused(FEATURES, bytes(limit + 1), status=413)

    def test_too_much_json(self, refused, app):
        limit = app.extensions["cconv"].settings.max_json_bytes
        assert "JSON: expected" in refused(INFER, b" " * (limit + 1), status=413)

    def test_json_takes_room_for_what_it_becomes(self, make_app):
        """`[],` is three bytes and 64 as a list: the room is taken before the text is parsed."""
        client = make_app(max_body_bytes=2**20, queue_bytes=2**21).test_client()
        answer = client.post(INFER, data=b'{"inputs":[' + b"[]," * 300_000 + b"[]]}")
        assert answer.status_code == 413

    def test_too_many_images(self, make_app, npy, bill):
        client = make_app(max_images=4).test_client()
        answer = client.post(FEATURES, data=npy(np.zeros((5, 3, 8, 8), np.float32)))
        assert answer.status_code == 413
        assert "expected at most 4" in answer.json["error"]
        assert not any(bill(client).values())

    def test_too_many_parts(self, make_app):
        client = make_app(max_images=4).test_client()
        parts = {"images": [(io.BytesIO(b"x"), "x") for _ in range(40)]}
        assert client.post(FEATURES, data=parts).status_code == 413

    def test_too_many_flops(self, make_app, npy, bill):
        client = make_app(max_flops=1_000_000).test_client()
        answer = client.post(FEATURES, data=npy(np.zeros((1, 3, 64, 64), np.float32)))
        assert answer.status_code == 413
        assert "flops + flops_other" in answer.json["error"]
        assert not any(bill(client).values())

    def test_too_large_an_answer(self, make_app, npy, bill):
        client = make_app(max_output_bytes=10_000).test_client()
        answer = client.post(FEATURES, data=npy(np.zeros((1, 3, 64, 64), np.float32)))
        assert answer.status_code == 413
        assert "bytes of maps" in answer.json["error"]
        assert not any(bill(client).values())

    @pytest.mark.parametrize("size", [65_536, 2**31, 2**62, 2**63])
    def test_sizes_beyond_any_image_in_a_dry_run(self, refused, size):
        for document in (
            {"model": "texture", "shape": [1, 3, size, 8]},
            {"model": "texture", "shape": [size, 3, 8, 8]},
            {"x_shape": [1, 3, size, 8], "w_shape": [1, 3, 1, 1]},
            {"x_shape": [1, 3, 8, 8], "w_shape": [size, 3, 1, 1]},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 3, 1, 1], "padding": size},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 3, 1, 1], "stride": [1, size]},
        ):
            assert "65535" in refused("/v1/cost", json.dumps(document), status=413)

    @pytest.mark.parametrize(
        "document",
        [
            {"model": "nonesuch"},
            {"model": 3},
            {"model": "texture", "shape": [3]},
            {"model": "texture", "shape": "x"},
            {"model": "texture", "shape": [1, 3, 2, 2]},
            {"model": "texture", "layers": ["nonesuch"]},
            {"model": "texture", "layers": 7},
            {"model": "texture", "layers": []},
            {"model": "texture", "colour": 1},
            {},
            {"x_shape": [1, 3, 8, 8]},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 4, 1, 1]},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 3, 1, 1], "colour": 1},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 3, 1, 1], "stride": {"a": 1}},
            {"x_shape": [1, 3, 8, 8], "w_shape": [1, 3, 1, 1], "padding": [1, 2, 3]},
        ],
    )
    def test_a_dry_run_of_nonsense_is_refused(self, refused, document):
        status = 404 if document.get("model") == "nonesuch" else 400
        assert refused("/v1/cost", json.dumps(document), status=status)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?model=",
        "?model=edges&model=edges",
        "?model=edges&format=zip",
        "?model=edges&format=",
        "?model=edges&layer=conv",
    ],
)
def test_a_query_of_nonsense_is_refused(refused, npy, query):
    assert "expected" in refused("/v1/features" + query, npy(np.zeros((3, 8, 8), np.float32)))


def test_an_unknown_layer_is_refused_with_the_closest_names(refused, npy):
    text = refused("/v1/features?model=texture&layers=level1.rely", npy(np.zeros((3, 32, 32), np.float32)))
    assert "level1.relu" in text


LONG = "x" * 1_000_000


def test_a_name_of_any_length_is_refused_in_few_words(refused, npy):
    image = npy(np.zeros((3, 32, 32), np.float32))
    for text in (
        refused("/v1/cost", json.dumps({"model": LONG})),
        refused("/v1/cost", json.dumps({"model": "edges", "layers": ["conv", LONG]})),
        refused("/v1/cost", json.dumps({"model": "edges", "layers": f"conv, {LONG}"})),
        refused("/v2/models/edges/cost", json.dumps({"layers": [LONG]})),
        refused(f"/v2/models/{LONG[:5000]}/infer", b"{}"),
        refused(f"/v1/features?model={LONG[:5000]}", image),
        refused(f"/v1/features?model=edges&layers=conv,{LONG[:5000]}", image),
        refused("/v1/features", {"model": LONG[:100_000], "images": (io.BytesIO(image), "x.npy")}),
        refused(INFER, request(tensor(), outputs=[{"name": LONG}])),
    ):
        assert "expected a name of at most 512 characters, got" in text
        assert "xxx" not in text


def test_every_name_that_there_is_is_short_enough():
    for name in cconv.model_names():
        for text in (name, *(layer.name for layer in cconv.load(name).layers)):
            assert len(wire.read_name(text, "name")) <= wire.LONGEST_NAME // 2
