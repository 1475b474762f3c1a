"""Draws pages of a finished run in Chromium: docs/report.png, docs/mlflow.png, docs/prefect.png.

python -m docs.screenshots RUN

The system tests show the same pages. Prefect's and MLflow's are served from their SQLite files.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Page

from clado.records.text import REPORT
from clado.settings.loading import load_run_config
from clado.settings.tracking import database_of
from clado.tracking import stores
from clado.tracking.notes import last_receipt
from flows.environment import set_defaults
from tests.system.browser import browser

PATIENCE = 420  # seconds until the server has to answer
WIDTH, HEIGHT = 1240, 800
COLUMNS = (
    "attributes.`Models`", "params.`budget`", "params.`method`", "metrics.`top1`", "metrics.`top1_subset`",
    "metrics.`size_bytes`",
)  # fmt: skip


def served(folder: Path) -> AbstractContextManager[str]:
    """The address of a plain `mlflow ui` in a folder, on loopback; it ends with the block."""
    stores.set_environment()
    port = _free_port()
    command = ("mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    return _server(command, folder, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, f"http://127.0.0.1:{port}", "/health")


def prefect_served(home: Path) -> AbstractContextManager[str]:
    """The address of a Prefect server with the database of a folder, on loopback; it ends with the block."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    return _server(command, home, environment, address, "/api/health")


@contextmanager
def _server(command: Sequence[str], folder: Path, environment: Mapping[str, str], address: str, health: str) -> Iterator[str]:
    server = subprocess.Popen(
        [Path(sys.executable).with_name(command[0]), *command[1:]],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(f"{address}{health}", server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server did not answer within {PATIENCE} s (exit code {server.poll()})")


def show_mlflow(page: Page, address: str, experiment_id: str, parent_id: str, last: str, model: str = "zoo.") -> None:
    """Opens the list of a run's nested runs, with columns of `COLUMNS`.

    `last` is the name of a run to wait for, and `model` a part of the name of its models.
    """
    state = {
        "selectedColumns": COLUMNS,
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "runsExpanded": {parent_id: True},
    }
    stored = {
        f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment_id}"]-ReactComponentState': state,
        "mlflow.workflowType_v1": "machine_learning",
        "mlflow.assistant.panelOpen_v1": False,
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    }
    for key, value in stored.items():
        page.add_init_script(f"localStorage.setItem({json.dumps(key)}, {json.dumps(json.dumps(value))})")
    page.goto(f"{address}/#/experiments/{experiment_id}/runs")
    page.get_by_text(last, exact=True).first.wait_for(timeout=PATIENCE * 1000)
    page.get_by_label("Toggle sidebar").click()
    page.get_by_text(model, exact=False).first.wait_for(timeout=PATIENCE * 1000)  # the models come with a request of their own


def show_report(page: Page, report: Path) -> None:
    """Opens the report of a run."""
    page.goto(report.resolve().as_uri())
    page.get_by_text("recommended", exact=False).first.wait_for(timeout=PATIENCE * 1000)


def show_flow_run(page: Page, address: str, flow_run: Mapping[str, Any]) -> None:
    """Opens Prefect's page of a flow run, as its API describes it."""
    page.goto(f"{address}/runs/flow-run/{flow_run['id']}")
    page.get_by_text(flow_run["name"], exact=True).first.wait_for(timeout=PATIENCE * 1000)


def shoot(page: Page, file: Path) -> None:
    """Writes what a page shows."""
    page.wait_for_timeout(1500)  # for what folds, fades and is drawn
    page.screenshot(path=file)


def shoot_report(folder: Path, file: Path) -> None:
    """The picture of a run's report."""
    with browser(width=WIDTH, height=HEIGHT) as opened:
        show_report(opened.page, folder / REPORT)
        shoot(opened.page, file)


def shoot_mlflow(folder: Path, file: Path) -> None:
    """The picture of a run in the MLflow database that its folder names."""
    client, parent = _tracked(folder)
    experiment_id, parent_id = parent.info.experiment_id, parent.info.run_id
    children = client.search_runs([experiment_id], f"tags.mlflow.parentRunId = '{parent_id}'")
    chosen = next(run for run in children if run.data.params["method"] == "chosen")
    model = client.search_model_versions(f"run_id = '{chosen.info.run_id}'")[0].name
    database = database_of(load_run_config(folder).tracking.uri)
    assert database is not None
    with served(database.parent) as address, browser(width=WIDTH, height=HEIGHT) as opened:
        show_mlflow(opened.page, address, experiment_id, parent_id, children[0].info.run_name, model)
        shoot(opened.page, file)


def shoot_prefect(folder: Path, file: Path) -> None:
    """The picture of a run's flow run in a copy of the database that Prefect kept it in."""
    _, parent = _tracked(folder)
    set_defaults(folder.parent)
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    with TemporaryDirectory() as name:
        with sqlite3.connect(home / "prefect.db") as source, sqlite3.connect(Path(name) / "prefect.db") as copy:
            source.backup(copy)
        with prefect_served(Path(name)) as address, browser(width=WIDTH, height=HEIGHT) as opened:
            flow_run_id = parent.data.tags["prefect_flow_run_id"]
            with urllib.request.urlopen(f"{address}/api/flow_runs/{flow_run_id}") as answer:
                flow_run = json.load(answer)
            show_flow_run(opened.page, address, flow_run)
            shoot(opened.page, file)


def _tracked(folder: Path) -> tuple[Any, Any]:
    """(client, MLflow's run) of a run's folder."""
    stores.set_environment()
    from mlflow import MlflowClient

    client, receipt = MlflowClient(load_run_config(folder).tracking.uri), last_receipt(folder)
    assert receipt is not None
    return client, client.get_run(receipt.parent_run_id)


def main(folder: Path) -> None:
    """Draws the three pages of a run."""
    docs = Path(__file__).parent
    shoot_report(folder, docs / "report.png")
    shoot_mlflow(folder, docs / "mlflow.png")
    shoot_prefect(folder, docs / "prefect.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
