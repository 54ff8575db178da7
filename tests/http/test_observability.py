"""Observability: what Prometheus and Grafana are given refers to what there is: containers, files, metrics, labels.

In: observability/, service/dashboard.json, docker-compose.yml, and /metrics of a service that has answered.  Out: no
name that nothing has.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as families_of

from service import auth

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "observability"
#: What Prometheus adds to everything that it asks for.
SCRAPED = {"job", "instance", "le"}
#: Words of PromQL that stand where a metric may.
WORDS = {"up"}


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


@pytest.fixture
def labels(make_app, url, tmp_path, infer_json):
    """{series: names of its labels} of a service that has computed, refused and recorded."""
    keys = tmp_path / "keys.json"
    headers = {"X-API-Key": auth.make(keys, "a", ("admin",))}
    client = make_app(api_keys=str(keys), ledger=url, ledger_spool=str(tmp_path / "spool")).test_client()
    good = infer_json(np.zeros((1, 3, 8, 8), np.float32))
    assert client.post("/v2/models/edges/infer", data=good, headers=headers).status_code == 200
    assert client.post("/v2/models/edges/infer", data=b"{", headers=headers).status_code == 400
    pipeline = client.application.extensions["cconv"]
    pipeline.metrics.discarded("edges", "cpu", 1)  # which no request can be made to do
    found: dict[str, set] = {}
    for family in families_of(client.get("/metrics", headers=headers).get_data(as_text=True)):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[str]:
    dashboard = json.loads((ROOT / "service/dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def test_every_query_asks_for_series_and_labels_that_there_are(labels):
    assert len(queries()) > 20
    for query in queries():
        names = set(re.findall(r"\bcconv_\w+", query))
        assert names or set(re.findall(r"\w+", query)) & WORDS, query
        assert names <= set(labels), (query, names - set(labels))
        asked = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        for name in names:
            chosen = {
                label for by in re.findall(rf"{name}{{([^}}]*)}}", query) for label in re.findall(r"(\w+)[=!]", by)
            }
            assert (asked | chosen) - SCRAPED <= labels[name], (query, name)


#: The names that pipelines and operators were promised.
PROMISED = {
    "requests_total": {"model", "version", "code"}, "inferences_total": {"model"}, "executions_total": {"model"},
    "macs_total": {"model", "device"}, "flops_total": {"model", "device"}, "request_seconds_count": set(),
    "queue_seconds_count": set(), "compute_seconds_count": {"model"}, "batch_size_count": {"model"},
    "pending_requests": set(), "pending_flops": set(), "rejected_total": {"reason"}, "bytes_in_total": set(),
    "bytes_out_total": set(), "ledger_writes_total": set(), "ledger_failures_total": set(),
    "ledger_lag_seconds": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_metric_is_there_with_its_labels(labels, name):
    assert PROMISED[name] <= labels[f"cconv_{name}"]


def test_requests_are_counted_by_the_model_that_computed_them(client, metrics, infer_json):
    x = np.zeros((1, 3, 8, 8), np.float32)
    client.post("/v2/models/edges/infer", data=infer_json(x))
    client.post("/v2/models/edges/versions/1/infer", data=b"{")
    client.post("/v2/models/no-such-model/infer", data=infer_json(x))
    client.post("/v1/conv2d?format=json", json={"x": [[[1.0]]], "weight": [[[[1.0]]]]})
    series = metrics(client.get("/metrics").get_data(as_text=True))
    for route, model, version, code in (
        ("/v2/models/<name>/infer", "edges", "1", 200),
        ("/v2/models/<name>/versions/<version>/infer", "edges", "1", 400),
        ("/v2/models/<name>/infer", "", "", 404),
        ("/v1/conv2d", "conv2d", "1", 200),
    ):
        name = f'cconv_requests_total{{code="{code}",model="{model}",route="{route}",version="{version}"}}'
        assert series[name] == 1.0, name
    assert "no-such-model" not in str(series), "what clients call things makes no series"


def test_prometheus_asks_the_service_with_the_key_that_it_was_given(compose, app):
    (job,) = read("prometheus.yml")["scrape_configs"]
    service, prometheus = compose["service"], compose["prometheus"]
    port = service["ports"][0].rpartition(":")[2]
    assert job["static_configs"] == [{"targets": [f"service:{port}"]}]
    assert job.get("metrics_path", "/metrics") in {rule.rule for rule in app.url_map.iter_rules()}
    assert set(service["networks"]) & set(prometheus["networks"])
    script = prometheus["entrypoint"][-1]
    assert f"> {job['authorization']['credentials_file']};" in script
    inside = dict(reversed(volume.split(":")[:2]) for volume in prometheus["volumes"])
    config = re.search(r"--config\.file=(\S+)", script)[1]
    assert inside[config] == "./observability/prometheus.yml"
    for name in read("prometheus.yml")["rule_files"]:
        assert inside[f"{Path(config).parent}/{name}"] == f"./observability/{name}"
    assert re.search(r"--storage\.tsdb\.path=(\S+)", script)[1] in inside


def test_grafana_finds_prometheus_and_the_dashboard(compose):
    grafana = compose["grafana"]
    (source,) = read("datasource.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"] is True
    assert set(grafana["networks"]) & set(compose["prometheus"]["networks"])
    inside = dict(reversed(volume.split(":")[:2]) for volume in grafana["volumes"])
    (provider,) = read("dashboards.yml")["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert inside[home] == "./service/dashboard.json"
    for outside in inside.values():
        assert not outside.startswith("./") or (ROOT / outside).is_file()
    dashboard = json.loads((ROOT / "service/dashboard.json").read_text())
    (variable,) = dashboard["templating"]["list"]
    assert variable["query"] == source["type"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_others_images_are_of_one_version(compose, name):
    assert compose[name]["profiles"] == ["observability"]
    assert re.search(r":v?\d+\.\d+\.\d+$", compose[name]["image"])
