"""Http: requests that are broken below their bodies, sent by hand. Refused by whoever reads them, computed by nobody.

In: bytes on sockets of the service under gunicorn, with a ledger.  Out: the one status that each deserves, and the
same worker, without a bill, a traceback or a row.
"""

import contextlib
import gzip
import json
import re
import socket
import struct

import pytest

ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")

TENSOR = {"name": "image", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}
#: Which would be computed and billed, were it not for what is around it.
GOOD = json.dumps({"inputs": [TENSOR]}).encode()
INFER = b"POST /v2/models/edges/infer HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(GOOD)
CLOSE = b"Connection: close\r\n"


def post(*headers: bytes, body: bytes = GOOD) -> bytes:
    return INFER + CLOSE + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


def get(target: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET " + target + b" " + version + b"\r\nHost: x\r\n" + CLOSE + b"\r\n"


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def chunked(body: bytes, *headers: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", *headers, body=body)


WHOLE = b"Content-Length: %d" % len(GOOD)
CASES = {
    # How long a body is.
    "length_and_chunks": post(WHOLE, b"Transfer-Encoding: chunked", body=chunks(GOOD)),
    "chunks_and_length": post(b"Transfer-Encoding: chunked", WHOLE, body=chunks(GOOD)),
    "length_twice_and_different": post(WHOLE, b"Content-Length: 5"),
    "length_twice_and_equal": post(WHOLE, WHOLE),
    "length_list": post(WHOLE + b", %d" % len(GOOD)),
    "length_negative": post(b"Content-Length: -1"),
    "length_plus": post(b"Content-Length: +%d" % len(GOOD)),
    "length_hexadecimal": post(b"Content-Length: 0x10"),
    "length_text": post(b"Content-Length: many"),
    "length_fraction": post(b"Content-Length: 10.5"),
    "length_unicode_digits": post("Content-Length: ١٠".encode()),
    "length_with_underscore": post(b"Content-Length: 1_0"),
    "length_2_64": post(b"Content-Length: %d" % 2**64),
    "length_of_10_000_digits": post(b"Content-Length: " + b"9" * 10_000),
    "length_larger": post(b"Content-Length: %d" % (len(GOOD) + 1)),
    "length_smaller": post(b"Content-Length: %d" % (len(GOOD) - 1), body=GOOD[:-1]),
    "length_none": post(),
    "length_zero": post(b"Content-Length: 0", body=b""),
    # Chunks.
    "chunk_size_negative": chunked(b"-1\r\n" + GOOD),
    "chunk_size_text": chunked(b"many\r\n" + GOOD),
    "chunk_size_0x": chunked(b"0x5\r\nabcde\r\n0\r\n\r\n"),
    "chunk_size_2_64": chunked(b"%x\r\n" % 2**64 + GOOD),
    "chunk_size_of_10_000_digits": chunked(b"f" * 10_000 + b"\r\n" + GOOD),
    "chunk_size_empty": chunked(b"\r\n" + GOOD),
    "chunk_shorter": chunked(b"%x\r\n" % (len(GOOD) + 9) + GOOD + b"\r\n0\r\n\r\n"),
    "chunk_longer": chunked(b"%x\r\n" % (len(GOOD) - 9) + GOOD + b"\r\n0\r\n\r\n"),
    "chunk_without_end": chunked(chunks(GOOD, end=b"")),
    "chunk_cut": chunked(b"%x\r\n" % len(GOOD) + GOOD[:-20]),
    "chunk_bare_lf": chunked(b"%x\n" % len(GOOD) + GOOD + b"\n0\n\n"),
    "chunk_extension_of_100_kb": chunked(b"5;" + b"x" * 100_000 + b"\r\n[[[[[\r\n0\r\n\r\n"),
    "chunks_of_one_byte": chunked(chunks(*[b"["] * 20_000)),
    "trailers_of_100_kb": chunked(chunks(b"[[", end=b"0\r\n" + b"X: y\r\n" * 16_000 + b"\r\n")),
    "coding_unknown": post(b"Transfer-Encoding: xchunked", body=chunks(GOOD)),
    "coding_twice": post(b"Transfer-Encoding: chunked, chunked", body=chunks(GOOD)),
    "coding_identity": post(b"Transfer-Encoding: identity", WHOLE),
    "coding_with_tab": post(b"Transfer-Encoding:\tchunked\x0b", body=chunks(GOOD)),
    # Headers.
    "header_without_colon": post(WHOLE, b"nonsense"),
    "header_with_space_before_colon": post(WHOLE, b"X-A : b"),
    "header_folded": post(WHOLE, b"X-A: b\r\n c"),
    "header_with_nul": post(WHOLE, b"X-A: \0"),
    "header_with_cr": post(WHOLE, b"X-A: a\rb"),
    "header_name_empty": post(WHOLE, b": a"),
    "header_name_with_bytes": post(WHOLE, b"X-\xff: a"),
    "header_of_100_kb": post(WHOLE, b"X-A: " + b"a" * 100_000),
    "headers_10_000": post(WHOLE, *[b"X-A: b"] * 10_000),
    "header_cut": INFER + b"X-A",
    "host_twice": post(WHOLE, b"Host: y"),
    "header_length_negative": post(WHOLE, b"Inference-Header-Content-Length: -1"),
    "header_length_99999999999": post(WHOLE, b"Inference-Header-Content-Length: 99999999999"),
    "header_length_text": post(WHOLE, b"Inference-Header-Content-Length: all"),
    "header_length_twice": post(WHOLE, *[b"Inference-Header-Content-Length: 5"] * 2),
    "header_length_zero": post(WHOLE, b"Inference-Header-Content-Length: 0"),
    "expect_unknown": post(WHOLE, b"Expect: a-miracle", body=GOOD[:-1]),
    # The request line.
    "method_unknown": b"BREW /v2 HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
    "method_lower_case": b"post /v2/models/edges/infer HTTP/1.1\r\nHost: x\r\n" + CLOSE + LENGTH + b"\r\n" + GOOD,
    "method_trace": b"TRACE / HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
    "method_connect": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
    "method_delete": b"DELETE /v2/models/edges HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n",
    "method_of_10_kb": b"A" * 10_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "version_0_9": b"GET /v2\r\n",
    "version_2_preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version_3_7": get(b"/v2", b"HTTP/3.7"),
    "version_none": get(b"/v2", b"FTP/1.1"),
    "target_of_100_kb": get(b"/" + b"a" * 100_000),
    "target_relative": get(b"v2"),
    "target_empty": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "target_with_nul": get(b"/v2/models/%00"),
    "target_not_utf8": get(b"/v2/models/%ff%fe"),
    "target_with_bytes": get(b"/v2/models/\xff"),
    "target_half_escaped": get(b"/v2/models/%e"),
    "target_up": get(b"/static/../../service/config.py"),
    "target_up_escaped": get(b"/static/%2e%2e/%2e%2e/service/config.py"),
    "target_up_twice_escaped": get(b"/static/%252e%252e/config.py"),
    "target_backslash": get(b"/static/..\\..\\service\\config.py"),
    "target_double_slash": get(b"/v2//models"),
    "target_deep": get(b"/v2" * 1000),
    # Connections.
    "nothing": b"",
    "line_ends": b"\r\n" * 1000,
    "tls_hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "random": bytes(range(256)) * 40,
    "two_requests_of_which_one_is_smuggled": post(b"Content-Length: 4", body=b"[[[[") + get(b"/v2/models/edges/infer"),
}
#: What is answered where that is not 400; by nothing at all where there is no request yet.
STATUS = {
    "length_2_64": 413, "length_of_10_000_digits": 431, "coding_unknown": 501, "header_of_100_kb": 431,
    "headers_10_000": 431, "expect_unknown": 417, "method_unknown": 405, "method_trace": 405, "method_connect": 404,
    "method_delete": 405, "method_of_10_kb": 414, "target_of_100_kb": 414, "target_with_nul": 404,
    "target_not_utf8": 404, "target_half_escaped": 404, "target_up": 404, "target_up_escaped": 404,
    "target_up_twice_escaped": 404, "target_backslash": 404, "target_double_slash": 404, "target_deep": 404,
    "gzip_bomb": 413,
}  # fmt: skip
SILENT = {"nothing", "header_cut", "tls_hello"}
_PACKED = {"gzip_bomb": gzip.compress(bytes(80_000_000)), "gzip_of_gzip": gzip.compress(gzip.compress(GOOD))}
for _name, _body in _PACKED.items():
    CASES[_name] = post(b"Content-Encoding: gzip", b"Content-Length: %d" % len(_body), body=_body)


@pytest.fixture(scope="module")
def billing(server, tmp_path_factory):
    """(A server that records every bill, the ledger's URL)."""
    folder = tmp_path_factory.mktemp("billing")
    url = f"sqlite:///{folder}/usage.db"
    ledger.migrate(url)
    running = type(server)(folder, CCONV_LEDGER=url, CCONV_MODELS="edges", CCONV_DEADLINE_SECONDS="5")
    try:
        running.wait_until_ready()
        yield running, url
    finally:
        running.stop()


def talk(port: int, data: bytes) -> bytes:
    """All that is answered until the connection ends, by a reset too: what was not read may be the end of it."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(OSError):  # it has heard enough; its answer may be there all the same
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return bytes(answer)


def untouched(running, url) -> None:
    """Nothing was computed, billed or broken."""
    assert running.ask("/livez")[0] == 200
    assert not any(running.billed().values())
    assert running.metrics().get("cconv_pending_requests") == 0
    log = running.log.read_text()
    assert "Traceback" not in log
    assert log.count("Booting worker") == 1
    with ledger.Ledger(url) as book:
        assert list(book.events()) == []


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused(billing, name):
    running, url = billing
    answer = talk(running.port, CASES[name])
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d{3})", answer, re.M)]
    assert statuses == ([] if name in SILENT else [STATUS.get(name, 400)]), answer[:300]
    untouched(running, url)


def test_the_cases_are_what_is_expected_of_them():
    assert len(CASES) >= 75
    assert {*STATUS, *SILENT} <= set(CASES)
    assert all(400 <= status < 500 or status in (501, 505) for status in STATUS.values())


def test_what_they_were_made_of_is_good(server):
    answer = talk(server.port, post(WHOLE))
    assert answer.startswith(b"HTTP/1.1 200")
    assert talk(server.port, chunked(chunks(GOOD))).startswith(b"HTTP/1.1 200")
    assert talk(server.port, chunked(chunks(*(GOOD[i : i + 1] for i in range(len(GOOD)))))).startswith(b"HTTP/1.1 200")


def test_connections_that_are_reset_in_the_middle_leave_nothing_behind(billing):
    running, url = billing
    for cut in range(0, len(post(WHOLE)) - 1, 41):
        connection = socket.create_connection(("127.0.0.1", running.port), timeout=20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(post(WHOLE)[:cut])
        connection.close()
    untouched(running, url)
