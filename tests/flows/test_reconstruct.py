"""A run of more effort than `fast`: the best answers are reconstructed, compete by what is deployed, and are recorded as that."""

import json
from pathlib import Path

import pytest
import torch

import clado
from clado.choosing.proposals import Proposal
from clado.quantization.reconstruction import EFFORTS, Effort
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.reporting.tables import markdown, rows, winners
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.storage.prepared_layers import PreparedLayers
from flows.commands.export import budget_folder, export_as
from flows.commands.plan import plan_text
from flows.commands.stored import StoredRun, chosen_for
from flows.phases.reconstruct import best_proposals
from tests.networks import Residual, build, images, labels
from tests.running import Calls, config, copy_of, run_pipeline

SHORT = Effort(proposals=1, block_steps=24, network_steps=8, batch_images=16)


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "best", SHORT)
        yield patch


@pytest.fixture(scope="module")
def made(finished, patched, tmp_path_factory) -> tuple[RunRecord, RunRecord, OpenedRun, Calls]:
    """(record of the fast run, record of the same run with effort, the run, its tasks)."""
    document = copy_of(finished, tmp_path_factory.mktemp("effort") / "run") | {"effort": "best"}
    before = RunRecord.load(Path(document["folder"]) / "record.json")
    calls, _ = run_pipeline(document, tracked=False)
    return before, RunRecord.load(Path(document["folder"]) / "record.json"), open_run(parse_config(document)), calls


def test_nothing_that_is_deployed_is_worse_than_in_a_fast_run(made):
    before, after, run, _ = made
    for budget in before.budgets:
        fast, chosen = before.find(budget, CHOSEN), after.find(budget, CHOSEN)
        assert chosen.loss_deployed <= fast.loss_deployed
        limit = next(one for one in run.budgets if one.name == budget).limit(run.space)
        assert limit.holds(run.space, chosen.assignment)
        for method in before.methods[:-1]:  # their own rows stay
            assert after.find(budget, method).assignment == before.find(budget, method).assignment
    assert any(after.find(budget, CHOSEN).assignment.is_reconstructed for budget in before.budgets)


def test_only_what_is_absent_is_done_each_network_once(made):
    _, after, run, calls = made
    assert not calls.of("run_tile")
    assert not calls.of("prepare")
    tasks = calls.of("reconstruct")
    assert len(tasks) == len(set(tasks)) <= SHORT.proposals * len(run.budgets)
    assert {task.corrected for task in tasks} == {"best"}
    assert after.seconds["reconstructing"] > 0
    assert after.forwards["reconstruction"] == len(tasks) * SHORT.trained_images
    again, _ = run_pipeline(run.config.model_dump(mode="json", exclude_none=True), tracked=False)
    assert not again.of("measure_loss")


def test_the_record_the_table_and_the_exports_say_and_hold_what_is_deployed(made, tmp_path):
    _, record, run, _ = made
    budget = next(b for b in run.budgets if record.find(b.name, CHOSEN).assignment.is_reconstructed)
    chosen = record.find(budget.name, CHOSEN)
    cells = {name: cells for name, cells, _ in rows(record, budget.name)}
    assert cells["corrections"][-1] == "reconstructed (best)"
    assert "reconstructed" in winners(record)
    assert "reconstructed (best)" in markdown(record)
    document = json.loads((budget_folder(run, budget.name) / "assignment.json").read_text())
    assert document["corrected"] == "best"
    assert chosen_for(StoredRun.open(run.folder), run, budget) == chosen.assignment
    network, layers = run.preparation.deployed(chosen.assignment)
    export_as("packed", run, chosen.assignment, tmp_path)
    loaded = clado.load_packed(tmp_path / "packed.safetensors", run.loaded.model)
    x = run.slices.validation.load(0, 16)[0]
    with torch.no_grad():
        assert torch.allclose(loaded(x), network.logits(x, layers), atol=1e-4, rtol=1e-4)
    assert chosen.loss_deployed == pytest.approx(run.evaluation.loss(chosen.assignment).accuracy().loss, rel=1e-5)


def test_a_reconstruction_that_was_stopped_goes_on_to_the_same_network(made, monkeypatch):
    _, _, run, calls = made
    assignment = calls.of("reconstruct")[0]
    file = run.preparation.files().reconstructed_file(assignment, run.slices.calibration.sha256)
    _, whole = run.preparation.deployed(assignment)
    file.unlink()
    write_part = PreparedLayers.write_part

    def stopped(files, part, tensors):
        write_part(files, part, tensors)
        if len(tensors["errors"]) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(PreparedLayers, "write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.preparation.reconstructed(assignment)
    monkeypatch.undo()
    assert run.preparation.files().part_file(file).exists()
    _, again = run.preparation.reconstructed(assignment)
    assert all(torch.equal(layer.weight, whole[i].weight) for i, layer in again.items())
    assert not run.preparation.files().part_file(file).exists()


def test_the_plan_says_what_it_takes(made):
    text = plan_text(made[2])
    networks = SHORT.proposals * len(made[2].budgets)
    assert f"{networks * SHORT.trained_images:,} forward images and as many backward images: effort best" in text


def test_the_chosen_answer_is_reconstructed_first_then_others_by_loss_and_no_bits_twice(made):
    _, _, run, _ = made
    (budget, other), a = run.budgets, run.space.narrowest
    b, c = a.replace(0, 4), a.replace(1, 4)
    proposals = [
        Proposal(budget, "layerwise", a),
        Proposal(budget, "layerwise", a.with_corrections("none")),
        Proposal(budget, "gauss_newton", b),
        Proposal(other, "gauss_newton", c),
    ]
    losses = {a: 0.3, a.with_corrections("none"): 0.1, b: 0.2, c: 0.25}
    chosen = {budget.name: b, other.name: b}
    assert [p.assignment for p in best_proposals(proposals, losses, chosen, 1)] == [b, b]
    in_float = run.space.nothing
    with_float = [Proposal(budget, "layerwise", in_float), *proposals]
    chosen_in_float = {budget.name: in_float, other.name: b}
    first, _ = best_proposals(with_float, losses | {in_float: 0.0}, chosen_in_float, 1)
    assert first.assignment.corrected == "none"
    assert [p.assignment.pairs for p in best_proposals(proposals, losses, chosen, 2)] == [b.pairs, a.pairs, b.pairs, c.pairs]


def network() -> torch.nn.Module:
    """A small network."""
    return build(Residual)


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    """Images with labels."""
    return images(120), labels(120)


def labelled_otherwise() -> tuple[torch.Tensor, torch.Tensor]:
    """The same images. The labels belong to other images."""
    return images(120), labels(120).roll(7)


def unlabelled() -> torch.Tensor:
    """The same images without labels."""
    return images(120)


def test_a_reconstruction_reads_no_label(tmp_path):
    """With effort balanced. Labels of other images, or none, give the same network, bit for bit."""
    states = []
    for source in (labelled, labelled_otherwise, unlabelled):
        document = config(
            tmp_path / source.__name__,
            network={"source": "factory", "name": f"{__name__}:network", "image_shape": [1, 8, 8]},
            data={
                "source": "factory", "factory": f"{__name__}:{source.__name__}", "sensitivity_images": 16, "sample_blocks": 2,
                "calibration_images": 40, "validation_images": 20,
            },
            effort="balanced",
        )  # fmt: skip
        run = open_run(parse_config(document))
        assert (run.slices.calibration.load(0, 1)[1] is None) == (source is unlabelled)
        start = run.preparation.deployed(run.space.narrowest)
        deployed = run.preparation.deployed(run.space.narrowest.with_corrections("balanced"))
        states.append([network.state_dict(layers) for network, layers in (start, deployed)])
    (first_start, first), *others = states
    assert any(not torch.equal(first_start[name], tensor) for name, tensor in first.items() if name in first_start)
    for _, other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
