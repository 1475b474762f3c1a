"""Nothing that is chosen is worse than plain rounding: where corrections harm, a network with fewer of them is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clado.choosing.choice import safe_methods
from clado.choosing.proposals import Budget, Proposal
from clado.grids import Grid, QuantizedLayer
from clado.network.normalisation import Moments, NormStatistics
from clado.quantization.corrections import LayerSample, batchnorm_reestimation, output_statistics
from clado.records.results import CHOSEN, UNIFORM
from clado.records.run_record import RunRecord
from clado.reporting.tables import markdown, rows, winners
from clado.run.evaluation import RunEvaluation
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.space import Assignment
from flows.commands.export import export_as
from flows.commands.stored import StoredRun, chosen_for
from flows.phases.choose import with_best_corrections
from tests.running import config, run_pipeline

BUDGET = Budget("average_bits", 3.0)


def doubled_statistics(norm: NormStatistics, floats: Moments) -> Moments:
    """A final correction that harms."""
    return norm.seen[0], 4 * norm.seen[1]


def turned_weights(sample: LayerSample, quantized: Sequence[QuantizedLayer]) -> list[QuantizedLayer]:
    """A correction of layers that harms, and that no batch norm makes up for."""
    return [
        replace(layer, weight=-layer.weight, grid=Grid(-layer.grid.scale, layer.grid.zero_point, layer.grid.codes))
        for layer in quantized
    ]


def harmful_final(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batchnorm_reestimation, "matched", doubled_statistics)


def harmful_layers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(output_statistics, "correction", replace(output_statistics.correction, correct=turned_weights))


def run(folder: Path) -> tuple[RunRecord, OpenedRun]:
    document = config(folder, budgets={"average_bits": [3.0]}, estimators=["layerwise"], search={"evaluations": 2, "batch": 2})
    run_pipeline(document, tracked=False)
    return RunRecord.load(folder / "record.json"), open_run(parse_config(document))


def losses_without(record: RunRecord, run: OpenedRun) -> dict[str, float]:
    """Measured here, one by one: the chosen bits, the widest uniform bits and plain layerwise's bits without corrections."""
    chosen = record.find(BUDGET.name, CHOSEN)
    plain = [c for c in record.measured_proposals if c.assignment.corrected == "none"]
    assignments = {
        "the same bits": chosen.assignment,
        "uniform bits": run.space.uniform_assignments().__next__()[1],
        "layerwise": next(c.assignment for c in plain if c.origin == "layerwise_plain"),
    }
    return {name: run.evaluation.loss(a.with_corrections("none")).accuracy().loss for name, a in assignments.items()}


@pytest.fixture(scope="module", params=[harmful_final, harmful_layers], ids=["final", "layers"])
def harmed(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        request.param(patch)
        yield (*run(tmp_path_factory.mktemp("harm") / "run"), "static" if request.param is harmful_final else "none")


def test_what_is_chosen_is_no_worse_than_any_of_it_without_corrections(harmed):
    record, run, expected = harmed
    chosen = record.find(BUDGET.name, CHOSEN)
    assert chosen.assignment.corrected == expected
    assert chosen.loss_deployed == pytest.approx(run.evaluation.loss(chosen.assignment).accuracy().loss, rel=1e-5)
    for name, loss in losses_without(record, run).items():
        assert chosen.loss_deployed <= loss * (1 + 1e-6), name
    # the corrections did harm: a run that did not look would have chosen worse
    corrected = run.evaluation.loss(chosen.assignment.with_corrections("all")).accuracy().loss
    assert corrected > 1.1 * chosen.loss_deployed
    assert all(record.find(BUDGET.name, method).loss_deployed >= chosen.loss_deployed for method in safe_methods())


def test_the_record_the_table_and_the_export_say_which_corrections_are_deployed(harmed, tmp_path):
    record, run, expected = harmed
    chosen = record.find(BUDGET.name, CHOSEN)
    cells = {name: cells for name, cells, _ in rows(record, BUDGET.name)}
    tried = "static" if expected == "static" else "all"  # on the first solution
    assert cells["corrections"] == [*[tried] * (len(record.methods) - 1), expected]
    assert expected in markdown(record)
    assert {"static": "without the final corrections", "none": "without corrections"}[expected] in winners(record)
    document = record.assignment_document(chosen)
    assert document["corrected"] == expected
    assert run.space.from_json(document) == chosen.assignment
    stored = StoredRun.open(run.folder)
    assert chosen_for(stored, run, BUDGET) == chosen.assignment
    export_as("packed", run, chosen.assignment, tmp_path)
    _, layers = run.preparation.deployed(chosen.assignment)
    _, corrected = run.preparation.deployed(chosen.assignment.with_corrections("all"))
    same = [torch.equal(layer.weight, corrected[i].weight) for i, layer in layers.items()]
    assert all(same) if expected == "static" else not any(same)


def test_without_the_check_a_harmful_correction_would_be_deployed(harmed, monkeypatch):
    """The law of the first test needs the additional measurements. Without them it does not hold."""
    _, run, _ = harmed
    stored = StoredRun.open(run.folder)
    monkeypatch.setattr("flows.commands.stored.recorded", lambda stored, run: [])  # else what the run measured competes
    monkeypatch.setattr(RunEvaluation, "other_corrections", lambda self, assignment: [])
    monkeypatch.setattr(StoredRun, "uncorrected", lambda self, budgets: [])
    monkeypatch.setattr("flows.commands.stored.with_final_corrections", lambda run, proposals, measure: proposals)
    assert chosen_for(stored, run, BUDGET).corrected == "all"
    monkeypatch.undo()
    assert chosen_for(stored, run, BUDGET).corrected != "all"


def test_equal_bits_are_deployed_alike_at_every_budget_and_what_was_replaced_still_competes():
    """Each reported proposal has the corrections of least measured loss of its own bits; nothing else changes."""
    bits, tight, loose = Assignment((4, 4)), BUDGET, Budget("average_bits", 5.0)
    at_tight, at_loose = Proposal(tight, UNIFORM, bits), Proposal(loose, UNIFORM, bits.with_corrections("static"))
    plain = Proposal(loose, UNIFORM, bits.with_corrections("none"), reported=False)
    losses = {at_tight.assignment: 0.2, at_loose.assignment: 0.3, plain.assignment: 0.1}
    proposed = with_best_corrections([at_tight, at_loose, plain], losses)
    assert proposed == [at_tight, replace(at_loose, assignment=bits), plain, replace(at_loose, reported=False)]
    assert with_best_corrections(proposed, losses) == proposed
    del losses[at_tight.assignment]  # not measured
    assert with_best_corrections([at_loose, plain], losses) == [at_loose, plain]
