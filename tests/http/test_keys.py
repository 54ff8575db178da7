"""Keys: who may ask for what, and under whose name it is recorded.

In: a service with a file of API keys, in process and under gunicorn.  Out: 401, 403, 200, and accounts in the ledger.
"""

import base64
import io
import json
import stat
import threading

import numpy as np
import pytest

from service import auth
from service.__main__ import main
from service.config import Settings
from service.routes import SCOPE_OF

CONV2D = {"x": [[[1.0, 2.0], [3.0, 4.0]]], "weight": [[[[1.0]]]]}
OPEN = {"health.livez", "health.readyz", "health.v2_health_live", "health.v2_health_ready", "static"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def key(path):
    """f(*scopes, **limits) -> a key that the service of this test knows."""
    return lambda *scopes, **limits: auth.make(path, "somebody", scopes or ("infer", "usage"), **limits)


@pytest.fixture
def client(make_app, path, monkeypatch):
    monkeypatch.setattr(auth, "LOOK_S", 0.0)
    return make_app(api_keys=str(path)).test_client()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def conv2d(client, headers=None, **more):
    return client.post("/v1/conv2d?format=json", json=CONV2D, headers=headers, **more)


def account_of(key: str) -> str:
    return key.split("_")[1]


def test_a_key_is_taken_from_every_header_it_may_come_in(client, key):
    good = key()
    for headers in (
        bearer(good),
        {"Authorization": f"bearer   {good} "},
        basic(good),
        basic(good, user=""),
        {"X-API-Key": good},
    ):
        assert conv2d(client, headers).status_code == 200, headers


def corpus(good: str) -> dict[str, dict[str, str]]:
    """Headers that nobody is to be recognised by, made of a good key."""
    identity, secret = good.split("_", 2)[1:]
    other = "A" if secret[-1] != "A" else "B"
    return {
        "nothing": {},
        "empty": {"Authorization": ""},
        "only_the_scheme": {"Authorization": "Bearer"},
        "no_scheme": {"Authorization": good},
        "another_scheme": {"Authorization": f"Digest {good}"},
        "last_character": bearer(good[:-1] + other),
        "cut": bearer(good[:-1]),
        "longer": bearer(good + "A"),
        "another_id": bearer(f"cck_{'0' * 12}_{secret}"),
        "upper_case": bearer(good.upper()),
        "only_the_id": bearer(identity),
        "only_the_secret": bearer(secret),
        "the_digest": bearer(auth._digest(good)),
        "twice": bearer(f"{good}, {good}"),
        "both_headers": {**bearer(good), "X-API-Key": good},
        "basic_as_user": {"Authorization": "Basic " + base64.b64encode(f"{good}:".encode()).decode()},
        "basic_without_colon": {"Authorization": "Basic " + base64.b64encode(good.encode()).decode()},
        "basic_no_base64": {"Authorization": f"Basic {good}"},
        "basic_not_utf8": {"Authorization": "Basic " + base64.b64encode(b"a:\xff\xfe").decode()},
        "latin_1": {"X-API-Key": "cck_ÿþ"},
        "nul_in_basic": basic(f"{good}\0"),
        "very_long": bearer("x" * 8000),
        "quoted": bearer(f'"{good}"'),
        "wildcard": {"X-API-Key": "*"},
        "json": {"X-API-Key": '{"$ne": null}'},
    }


@pytest.mark.parametrize("name", corpus("cck_0123456789ab_" + "A" * 43))
def test_whoever_has_no_good_key_is_refused_and_computes_nothing(client, key, bill, name):
    watcher = key("metrics")
    answer = conv2d(client, corpus(key())[name])
    assert answer.status_code == 401
    assert "expected" in answer.json["error"]
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    text = client.get("/metrics", headers=bearer(watcher)).get_data(as_text=True)
    assert "cconv_inferences_total{" not in text
    assert 'cconv_rejected_total{reason="unauthorized"} 1.0' in text


def test_a_key_in_the_address_is_none(client, key):
    assert client.post(f"/v1/conv2d?format=json&api_key={key()}", json=CONV2D).status_code == 401


def test_every_address_but_the_probes_needs_a_key(client, key):
    client.get("/livez")
    rules = [rule for rule in client.application.url_map.iter_rules() if rule.endpoint not in OPEN]
    assert len(rules) > 15
    limited = key("metrics")
    for rule in rules:
        address = rule.rule.replace("<name>", "edges").replace("<version>", "1").replace("<path:filename>", "x")
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert client.open(address, method=method).status_code == 401, (rule, method)
            if SCOPE_OF.get(rule.endpoint) != "metrics":
                assert client.open(address, method=method, headers=bearer(limited)).status_code == 403, (rule, method)
    assert {endpoint for endpoint, scope in SCOPE_OF.items() if scope is None} == OPEN


def test_probes_need_none(client):
    for address in ("/livez", "/v2/health/live", "/readyz", "/v2/health/ready"):
        assert client.get(address).status_code == 200
    assert client.get("/nowhere").status_code == 404


@pytest.mark.parametrize(
    ("scope", "reach"),
    [
        ("infer", {"/v1/conv2d", "/v2"}),
        ("usage", {"/v1/usage"}),
        ("metrics", {"/metrics", "/v2/models/stats"}),
        ("admin", {"/v1/conv2d", "/v2", "/v1/usage", "/metrics", "/v2/models/stats"}),
    ],
)
def test_a_scope_reaches_so_far(client, key, scope, reach):
    headers = bearer(key(scope))
    addresses = ("/v2", "/v1/usage", "/metrics", "/v2/models/stats")
    answers = {address: client.get(address, headers=headers) for address in addresses}
    answers["/v1/conv2d"] = conv2d(client, headers)
    for address, answer in answers.items():
        assert (answer.status_code != 403) == (address in reach), address
        if address not in reach:
            assert f"got {scope}" in answer.json["error"]


def test_a_revoked_key_is_refused_while_the_service_runs_and_another_is_not(client, key, path):
    first, second = key(), key()
    assert conv2d(client, bearer(first)).status_code == 200
    auth.revoke(path, account_of(first))
    assert conv2d(client, bearer(first)).status_code == 401
    assert conv2d(client, bearer(second)).status_code == 200


def test_a_file_that_breaks_changes_nothing_and_a_whole_one_does(client, key, path):
    good = key()
    assert conv2d(client, bearer(good)).status_code == 200
    whole = path.read_bytes()
    for broken in (whole[:-10], b"[]", b'{"keys": [{}]}', b"\xff", b"[" * 100_000):
        path.write_bytes(broken)
        assert conv2d(client, bearer(good)).status_code == 200
    path.write_bytes(whole)
    assert conv2d(client, bearer(good)).status_code == 200
    path.unlink()
    assert conv2d(client, bearer(good)).status_code == 401


def test_the_service_does_not_start_with_a_file_that_cannot_be_read(make_app, path):
    path.write_text('{"keys": [{"id": "x"}]}')
    with pytest.raises(auth.KeysError, match=r"keys\.json: expected"):
        make_app(api_keys=str(path))


def test_the_file_holds_no_key_and_is_its_owners_alone(path, key):
    made = [key(), key()]
    text = path.read_text()
    for one in made:
        assert one.split("_", 2)[2] not in text
        assert account_of(one) in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)  # for a service that runs as another user of the group
    key()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_keys_made_at_the_same_time_are_all_there(path, key):
    threads = [threading.Thread(target=key) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(auth.read(path)) == 20
    assert {one.name for one in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_an_unknown_id_takes_the_way_of_a_known_one(client, key, monkeypatch):
    """Both are compared, in constant time: an id's existence shows in no time."""
    compared = []
    original = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda *pair: compared.append(pair) or original(*pair))
    good = key()
    conv2d(client, bearer(good[:-1] + ("A" if good[-1] != "A" else "B")))
    conv2d(client, bearer(f"cck_{'0' * 12}_{'A' * 43}"))
    assert [len(one) for pair in compared for one in pair] == [64] * 4


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200), (None, 200)]
)
def test_another_sites_page_cannot_spend_what_a_browser_remembers(client, key, png, site, status):
    headers = {**basic(key()), **({"Sec-Fetch-Site": site} if site else {})}
    form = {"choice": "texture:level1.relu", "photograph": (io.BytesIO(png(8, 8)), "a.png")}
    assert client.post("/", data=form, headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == 200


class TestCommand:
    """python -m service keys"""

    def run(self, *arguments: str) -> int:
        return main(["keys", *arguments])

    @pytest.fixture(autouse=True)
    def _file(self, monkeypatch, path):
        monkeypatch.setenv("CCONV_API_KEYS", str(path))

    def test_makes_lists_and_revokes(self, capsys, path):
        assert self.run("make", "Anna", "--scopes", "infer,admin", "--mflop-per-minute", "7") == 0
        key = capsys.readouterr().out.strip()
        assert auth.KEY.fullmatch(key)
        assert self.run("list") == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(account_of(key))
        assert "infer,admin  7 MFLOP per minute  Anna" in line
        assert key not in line
        assert self.run("revoke", account_of(key)) == 0
        assert self.run("revoke", account_of(key)) == 0
        capsys.readouterr()
        self.run("list")
        assert "revoked 20" in capsys.readouterr().out

    def test_knows_a_key_that_was_made_elsewhere_once(self, capsys, path, monkeypatch, make_app):
        given = f"cck_{'a1' * 6}_{'Z9' * 21}-"
        for line, code, said in (
            (given + "\n", 0, "a1a1a1a1a1a1 is known"),
            (given, 0, "a1a1a1a1a1a1 is known"),
            (given[:-1] + "_", 2, "a1a1a1a1a1a1: expected the key that has this id already"),
            (given[:-1], 2, "key: expected cck_"),
            ("", 2, "key: expected cck_"),
        ):
            monkeypatch.setattr("sys.stdin", io.StringIO(line))
            assert self.run("add", "first", "--scopes", "infer") == code
            captured = capsys.readouterr()
            assert said in captured.out + captured.err
            assert given[20:50] not in captured.out + captured.err
        assert list(auth.read(path)) == ["a1a1a1a1a1a1"]
        client = make_app(api_keys=str(path)).test_client()
        assert conv2d(client, bearer(given)).status_code == 200
        self.run("revoke", "a1a1a1a1a1a1")
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert self.run("add", "first") == 0
        assert auth.read(path)["a1a1a1a1a1a1"].revoked

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("make", ""), "name: expected"),
            (("make", "a\nb"), "name: expected"),
            (("make", "a", "--scopes", "root"), "scopes: expected some of infer, usage, metrics, admin, got root"),
            (("make", "a", "--scopes", ""), "scopes: expected"),
            (("make", "a", "--mflop-per-month", "0"), "mflop_per_month: expected a whole number"),
            (("revoke", "nobody"), "nobody: expected the id of a key"),
        ],
    )
    def test_says_what_it_expects(self, capsys, path, arguments, text):
        self.run("make", "first")
        before = path.read_bytes()
        assert self.run(*arguments) == 2
        assert text in capsys.readouterr().err
        assert path.read_bytes() == before
        assert not [one for one in path.parent.iterdir() if one.name not in ("keys.json", "keys.json.lock")]

    def test_needs_a_file(self, capsys, monkeypatch):
        monkeypatch.delenv("CCONV_API_KEYS")
        assert self.run("list") == 2
        assert "CCONV_API_KEYS: expected" in capsys.readouterr().err


class TestSettings:
    """When keys are asked for."""

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
    def test_not_by_default_where_only_this_machine_reaches_the_service(self, host):
        assert not Settings(host=host).auth_required
        assert Settings(host=host, api_keys="keys.json").auth_required

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
    def test_everywhere_else_unless_switched_off(self, host):
        with pytest.raises(ValueError, match="CCONV_API_KEYS: expected a file"):
            Settings(host=host)
        assert Settings(host=host, api_keys="keys.json").auth_required
        assert not Settings(host=host, auth="off").auth_required
        assert not Settings(host=host, auth="off", api_keys="keys.json").auth_required

    def test_a_word_that_is_none_of_the_three_is_refused(self):
        with pytest.raises(ValueError, match="CCONV_AUTH: expected on, off or auto, got 'no'"):
            Settings(auth="no")
        with pytest.raises(ValueError, match="CCONV_API_KEYS: expected"):
            Settings(auth="on")


class TestLedger:
    """Whose bill it is."""

    @pytest.fixture
    def client(self, make_app, path, tmp_path, monkeypatch):
        ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
        pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")
        url = f"sqlite:///{tmp_path}/usage.db"
        ledger.migrate(url)
        monkeypatch.setattr(auth, "LOOK_S", 0.0)
        return make_app(api_keys=str(path), ledger=url).test_client()

    def usage(self, client, key, query="by=account"):
        answer = client.get(f"/v1/usage?{query}", headers=bearer(key))
        assert answer.status_code == 200
        return answer.json

    def test_a_bill_is_its_keys_and_nobody_else_sees_it(self, client, key):
        anna, ben, boss = key(), key(), key("admin")
        for one, times in ((anna, 2), (ben, 1)):
            for _ in range(times):
                assert conv2d(client, bearer(one)).status_code == 200
        for one, events in ((anna, 2), (ben, 1)):
            assert [(row["account"], row["events"]) for row in self.usage(client, one)] == [(account_of(one), events)]
            rows = self.usage(client, one, "by=event")
            assert {row["account"] for row in rows} == {account_of(one)}
        assert {row["account"] for row in self.usage(client, boss)} == {account_of(anna), account_of(ben)}

    def test_an_idempotency_key_is_its_accounts_own(self, client, key):
        anna, ben = key(), key()
        mine = {"Idempotency-Key": "1"}
        assert conv2d(client, {**bearer(anna), **mine}).status_code == 200
        other = client.post("/v1/conv2d", json={**CONV2D, "padding": 1}, headers={**bearer(ben), **mine})
        assert (other.status_code, other.headers.get("Idempotent-Replay")) == (200, None)
        again = conv2d(client, {**bearer(anna), **mine})
        assert (again.status_code, again.headers["Idempotent-Replay"]) == (200, "true")
        assert [row["events"] for row in self.usage(client, ben)] == [1]


def test_tritonclient_sends_its_key_by_header_and_by_plugin(start_server, triton, path, key, tmp_path):
    from tritonclient.http.auth import BasicAuth
    from tritonclient.utils import InferenceServerException

    good = key()
    server = start_server(CCONV_API_KEYS=str(path), CCONV_MODELS="edges", CCONV_ACCESS_LOG=str(tmp_path / "access.log"))
    x = np.zeros((1, 3, 8, 8), np.float32)
    image = triton.InferInput("image", x.shape, "FP32")
    image.set_data_from_numpy(x)
    client = triton.InferenceServerClient(server.address)
    try:
        with pytest.raises(InferenceServerException, match="API key: expected one"):
            client.infer("edges", [image])
        assert client.infer("edges", [image], headers=bearer(good)).get_response()["parameters"]["macs"] > 0
        client.register_plugin(BasicAuth("anybody", good))
        assert client.infer("edges", [image]).get_response()["parameters"]["flops"] > 0
    finally:
        client.close()
    server.stop()
    for log in (server.log, server.access_log, tmp_path / "access.log"):
        assert not log.exists() or good.split("_", 2)[2] not in log.read_text()
    assert json.loads(path.read_text())["keys"][0]["id"] == account_of(good)
