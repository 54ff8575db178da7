"""Openapi: service/openapi.yaml describes the service, all of it, and the service does what it says.

In: the file, the URL map, and a server with keys and a ledger that schemathesis may send anything to.  Out: the same
addresses and methods on both sides, and no answer that the file does not allow.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cconv
from service import auth
from service.routes import SCOPE_OF, features

ROOT = Path(__file__).parents[2]
FILE = ROOT / "service/openapi.yaml"
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
#: Of a description no answer to which may be 200: tensors that fit neither each other nor a model.
NEVER = "positive_data_acceptance"
#: 503 is an answer to `device: cuda` where there is no GPU, and to nothing else that is asked here.
CONFIG = """
[[operations]]
include-path-regex = "/(features|conv2d|infer)$"
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
"""


@pytest.fixture(scope="module")
def document():
    return yaml.safe_load(FILE.read_text())


def test_it_is_openapi(document):
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    assert document["openapi"].startswith("3.1")
    validator.validate(document)


def test_it_has_the_addresses_and_methods_of_the_service_and_no_others(document, app):
    described = {(path, verb) for path, item in document["paths"].items() for verb in METHODS & set(item)}
    served = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), verb.lower())
        for rule in app.url_map.iter_rules()
        for verb in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert described == served
    for path, item in document["paths"].items():
        of_path = {_resolve(document, one)["name"] for one in item.get("parameters", ())}
        of_path |= {
            found["name"]
            for verb in METHODS & set(item)
            for one in item[verb].get("parameters", ())
            if (found := _resolve(document, one))["in"] == "path"
        }
        assert of_path == set(re.findall(r"{(\w+)}", path)), path


def _resolve(document, node):
    for name in node.get("$ref", "#")[2:].split("/"):
        node = node if not name else (document if name == "components" else node)[name]
    return node


def test_it_says_what_needs_no_key(document, app):
    adapter = app.url_map.bind("localhost")
    for path, item in document["paths"].items():
        for verb in METHODS & set(item):
            endpoint, _ = adapter.match(
                re.sub(r"{version}", "1", re.sub(r"{(name|filename)}", "x", path)), verb.upper()
            )
            assert (item[verb].get("security") == []) == (SCOPE_OF.get(endpoint, "infer") is None), (path, verb)


def test_it_has_every_option_and_device_of_a_computation(document):
    schemas = document["components"]["schemas"]
    assert tuple(schemas["Device"]["enum"]) == cconv.devices.NAMES
    assert {*schemas["Outcome"]["allOf"][1]["properties"]["device"]["enum"]} == {*cconv.devices.NAMES} - {"auto"}
    assert {*schemas["Conv2d"]["properties"]} == {*features.TENSORS, *features.OPTIONS, "dtype", "device"}
    form = document["paths"]["/v1/conv2d"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    query = {
        one["name"]: one["schema"] for one in document["paths"]["/v1/features"]["post"]["parameters"] if "in" in one
    }
    infer = schemas["InferRequest"]["properties"]["parameters"]["allOf"][1]
    for place in (form["properties"], query, infer["properties"], schemas["Conv2d"]["properties"]):
        assert place["device"] == {"$ref": "#/components/schemas/Device"}


def test_every_part_of_it_is_used():
    text = FILE.read_text()
    kinds = yaml.safe_load(text)["components"]
    for kind, parts in kinds.items():
        for name in parts if kind != "securitySchemes" else ():
            assert f'"#/components/{kind}/{name}"' in text, name


def test_it_needs_no_yaml_1_1():
    """YAML 1.2 has no merge keys."""
    assert "<<:" not in FILE.read_text()


@pytest.mark.slow
def test_schemathesis_finds_nothing(document, start_server, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from cconv import ledger

    keys, url = tmp_path / "keys.json", f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    key = auth.make(keys, "schemathesis", ("admin",))
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    server = start_server(CCONV_API_KEYS=str(keys), CCONV_LEDGER=url, CCONV_MODELS="edges,texture")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(FILE), "--url", server.url),
        *("--header", f"Authorization: Bearer {key}", "--exclude-checks", NEVER, "--max-examples", "40"),
        *("--continue-on-failure", "--warnings", "off", "--no-color", "--suppress-health-check", "all"),
        *("--seed", "1", "--generation-database", "none", "--request-timeout", "30"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    # That it did its work.
    assert f"Tested: {sum(len(METHODS & set(item)) for item in document['paths'].values())}\n" in done.stdout
    assert int(re.search(r"(\d+) generated, \1 passed", done.stdout)[1]) > 1000
    assert server.ask("/readyz")[0] == 200
