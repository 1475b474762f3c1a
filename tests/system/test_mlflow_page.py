"""MLflow's own page of a finished run in a real browser: models, budgets and accuracies side by side."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from clado.tracking import delivery
from docs.screenshots import WIDTH, served, shoot, show_mlflow
from tests.synthetic import make_model, make_record
from tests.system.browser import browser

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def test_a_plain_mlflow_ui_has_the_runs_and_their_files(tmp_path: Path) -> None:
    records = [make_record(budgets=(2.5,), network=name) for name in ("one", "other")]
    receipts = [delivery.track(record, tmp_path / record.network, {}) for record in records]
    with served(tmp_path) as address:
        for record, receipt in zip(records, receipts, strict=True):
            artifact = f"{address}/get-artifact?run_uuid={receipt.parent_run_id}&path=record.json"
            with urllib.request.urlopen(artifact) as answer:
                assert json.load(answer)["network"] == record.network
    assert receipts[0].experiment_id == receipts[1].experiment_id


def test_the_page_of_a_run_shows_models_budgets_and_accuracies_side_by_side(tmp_path: Path) -> None:
    record = make_record(budgets=(2.5, 4.0))
    record.save(tmp_path / "record.json")
    models = {budget: make_model(tmp_path / "models" / budget) for budget in record.budgets}
    receipt = delivery.track(record, tmp_path, {}, models=models)
    assert receipt.delivered, receipt.problem
    assert receipt.experiment_id is not None
    assert receipt.parent_run_id is not None
    last = record.results[-1]
    with served(tmp_path) as address, browser(width=WIDTH, height=900) as opened:
        show_mlflow(opened.page, address, receipt.experiment_id, receipt.parent_run_id, f"{last.budget} {last.method}")
        shoot(opened.page, tmp_path / "mlflow.png")
        rows: dict[str, str] = {}  # the table draws a row in two halves, its name apart from its columns
        for cell in opened.page.locator("[row-id] [role=gridcell]").all():
            row = cell.evaluate("cell => cell.closest('[row-id]').getAttribute('row-id')")
            rows[row] = f"{rows.get(row, '')} {cell.inner_text()}"
        outside = [url for url in opened.requests if not url.startswith((address, "data:", "blob:"))]
    for result in record.results:
        [shown] = [text for text in rows.values() if f"{result.budget} {result.method}" in text]
        assert result.validation is not None
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", shown)]
        assert pytest.approx(result.validation.top1, abs=1e-6) in numbers, shown
        assert result.size_bytes in numbers, shown
        assert shown.count(result.budget) == 2, shown  # in its name and in its column
        assert ("zoo.resnet20_fashion_mnist" in shown) == (result.method == "chosen"), shown
    assert outside == []
    with Image.open(tmp_path / "mlflow.png") as picture:
        assert picture.width == WIDTH
