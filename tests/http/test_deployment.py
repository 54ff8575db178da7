"""Deployment: the image and the compose file, as far as they can be checked without an engine.

In: Dockerfile, docker-compose.yml.  Out: the hardening that the docs promise, and a file that Compose itself accepts.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.config import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def dockerfile():
    return (ROOT / "Dockerfile").read_text()


OURS = dict.fromkeys(("service", "gpu", "migrate", "keys", "demo"), "10001:10001")
USERS = {**OURS, "db": "999:999", "prometheus": "65534:65534", "grafana": "472:0"}


@pytest.mark.parametrize("name", USERS)
def test_every_container_is_hardened(compose, name):
    container = compose["services"][name]
    assert container["user"] == USERS[name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["init"] is True
    assert container["pids_limit"] > 0
    assert container["mem_limit"]
    for tmp in container["tmpfs"]:
        assert {"noexec", "nosuid", "nodev"} <= set(tmp.partition(":")[2].split(","))
    assert not {"privileged", "cap_add", "pid", "devices", "env_file"} & set(container)
    assert container.get("network_mode", "none") == "none"
    for volume in container.get("volumes", ()):  # of this machine's files nothing is written
        assert not volume.startswith((".", "/")) or volume.endswith(":ro"), volume


def test_the_service_stops_later_than_it_drains(compose):
    for name in ("service", "gpu"):
        seconds = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert seconds > Settings().grace_s


def test_the_port_is_published_on_this_machine_alone(compose):
    ports = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert ports == {
        "service": ["127.0.0.1:${PORT:-8080}:8080"],
        "gpu": ["127.0.0.1:${GPU_PORT:-8081}:8080"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3000}:3000"],
    }


def test_models_of_the_users_own_are_mounted_read_only(compose, dockerfile):
    service = compose["services"]["service"]
    assert "./models:/models:ro" in service["volumes"]
    assert service["environment"]["CCONV_MODEL_REPOSITORY"] == "/models"
    assert {path.name for path in (ROOT / "models").iterdir() if path.name.startswith(".")} == {".gitignore"}
    assert "[service,model]" in dockerfile  # what reads them


def test_the_demo_runs_in_its_profile_once_the_service_is_healthy(compose):
    demo = compose["services"]["demo"]
    assert demo["profiles"] == ["demo"]
    assert demo["depends_on"] == {"service": {"condition": "service_healthy"}}
    assert set(compose["services"]) == set(USERS)


@pytest.mark.parametrize("name", ["service", "gpu"])
def test_the_service_keeps_a_ledger_whose_tables_and_keys_were_made_before_it_starts(compose, name):
    service, migrate, db = (compose["services"][name] for name in (name, "migrate", "db"))
    done = {"condition": "service_completed_successfully"}
    assert service["depends_on"] == {"migrate": done, "keys": done}
    assert "keys:/keys:ro" in service["volumes"]
    assert migrate["depends_on"] == {"db": {"condition": "service_healthy"}}
    assert migrate["command"] == ["python", "-m", "cconv.ledger", "migrate", service["environment"]["CCONV_LEDGER"]]
    assert "profiles" not in migrate
    assert migrate["restart"] == "no"
    assert service["environment"]["CCONV_LEDGER"] == "postgresql://cconv@db/cconv"
    assert (db["environment"]["POSTGRES_USER"], db["environment"]["POSTGRES_DB"]) == ("cconv", "cconv")
    assert db["volumes"] == ["ledger:/var/lib/postgresql/data"]
    assert "ledger" in compose["volumes"]
    assert db["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]


def test_the_tables_are_made_by_the_image_that_serves(compose):
    service, migrate = (compose["services"][name] for name in ("service", "migrate"))
    assert (migrate["image"], migrate["build"]) == (service["image"], service["build"])


def test_the_database_is_reached_by_the_services_and_their_migration_alone(compose):
    assert compose["networks"]["back"] == {"internal": True}
    on_it = {name for name, one in compose["services"].items() if "back" in one.get("networks", ())}
    assert on_it == {"service", "gpu", "migrate", "db"}
    assert compose["services"]["db"]["networks"] == ["back"]


def test_no_secret_is_in_the_file(compose):
    """Whatever is called a password or a key comes from outside, and its absence is an error."""
    text = (ROOT / "docker-compose.yml").read_text()
    given = re.findall(r"^\s*\w*(?:PASSWORD|_KEY): (.*)$", text, re.M)
    assert len(given) == 7
    assert all(re.match(r'(&scrape )?"?\$\{\w+:\?|\*scrape$', value) for value in given), given
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)
    ignored = (ROOT / ".gitignore").read_text().split()
    assert ".env" in ignored
    assert "!.env" not in (ROOT / ".dockerignore").read_text()


def _stages(dockerfile) -> dict[str, tuple[str, str]]:
    """Every stage's base and text, in order."""
    found = re.split(r"^FROM (\S+) AS ([\w-]+)$", dockerfile, flags=re.M)[1:]
    return {name: (base, text) for base, name, text in zip(found[::3], found[1::3], found[2::3], strict=True)}


def test_the_gpus_service_has_one_computes_nowhere_else_and_keeps_its_kernels(compose, dockerfile):
    gpu, service = (compose["services"][name] for name in ("gpu", "service"))
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    mine = {name: value for name, value in gpu["environment"].items() if name not in service["environment"]}
    assert (
        Settings.from_env({name: value for name, value in mine.items() if name != "CCONV_CACHE_DIR"}).device == "cuda"
    )
    assert set(service["environment"]) < set(gpu["environment"])  # the ledger, API keys, models
    folder = gpu["environment"]["CCONV_CACHE_DIR"]
    assert f"cubins:{folder}" in gpu["volumes"]
    assert f"--owner=10001 --group=10001 {folder}" in _stages(dockerfile)["gpu"][1]
    assert "[gpu]" in dockerfile


def test_the_images_run_as_nobody_and_tell_their_health(dockerfile, compose):
    stages = _stages(dockerfile)
    built = [container for container in compose["services"].values() if "build" in container]
    assert {container["build"]["target"] for container in built} == {"service", "gpu", "demo"} <= set(stages)
    assert list(stages)[-1] == "service"  # what `docker build .` makes
    for name in ("service", "gpu", "demo"):
        assert re.findall(r"^USER (.*)$", stages[name][1], re.M) == ["10001:10001"]
    serving = stages["serving"][1]
    assert [stages[name][0] for name in ("service", "gpu")] == ["serving"] * 2
    assert "--owner=10001 --group=10001 --mode=700 /keys" in serving
    assert re.search(r'CMD \["gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app\(\)"\]', serving)
    assert "/readyz" in serving[serving.index("HEALTHCHECK") :]


def test_what_the_image_copies_is_there(dockerfile):
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
    ignored = (ROOT / ".dockerignore").read_text()
    assert re.search(r"^\*$", ignored, re.M)
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M):
        for source in line.split()[:-1]:
            assert f"!{source.partition('/')[0]}\n" in ignored, source


def compose_client() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version"], capture_output=True, check=False)
            if found.returncode == 0:
                return command
    return None


@pytest.mark.parametrize(
    "profile", [[], *(["--profile", name] for name in ("demo", "gpu", "observability"))], ids=" ".join
)
def test_compose_accepts_the_file(profile):
    client = compose_client()
    if client is None:
        pytest.skip("no `docker compose` and no `docker-compose` on this machine")
    command = [*client, "-f", str(ROOT / "docker-compose.yml"), *profile, "config", "-q"]
    names = ("CCONV_DB_PASSWORD", "CCONV_API_KEY", "CCONV_METRICS_KEY", "GRAFANA_PASSWORD")
    environment = {**os.environ, **dict.fromkeys(names, "of a test")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
