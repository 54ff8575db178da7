"""Deployment: the image and the compose file, as far as they can be checked without an engine.

In: Dockerfile, docker-compose.yml.  Out: the hardening that the docs promise, and a file that Compose itself accepts.
"""

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


@pytest.mark.parametrize("name", ["service", "gpu", "demo"])
def test_every_container_is_hardened(compose, name):
    container = compose["services"][name]
    assert container["user"] == "10001:10001"
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["init"] is True
    assert container["pids_limit"] > 0
    assert container["mem_limit"]
    (tmp,) = container["tmpfs"]
    assert {"noexec", "nosuid"} <= set(tmp.partition(":")[2].split(","))
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(container)


def test_the_service_stops_later_than_it_drains(compose):
    for name in ("service", "gpu"):
        seconds = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert seconds > Settings().grace_s


def test_the_port_is_published_on_this_machine_alone(compose):
    assert compose["services"]["service"]["ports"] == ["127.0.0.1:${PORT:-8080}:8080"]
    assert "ports" not in compose["services"]["demo"]


def test_models_of_the_users_own_are_mounted_read_only(compose, dockerfile):
    service = compose["services"]["service"]
    assert service["volumes"] == ["./models:/models:ro"]
    assert service["environment"] == {"CCONV_MODEL_REPOSITORY": "/models"}
    assert {path.name for path in (ROOT / "models").iterdir() if path.name.startswith(".")} == {".gitignore"}
    assert "[service,model]" in dockerfile  # what reads them


def test_the_demo_runs_in_its_profile_once_the_service_is_healthy(compose):
    demo = compose["services"]["demo"]
    assert demo["profiles"] == ["demo"]
    assert demo["depends_on"] == {"service": {"condition": "service_healthy"}}
    assert set(compose["services"]) == {"service", "gpu", "demo"}


def test_the_gpus_service_has_one_computes_nowhere_else_and_keeps_its_kernels(compose, dockerfile):
    gpu = compose["services"]["gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    settings = Settings.from_env(
        {name: value for name, value in gpu["environment"].items() if name != "CCONV_CACHE_DIR"}
    )
    assert settings.device == "cuda"
    folder = gpu["environment"]["CCONV_CACHE_DIR"]
    assert f"cubins:{folder}" in gpu["volumes"]
    stage = dockerfile[dockerfile.index("AS gpu") :]
    assert f"--owner=10001 --group=10001 {folder}" in stage
    assert stage.rstrip().endswith("USER 10001:10001")
    assert "[gpu]" in dockerfile
    assert gpu["ports"] == ["127.0.0.1:${GPU_PORT:-8081}:8080"]


def test_the_image_runs_as_nobody_and_tells_its_health(dockerfile, compose):
    stages = re.findall(r"^FROM \S+ AS ([\w-]+)$", dockerfile, re.M)
    assert {container["build"]["target"] for container in compose["services"].values()} <= set(stages)
    service = dockerfile[dockerfile.index("AS service") :]
    assert "USER 10001:10001" in service
    assert re.search(r'CMD \["gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app\(\)"\]', service)
    assert "/readyz" in service[service.index("HEALTHCHECK") :]
    demo = dockerfile[dockerfile.index("AS demo") : dockerfile.index("AS service")]
    assert "USER 10001:10001" in demo


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


@pytest.mark.parametrize("profile", [[], ["--profile", "demo"], ["--profile", "gpu"]])
def test_compose_accepts_the_file(profile):
    client = compose_client()
    if client is None:
        pytest.skip("no `docker compose` and no `docker-compose` on this machine")
    command = [*client, "-f", str(ROOT / "docker-compose.yml"), *profile, "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
