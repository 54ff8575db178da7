"""Bodies: what is cut short, broken on its way, encoded or of the wrong kind is refused, named and not billed.

In: requests in process, and bytes on a socket of the service under gunicorn.  Out: 400, 413 or 415 with a text.
"""

import gzip
import io
import json
import socket
import tracemalloc
import zlib

import numpy as np
import pytest

PATH = "/v1/features?model=edges&format=npy"
PACK = {"gzip": gzip.compress, "deflate": zlib.compress}


def form(data: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x.npy"\r\n\r\n'
    return head + data + b"\r\n--b--\r\n"


@pytest.fixture
def send(server):
    """f(header lines, body) -> (status, the error's text); nothing was billed, no traceback was logged."""

    def exchange(headers: str, body: bytes, path: str = PATH) -> tuple[int, str]:
        before = server.billed()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode() + body)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        assert server.billed() == before
        assert "Traceback" not in server.log.read_text()
        return int(head.split()[1]), json.loads(content)["error"]

    return exchange


class TestShort:
    """Less than was announced, although it would make sense as it is."""

    def test_a_body(self, send, npy):
        data = npy(np.zeros((1, 3, 8, 8), np.float32))
        status, text = send(f"Content-Length: {len(data) + 100}", data)
        assert (status, text) == (400, f"body: expected {len(data) + 100} bytes by its Content-Length, got {len(data)}")

    def test_a_form(self, send, npy):
        data = form(npy(np.zeros((1, 3, 8, 8), np.float32)))
        headers = f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(data) + 100}"
        status, text = send(headers, data)
        assert status == 400
        assert f"expected {len(data) + 100} bytes" in text

    def test_json(self, send):
        data = b'{"model": "edges"}'
        assert send(f"Content-Length: {len(data) + 9}", data, "/v1/cost")[0] == 400


@pytest.mark.parametrize("body", [b"zz\r\nabc", b"5\r\nab", b"-1\r\n\r\n", b"3\r\nabcX\r\n0\r\n\r\n"])
@pytest.mark.parametrize("kind", ["", "Content-Type: multipart/form-data; boundary=b\r\n"])
def test_broken_chunks_are_the_senders_error(send, kind, body):
    status, text = send(f"{kind}Transfer-Encoding: chunked", body)
    assert status == 400
    assert text == "body: expected a whole body, got one that is broken or cut short"


def test_no_coding_but_chunks_gzip_and_deflate_is_taken(client, npy, bill):
    data = npy(np.zeros((1, 3, 8, 8), np.float32))
    codings = [("Content-Encoding", name) for name in ("br", "zstd", "gzip, gzip", "x" * 500, "")]
    for name, value in (*codings, ("Transfer-Encoding", "gzip, chunked")):
        answer = client.post(PATH, data=data, headers={name: value})
        assert answer.status_code == 415
        assert len(answer.json["error"]) < 200
    assert not any(bill(client).values())


def test_a_refusal_before_the_body_is_read_keeps_no_place(make_app, npy, rng, metrics):
    client = make_app(queue_requests=2).test_client()
    bare = {"CONTENT_LENGTH": str(1 << 40), "HTTP_CONTENT_ENCODING": "gzip"}
    for _ in range(3):
        assert client.post(PATH, environ_overrides=bare).status_code == 413
        assert client.post(PATH, headers={"Idempotency-Key": " "}).status_code == 400
        assert client.post("/v1/features", environ_overrides={"QUERY_STRING": "model=\xff"}).status_code == 400
    assert metrics(client.get("/metrics").get_data(as_text=True))["cconv_pending_requests"] == 0
    assert client.post(PATH, data=npy(rng.random((1, 3, 8, 8), np.float32))).status_code == 200


class TestCompressed:
    """gzip, and deflate, which is zlib's format."""

    @pytest.mark.parametrize("coding", ["gzip", "GZip", "deflate", " gzip "])
    def test_a_body_is_taken_as_what_it_was(self, client, npy, rng, coding):
        data = npy(rng.random((1, 3, 8, 8), np.float32))
        answer = client.post(PATH, data=PACK[coding.strip().lower()](data), headers={"Content-Encoding": coding})
        assert answer.status_code == 200
        assert answer.data == client.post(PATH, data=data).data

    def test_a_form_and_json_are_too(self, client, npy):
        data = form(npy(np.zeros((1, 3, 8, 8), np.float32)))
        headers = {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=b"}
        assert client.post(PATH, data=gzip.compress(data), headers=headers).status_code == 200
        body = gzip.compress(b'{"model": "edges"}')
        assert client.post("/v1/cost", data=body, headers={"Content-Encoding": "gzip"}).status_code == 200

    @pytest.mark.parametrize("size", [4096, 4097, 10_000_000, 500_000_000])
    def test_it_may_grow_to_the_limit_of_any_body_and_no_further(self, make_app, size):
        client = make_app(max_body_bytes=4096, queue_bytes=8192).test_client()
        packer = zlib.compressobj(9, wbits=31)
        bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20))
        bomb += packer.compress(bytes(size % (1 << 20))) + packer.flush()
        if len(bomb) > 4096:  # a bomb in a bomb's clothes: what comes may not be longer either
            bomb = bomb[:4096]
        tracemalloc.start()
        answer = client.post(PATH, data=bomb, headers={"Content-Encoding": "gzip"})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answer.status_code == (400 if size == 4096 else 413)  # 4096 noughts are no picture
        assert most < 2_000_000

    @pytest.mark.parametrize(
        "change",
        [
            lambda body: body[:-1],
            lambda body: body[: len(body) // 2],
            lambda body: body + b"x",
            lambda body: body + body,
            lambda body: b"x" + body,
            lambda body: body[:20] + bytes([body[20] ^ 255]) + body[21:],
            lambda body: body[:-8] + bytes(4) + body[-4:],
            lambda body: b"",
        ],
        ids=["last_byte", "half", "more", "twice", "before", "within", "checksum", "nothing"],
    )
    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    def test_a_broken_one_is_refused(self, client, bill, npy, rng, coding, change):
        body = PACK[coding](npy(rng.random((1, 3, 8, 8), np.float32)))
        answer = client.post(PATH, data=change(body), headers={"Content-Encoding": coding})
        assert answer.status_code == 400
        assert f"expected {coding} by its Content-Encoding" in answer.json["error"]
        assert not any(bill(client).values())

    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    def test_an_answer_is_compressed_for_who_asks_for_that_alone(self, client, npy, rng, coding):
        data = npy(rng.random((2, 3, 40, 40), np.float32))
        plain = client.post(PATH, data=data)
        answer = client.post(PATH, data=data, headers={"Accept-Encoding": coding})
        assert answer.headers["Content-Encoding"] == coding
        assert zlib.decompress(answer.data, wbits=47 if coding == "gzip" else 15) == plain.data
        assert answer.headers["X-Cconv-Macs"] == plain.headers["X-Cconv-Macs"]
        for unasked in ("gzip, deflate, br", "*", "identity"):
            assert "Content-Encoding" not in client.post(PATH, data=data, headers={"Accept-Encoding": unasked}).headers


def test_a_long_text_field_is_told_the_limit_that_it_broke(client):
    answer = client.post(PATH, data={"layers": "x" * 500_001, "images": (io.BytesIO(b"x"), "x")})
    assert answer.status_code == 413
    assert "500000 bytes of text fields" in answer.json["error"]


def test_misspelt_names_are_refused_with_the_known_ones(client, npy, bill):
    x = npy(np.zeros((1, 3, 8, 8), np.float32))
    tensors = {"x": (io.BytesIO(x), "x"), "weight": (io.BytesIO(x), "w")}
    for path, data, wrong, known in (
        (PATH + "&layer=conv", x, "layer", "model, layers, format"),
        (PATH, {"Layers": "conv", "images": (io.BytesIO(x), "x")}, "Layers", "model, layers, format"),
        ("/v1/cost", b'{"model": "edges", "size": [1, 3, 8, 8]}', "size", "model, shape, layers"),
        ("/v1/conv2d", {**tensors, "strides": "2"}, "strides", "stride, padding"),
    ):
        answer = client.post(path, data=data)
        assert answer.status_code == 400
        assert f"'{wrong}'" in answer.json["error"]
        assert known in answer.json["error"]
    assert not any(bill(client).values())


def test_the_page_takes_one_image_and_not_an_array_of_many(client, npy, bill):
    for count, status in ((8, 400), (1, 200)):
        photograph = (io.BytesIO(npy(np.zeros((count, 3, 16, 16), np.float32))), "many.npy")
        page = client.post("/", data={"choice": "edges:conv", "photograph": photograph})
        assert page.status_code == status
        assert ("expected one image, got 8" in page.get_data(as_text=True)) == (status == 400)
        assert any(bill(client).values()) == (status == 200)


def test_an_address_is_what_it_says(client):
    """Two slashes are not one: a redirect would turn a POST into something else."""
    assert client.get("/v2//models").status_code == 404
    assert client.post("/v2//models/edges/infer").status_code == 404


def test_an_error_never_says_where_the_server_lives(client, monkeypatch, caplog):
    monkeypatch.setattr(client.application.extensions["cconv"].engine, "quote", lambda *_: 1 / 0)
    answer = client.post("/v1/cost", json={"model": "edges"})
    assert answer.status_code == 500
    assert answer.json == {"error": "internal error; the server's log says more"}
    assert "ZeroDivisionError" in caplog.text


def test_names_from_outside_do_not_become_series(client):
    for path in ("/nonesuch", "/v2/models/nonesuch", "/v2/models/%00/infer", "/v2/models/a%2Fb"):
        client.get(path)
    text = client.get("/metrics").get_data(as_text=True)
    assert "nonesuch" not in text
