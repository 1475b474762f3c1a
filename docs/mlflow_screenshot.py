"""Draws docs/mlflow.png: the MLflow page of a finished run, its models, budgets and accuracies side by side, in Chromium.

python -m docs.mlflow_screenshot RUN
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

from clado.settings.loading import load_run_config
from clado.settings.tracking import database_of
from clado.tracking import stores
from tests.system.browser import browser

PATIENCE = 420  # seconds until the server has to answer
WIDTH, HEIGHT = 1240, 800
COLUMNS = (
    "attributes.`Models`", "params.`budget`", "params.`method`", "metrics.`top1`", "metrics.`top1_subset`",
    "metrics.`size_bytes`",
)  # fmt: skip


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a plain `mlflow ui` in a folder, on loopback; it ends with the block."""
    stores.set_environment()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("mlflow"), "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{address}/health", server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"MLflow's server did not answer within {PATIENCE} s (exit code {server.poll()})")


def show(page: Page, address: str, experiment_id: str, parent_id: str, last: str, model: str = "zoo.") -> None:
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


def main(folder: Path) -> None:
    """The picture of the newest run in the database that a run's folder names."""
    stores.set_environment()
    from mlflow import MlflowClient

    uri = load_run_config(folder).tracking.uri
    database = database_of(uri)
    assert database is not None, f"{uri} is no SQLite file"
    client = MlflowClient(uri)
    [experiment] = [item for item in client.search_experiments() if item.name == "clado"]
    parent = client.search_runs([experiment.experiment_id], "tags.mlflow.source.name = 'clado run'", max_results=1)[0]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'", max_results=1)
    query = f"tags.mlflow.parentRunId = '{parent.info.run_id}' and params.method = 'chosen'"
    chosen = client.search_runs([experiment.experiment_id], query, max_results=1)
    with served(database.parent) as address, browser(width=WIDTH, height=HEIGHT) as opened:
        model = client.search_model_versions(f"run_id = '{chosen[0].info.run_id}'")[0].name
        show(opened.page, address, experiment.experiment_id, parent.info.run_id, children[0].info.run_name, model)
        opened.page.wait_for_timeout(1000)  # for the sidebar to fold
        opened.page.screenshot(path=Path(__file__).with_name("mlflow.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
