"""The tracker mirrors the record exactly, never fails the science, leaves no run open and tells no secret (MLflow on SQLite)."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clado.records.results import Receipt, Result
from clado.records.run_record import RunRecord
from clado.reporting.tables import how_to_open
from clado.settings.redaction import redact
from clado.tracking.delivery import track
from clado.tracking.models import alias_of
from clado.tracking.stores import set_environment
from tests.synthetic import make_matrix, make_model, make_record, make_space

BUDGETS = (2.5, 4.0)
CONFIG = {
    "network": {"source": "zoo", "name": "resnet20_fashion_mnist", "weights": None},
    "data": {"sensitivity_images": 256, "seed": 0},
    "bits": [2, 4, 8],
    "tracking": {"experiment": "clado", "uri": "postgresql://me:hunter2@db.example/mlflow?sslpassword=hunter2"},
    **{f"extra_{k}": k for k in range(150)},
}


@dataclass(frozen=True)
class Files:
    """What a run leaves on disk for the tracker."""

    folder: Path
    matrices: dict[str, Path]
    plots: list[Path]
    exports: dict[str, Path]
    models: dict[str, Path]

    def arguments(self) -> dict[str, Any]:
        return {"matrices": self.matrices, "plots": self.plots, "exports": self.exports, "models": self.models}


def make_files(folder: Path, record: RunRecord) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    matrix, plot, exports = folder / "pairwise.npz", folder / "plots" / "loss.png", {}
    np.savez(matrix, values=make_matrix(make_space()).values)
    plot.parent.mkdir()
    plot.write_bytes(b"picture")
    for budget in record.budgets:
        exports[budget] = folder / "exports" / budget
        exports[budget].mkdir(parents=True)
        (exports[budget] / "weights.safetensors").write_bytes(budget.encode())
    models = {budget: make_model(folder / "models" / budget) for budget in record.budgets}
    record.save(folder / "record.json")
    return Files(folder, {"pairwise": matrix}, [plot], exports, models)


def runs_of(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(ids, max_results=5000))


@pytest.fixture(scope="module")
def record() -> RunRecord:
    record = make_record(budgets=BUDGETS)
    first, *others = record.results
    return replace(record, results=(replace(first, gap=float("inf")), *others))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: MLflow takes seconds to make one, and a copy takes none."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    assert runs_of(f"sqlite:///{path}") == []
    return path


@dataclass(frozen=True)
class Tracked:
    files: Files
    receipt: Receipt
    runs: list[Any]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, record: RunRecord) -> Tracked:
    files = make_files(tmp_path_factory.mktemp("a run") / "folder", replace(record, results=record.results[1:]))
    uri, tags = f"sqlite:///{files.folder}/mlflow.db", {"torch": "2.15.0"}
    receipt = track(record, files.folder, CONFIG, uri=uri, tags=tags, description="# A table", **files.arguments())
    return Tracked(files, receipt, runs_of(receipt.uri))


def children(tracked: Tracked) -> list[Any]:
    return [run for run in tracked.runs if run.data.tags.get("mlflow.parentRunId") == tracked.receipt.parent_run_id]


def artifacts(run: Any) -> Path:
    return place_of(run.info.artifact_uri)


def place_of(uri: str) -> Path:
    from urllib.parse import unquote, urlsplit

    return Path(unquote(urlsplit(uri).path))


def test_all_is_delivered_and_finished(tracked: Tracked, record: RunRecord) -> None:
    receipt = tracked.receipt
    assert receipt.delivered, receipt.problem
    assert receipt.num_children == len(record.results) == len(children(tracked)) == len(tracked.runs) - 1
    assert {run.info.status for run in tracked.runs} == {"FINISHED"}
    assert receipt.spool is None
    assert not (tracked.files.folder / "mlflow-undelivered.json").exists()
    assert how_to_open(receipt).startswith("MLFLOW_DISABLE_TELEMETRY=true ")
    command, address = how_to_open(receipt).splitlines()
    assert command.endswith(f"mlflow ui --backend-store-uri '{receipt.uri}'")
    assert address.endswith(f"/runs/{receipt.parent_run_id}?workflowType=machine_learning")
    assert receipt.uri == f"sqlite:///{tracked.files.folder}/mlflow.db"


def test_a_run_lasts_as_long_as_it_took_and_a_sweep_is_called_one(tracked: Tracked, record: RunRecord, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (parent,) = [run for run in tracked.runs if "mlflow.parentRunId" not in run.data.tags]
    seconds = (parent.info.end_time - parent.info.start_time) / 1000
    assert seconds == pytest.approx(sum(record.seconds.values()), abs=0.01)
    assert parent.info.run_name == record.network
    swept = replace(record, seconds={})
    swept.save(tmp_path / "record.json")
    receipt = track(swept, tmp_path, {}, uri=f"sqlite:///{tmp_path}/mlflow.db", tags={"sweep": "average_bits"})
    assert MlflowClient(receipt.uri).get_run(receipt.parent_run_id).info.run_name == f"{record.network}, sweep"


def test_parent_holds_network_settings_and_provenance(tracked: Tracked, record: RunRecord) -> None:
    [parent] = [run for run in tracked.runs if run.info.run_id == tracked.receipt.parent_run_id]
    params, tags, metrics = parent.data.params, parent.data.tags, parent.data.metrics
    assert params["network"] == "resnet20_fashion_mnist"
    assert params["data.sensitivity_images"] == "256"
    assert params["bits"] == "[2, 4, 8]"
    assert params["extra_149"] == "149"
    assert "network.weights" not in params
    assert tags["fingerprint"] == record.fingerprint
    assert tags["torch"] == "2.15.0"
    assert tags["mlflow.note.content"] == "# A table"
    assert metrics["float_top1"] == record.float_accuracy.top1
    assert metrics["float_bytes"] == record.float_bytes
    assert metrics["seconds/measuring"] == record.seconds["measuring"]
    assert metrics["forwards/pairwise"] == record.forwards["pairwise"]
    place = artifacts(parent)
    assert (place / "matrices" / "pairwise.npz").read_bytes() == tracked.files.matrices["pairwise"].read_bytes()
    assert (place / "plots" / "loss.png").read_bytes() == b"picture"
    assert json.loads((place / "config.json").read_text())["bits"] == [2, 4, 8]
    assert len(RunRecord.load(place / "record.json").results) == len(record.results)


def against(record: RunRecord, result: Result) -> dict[str, float]:
    """How the chosen answer of the budget compares with this one on the validation images."""
    row = record.comparison(result.budget, "chosen", result.method)
    return {
        f"chosen_minus_this/{name}{end}": getattr(getattr(row, name), which)
        for name in ("kl", "agreement", "top1")
        for end, which in (("", "mean"), ("_low", "low"), ("_high", "high"))
        if row is not None
    }


def test_children_hold_the_records_numbers(tracked: Tracked, record: RunRecord) -> None:
    runs = {(run.data.params["budget"], run.data.params["method"]): run for run in children(tracked)}
    assert len(runs) == len(record.results)
    for result in record.results:
        run = runs[result.budget, result.method]
        assert result.validation is not None
        expected = {
            "size_bytes": result.size_bytes,
            "average_bits": result.average_bits,
            "loss_deployed": result.loss_deployed,
            "brier_deployed": result.brier_deployed,
            "agreement_deployed": result.agreement_deployed,
            "loss_predicted": result.loss_predicted,
            "top1": result.validation.top1,
            "top1_low": (result.validation.top1_interval or (None, None))[0],
            "top1_high": (result.validation.top1_interval or (None, None))[1],
            "top5": result.validation.top5,
            "validation_loss": result.validation.loss,
            "validation_images": result.validation.num_images,
            **against(record, result),
            "solver_objective": result.objective,
            "solver_bound": result.bound,
            "solver_gap": result.gap if result.gap != float("inf") else None,
            "solver_seconds": result.seconds,
            "gain": result.gain,
        }
        assert run.data.metrics == {name: value for name, value in expected.items() if value is not None}
        assert run.data.tags.get("solver_status") == result.status
        assert run.data.tags.get("winner") == result.winner
        assert json.loads((artifacts(run) / "assignment.json").read_text()) == record.assignment_document(result)
        exported = artifacts(run) / "export" / "weights.safetensors"
        if result.method == "chosen":
            assert exported.read_bytes() == result.budget.encode()
        else:
            assert not exported.exists()


def test_the_parent_names_its_images_by_their_hashes_and_what_each_was_for(tracked: Tracked, record: RunRecord) -> None:
    [parent] = [run for run in tracked.runs if run.info.run_id == tracked.receipt.parent_run_id]
    datasets = {entry.tags[0].value: entry.dataset for entry in parent.inputs.dataset_inputs}
    assert {entry.tags[0].key for entry in parent.inputs.dataset_inputs} == {"mlflow.data.context"}
    assert set(datasets) == {"calibration", "sensitivity", "validation"}
    for context, dataset in datasets.items():
        whole = record.data[f"{context}_set"]
        assert dataset.name == f"{context}_set"
        assert whole["sha256"].startswith(dataset.digest)
        assert json.loads(dataset.profile) == whole
        assert json.loads(dataset.source) == {"tags": {"seed": "0"}}


def test_the_parent_has_a_curve_of_every_method_with_bytes_as_its_steps(tracked: Tracked, record: RunRecord) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.receipt.uri)
    for method in record.methods:
        rows = sorted((result for result in record.results if result.method == method), key=lambda result: result.size_bytes)
        for name, value_of in {"top1": lambda row: row.validation.top1, "loss_deployed": lambda row: row.loss_deployed}.items():
            points = client.get_metric_history(tracked.receipt.parent_run_id, f"{name} over bytes/{method}")
            expected = [(row.size_bytes, value_of(row)) for row in rows]
            assert sorted((point.step, point.value) for point in points) == sorted(expected)


def test_the_model_of_every_budget_is_logged_with_its_signature_pins_and_accuracy(tracked: Tracked, record: RunRecord) -> None:
    from mlflow import MlflowClient
    from mlflow.models import Model

    client = MlflowClient(tracked.receipt.uri)
    [parent] = [run for run in tracked.runs if run.info.run_id == tracked.receipt.parent_run_id]
    models = client.search_logged_models([tracked.receipt.experiment_id])
    assert {model.model_id for model in models} == {output.model_id for output in parent.outputs.model_outputs}
    assert {model.params["budget"] for model in models} == set(record.budgets)
    for model in models:
        budget = model.params["budget"]
        [child] = [
            run
            for run in children(tracked)
            if {**run.data.params, "corrected": ""} == {"budget": budget, "method": "chosen", "corrected": ""}
        ]
        assert model.source_run_id == child.info.run_id
        assert [output.model_id for output in child.outputs.model_outputs] == [model.model_id]
        assert str(model.status) == "READY"
        place = place_of(model.artifact_location)
        described = Model.load(str(place))
        assert described.signature.inputs.to_dict() == [
            {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": (-1, 1, 28, 28)}}
        ]
        assert described.signature.outputs.to_dict() == [
            {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": (-1, 10)}}
        ]
        assert {"clado==0.1.0", "torch==2.15.0"} < set((place / "requirements.txt").read_text().split())
        assert (place / "data" / budget / "packed.safetensors").read_bytes() == b"weights of " + budget.encode()
        row = record.find(budget, "chosen")
        assert row is not None
        assert row.validation is not None
        measured = {metric.key: metric for metric in model.metrics}
        assert measured["size_bytes"].value == row.size_bytes
        assert measured["top1"].value == row.validation.top1
        assert measured["top1"].dataset_name == "validation_set"
        assert record.data["validation_set"]["sha256"].startswith(measured["top1"].dataset_digest)


def aliases_of(uri: str) -> dict[str, Any]:
    """Alias -> the registered version that it names."""
    from mlflow import MlflowClient

    client, name = MlflowClient(uri), "zoo.resnet20_fashion_mnist"
    return {
        alias: client.get_model_version(name, version) for alias, version in client.get_registered_model(name).aliases.items()
    }


def test_every_budget_is_an_alias_of_the_registered_network_and_says_what_it_is(tracked: Tracked, record: RunRecord) -> None:
    versions = aliases_of(tracked.receipt.uri)
    for version in versions.values():
        row = record.find(version.tags["budget"], "chosen")
        assert f"{row.average_bits:.3f} bits a weight" in version.description
        assert f"→ {100 * row.validation.top1:.2f} % on 10,000 images" in version.description
    assert {alias: version.tags["budget"] for alias, version in versions.items()} == {"2_5_bits": "2.5 bits", "4_bits": "4 bits"}


def test_the_newest_run_owns_an_alias_however_late_an_older_one_is_delivered(tmp_path: Path, template: Path) -> None:
    shutil.copy(template, tmp_path / "shared.db")
    record = make_record(budgets=BUDGETS)
    uri, files = f"sqlite:///{tmp_path}/shared.db", make_files(tmp_path / "run", record)
    owners = []
    for day, budgets in (("02", ("2.5 bits", "4 bits")), ("03", ("4 bits",)), ("01", ("2.5 bits", "4 bits"))):
        small = replace(record, recorded=f"2026-01-{day}T00:00:00+00:00")
        small = replace(small, results=tuple(r for r in record.results if r.method == "chosen" and r.budget in budgets))
        models = {budget: files.models[budget] for budget in budgets}
        assert track(small, files.folder, {}, uri=uri, models=models).delivered
        owners.append({alias: version.tags["recorded"][8:10] for alias, version in aliases_of(uri).items()})
    assert owners == [{"2_5_bits": "02", "4_bits": "02"}, {"2_5_bits": "02", "4_bits": "03"}, {"2_5_bits": "02", "4_bits": "03"}]


@pytest.mark.parametrize(
    ("budget", "alias"),
    [("2.25 bits", "2_25_bits"), ("100 kB", "100_kB"), ("40 % of 8-bit", "40_of_8-bit"), ("1e+03 GBOP", "1e_03_GBOP")],
)
def test_an_alias_is_one_that_mlflow_takes(budget: str, alias: str) -> None:
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_alias_name

    assert alias_of(budget) == alias
    _validate_model_alias_name(alias)
    _validate_logged_model_name(alias)


def test_what_is_not_finite_becomes_a_tag(tracked: Tracked) -> None:
    [run] = [
        run for run in children(tracked) if run.data.params == {"budget": "2.5 bits", "method": "uniform", "corrected": "all"}
    ]
    assert run.data.tags["solver_gap"] == "inf"


def test_no_secret_is_stored(tracked: Tracked) -> None:
    files = [path for path in tracked.files.folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "config.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


def test_the_same_record_again_is_a_second_parent(record: RunRecord, tmp_path: Path, template: Path) -> None:
    shutil.copy(template, tmp_path / "shared.db")
    small = replace(record, results=record.results[:1])
    uri = f"sqlite:///{tmp_path}/shared.db"
    first, second = track(small, tmp_path / "run", {}, uri=uri), track(small, tmp_path / "run", {}, uri=uri)
    assert first.delivered
    assert second.delivered
    assert first.parent_run_id != second.parent_run_id
    assert len(runs_of(uri)) == 4
    assert (tmp_path / "mlruns").is_dir()


def test_a_database_that_was_copied_takes_new_runs_and_the_old_place_is_left_alone(
    record: RunRecord, tmp_path: Path, template: Path
) -> None:
    small, files = replace(record, results=record.results[:1]), make_files(tmp_path / "run", record)
    for name in ("an old one", "new%20one"):
        (tmp_path / name).mkdir()
    shutil.copy(template, tmp_path / "an old one")
    assert track(small, files.folder, {}, plots=files.plots, uri="sqlite:///an old one/mlflow.db").delivered
    shutil.copy(tmp_path / "an old one" / "mlflow.db", tmp_path / "new%20one")
    left = {path: path.read_bytes() for path in (tmp_path / "an old one").rglob("*") if path.is_file()}
    receipt = track(small, files.folder, {}, plots=files.plots, uri="sqlite:///new%20one/mlflow.db")
    assert receipt.delivered, receipt.problem
    runs = runs_of(receipt.uri)
    new = [run for run in runs if run.info.experiment_id == receipt.experiment_id]
    assert (len(runs), len(new)) == (4, 2)
    assert all(artifacts(run).is_relative_to(tmp_path / "new%20one") for run in new)
    assert left == {path: path.read_bytes() for path in (tmp_path / "an old one").rglob("*") if path.is_file()}


ONE_OF_TWO = """
import sys, time, mlflow
from pathlib import Path
from clado.records.run_record import RunRecord
from clado.tracking.delivery import track
record = RunRecord.load(Path("record.json"))
Path(sys.argv[1]).mkdir()
while not Path("go").exists():
    time.sleep(0.001)
sys.exit(track(record, Path(sys.argv[1]), {}).problem)
"""


def test_two_runs_that_start_at_once_on_a_new_database_are_both_in_it(tmp_path: Path) -> None:
    record = make_record(budgets=(2.5,))
    record.save(tmp_path / "record.json")
    both = [subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, name]) for name in ("one", "two")]
    while not all((tmp_path / name).exists() for name in ("one", "two")):
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait() for process in both] == [0, 0]
    runs = runs_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert Counter(run.info.status for run in runs) == {"FINISHED": 2 * (1 + len(record.results))}
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "one", "two", "go", "mlflow.db", "mlruns"}


@pytest.mark.parametrize("place", ["parent", "child"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_fault_in_the_middle_leaves_no_run_open(
    place: str, kind: type[BaseException], tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from mlflow import MlflowClient

    record = make_record(budgets=BUDGETS)
    files = make_files(tmp_path / "run", record)
    shutil.copy(template, tmp_path)
    calls = []

    def failing(self: Any, *arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if place == "parent" or len(calls) == 3:
            raise kind("lost http://me:hunter2@host/")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts" if place == "parent" else "log_dict", failing)
        if kind is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                track(record, files.folder, CONFIG, **files.arguments())
        else:
            receipt = track(record, files.folder, CONFIG, **files.arguments())
            assert not receipt.delivered
            assert receipt.problem == "RuntimeError: lost http://***@host/"
            assert receipt.num_children == (0 if place == "parent" else 2)
            assert "did not take the whole record" in caplog.text
            assert "hunter2" not in caplog.text
            assert receipt.spool == files.folder / "mlflow-undelivered.json"
            note = json.loads(receipt.spool.read_text())
            expected = [f"run of {result.budget} {result.method}" for result in record.results]
            assert [name for name in note["undelivered"] if name.startswith("run of")] == expected[receipt.num_children :]
            assert "export of 4 bits" in note["undelivered"]
            assert ("parent run" in note["undelivered"]) == (place == "parent")
    statuses = sorted(run.info.status for run in runs_of(f"sqlite:///{tmp_path}/mlflow.db"))
    assert statuses == (["FAILED"] if place == "parent" else ["FAILED", "FAILED", "FINISHED", "FINISHED"])
    if kind is RuntimeError:
        assert track(record, files.folder, CONFIG, **files.arguments()).delivered
        assert not (files.folder / "mlflow-undelivered.json").exists()


def test_runs_that_a_dead_server_left_open_are_ended_and_replaced_next_time(
    record: RunRecord, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    shutil.copy(template, tmp_path)

    def gone(self: Any, *arguments: Any, **named: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_dict", gone)
        patch.setattr(MlflowClient, "set_terminated", gone)
        receipt = track(record, tmp_path, {})
    assert receipt.spool is not None
    assert [run.info.status for run in runs_of(receipt.uri)] == ["RUNNING"] * 2
    assert track(replace(record, results=record.results[:1]), tmp_path, {}).delivered
    assert [run.info.status for run in runs_of(receipt.uri)] == ["FINISHED"] * 2
    deleted = MlflowClient(receipt.uri).search_runs([receipt.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert [run.info.status for run in deleted] == ["FAILED"] * 2


def test_files_that_are_not_there_are_named_and_the_rest_is_delivered(record: RunRecord, tmp_path: Path, template: Path) -> None:
    shutil.copy(template, tmp_path)
    small = replace(record, results=record.results[-1:])
    receipt = track(
        small, tmp_path, {}, plots=[tmp_path / "gone.png"], matrices={"pairwise": tmp_path / "gone.npz"},
        exports={"4 bits": tmp_path / "gone", "9 bits": tmp_path}, models={"4 bits": tmp_path / "gone"},
    )  # fmt: skip
    assert receipt.num_children == 1
    assert (
        receipt.problem == "not found: matrices/pairwise.npz, plots/gone.png, export of 4 bits, export of 9 bits, model of 4 bits"
    )
    assert receipt.spool is not None
    assert {run.info.status for run in runs_of(receipt.uri)} == {"FINISHED"}


@pytest.mark.parametrize(
    "uri", ["http://me:hunter2@127.0.0.1:9", "postgresql://me:hunter2@127.0.0.1:9/mlflow", "nonsense://me:hunter2@127.0.0.1"]
)
def test_a_dead_tracker_warns_and_spools(uri: str, record: RunRecord, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        receipt = track(record, tmp_path, CONFIG, uri=uri)
    assert not receipt.delivered
    assert receipt.parent_run_id is None
    assert receipt.seconds < 60
    assert [entry.levelname for entry in caplog.records if entry.name == "clado.tracking.delivery"] == ["WARNING"]
    assert receipt.spool is not None
    note = json.loads(receipt.spool.read_text())
    assert note["undelivered"] == ["parent run", *[f"run of {result.budget} {result.method}" for result in record.results]]
    for text in (caplog.text, receipt.spool.read_text(), repr(receipt), how_to_open(receipt)):
        assert "hunter2" not in text
        assert "127.0.0.1" in text


def test_a_folder_that_takes_no_note_is_no_fault_of_the_science(record: RunRecord, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    receipt = track(record, tmp_path / "file" / "run", CONFIG, uri="nonsense://host")
    assert not receipt.delivered
    assert receipt.spool is None
    assert "could not be written either" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host:5000/a", "https://***@host:5000/a"),
        ("https://secret@host/", "https://***@host/"),
        ("postgresql+psycopg2://me:se@cr/et@host/db", "postgresql+psycopg2://***@host/db"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("https://host/?x=1&api_key=secret", "https://host/?x=1&api_key=***"),
        ("no route to http://me:secret@host (and http://you:secret@there)", "no route to http://***@host (and http://***@there)"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_a_servers_run_is_opened_by_its_address() -> None:
    receipt = Receipt("http://127.0.0.1:5000/", "clado", "3", "abc", 1, True, 0.0)
    assert how_to_open(receipt) == "http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"


def test_a_database_in_the_working_folder_is_opened_without_an_address(tmp_path: Path) -> None:
    receipt = Receipt(f"sqlite:///{tmp_path}/mlflow.db", "clado", "1", "abc", 1, True, 0.0)
    command, address = how_to_open(receipt).splitlines()
    assert command.endswith("mlflow ui")
    assert address.split() == ["then", "http://localhost:5000/#/experiments/1/runs/abc?workflowType=machine_learning"]


def test_telemetry_is_off_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    set_environment()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = (
        "import sys, clado.tracking.delivery, clado.reporting.tables; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_names_the_tracker_where_settings_do_not(tmp_path, record, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'mlflow.db'}")
    for uri in (None, "https://***@host/"):  # the second is what a folder keeps of one with a password
        receipt = track(record, tmp_path, {}, uri=uri)
        assert receipt.delivered, receipt.problem
        assert receipt.uri == f"sqlite:///{elsewhere / 'mlflow.db'}"
    assert not (tmp_path / "mlflow.db").exists()


def test_credentials_that_were_not_kept_are_asked_for(tmp_path, record, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    receipt = track(record, tmp_path, {}, uri="https://***@host/")
    assert receipt.delivered
    assert receipt.uri.endswith("mlflow.db")
    assert "MLFLOW_TRACKING_URI" in caplog.text
