"""`clado up` and `clado down`, and deployments on what they start: Prefect's server and worker, MLflow, Dask, all on loopback."""

import json
import os
import pwd
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

from clado.records.run_record import RunRecord
from docs.screenshots import HEIGHT, WIDTH, shoot, show_flow_run
from flows.artifacts import MLFLOW, TABLE
from flows.services import HOST, LIST
from tests.system.browser import browser
from tests.system.running import COMMAND, SMALL, Bench, free_port, wait_for
from tests.system.test_deployments import ask
from tests.system.test_infra import binaries

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
NAMES = ["prefect", "mlflow", "scheduler", "workers", "runner"]


def free_ports() -> dict[str, int]:
    """Free ports; the one after Dask's is free too."""
    while True:
        dask = free_port()
        if not any(one.laddr.port == dask + 1 for one in psutil.net_connections("tcp") if one.laddr):
            return {"prefect": free_port(), "mlflow": free_port(), "dask": dask}


class Services(Bench):
    """A folder in which `clado up` was called."""

    def up(self, *more: str) -> str:
        self.ports = free_ports()
        options = [word for name, port in self.ports.items() for word in (f"--{name}-port", str(port))]
        printed = self.run("up", "--workers", "1", "--timeout", "400", *options, *more, name="up")
        exports = [line.removeprefix("export ").split("=", 1) for line in printed.splitlines() if line.startswith("export ")]
        self.environment |= dict(exports)
        return printed

    @property
    def listing(self) -> Path:
        return self.folder / "runs" / "services" / LIST

    def processes(self) -> dict[str, psutil.Process]:
        return {name: psutil.Process(one["pid"]) for name, one in json.loads(self.listing.read_text())["processes"].items()}

    def family(self) -> list[psutil.Process]:
        return [one for process in self.processes().values() for one in (process, *process.children(recursive=True))]

    def api(self, path: str, question: Any) -> Any:
        return ask(f"{self.environment['PREFECT_API_URL']}/{path}", question)

    def prefect(self, *words: str) -> str:
        tool = Bench.__new__(Bench)
        tool.folder, tool.environment, tool.executable = self.folder, self.environment, COMMAND.with_name("prefect")
        return tool.run(*words, name="prefect")


@pytest.fixture
def services(tmp_path):
    bench = Services(tmp_path / "machine", {"PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "true"})
    yield bench
    bench.run("down", name="down")


def listeners(processes: list[psutil.Process]) -> set[str]:
    """Addresses that they listen at."""
    return {one.laddr.ip for p in processes for one in p.net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def refuses_what_is_taken(services: Services) -> None:
    """A second `up` starts nothing: the same folder is up already, another one needs ports of its own."""
    before = services.listing.read_text()
    assert "Already running" in services.run("up", name="again")
    assert services.listing.read_text() == before
    process = services.start("up", "--folder", "elsewhere", "--prefect-port", services.ports["prefect"], name="taken")
    assert process.wait(300) == 2
    assert f"port {services.ports['prefect']}" in services.printed("taken")
    assert not (services.folder / "elsewhere").exists()


def pages_ask_their_own_port(services: Services) -> None:
    """Prefect's pages ask the server that they come from, whatever its port."""
    api = services.environment["PREFECT_API_URL"]
    with urllib.request.urlopen(f"{api.removesuffix('/api')}/ui-settings", timeout=30) as answer:
        assert json.load(answer)["api_url"] == api


def its_page_shows(services: Services, run: dict[str, Any]) -> None:
    """Prefect's page of a flow run has its name, asks nobody else, and is drawn."""
    address = services.environment["PREFECT_API_URL"].removesuffix("/api")
    with browser(width=WIDTH, height=HEIGHT) as opened:
        show_flow_run(opened.page, address, run)
        shoot(opened.page, services.folder / "prefect.png")
        assert [url for url in opened.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert "resnet20_fashion_mnist at 3 bits" in run["name"]
    with Image.open(services.folder / "prefect.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)


def deploy(services: Services) -> None:
    """The repository's deployments; the time of one of them comes every minute, for a smaller run on the services' cluster."""
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (nightly,) = [one for one in document["deployments"] if one["name"] == "nightly"]
    nightly["schedules"] = [{"cron": "* * * * *", "timezone": "Etc/UTC"}]
    nightly["parameters"] |= {"config": "clado.yaml", "folder": str(services.folder / "nightly" / "%Y-%m-%d"), "overrides": []}
    (services.folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(ROOT / "demo.yaml", services.folder)
    cluster = {"kind": "address", "address": services.environment["DASK_SCHEDULER_ADDRESS"], "workers": 1}
    services.write(**SMALL, corrections=[], cluster=cluster)
    services.prefect("--no-prompt", "deploy", "--all")
    assert {one["name"] for one in services.api("deployments/filter", {})} == {"nightly", "weekly", "on-demand"}


def first_to_end(services: Services) -> dict[str, Any]:
    """The flow run that ended first, other than those that were skipped."""
    query = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}, "sort": "END_TIME_DESC"}
    wait_for(lambda: services.api("flow_runs/filter", query), "a scheduled run")
    run: dict[str, Any] = services.api("flow_runs/filter", query)[-1]
    return run


def point_at_each_other(services: Services, run: dict[str, Any]) -> None:
    """Prefect shows the table, links to the MLflow run and knows its id; MLflow knows the flow run's."""
    tracked = run["labels"]["mlflow_run_id"]
    mlflow = services.environment["MLFLOW_TRACKING_URI"]
    artifacts = services.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    shown = {one["key"]: one["data"] for one in artifacts if one["key"]}  # Prefect notes results of its own without a key
    assert set(shown) == {TABLE, MLFLOW}
    assert "| uniform" in shown[TABLE]
    assert mlflow in shown[MLFLOW]
    assert tracked in shown[MLFLOW]
    experiments = ask(f"{mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 9})["experiments"]
    (number,) = [one["experiment_id"] for one in experiments if one["name"] == "clado"]
    runs = ask(f"{mlflow}/api/2.0/mlflow/runs/search", {"experiment_ids": [number]})["runs"]
    (parent,) = [one for one in runs if one["info"]["run_id"] == tracked]
    assert {tag["key"]: tag["value"] for tag in parent["data"]["tags"]}["prefect_flow_run_id"] == run["id"]
    assert parent["info"]["status"] == "FINISHED"


def test_a_machine_from_nothing_to_a_scheduled_run_and_back(services):
    services.up()
    assert list(services.processes()) == NAMES
    everything = services.family()
    assert listeners(everything) == {HOST}
    refuses_what_is_taken(services)
    pages_ask_their_own_port(services)
    deploy(services)
    run = first_to_end(services)
    assert (run["state_type"], run["auto_scheduled"]) == ("COMPLETED", True), run["state"]
    (folder,) = (services.folder / "nightly").iterdir()
    assert folder.name == run["expected_start_time"][:10]
    assert RunRecord.load(folder / "record.json").float_accuracy.top1 > 0.8
    point_at_each_other(services, run)
    its_page_shows(services, run)
    everything += services.family()
    assert "Stopped runner, workers, scheduler, mlflow, prefect." in services.run("down", name="down")
    assert [one for one in everything if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    assert "No service" in services.run("down", name="down")
    assert services.outside() == []


@pytest.fixture
def postgres():
    """URL of a PostgreSQL server of its own, on loopback, whose user may make databases."""
    programs, port = binaries(), free_port()
    pytest.importorskip("psycopg2", reason="pip install 'clado[servers]'")
    as_user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    base = Path("/tmp") / f"clado-services-{port}"  # a path that its user may enter
    base.mkdir(mode=0o700)
    (base / "password").write_text("hunter2")
    if as_user:
        for path in (base, base / "password"):
            shutil.chown(path, pwd.getpwnam("postgres").pw_uid)

    def run(*words: object) -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=300, cwd=base, **as_user)

    data = base / "data"
    try:
        run(programs / "initdb", "-D", data, "-U", "clado", "--auth=scram-sha-256", f"--pwfile={base}/password")
        run(programs / "pg_ctl", "-D", data, "-w", "-l", base / "log", "-o", f"-p {port} -h 127.0.0.1 -k {base}", "start")
        yield f"postgresql://clado:hunter2@127.0.0.1:{port}"
    finally:
        subprocess.run(
            [programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False, capture_output=True, cwd=base, **as_user
        )
        shutil.rmtree(base, ignore_errors=True)


def test_on_postgresql_both_servers_make_their_tables_and_nothing_shows_the_password(services, postgres):
    import psycopg2

    services.up("--database", postgres)
    commands = [" ".join(one.cmdline()) for one in services.family()]
    for database, table in (("prefect", "flow_run"), ("mlflow", "experiments")):
        with psycopg2.connect(f"{postgres}/{database}") as connection, connection.cursor() as cursor:
            cursor.execute("SELECT version_num FROM alembic_version")  # what migrations note
            assert len(cursor.fetchall()) == 1
            cursor.execute(f"SELECT count(*) FROM {table}")
        connection.close()
    assert services.api("work_pools/filter", {})[0]["name"] == "clado"
    assert "Stopped" in services.run("down", name="down")
    written = [path.read_text(errors="replace") for path in services.listing.parent.glob("*.*") if path.is_file()]
    assert [text for text in [*commands, *written, services.printed("up")] if "hunter2" in text] == []


@pytest.mark.parametrize("database", ["postgresql://clado:hunter2@127.0.0.1:9", "mysql://clado:hunter2@127.0.0.1:9", "nonsense"])
def test_a_database_that_cannot_be_used_is_one_message_and_nothing_is_started(tmp_path, database):
    pytest.importorskip("psycopg2", reason="pip install 'clado[servers]'")
    bench = Bench(tmp_path / "machine")
    words = [word for name, port in free_ports().items() for word in (f"--{name}-port", port)]
    process = bench.start("up", "--database", database, *words)
    assert process.wait(300) == 2
    assert "--database" in bench.printed()
    assert "hunter2" not in bench.printed()
    assert "Traceback" not in bench.printed()
    assert not (bench.folder / "runs").exists()
