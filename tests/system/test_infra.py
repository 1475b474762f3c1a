"""The services of infra/compose.yaml as processes of this machine: commands, environments, health checks; a run on them."""

import base64
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from clado.records.run_record import RunRecord
from flows.clusters._certificates import make_certificates
from tests.system.running import Bench, end_group, free_port, wait_for
from tests.test_infra import INFRA, SERVICES, VARIABLE, environment

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
HOSTS = "postgres|store|mlflow|prefect-server|dask-scheduler|127.0.0.1|localhost"
GIVEN = {"POSTGRES_PASSWORD": "secret1", "MLFLOW_ADMIN_PASSWORD": "secret2secret2", "MLFLOW_SECRET_KEY": "secret3",
         "PREFECT_AUTH": "flow:secret4", "S3_ACCESS_KEY": "key5", "S3_SECRET_KEY": "secret6"}  # fmt: skip


class Native:
    """Containers as processes: each address becomes a free port of loopback, each mounted path a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.started: list[tuple[str, Bench, subprocess.Popen]] = []
        make_certificates(folder / "tls")
        (folder / "data").mkdir()
        (folder / "runs").mkdir()
        (folder / "etc" / "clado").mkdir(parents=True)
        (folder / "etc" / "clado" / "auth.ini").write_text(self.translate((INFRA / "mlflow" / "auth.ini").read_text()))

    def port(self, number: str) -> int:
        return self.ports.setdefault(number, free_port())

    def translate(self, text: str) -> str:
        text = VARIABLE.sub(lambda match: GIVEN.get(match[1], ""), text)
        text = re.sub(rf"\b({HOSTS}):(\d+)\b", lambda match: f"127.0.0.1:{self.port(match[2])}", text)
        text = re.sub(r"--port (\d+)", lambda match: f"--port {self.port(match[1])}", text).replace("0.0.0.0", "127.0.0.1")
        return re.sub(
            r"(?<![\w./])(/+)(tls|data|runs|etc/clado)\b", lambda match: f"{match[1][:-1]}{self.folder}/{match[2]}", text
        )

    def environment(self, name: str) -> dict[str, str]:
        return {variable: self.translate(value) for variable, value in environment(SERVICES[name]).items()}

    def start(self, name: str, *more_words: str, **more: str) -> None:
        program, *words = shlex.split(self.translate(SERVICES[name]["command"]))
        bench = Bench(self.folder / name, {**self.environment(name), **more}, Path(sys.executable).with_name(program))
        self.started.append((name, bench, bench.start(*words, *more_words)))

    def wait(self) -> None:
        """Until the health check of each service passes."""
        for name, _, process in self.started:
            wait_for(lambda: self.healthy(name), name, process)  # noqa: B023

    def healthy(self, name: str) -> bool:
        kind, program, *words = SERVICES[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        return subprocess.run([sys.executable, *map(self.translate, words)], check=False, capture_output=True).returncode == 0

    def end(self) -> None:
        for _, _, process in reversed(self.started):
            end_group(process)


def binaries() -> Path:
    """PostgreSQL's programs."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("initdb")
    if not programs and which is None:
        pytest.skip("PostgreSQL is not installed")
    return programs[-1].parent if programs else Path(str(which)).parent


@pytest.fixture
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infra")
    programs = binaries()
    for module in ("psycopg2", "flask_wtf", "boto3", "moto"):
        pytest.importorskip(module, reason="pip install 'clado[servers]' moto[server]")
    services = Native(folder)
    as_user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    base = Path("/tmp") / f"clado-postgres-{services.port('5432')}"  # a path that its user may enter
    base.mkdir(mode=0o700)
    if as_user:
        shutil.chown(base, pwd.getpwnam("postgres").pw_uid)

    def run(*words: object, **more: Any) -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=300, cwd=base, **as_user, **more)

    (folder / "password").write_text(GIVEN["POSTGRES_PASSWORD"])
    shutil.copy(folder / "password", base / "password")
    (base / "password").chmod(0o644)
    store = Bench(folder / "store", executable=Path(sys.executable))
    bucket_store = None
    try:
        run(
            programs / "initdb",
            "-D",
            base / "data",
            "-U",
            "clado",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            f"--pwfile={base}/password",
        )
        options = f"-p {services.port('5432')} -h 127.0.0.1 -k {base}"
        run(programs / "pg_ctl", "-D", base / "data", "-w", "-l", base / "log", "-o", options, "start")
        shown = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "POSTGRES_USER": "clado", "PGDATABASE": "postgres",
                 "PGHOST": str(base), "PGPORT": str(services.port("5432"))}  # fmt: skip
        run("/bin/sh", "-c", (INFRA / "postgres" / "databases.sh").read_text(), env=shown)
        bucket_store = store.start("-m", "moto.server", "-H", "127.0.0.1", "-p", services.port("8333"))
        wait_for(lambda: buckets(services), "the store", bucket_store)
        yield services
    finally:
        services.end()
        if bucket_store is not None:
            end_group(bucket_store)
        subprocess.run(
            [programs / "pg_ctl", "-D", base / "data", "-m", "immediate", "stop"],
            check=False,
            capture_output=True,
            cwd=base,
            **as_user,
        )
        shutil.rmtree(base, ignore_errors=True)


def buckets(services: Native) -> bool:
    """Makes the buckets, as the service of that name does; whether that was possible."""
    import boto3
    from botocore.exceptions import BotoCoreError

    credentials = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    try:
        for name in ("clado", "mlflow"):
            boto3.client("s3", endpoint_url=f"http://127.0.0.1:{services.port('8333')}", **credentials).create_bucket(Bucket=name)
    except BotoCoreError:
        return False
    return True


def status(url: str, user: str | None = None, question: dict[str, Any] | None = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    if user is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    body = None if question is None else json.dumps(question).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, None


def test_the_services_start_ask_who_is_there_and_carry_a_run(native):
    for name in ("mlflow", "prefect-server", "dask-scheduler"):
        native.start(name)
    native.wait()
    native.start("worker", "--host", "127.0.0.1")
    native.start("prefect-worker", PREFECT_WORKER_WEBSERVER_PORT=str(native.port("8080")))
    native.wait()
    mlflow, prefect = (f"http://127.0.0.1:{native.port(port)}" for port in ("5000", "4200"))
    experiments, flows = f"{mlflow}/api/2.0/mlflow/experiments/search", f"{prefect}/api/flow_runs/filter"
    assert status(experiments, None, {"max_results": 5})[0] == 401
    assert status(experiments, "admin:password1234", {"max_results": 5})[0] == 401
    assert status(flows, None, {})[0] == 401

    run = Bench(native.folder / "flow", native.environment("prefect-worker"))
    (run.folder / "clado.yaml").write_text(native.translate((INFRA / "clado.yaml").read_text()))
    run.run(
        "run", "clado.yaml", "cluster.workers=1", "bits=[2,4]", "estimators=[layerwise]", "budgets.average_bits=[3]",
        "data.sensitivity_images=8", "data.sample_blocks=2", "data.calibration_images=0", "data.validation_images=50",
        "corrections=[]",
    )  # fmt: skip
    assert RunRecord.load(native.folder / "runs" / "demo" / "record.json").float_accuracy.top1 > 0.8

    code, answer = status(flows, GIVEN["PREFECT_AUTH"], {})
    assert code == 200
    assert [one["state_type"] for one in answer] == ["COMPLETED"]
    code, answer = status(experiments, f"admin:{GIVEN['MLFLOW_ADMIN_PASSWORD']}", {"max_results": 50})
    assert code == 200
    assert "clado" in {one["name"] for one in answer["experiments"]}
    assert {line for _, bench, _ in native.started for line in bench.outside()} | set(run.outside()) == set()
