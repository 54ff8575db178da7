"""Kserve: what KServe's client sends, byte for byte, over one connection; its answers, read as that client reads them.

In: requests as kserve 0.21's InferenceRESTClient (httpx 0.28) sent them, recorded on a socket; the package itself
brings a server's dependencies along.  Out: answers with the status, headers and fields that it looks at.
"""

import http.client
import json

import numpy as np
import pytest

import cconv

HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "Connection": "keep-alive",
    "User-Agent": "python-httpx/0.28.1",
}
LENGTH = "inference-header-content-length"
X = np.arange(3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8) / 100
INFER = "/v2/models/edges/infer"


@pytest.fixture(scope="module")
def connection(server):
    """One, as the client keeps it."""
    found = http.client.HTTPConnection(*server.address.split(":"), timeout=30)
    yield found
    found.close()


@pytest.fixture
def ask(connection):
    """f(method, path, body, headers) -> (answer, its body)."""

    def send(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None):
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {**HEADERS, **(headers or {})}.items():
            connection.putheader(name, value)
        if method == "POST":
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer, answer.read()

    return send


def of_tensor(name: str, x: np.ndarray, datatype: str, outputs: str = "") -> tuple[bytes, dict[str, str]]:
    """InferRequest.to_rest() of a tensor set with binary_data=True."""
    shape = ",".join(map(str, x.shape))
    head = (
        f'{{"id":"{name}","model_name":"edges","inputs":[{{"name":"image","shape":[{shape}],"datatype":"{datatype}",'
        f'"parameters":{{"binary_data_size":{x.nbytes}}}}}]{outputs}}}'
    )
    return head.encode() + x.tobytes(), {LENGTH: str(len(head)), "content-type": "application/octet-stream"}


def of_json(name: str) -> tuple[bytes, dict[str, str]]:
    content = {
        "id": name,
        "model_name": "edges",
        "inputs": [{"name": "image", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": X.ravel().tolist()}],
        "parameters": {"timeout": 5_000_000},
    }
    return json.dumps(content, separators=(",", ":")).encode(), {"content-type": "application/json"}


def read(answer, body: bytes) -> tuple[dict, np.ndarray]:
    """InferResponse.from_bytes: binary outputs follow the JSON, whose length the header says, if it is there."""
    size = int(answer.headers.get(LENGTH, len(body)))
    content = json.loads(body[:size])
    (output,) = content["outputs"]
    if "data" in output:
        numbers = np.array(output["data"], np.float32)
    else:
        assert output["parameters"]["binary_data_size"] == len(body) - size
        numbers = np.frombuffer(body[size:], np.float32)
    return content, numbers.reshape(output["shape"])


OUTPUT = cconv.load("edges").outputs[0]
WANTED = f',"outputs":[{{"name":"{OUTPUT}","parameters":{{"binary_data":true}}}}]'
REQUESTS = {
    "binary": of_tensor("k-1", X, "FP32"),
    "binary_out": of_tensor(
        "k-2", X, "FP32", f',"outputs":[{{"name":"{OUTPUT}","parameters":{{"binary_data":true}}}}]'
    ),
    "json": of_json("k-3"),
    "half": of_tensor("k-4", X.astype(np.float16), "FP16"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_inference(ask, name):
    body, headers = REQUESTS[name]
    answer, content = ask("POST", INFER, body, headers)
    assert answer.status == 200, content
    document, maps = read(answer, content)
    model = cconv.load("edges")
    x = X.astype(np.float16).astype(np.float32) if name == "half" else X
    assert np.array_equal(maps, model.run(x)[OUTPUT])
    assert (document["id"], document["model_name"]) == (
        json.loads(body[: int(headers.get(LENGTH, len(body)))])["id"],
        "edges",
    )
    assert document["parameters"]["macs"] == model.cost(X.shape).total.macs
    assert all(type(value) in (int, str, bool) for value in document["parameters"].values()), (
        "flat, as its model has it"
    )
    assert (LENGTH in answer.headers) == (name == "binary_out")
    assert "Content-Encoding" not in answer.headers, "a list of encodings is no wish"


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/edges/ready"])
def test_health(ask, path):
    answer, body = ask("GET", path)
    assert answer.status == 200
    assert {"live", "ready"} & set(json.loads(body)), "it reads one of these"
    assert True in json.loads(body).values()


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "text"),
    [
        ("GET", "/v2/models/nonesuch/ready", (b"", {}), 404, "unknown model"),
        ("POST", "/v2/models/nonesuch/infer", REQUESTS["binary"], 404, "unknown model"),
        ("POST", INFER, of_tensor("k-5", X[0], "FP32"), 400, "Expected [-1,3,-1,-1], got [3,8,8]"),
    ],
)
def test_an_error_is_what_it_shows(ask, method, path, request_, status, text):
    """It reads `error` of a body whose content type is exactly this one."""
    answer, body = ask(method, path, *request_)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert text in json.loads(body)["error"]
    assert ask("GET", "/v2/health/live")[0].status == 200, "the connection goes on"
