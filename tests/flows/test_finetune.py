"""A fine-tuning of a finished run: written whole, evaluated, nested under the run in MLflow; a mistake is refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import clado
from clado.errors import DataError, NetworkError
from clado.quantization.training import Training
from clado.records.run_record import RunRecord
from clado.run.opened_run import open_run
from flows.cli import app
from flows.commands.finetune import RECORD, folder_of, images_of, train
from flows.commands.stored import StoredRun, accuracy_of, chosen_for
from tests.running import copy_of


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """(run, run, assignment, what was printed, MLflow's receipt, record) of one epoch on a few of the run's own images."""
    folder = Path(copy_of(finished, tmp_path_factory.mktemp("tuned") / "run")["folder"])
    stored = StoredRun.open(folder)
    run = open_run(stored.config)
    budget = run.budgets[0]
    assignment = chosen_for(stored, run, budget)
    images = images_of(run, None, seed=0, most=128)
    text, receipt = train(stored, run, budget.name, assignment, Training(epochs=1), images)
    record = json.loads((folder_of(stored, budget.name) / RECORD).read_text())
    return stored, run, budget, assignment, text, receipt, record


def test_the_record_holds_what_was_trained_and_what_it_is_worth(tuned):
    stored, run, budget, assignment, text, _, record = tuned
    assert run.space.from_json(record) == assignment
    assert record["validation_before"]["top1"] == accuracy_of(run, assignment).top1
    assert record["validation"]["num_images"] == len(run.slices.validation)
    assert f"{100 * record['validation']['top1']:.2f} % after" in text
    network = clado.load_packed(folder_of(stored, budget.name) / "packed.safetensors", run.loaded.model)
    x, y = run.slices.validation.load(0, len(run.slices.validation))
    with torch.no_grad():
        assert float((network(x).argmax(1) == y).float().mean()) == pytest.approx(record["validation"]["top1"], abs=0.006)


def test_no_validation_image_is_trained_on_and_the_held_out_are_apart(tuned):
    run, images = tuned[1], images_of(tuned[1], None, seed=0)
    hashes = {hash(x.numpy().tobytes()) for part in (images.training, images.held_out) for x in part.load(0, len(part))[0]}
    validation, _ = run.slices.validation.load(0, len(run.slices.validation))
    assert not hashes & {hash(x.numpy().tobytes()) for x in validation}
    both = [hash(x.numpy().tobytes()) for x in images.held_out.load(0, 50)[0]]
    training = {hash(x.numpy().tobytes()) for x in images.training.load(0, len(images.training))[0]}
    assert not training & set(both)


def test_mlflow_has_it_as_a_run_nested_under_the_run_itself(tuned):
    stored, _, _, _, _, receipt, record = tuned
    from mlflow import MlflowClient

    assert receipt.delivered
    client = MlflowClient(receipt.uri)
    run = client.get_run(receipt.parent_run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["fingerprint"] == RunRecord.load(stored.folder / "record.json").fingerprint
    assert parent.data.tags["mlflow.source.name"] == "clado run"
    assert run.data.metrics["top1"] == record["validation"]["top1"]
    steps = client.get_metric_history(run.info.run_id, "held_out_loss")
    assert [point.step for point in steps] == [epoch["number"] for epoch in record["epochs"]]
    assert {"packed.safetensors", RECORD} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_what_could_not_be_written_is_refused_before_anything_is_trained(tuned, monkeypatch):
    stored, run, budget, assignment, *_ = tuned

    def refuse(*_):
        raise NetworkError("a module cannot hold it")

    monkeypatch.setattr("flows.commands.finetune.as_module", refuse)
    monkeypatch.setattr("flows.commands.finetune.finetune", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(NetworkError, match="cannot hold"):
        train(stored, run, budget.name, assignment, Training(epochs=1), images_of(run, None, seed=0, most=128))


def test_labels_matter_where_they_are_learned_from_alone(tuned, tmp_path):
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (12, 28, 28))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(12 * 784))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + (12).to_bytes(4, "big") + bytes(range(12)))
    assert len(images_of(tuned[1], tmp_path, seed=0).training) == 10
    with pytest.raises(DataError, match="labels of 12 classes, the network 10 outputs"):
        images_of(tuned[1], tmp_path, seed=0, labels=True)


def test_too_few_images_are_refused(tuned):
    with pytest.raises(DataError, match="--images is 1"):
        images_of(tuned[1], None, seed=0, most=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one budget"),
        (["--budget", "3", "--epochs", "-1"], "epochs is -1"),
        (["--budget", "3", "--criterion", "hinge"], "unknown criterion"),
        (["--budget", "3", "--data", "no-such-folder"], "is not a folder"),
    ],
)
def test_a_mistake_is_a_message_and_nothing_is_written(tuned, arguments, words):
    before = sorted(tuned[0].folder.rglob("*"))
    result = CliRunner().invoke(app, ["finetune", str(tuned[0].folder), *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert sorted(tuned[0].folder.rglob("*")) == before
