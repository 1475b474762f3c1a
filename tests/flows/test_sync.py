"""If MLflow does not take something, it stays in the run's folder and is delivered once later. Failed runs are marked so."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from clado.errors import MeasurementError
from clado.records.results import Receipt
from clado.records.run_record import RunRecord
from clado.settings.loading import load_run_config, parse_config
from clado.tracking import delivery
from clado.tracking.content import RecordContent
from clado.tracking.single_runs import FailureContent
from flows import clusters
from flows.cli import app
from flows.guard import locked
from flows.phases import deliver
from tests.running import config, run_pipeline
from tests.synthetic import make_model, make_record

CHILDREN = len(make_record(budgets=(2.5, 4.0)).results)
BUDGETS = ("2.5_bits", "4_bits")
NOTE = "mlflow-undelivered.json"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: MLflow takes seconds to make one, and a copy takes none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def unsent(tmp_path, template) -> dict[str, Any]:
    """The configuration of a finished run whose tracker, a database next to its folder, is empty."""
    folder = tmp_path / "run"
    document = config(folder, tracking={"uri": f"sqlite:///{tmp_path}/tracker.db"})
    make_record(budgets=(2.5, 4.0)).save(folder / "record.json")
    (folder / "config.yaml").write_text(parse_config(document).to_yaml())
    for name in ("matrices/pairwise.npz", "plots/loss.png", "exports/2.5_bits/weights", "exports/4_bits/weights"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for budget in BUDGETS:
        make_model(folder / "models" / budget)
    shutil.copy(template, tmp_path / "tracker.db")
    return document


def run_of(document: dict[str, Any]) -> Any:
    """A run of the flow that is about to be delivered."""
    folder, loaded = Path(document["folder"]), SimpleNamespace(description="a network", weights_sha256="0" * 64)
    identity = SimpleNamespace(provenance={"torch": "2"})
    config = parse_config({**document, "estimators": ["pairwise"]})
    return SimpleNamespace(config=config, folder=folder, identity=identity, loaded=loaded)


def track(document: dict[str, Any]) -> Receipt:
    """The flow's last phase."""
    run = run_of(document)
    with deliver.failure_recorded(run):
        return deliver.deliver(run, RunRecord.load(run.folder / "record.json"))


def sync(folder: Path, *options: str, ends: int = 0) -> str:
    result = CliRunner().invoke(app, ["sync", str(folder), *options])
    assert "Traceback" not in result.output
    assert result.exit_code == ends, (result.output, result.exception)
    return result.output


def runs_of(document: dict[str, Any]) -> list[Any]:
    """Every MLflow run that is not deleted."""
    from mlflow import MlflowClient

    client = MlflowClient(document["tracking"]["uri"])
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(ids, max_results=500))


def check_delivered(document: dict[str, Any]) -> None:
    """The tracker has the run whole and once, and nothing is open."""
    folder = Path(document["folder"])
    expected = RunRecord.load(folder / "record.json")
    runs = runs_of(document)
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert {"torch", "mlflow", "weights_sha256", "fingerprint"} <= parents[0].data.tags.keys()
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert Counter((run.data.params["budget"], run.data.params["method"]) for run in children) == Counter(
        (result.budget, result.method) for result in expected.results
    )
    place = Path(parents[0].info.artifact_uri.removeprefix("file://"))
    for name in ("matrices/pairwise.npz", *(f"plots/{path.name}" for path in (folder / "plots").glob("*.png"))):
        assert (place / name).read_bytes() == (folder / name).read_bytes()
    for child in children:
        exported = Path(child.info.artifact_uri.removeprefix("file://")) / "export"
        assert exported.is_dir() == (child.data.params["method"] == "chosen")
    check_registered(document, parents[0])
    assert not (folder / NOTE).exists()


def check_registered(document: dict[str, Any], parent: Any) -> None:
    """Each budget's model is logged once, is one registered version, and that has the budget's alias."""
    from mlflow import MlflowClient

    client = MlflowClient(document["tracking"]["uri"])
    models = client.search_logged_models([parent.info.experiment_id])
    assert len(models) == len(BUDGETS)
    assert {model.model_id for model in models} == {output.model_id for output in parent.outputs.model_outputs}
    versions = client.search_model_versions()
    assert Counter(version.source for version in versions) == Counter(model.artifact_location for model in models)
    budgets = {version.version: version.tags["budget"] for version in versions}
    aliases = client.get_registered_model(versions[0].name).aliases
    assert {alias: budgets[number] for alias, number in aliases.items()} == {"2_5_bits": "2.5 bits", "4_bits": "4 bits"}


def test_a_failure_does_not_take_the_place_of_a_finished_run_that_was_not_delivered(unsent, monkeypatch):
    folder = Path(unsent["folder"])
    with monkeypatch.context() as patch:
        patch.setattr(RecordContent, "send", gone)
        assert not track(unsent).delivered
    with pytest.raises(MeasurementError), deliver.failure_recorded(run_of(unsent)):
        raise MeasurementError("a later run fails")
    assert (folder / NOTE).exists()
    assert "1 new" not in sync(folder)
    statuses = Counter(run.info.status for run in runs_of(unsent))
    assert statuses == {"FAILED": 1, "FINISHED": 1 + CHILDREN}
    assert "Nothing to deliver" in sync(folder)


def test_a_failure_that_was_not_delivered_goes_with_the_run_that_came_to_its_end(unsent, monkeypatch):
    folder = Path(unsent["folder"])
    with monkeypatch.context() as patch:
        patch.setattr(FailureContent, "send", gone)
        with pytest.raises(MeasurementError), deliver.failure_recorded(run_of(unsent)):
            raise MeasurementError("a run fails")
        assert (folder / "mlflow-undelivered-failure.json").exists()
        patch.setattr(RecordContent, "send", gone)
        assert not track(unsent).delivered  # and takes its traceback away
    assert [path.name for path in folder.glob("mlflow-undelivered*")] == [NOTE]
    sync(folder)
    check_delivered(unsent)
    assert "Nothing to deliver" in sync(folder)


@pytest.mark.parametrize("command", [["evaluate", "--budget", "3"], ["sweep"], ["finetune", "--budget", "3"]])
def test_what_writes_into_a_runs_folder_waits_for_nobody_and_disturbs_nobody(command, finished):
    with locked(finished.folder):
        result = CliRunner().invoke(app, [command[0], str(finished.folder), *command[1:]])
    assert result.exit_code == 2
    assert "another run is writing" in " ".join(result.output.split())


def gone(*arguments: Any, **named: Any) -> None:
    raise ConnectionError("no answer from http://me:hunter2@host/")


class Outage:
    """A tracker that goes at a call and stays away: what was begun stays open there."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, number: int) -> None:
        from mlflow import MlflowClient

        self.left, whole = number, getattr(MlflowClient, name)

        def failing(client: Any, *arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return whole(client, *arguments, **named)
            for other in (
                "create_run",
                "log_batch",
                "log_artifacts",
                "log_dict",
                "set_terminated",
                "search_runs",
                "create_model_version",
            ):
                patch.setattr(MlflowClient, other, gone)
            return gone()

        patch.setattr(MlflowClient, name, failing)


@pytest.mark.parametrize(
    ("name", "number", "left_behind"),
    [
        ("create_run", 0, 0),
        ("log_artifacts", 0, 1),
        ("log_dict", 4, 6),
        ("log_model_artifacts", 1, CHILDREN + 1),
        ("set_terminated", CHILDREN, CHILDREN + 1),
        ("create_model_version", 1, CHILDREN + 1),
    ],
    ids=[
        "down at the start",
        "down at the parent's files",
        "down in the middle",
        "down at a model",
        "down at the end",
        "down at the registry",
    ],
)
def test_a_tracker_that_goes_costs_nothing_and_a_sync_delivers_all_of_it_once(
    unsent, name, number, left_behind, monkeypatch, caplog
):
    folder = Path(unsent["folder"])
    with monkeypatch.context() as patch:
        Outage(patch, name, number)
        receipt = track(unsent)
        assert not receipt.delivered
        assert f"clado sync {folder}" in caplog.text
        assert "did not take the record (ConnectionError" in sync(folder, ends=2)  # still away: kept
    assert len(runs_of(unsent)) == left_behind
    assert any(run.info.status == "RUNNING" for run in runs_of(unsent)) == (left_behind > 0 and name != "create_model_version")
    assert "hunter2" not in (folder / NOTE).read_text() + caplog.text
    assert f"{CHILDREN} below it" in sync(folder)
    check_delivered(unsent)
    before = sorted(run.info.run_id for run in runs_of(unsent))
    assert "Nothing to deliver" in sync(folder)
    assert sorted(run.info.run_id for run in runs_of(unsent)) == before


def test_the_command_again_replaces_what_was_half_delivered(unsent, monkeypatch):
    with monkeypatch.context() as patch:
        Outage(patch, "log_dict", 4)
        track(unsent)
    assert track(unsent).delivered
    check_delivered(unsent)


def test_a_process_that_is_killed_while_it_sends_leaves_the_note(unsent, monkeypatch):
    from mlflow import MlflowClient

    class Killed(BaseException):
        pass

    def kill(*arguments: Any, **named: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_dict", kill)
        patch.setattr(MlflowClient, "set_terminated", kill)  # a dead process ends no run
        with pytest.raises(Killed):
            track(unsent)
    assert [run.info.status for run in runs_of(unsent)] == ["RUNNING"] * 2
    sync(Path(unsent["folder"]))
    check_delivered(unsent)


def test_a_folder_that_moved_is_delivered_to_another_tracker(unsent, monkeypatch, tmp_path, template):
    with monkeypatch.context() as patch:
        Outage(patch, "create_run", 0)
        track(unsent)
    shutil.move(unsent["folder"], tmp_path / "elsewhere")
    shutil.copy(template, tmp_path / "other.db")
    sync(tmp_path / "elsewhere", "--uri", f"sqlite:///{tmp_path}/other.db")
    assert runs_of(unsent) == []
    moved = {"folder": str(tmp_path / "elsewhere"), "tracking": {"uri": f"sqlite:///{tmp_path}/other.db"}}
    check_delivered(moved)


def test_a_delivered_run_is_delivered_again_where_mlflow_has_not_got_it(unsent, tmp_path, template):
    folder, database = Path(unsent["folder"]), tmp_path / "tracker.db"
    assert track(unsent).delivered
    assert nested(unsent, "evaluated").delivered
    first = runs_of(unsent)
    assert "Nothing to deliver" in sync(folder)
    shutil.copy(template, database)  # the records are gone
    assert f"{CHILDREN} below it" in sync(folder)
    again = runs_of(unsent)
    assert len(again) == len(first) == CHILDREN + 2
    [child] = [run for run in again if run.info.run_name == "3 bits evaluated"]
    assert child.data.tags["mlflow.parentRunId"] in {run.info.run_id for run in again}
    assert not {run.info.run_id for run in again} & {run.info.run_id for run in first}
    other = {**unsent, "tracking": {"uri": f"sqlite:///{tmp_path}/other.db"}}
    shutil.copy(template, tmp_path / "other.db")
    for document in (other, unsent):  # there and back: never twice
        sync(folder, "--uri", document["tracking"]["uri"])
        assert load_run_config(folder).tracking.uri == document["tracking"]["uri"]
        assert len(runs_of(document)) == CHILDREN + 2
        assert "Nothing to deliver" in sync(folder)


def test_a_run_whose_mlflow_is_gone_is_delivered_to_the_default_of_the_working_folder(unsent, tmp_path, template, caplog):
    home = tmp_path / "home"
    shutil.move(unsent["folder"], home / "run")
    (tmp_path / "tracker.db").rename(home / "tracker.db")
    document = {**unsent, "folder": str(home / "run"), "tracking": {"uri": f"sqlite:///{home}/tracker.db"}}
    (home / "run" / "config.yaml").write_text(parse_config(document).to_yaml())
    assert track(document).delivered
    shutil.move(home / "run", tmp_path / "moved")
    shutil.rmtree(home)
    shutil.copy(template, tmp_path)
    output = sync(tmp_path / "moved")
    assert f"Delivered to sqlite:///{tmp_path}/mlflow.db" in output
    assert f"{home}/tracker.db does not exist any more" in caplog.text
    check_delivered({"folder": str(tmp_path / "moved"), "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}})
    assert "Nothing to deliver" in sync(tmp_path / "moved")


def test_a_tracker_that_is_away_is_not_taken_for_one_that_has_nothing(unsent, monkeypatch):
    from mlflow import MlflowClient

    assert track(unsent).delivered
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", gone)
        assert "does not answer (ConnectionError" in sync(Path(unsent["folder"]), ends=2)
    check_delivered(unsent)
    assert "Nothing to deliver" in sync(Path(unsent["folder"]))


def poison(run: Any) -> None:
    raise MeasurementError("tile 3 is bad: see http://me:hunter2@host/")


@pytest.mark.parametrize("away", [False, True], ids=["tracker there", "tracker away"])
def test_a_run_that_fails_is_recorded_as_failed_with_its_traceback(unsent, away, monkeypatch):
    folder = Path(unsent["folder"])
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "start", poison)
        if away:
            Outage(patch, "log_batch", 0)
        with pytest.raises(MeasurementError, match="tile 3 is bad"):
            run_pipeline(unsent)
    if away:
        assert [run.info.status for run in runs_of(unsent)] == ["RUNNING"]
        sync(folder)
    assert not (folder / NOTE).exists()
    [failed] = runs_of(unsent)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["error"] == "MeasurementError: tile 3 is bad: see http://***@host/"
    assert failed.data.params["network"]
    [traceback] = Path(failed.info.artifact_uri.removeprefix("file://")).iterdir()
    assert traceback.read_bytes() == (folder / "failure.txt").read_bytes()
    assert "in poison" in traceback.read_text()
    assert "hunter2" not in traceback.read_text()
    assert track(unsent).delivered
    assert not (folder / "failure.txt").exists()
    assert Counter(run.info.status for run in runs_of(unsent)) == {"FAILED": 1, "FINISHED": CHILDREN + 1}


NOTES = {
    "not JSON": ("{", ["is not a note of clado", "Delete it"]),
    "a list": ("[]", ["is not a note of clado"]),
    "another format": ('{"format": "clado-undelivered/1"}', ["clado-undelivered/1", "expected clado-undelivered/2"]),
    "no attempts": ('{"format": "clado-undelivered/2"}', ["is not a note of clado"]),
    "a query for an attempt": (
        json.dumps({"format": "clado-undelivered/2", "attempts": [{"delivery": "' OR 1", "experiment": "a"}]}),
        ["names an attempt of a wrong form"],
    ),
    "nothing to send": ('{"format": "clado-undelivered/2", "attempts": []}', ["cannot be read", "clado run"]),
    "a file from elsewhere": (
        json.dumps(
            {"format": "clado-undelivered/2", "attempts": [], "experiment": "clado", "tags": {}, "matrices": {},
             "plots": ["../../secret"], "exports": {}, "description": ""}
        ),
        ["../../secret", "which is not in"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_cannot_be_followed_is_one_message_and_nothing_is_sent(unsent, name):
    folder, (text, expected) = Path(unsent["folder"]), NOTES[name]
    (folder / NOTE).write_text(text)
    output = sync(folder, ends=2)
    assert all(words in output for words in expected), output
    assert (folder / NOTE).read_text() == text
    assert runs_of(unsent) == []


def test_what_is_no_run_is_refused(tmp_path, unsent):
    assert "is not the folder of a run" in sync(tmp_path, ends=2)
    assert "is not the folder of a run" in sync(tmp_path / "nowhere", ends=2)
    assert not (tmp_path / "nowhere").exists()
    with locked(Path(unsent["folder"])):
        assert "another run is writing" in sync(Path(unsent["folder"]), ends=2)


def test_a_front_and_its_run_have_notes_of_their_own(unsent, monkeypatch):
    folder = Path(unsent["folder"])
    sweep = RunRecord.load(folder / "record.json")
    sweep.save(folder / "sweep" / "record.json")
    with monkeypatch.context() as patch:
        Outage(patch, "create_run", 0)
        track(unsent)
        delivery.track(
            sweep, folder, unsent, uri=unsent["tracking"]["uri"], tags={"sweep": "size"}, record_folder=folder / "sweep"
        )
    assert sync(folder).count(f"{CHILDREN} below it") == 2
    assert [run.data.tags["sweep"] for run in runs_of(unsent) if "sweep" in run.data.tags] == ["size"]
    assert len(runs_of(unsent)) == 2 * (CHILDREN + 1)


def nested(document: dict[str, Any], name: str) -> Receipt:
    """The results of a command on a finished run: a file, and an MLflow run below that of the run."""
    folder = Path(document["folder"])
    place = folder / name / "3_bits"
    place.mkdir(parents=True, exist_ok=True)
    (place / "table.md").write_text(name)
    return delivery.track_nested(
        folder,
        f"3 bits {name}",
        record_folder=place,
        experiment="clado",
        uri=document["tracking"]["uri"],
        params={"budget": "3 bits"},
        metrics={"top1": 0.9},
        series={"top1/chosen": [(1000, 0.8), (2000, 0.9)]},
        artifacts=[place / "table.md"],
    )


def test_evaluations_and_fine_tunings_are_delivered_below_their_run_once(unsent, monkeypatch):
    from mlflow import MlflowClient

    folder = Path(unsent["folder"])
    with monkeypatch.context() as patch:
        Outage(patch, "create_run", 0)
        assert not track(unsent).delivered
        assert not nested(unsent, "evaluated").delivered
    assert not nested(unsent, "finetuned").delivered  # the tracker is back, but has no run to put it below
    assert runs_of(unsent) == []
    sync(folder)
    assert "Nothing to deliver" in sync(folder)
    runs = {run.info.run_name: run for run in runs_of(unsent)}
    assert len(runs) == len(runs_of(unsent)) == CHILDREN + 3
    [parent] = [run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]
    client = MlflowClient(unsent["tracking"]["uri"])
    for name in ("evaluated", "finetuned"):
        run = runs[f"3 bits {name}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {"budget": "3 bits"}
        assert run.data.metrics["top1"] == 0.9
        points = client.get_metric_history(run.info.run_id, "top1/chosen")
        assert sorted((point.step, point.value) for point in points) == [(1000, 0.8), (2000, 0.9)]
        [table] = Path(run.info.artifact_uri.removeprefix("file://")).iterdir()
        assert table.read_text() == name


def test_what_belongs_to_a_run_is_not_put_below_a_front_of_it(unsent):
    folder = Path(unsent["folder"])
    run = track(unsent)
    sweep = RunRecord.load(folder / "record.json")
    sweep.save(folder / "sweep" / "record.json")
    front = delivery.track(
        sweep, folder, unsent, uri=unsent["tracking"]["uri"], tags={"sweep": "size"}, record_folder=folder / "sweep"
    )
    assert front.delivered
    assert nested(unsent, "evaluated").delivered
    [evaluated] = [run for run in runs_of(unsent) if run.info.run_name == "3 bits evaluated"]
    assert evaluated.data.tags["mlflow.parentRunId"] == run.parent_run_id
