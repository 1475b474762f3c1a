"""infra/ declares what exists: images by version, health checks, no default passwords, commands and options that are there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clado.settings.loading import load_config

INFRA = Path(__file__).parents[1] / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OBJECTS = [document for document in yaml.safe_load_all((INFRA / "kubernetes" / "clado.yaml").read_text()) if document]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("clado:")}
PINNED = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?(-[\w.]+)?")
SECRET = re.compile(r"PASSWORD|SECRET|KEY|AUTH_STRING|PREFECT_AUTH", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]*)?\}")


def environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in service.get("environment", {}).items()}


def containers(kind: dict[str, Any]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = kind.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])
    return listed


PODS = {document["metadata"]["name"]: containers(document) for document in OBJECTS if containers(document)}


def test_every_service_is_there():
    assert set(SERVICES) == {
        "postgres", "store", "buckets", "mlflow", "prefect-server", "prefect-worker", "dask-scheduler",
        "worker", "gpu-worker-0", "gpu-worker-1",
    }  # fmt: skip
    assert set(PODS) == {"postgres", "mlflow", "prefect-server", "prefect-worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_healthy_and_closed(name):
    service = SERVICES[name]
    assert PINNED.fullmatch(service["image"]), service["image"]
    waited_for = {needed: how["condition"] for other in SERVICES.values() for needed, how in other.get("depends_on", {}).items()}
    if service["restart"] == "no":  # it does one thing and ends: others wait for that
        assert waited_for[name] == "service_completed_successfully"
    else:
        assert {"test", "interval", "timeout", "retries"} <= set(service["healthcheck"])
        assert waited_for.get(name, "service_healthy") == "service_healthy"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), port
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("./"):
            assert (INFRA / source).exists(), source
        elif not source.startswith("$"):
            assert source in COMPOSE["volumes"]
    assert "privileged" not in service
    assert service.get("network_mode") != "host"


def test_no_password_has_a_default():
    text = (INFRA / "compose.yaml").read_text()
    assert not re.search(r"\$\{\w+:?-", text)  # ${NAME:-default}
    first = {}
    for match in VARIABLE.finditer(text):
        first.setdefault(match[1], match[2])
    required = {name for name, demand in first.items() if demand}
    assert required == set(first), "each variable is demanded where it is named first"
    example = dict(
        line.split("=", 1) for line in (INFRA / "env.example").read_text().splitlines() if "=" in line and line[0] != "#"
    )
    assert example == dict.fromkeys(first, "")
    for name, service in SERVICES.items():
        for variable, value in environment(service).items():
            if SECRET.search(variable) and variable != "MLFLOW_AUTH_CONFIG_PATH":
                assert VARIABLE.search(value), f"{name}: {variable}"


def test_the_check_of_passwords_can_fail():
    assert SECRET.search("POSTGRES_PASSWORD")
    assert not VARIABLE.search("hunter2")
    assert not PINNED.fullmatch("postgres:latest")
    assert not PINNED.fullmatch("postgres")


def test_servers_ask_who_is_there():
    mlflow, prefect, scheduler = (SERVICES[name] for name in ("mlflow", "prefect-server", "dask-scheduler"))
    assert "--app-name basic-auth" in mlflow["command"]
    value = environment(SERVICES["prefect-worker"])["MLFLOW_TRACKING_PASSWORD"]
    assert environment(mlflow)["MLFLOW_AUTH_ADMIN_PASSWORD"] == VARIABLE.sub(r"${\1}", value)
    assert "PREFECT_SERVER_API_AUTH_STRING" in environment(prefect)
    for service in (scheduler, SERVICES["worker"], SERVICES["gpu-worker-1"]):
        assert all(f"--tls-{part} /tls/" in service["command"] for part in ("ca-file", "cert", "key"))
    assert "default_permission = NO_PERMISSIONS" in (INFRA / "mlflow" / "auth.ini").read_text()


def test_each_gpu_worker_has_its_own_gpu():
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, service in SERVICES.items()
        if name.startswith("gpu-worker")
    }
    assert devices == {f"gpu-worker-{k}": [str(k)] for k in range(len(devices))}


def commands() -> dict[str, list[str]]:
    """The commands of our image, in compose.yaml and on Kubernetes, by their words."""
    by_name = {name: shlex.split(service["command"]) for name, service in OURS.items()}
    for name, pod_containers in PODS.items():
        by_name |= {f"{name} on Kubernetes": one["args"] for one in pod_containers if one["image"].startswith("clado:")}
    return by_name


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_exists(name):
    assert shutil.which(COMMANDS[name][0], path=str(Path(sys.executable).parent)), COMMANDS[name][0]


@pytest.mark.system
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("gpu-worker-0", "gpu-worker-1")])
def test_a_command_takes_its_options(name, tmp_path):
    words = COMMANDS[name]
    options = [word for word in words if word.startswith("--")]
    verbs = [word for word in words[1:4] if re.fullmatch(r"[a-z]+", word)]
    quiet = {"PREFECT_HOME": str(tmp_path), "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "COLUMNS": "300"}
    program = Path(sys.executable).with_name(words[0])
    said = subprocess.run(
        [program, *verbs, "--help"], check=True, capture_output=True, text=True, timeout=300, env={**os.environ, **quiet}
    ).stdout
    missing = [option for option in options if option not in said]
    assert not missing, f"{words[0]} {' '.join(verbs)} has no {missing}"


@pytest.mark.parametrize("file", ["clado.yaml", "slurm/clado.yaml", "kubernetes/clado-run.yaml"])
def test_a_configuration_loads(file):
    config = load_config(INFRA / file)
    assert config.cluster.name in ("address", "slurm", "kubernetes")


def test_configurations_fit_the_declarations():
    config = load_config(INFRA / "clado.yaml")
    port = shlex.split(SERVICES["dask-scheduler"]["command"])[5]
    assert config.cluster.address == f"tls://dask-scheduler:{port}"
    assert config.tracking.uri == environment(SERVICES["prefect-worker"])["MLFLOW_TRACKING_URI"]
    pods = load_config(INFRA / "kubernetes" / "clado-run.yaml").cluster.kubernetes
    assert pods is not None
    names = {(document["kind"], document["metadata"]["name"]) for document in OBJECTS}
    assert {("Namespace", pods.namespace), *(("PersistentVolumeClaim", claim.name) for claim in pods.claims)} <= names


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_pinned_limited_and_probed(name):
    for one in PODS[name]:
        assert PINNED.fullmatch(one["image"])
        assert "readinessProbe" in one
        assert "memory" in one["resources"]["limits"]
        for entry in one.get("env", []):
            if SECRET.search(entry["name"]) and entry["name"] != "MLFLOW_AUTH_CONFIG_PATH":
                assert "secretKeyRef" in entry["valueFrom"], entry["name"]


def test_kubernetes_and_compose_agree():
    data = {document["metadata"]["name"]: document for document in OBJECTS if document["kind"] == "ConfigMap"}["clado"]["data"]
    strip = lambda text: [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]  # noqa: E731
    assert strip(data["databases.sh"]) == strip((INFRA / "postgres" / "databases.sh").read_text())
    assert strip(data["auth.ini"]) == strip((INFRA / "mlflow" / "auth.ini").read_text())
    assert json.dumps(OBJECTS).count("namespace") > len(OBJECTS) - 2


@pytest.mark.parametrize(("shell", "file"), [("sh", "postgres/databases.sh"), ("bash", "slurm/clado.sbatch")])
def test_a_shell_reads_a_script_without_complaint(shell, file):
    read = subprocess.run([shell, "-n", INFRA / file], capture_output=True, text=True, timeout=60, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_the_image_has_what_its_commands_need():
    text = (INFRA / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", text, flags=re.M)
    assert PINNED.fullmatch(base)
    for source in re.findall(r"^COPY (.*) \S+$", text, flags=re.M):
        assert all((INFRA.parent / word).exists() for word in source.split())
    project = (INFRA.parent / "pyproject.toml").read_text()
    assert "\nUSER clado" in text
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, flags=re.M), f"pyproject.toml has no extra {extra}"
    kinds = re.findall(r"^ +kind: (slurm|ssh|kubernetes)", (INFRA / "kubernetes" / "clado-run.yaml").read_text(), flags=re.M)
    assert set(kinds) <= set(extras.split(",")), "a run that is started in the image needs what starts its workers"


def test_a_run_reaches_the_bucket_that_compose_makes():
    settings = COMPOSE["x-s3"]
    assert settings["AWS_ENDPOINT_URL"] == settings["AWS_ENDPOINT_URL_S3"]
    assert settings["AWS_ENDPOINT_URL"].startswith("https://") or settings["AWS_ALLOW_HTTP"] == "true"
