"""A run with a network, data, a loss and a user-defined metric: what it measures, and who calls the metric by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import clado
from clado.data.images import DataSlices
from clado.data.sources import load_data
from clado.errors import CladoError, ConfigurationError, DataError
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.run.checks import check
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.settings.schema import DataSettings
from flows.cli import app
from tests import tolerance
from tests.api.test_own_functions import Keypoints, distance, visibility
from tests.running import Finished, config, copy_of, run_pipeline

HERE = "tests.flows.test_own_functions"
SHAPE = (1, 8, 8)


def network() -> tuple[nn.Module, Tensor]:
    """A network of two outputs."""
    torch.manual_seed(0)
    return Keypoints().eval(), torch.zeros(2, *SHAPE)


def keypoints(count: int = 140, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and targets (N, 2) that the float network tells right at most places."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *SHAPE, generator=random)
    with torch.no_grad():
        logits = network()[0](x)["visible"]
    noise = 0.02 * torch.randn(count, 2, generator=random)
    return x, (logits + noise > 0).float()


def separate() -> dict[str, Any]:
    """Training images, and validation images of their own."""
    return {"train": keypoints(), "val": keypoints(40, seed=4)}


def wrong_keys() -> dict[str, Any]:
    return {"training": keypoints()}


def broken() -> None:
    raise RuntimeError("the disk is full")


def failing(outputs: Any, targets: Any) -> Tensor:
    return outputs["masks"]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {
        "network": {"source": "factory", "name": f"{HERE}:network"},
        "data": {
            "source": "factory",
            "factory": f"{HERE}:keypoints",
            "sensitivity_images": 32,
            "sample_blocks": 2,
            "calibration_images": 32,
            "validation_images": 40,
        },
        "bits": [2, 4, 8],
        "criterion": "tests.api.test_own_functions:distance",
        "metric": "tests.api.test_own_functions:visibility",
        "estimators": ["layerwise", "pairwise"],
        "corrections": ["output_statistics"],
        "search": {"evaluations": 2},
    }
    return config(folder, **(own | changes))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    document = settings(tmp_path_factory.mktemp("own") / "run")
    calls, receipt = run_pipeline(document)
    return Finished(Path(document["folder"]), document, calls, receipt)


@pytest.fixture(scope="module")
def record(own: Finished) -> RunRecord:
    return RunRecord.load(own.folder / "record.json")


def test_losses_and_metrics_are_those_of_the_deployed_modules(own, record):
    run, finished = open_run(parse_config(own.document)), clado.Run(own.folder)
    assert record.criterion == "tests.api.test_own_functions:distance"
    for budget in record.budgets:
        row = record.find(budget, CHOSEN)
        module = finished.network(budget)
        for images, recorded in ((run.decision, row.loss_deployed), (run.slices.validation, row.validation.loss)):
            x, y = images.load(0, len(images))
            with torch.no_grad():
                expected = float(distance(module(x), run.float_network.model(x), y).mean())
            assert recorded == pytest.approx(expected, abs=8 * tolerance.LOSS)
        with torch.no_grad():
            assert row.validation.metric == pytest.approx(float(visibility(module(x), y).mean()))
        assert (row.validation.top1, row.brier_deployed, row.agreement_deployed) == (None, None, None)
        fitting = [other for other in record.measured_proposals if other.size_bytes <= row.size_bytes]
        assert row.loss_deployed == min(other.loss_deployed for other in fitting)  # the loss alone decides


def test_record_table_report_and_mlflow_call_the_metric_by_its_name(own, record):
    from mlflow import MlflowClient

    assert record.float_accuracy.metric_name == record.metric_name == "visibility"
    assert "float visibility" in record.summary()
    assert all("visibility" in row for row in record.rows())
    chosen = record.find(record.budgets[0], CHOSEN)
    table = (own.folder / "table.md").read_text()
    assert f"visibility {record.float_accuracy.metric:.4g} on 40 images" in table
    lines = [[cell.strip("| *") for cell in line.split(" | ")] for line in table.splitlines()]
    (cells,) = [line for line in lines if line[:2] == [record.budgets[0], "visibility"]]
    assert cells[2 + record.methods.index(CHOSEN)] == f"{chosen.validation.metric:.4g}"
    assert "top-1 %" not in table
    report = (own.folder / "report.html").read_text()
    assert "visibility on 40 validation images, higher is better" in report
    assert f"visibility {chosen.validation.metric:.4g}" in report
    assert (own.folder / "plots" / "metric_against_size.png").is_file()
    client = MlflowClient(own.document["tracking"]["uri"])
    parent = client.get_run(own.receipt.parent_run_id)
    assert parent.data.metrics["float_visibility"] == record.float_accuracy.metric
    children = client.search_runs([own.receipt.experiment_id], f"tags.mlflow.parentRunId = '{own.receipt.parent_run_id}'")
    metrics = {(run.data.params["budget"], run.data.params["method"]): run.data.metrics for run in children}
    for row in record.results:
        assert metrics[row.budget, row.method]["visibility"] == row.validation.metric
        assert "top1" not in metrics[row.budget, row.method]


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output


def test_smallest_bounds_the_drop_of_the_metric(own, tmp_path):
    copy_of(own, tmp_path / "copy")
    text = call("smallest", tmp_path / "copy", "--max-metric-drop", 0.5)
    assert "visibility drop" in text
    assert "| answer" in text
    assert "loss increase" in call("smallest", tmp_path / "copy", "--max-loss-increase", 10)
    assert "a bound on top-1 needs logits" in call("smallest", tmp_path / "copy", "--max-top1-drop", 1)
    assert "visibility" in call("evaluate", tmp_path / "copy")


def test_a_run_without_a_metric_has_none_to_bound(finished, tmp_path):
    copy_of(finished, tmp_path / "copy")
    assert "the run has no metric; expected metric: package.module:name" in call(
        "smallest", tmp_path / "copy", "--max-metric-drop", 0.5
    )


def opened(folder: Path, **changes: Any) -> OpenedRun:
    return open_run(parse_config(settings(folder / "run", **changes)))


def test_another_metric_is_counted_anew_and_nothing_else(own):
    run = open_run(parse_config(own.document))
    other = open_run(parse_config(own.document | {"metric": f"{HERE}:failing"}))
    assert run.evaluation.cache("decision").identity == other.evaluation.cache("decision").identity
    assert run.evaluation.cache("validation").identity != other.evaluation.cache("validation").identity
    assert run.identity.document == other.identity.document


REFUSED: dict[str, tuple[dict[str, Any], type[CladoError], str]] = {
    "curvature": ({"estimators": ["gauss_newton"]}, ConfigurationError, "gauss_newton needs the curvature"),
    "classes": ({"criterion": "mse_to_float", "estimators": ["mpqco"]}, ConfigurationError, "mpqco needs logits"),
    "a metric that fails": ({"metric": f"{HERE}:failing"}, ConfigurationError, "metric failing failed: KeyError: 'masks'"),
    "a metric that is not there": ({"metric": f"{HERE}:iou"}, ConfigurationError, "has no name 'iou'"),
    "a metric that is none": ({"metric": f"{HERE}:SHAPE"}, ConfigurationError, "cannot be called"),
    "a criterion that fails": ({"criterion": f"{HERE}:failing"}, ConfigurationError, "criterion .*failing failed: TypeError"),
    "kl of two outputs": ({"criterion": "kl_to_float"}, ConfigurationError, "kl_to_float needs one tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_functions_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, case):
    changes, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        check(opened(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def slices(name: str, **sizes: Any) -> DataSlices:
    counts = {"sensitivity_images": 32, "calibration_images": 16, "sample_blocks": 2, **sizes}
    return load_data(DataSettings(source="factory", factory=f"{HERE}:{name}", **counts), SHAPE)


def test_a_factorys_slices_are_disjoint_parts_of_its_images_with_their_targets():
    x, y = keypoints()
    parts = slices("keypoints", validation_images=40)
    drawn = []
    for part, count in ((parts.calibration, 16), (parts.sensitivity, 32), (parts.validation, 40), (parts.selection, 52)):
        images, targets = part.load(0, len(part))
        assert len(images) == count
        for image, target in zip(images, targets, strict=True):
            (k,) = (x == image).flatten(1).all(1).nonzero()[0].tolist()
            assert torch.equal(target, y[k])
            drawn.append(k)
    assert sorted(drawn) == list(range(140))


def test_a_larger_sensitivity_set_of_a_factory_holds_the_smaller_one():
    small, large = (slices("keypoints", sensitivity_images=count).sensitivity for count in (20, 32))
    assert torch.equal(large.load(0, 20)[0], small.load(0, 20)[0])


def test_validation_images_of_their_own_are_the_validation_set():
    x, _ = separate()["val"]
    assert torch.equal(slices("separate").validation.load(0, 40)[0], x)
    few = slices("separate", validation_images=10).validation.load(0, 10)[0]
    assert all(bool((x == image).flatten(1).all(1).any()) for image in few)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("keypoints", {"sensitivity_images": 130}, "gives 140 images; 147 are needed: 130 for sensitivity, 16 for calibration"),
        ("separate", {"validation_images": 41}, "asks for 41 images; .* gives 40"),
        ("wrong_keys", {}, "returned the keys training; expected train, or train and val"),
        ("broken", {}, "raised RuntimeError: the disk is full"),
        ("SHAPE", {}, "has no function 'SHAPE'; it is a tuple"),
        ("absent", {}, "has no function 'absent'"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(name, sizes, words):
    with pytest.raises(DataError, match=words):
        slices(name, **sizes)


def test_the_evaluations_of_a_run_keep_the_metric_of_each_image(own, record):
    files = list((own.folder / "evaluations" / "validation").rglob("*.json"))
    assert files
    for file in files:
        counts = json.loads(file.read_text())["counts"]
        assert len(counts["metric"]) == 40
        assert counts["metric_name"] == "visibility"
