"""The artifacts of a flow run on Prefect's page: the table, and a link to the MLflow run."""

import logging
from pathlib import Path

from prefect import get_client
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.runtime import flow_run

from clado.records.results import Receipt
from clado.records.run_record import RunRecord
from clado.reporting import tables

log = logging.getLogger(__name__)
TABLE, MLFLOW = "clado-table", "clado-mlflow"  # keys of the artifacts


def show(record: RunRecord, receipt: Receipt) -> None:
    """Adds table, link and label to the present flow run, if there is one. If the server does not answer, a warning is logged."""
    if not flow_run.id:
        return
    try:
        create_markdown_artifact(tables.markdown(record), key=TABLE, description=f"{record.network}: assignments by budget")
        if receipt.parent_run_id is None:
            return
        create_link_artifact(
            address(receipt),
            link_text=f"MLflow run {receipt.parent_run_id}",
            key=MLFLOW,
            description=f"experiment {receipt.experiment}, run {receipt.parent_run_id}; "
            f"to open it: {tables.how_to_open(receipt)}",
        )
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {"mlflow_run_id": receipt.parent_run_id})
    except Exception as error:  # the results are in the folder: a failing page must not stop the run
        log.warning("Prefect does not show the results of this run (%s); they are in its folder", type(error).__name__)


def address(receipt: Receipt) -> str:
    """The run's page on a server, or else the SQLite file, which `mlflow ui` serves."""
    if receipt.uri.startswith(("http://", "https://")):
        return tables.how_to_open(receipt)
    return Path(receipt.uri.removeprefix("sqlite:///")).as_uri() if receipt.uri.startswith("sqlite:///") else receipt.uri
