"""One full pipeline at reduced size: its numbers are those of an independent computation, and nothing is computed twice."""

import copy
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import clado
from clado.choosing.proposals import LAYERWISE_PLAIN, Budget
from clado.data.sources import load_data, load_network
from clado.evaluation import Counts
from clado.measuring.kinds import tile_kinds
from clado.quantization.quantizers import WeightQuantizer
from clado.records.results import CHOSEN, LOCAL_SEARCH, UNIFORM
from clado.records.run_record import RunRecord
from clado.run.evaluation import RunEvaluation
from clado.run.opened_run import OpenedRun, open_run
from clado.run.preparation import LayerTask, SweepTask
from clado.settings.loading import parse_config
from clado.settings.schema import DataSettings, NetworkSettings
from clado.space import Assignment
from clado.storage.measurement_store import MeasurementStore
from flows import pipeline
from flows.commands.export import loading_snippet
from flows.commands.stored import StoredRun, chosen_for, recorded
from flows.phases.record import git_revision
from tests import tolerance
from tests.networks import replaced_logits
from tests.running import BUDGETS, ESTIMATORS, config, copy_of, run_pipeline

METHODS = ("uniform", *ESTIMATORS, CHOSEN)
SAFE = (UNIFORM, "layerwise")  # a chosen assignment is never worse
TEMPERED = ("tempered2", "tempered4", "tempered8")  # propose always, where their tiles are measured anyway


@pytest.fixture(scope="module")
def record(finished) -> RunRecord:
    return RunRecord.load(finished.folder / "record.json")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_network(NetworkSettings(name="resnet20_fashion_mnist")).model


@pytest.fixture(scope="module")
def run(finished) -> OpenedRun:
    return open_run(parse_config(finished.document))


@pytest.fixture(scope="module")
def slices(finished):
    return load_data(DataSettings(**finished.document["data"]), (1, 28, 28)).held_out()


def logits(model, names, bits, x) -> torch.Tensor:
    """The module itself, run whole, each layer's weight rounded here: no graph, no store."""
    state = dict(model.named_parameters())
    weights = {name: WeightQuantizer().fake_quantize(state[name], b) for name, b in zip(names, bits, strict=True) if b}
    return replaced_logits(model, weights, x).double()


def corrected(run: OpenedRun, assignment: Assignment, final: bool) -> torch.nn.Module:
    """The module itself with the corrected layers' state in it, as deployed or as probes see it: no graph, nothing folded."""
    prepared = run.preparation.corrected
    network, layers = run.preparation.deployed(assignment) if final else (prepared.network, prepared.chosen(assignment))
    module = copy.deepcopy(run.loaded.model)
    module.load_state_dict(network.state_dict(layers))
    return module.eval()


def kl(floats: torch.Tensor, quantized: torch.Tensor) -> float:
    p, q = floats.double().log_softmax(1), quantized.double().log_softmax(1)
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


def arrays(folder: Path) -> dict[str, bytes]:
    """Every measured number of a store, and every matrix."""
    group = MeasurementStore.open(folder / "store.zarr").group
    sums = {kind: np.asarray(group[f"{kind}/sums"][:]).tobytes() for kind in tile_kinds()}
    return sums | {file.name: np.load(file)["values"].tobytes() for file in (folder / "matrices").iterdir()}


def test_the_record_has_one_result_for_each_budget_and_method(record):
    assert [(r.budget, r.method) for r in record.results] == [(f"{b:g} bits", m) for b in BUDGETS for m in METHODS]
    assert record.layer_names[0] == "conv1.weight"
    assert len(record.layer_names) == 22


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_results_of_a_budget_are_those_of_an_independent_computation(record, model, slices, run, method):
    row = record.find("2.5 bits", method)
    bits, names = row.assignment.bits, record.layer_names
    assert row.size_bytes == -(-sum(b * n for b, n in zip(bits, record.layer_weights, strict=True)) // 8)
    assert row.average_bits == pytest.approx(
        sum(b * n for b, n in zip(bits, record.layer_weights, strict=True)) / sum(record.layer_weights)
    )
    assert row.average_bits <= 2.5
    x, _ = slices.decision.load(0, 16)
    deployed = corrected(run, row.assignment, final=row.assignment.corrected == "all")
    assert row.loss_deployed == pytest.approx(kl(model(x), deployed(x)), rel=1e-4, abs=1e-5)
    is_chosen = bits in {chosen.assignment.bits for chosen in record.results if chosen.method == CHOSEN}
    assert (row.validation_plain is not None) == is_chosen
    x, y = slices.validation.load(0, 100)
    for accuracy, z in ((row.validation, deployed(x)), (row.validation_plain, logits(model, names, bits, x))):
        if accuracy is None:
            continue
        assert accuracy.num_images == 100
        assert accuracy.top1 == float((z.argmax(1) == y).double().mean())
        assert accuracy.top5 == float((z.topk(5).indices == y[:, None]).any(1).double().mean())
        assert accuracy.loss == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-4)


def test_the_float_accuracy_is_that_of_the_module(record, model, slices):
    x, y = slices.validation.load(0, 100)
    z = logits(model, record.layer_names, [None] * 22, x)
    assert record.float_accuracy.top1 == float((z.argmax(1) == y).double().mean())
    assert record.baseline == 0.0


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_pairwise_matrix_predicts_the_increase_of_two_layers_exactly(finished, record, model, slices, run, seed):
    with np.load(finished.folder / "matrices" / "pairwise.npz") as file:
        values, options = file["values"], list(file["options"])
    rng = np.random.default_rng(seed)
    bits = [None] * 22
    for layer in rng.choice(22, 2, replace=False):
        bits[layer] = int(rng.choice([2, 4]))
    chosen = [options.index(f"{name}:{b}") for name, b in zip(record.layer_names, bits, strict=True) if b]
    x, _ = slices.sensitivity.load(0, 16)
    predicted = 0.5 * values[np.ix_(chosen, chosen)].sum()
    probed = corrected(run, Assignment(tuple(bits)), final=False)
    assert predicted == pytest.approx(kl(model(x), probed(x)), rel=1e-4, abs=1e-5)


def test_chosen_is_the_best_that_is_safe_unless_another_is_significantly_nearer_to_float(finished, record):
    run = open_run(parse_config(finished.document))
    cache = run.evaluation.cache("decision")

    def exceeds(ones: np.ndarray, others: np.ndarray) -> bool:
        difference = ones - others
        assert len(difference) == 16
        return difference.mean() > 2 * difference.std(ddof=1) / 16**0.5

    for budget in run.budgets:
        rows = {m: record.find(budget.name, m) for m in METHODS}
        chosen, limit = rows[CHOSEN], budget.limit(run.space)
        fitting = [c for c in record.measured_proposals if limit.holds(run.space, c.assignment)]
        safe = min(
            (c for c in fitting if c.origin in SAFE or c.assignment.corrected == "none"),
            key=lambda c: (c.loss_deployed, c.brier_deployed),
        )
        assert chosen.loss_deployed <= safe.loss_deployed <= min(rows[m].loss_deployed for m in SAFE)
        counts = {c.assignment: cache.get(c.assignment) for c in fitting}
        briers = counts[safe.assignment].each_brier
        rivals = [
            c for c in fitting if c.loss_deployed <= safe.loss_deployed and exceeds(briers, counts[c.assignment].each_brier)
        ]
        rivals.append(safe)
        most = counts[max(rivals, key=lambda c: c.agreement_deployed).assignment].each_hit
        assert chosen.brier_deployed == min(c.brier_deployed for c in rivals if not exceeds(most, counts[c.assignment].each_hit))
        others = [c for c in record.measured_proposals if c.budget == budget.name and c.origin != chosen.winner]
        assert chosen.gain == min(c.loss_deployed for c in others) - chosen.loss_deployed
        assert chosen.winner
        assert all(rows[m].status == "optimal" for m in ESTIMATORS)


def test_brier_scores_and_agreement_are_those_of_the_network_that_ships(finished, record, model, slices, run):
    x, _ = slices.decision.load(0, 16)
    row = record.find(record.budgets[0], CHOSEN)
    modules = corrected(run, row.assignment, final=row.assignment.corrected == "all"), model
    q, p = (module(x).detach().double().softmax(-1) for module in modules)
    assert row.agreement_deployed == float((q.argmax(-1) == p.argmax(-1)).double().mean())
    assert row.brier_deployed == pytest.approx(float((q - p).square().sum(-1).mean()), rel=1e-4)


def test_a_flow_run_is_called_by_its_network_and_budgets(finished, monkeypatch):
    for document, name in ((finished.document, f"resnet20_fashion_mnist at {BUDGETS[0]:g} bits"), ({"bits": [0]}, "refused")):
        monkeypatch.setattr(pipeline, "flow_run", SimpleNamespace(parameters={"config": document}))
        assert pipeline.flow_run_name().startswith(name)


def test_each_tile_and_each_distinct_assignment_is_computed_once(finished, record):
    run = open_run(parse_config(finished.document))
    assert sorted(finished.calls.of("run_tile")) == sorted(run.plan.tiles)
    distinct, candidates = {row.assignment for row in record.results}, {c.assignment for c in record.measured_proposals}
    measured = finished.calls.of("measure_loss")
    assert len(measured) == len(set(measured))
    assert set(measured) == candidates >= distinct
    # none: uniform bits, plain layerwise, and what is chosen; both others: layerwise's answers, and what is chosen
    assert {a.corrected for a in candidates} == {"all", "static", "none"}
    evaluated = [key for _, group in finished.calls.of("evaluate_batch") for key in group]
    assert len(evaluated) == len(set(evaluated))  # 100 images are one evaluation batch
    # without corrections what is chosen alone
    chosen = {row.assignment for row in record.results if row.method == CHOSEN}
    assert set(evaluated) == distinct | {a.with_corrections("none") for a in chosen} | {run.space.nothing}
    assert len(list((finished.folder / "evaluations" / "decision").iterdir())) == len(candidates)
    assert len(list((finished.folder / "evaluations" / "validation").iterdir())) == len(evaluated)


def level_of(record: RunRecord, budget: str) -> str:
    """The corrections that proposals for a budget are deployed with: those that were better for its first solution."""
    return record.find(budget, UNIFORM).assignment.corrected


def test_candidates_are_all_that_was_measured_and_the_search_keeps_its_budget(finished, record):
    tried = {}
    for budget in record.budgets:
        of_budget = [c for c in record.measured_proposals if c.budget == budget]
        proposing = {UNIFORM, *ESTIMATORS, "pairwise_raw", "pairwise_shrunk", *TEMPERED, LAYERWISE_PLAIN, LOCAL_SEARCH}
        assert {c.origin for c in of_budget} == proposing
        assert {c.assignment.corrected for c in of_budget if c.origin == LAYERWISE_PLAIN} == {"none"}
        level = level_of(record, budget)
        assert {c.assignment.corrected for c in of_budget if c.origin == UNIFORM} >= {level, "none"}
        summary = next(row for row in record.searches if row.budget == budget)
        assert summary.evaluations == 5
        # after these come the chosen bits with other corrections
        searched = [c for c in of_budget if c.origin == LOCAL_SEARCH][:5]
        assert len({c.assignment.corrected for c in searched}) == 1
        tried |= {c.assignment: None for c in searched}
        before = [
            c.loss_deployed
            for c in record.measured_proposals
            if c.origin != LOCAL_SEARCH and c.size_bytes <= of_budget[0].size_bytes
            if c.assignment.corrected in (level_of(record, c.budget), "none")
        ]
        assert summary.start_loss <= min(before)
        assert summary.best_loss == min([summary.start_loss, *(c.loss_deployed for c in searched)])
        assert summary.gain == summary.start_loss - summary.best_loss
    measured = {c.assignment for c in record.measured_proposals}
    assert record.forwards["local_search"] == 16 * len(tried)
    proposed = record.forwards["proposals"] + record.forwards["other_corrections"]
    assert proposed == 16 * len(measured - set(tried))
    assert record.forwards["other_corrections"] <= 16 * 2 * 2 * len(record.budgets)
    evaluated = {assignment for _, group in finished.calls.of("evaluate_batch") for assignment in group}
    assert record.forwards["validation"] == 100 * len(evaluated)
    # of 64 calibration images, and once of the float network
    assert record.forwards["batchnorm_reestimation"] == 64 * (1 + sum(a.corrected == "all" for a in measured))


def test_every_candidate_has_a_predicted_loss_and_who_predicts_it_is_said(finished, record, run):
    with np.load(finished.folder / "matrices" / "gauss_newton.npz") as file:
        values = file["values"]
    ranking = {UNIFORM, *TEMPERED} | {LOCAL_SEARCH for search in record.searches if search.surrogate in TEMPERED}
    for c in record.measured_proposals:
        if c.assignment.corrected == "none":  # no matrix knows of rounding to nearest, but that of LAYERWISE_PLAIN
            assert c.predicted_by == ""
            assert (c.loss_predicted is None) == (c.origin != LAYERWISE_PLAIN)
            continue
        if c.assignment.corrected == level_of(record, c.budget):
            assert c.predicted_by == ("gauss_newton" if c.origin in ranking else "")
        if c.predicted_by or c.origin == "gauss_newton":
            chosen = run.space.chosen_options(c.assignment)
            assert c.loss_predicted == pytest.approx(record.baseline + 0.5 * values[np.ix_(chosen, chosen)].sum())
        assert math.isfinite(c.loss_predicted)


def test_reestimation_is_a_run_of_the_calibration_images_or_one_for_each_batch_norm_without_a_graph(run, model):
    def images(**changes) -> int:
        return replace(run, config=run.config.model_copy(update=changes)).preparation.images_per_reestimation

    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert images() == 64
    assert images(network=run.config.network.model_copy(update={"graph": False})) == 64 * norms
    assert images(corrections=("output_statistics",)) == 0


@pytest.mark.parametrize("named", [("gauss_newton",), ("pairwise",), ("tempered2",)])
def test_nothing_chosen_is_worse_than_layerwise_where_it_is_not_named(finished, record, tmp_path, named):
    """Layerwise's answers and their losses are those of the run that names it."""
    document = {**copy_of(finished, tmp_path / "run"), "estimators": list(named)}
    run_pipeline(document, tracked=False)
    stored = RunRecord.load(tmp_path / "run" / "record.json")
    run = open_run(parse_config(document))
    assert stored.methods == (UNIFORM, *named, CHOSEN)
    for budget in run.budgets:
        safe = [record.find(budget.name, method) for method in SAFE]
        assert stored.find(budget.name, CHOSEN).loss_deployed <= min(row.loss_deployed for row in safe) + 1e-12
        ours = {c.assignment for c in stored.measured_proposals if (c.budget, c.origin) == (budget.name, "layerwise")}
        assert ours >= {row.assignment for row in safe if row.method == "layerwise"}
    corrected = [c for c in stored.measured_proposals if c.assignment.corrected == level_of(stored, c.budget)]
    predicting = {c.predicted_by for c in corrected if c.origin in (UNIFORM, *TEMPERED)}
    assert predicting == ({"layerwise"} if named == ("tempered2",) else set(named))
    assert all(c.loss_predicted is not None for c in corrected)
    # what is read back knows who proposed what, also where two proposed the same
    known = {(p.budget.name, p.method, p.assignment) for p in recorded(StoredRun.open(tmp_path / "run"), run)}
    assert known == {(c.budget, c.origin, c.assignment) for c in stored.measured_proposals}


def test_show_prints_every_candidate(finished, record):
    from typer.testing import CliRunner

    from flows.cli import app

    printed = CliRunner().invoke(app, ["show", str(finished.folder), "--proposals"]).output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    chosen_elsewhere = [budget for budget in record.budgets if " for " in record.find(budget, CHOSEN).winner]
    assert len(lines) == 1 + len(record.measured_proposals) + len(chosen_elsewhere)
    for budget in record.budgets:
        of_budget = [line for line in lines if line[0] == budget]
        scores = [float(line[5]) for line in of_budget]
        assert scores == sorted(scores)
        marked = {line[-1] for line in of_budget if line[1].endswith("(chosen)")}
        assert marked <= {str(record.find(budget, CHOSEN).assignment)}
        assert marked or record.find(budget, CHOSEN).winner.endswith("bits")  # measured for a smaller budget
    assert f"Local search on the measured loss ({5 * len(record.budgets)} evaluations" in printed


def test_what_a_run_chose_stays_chosen_while_it_measures_the_same(finished, tmp_path, record):
    """The record says what is exported; a run of other settings that was killed leaves a record of before."""
    run = open_run(parse_config(copy_of(finished, tmp_path / "run")))
    stored, budget = StoredRun.open(tmp_path / "run"), run.budgets[0]
    row = record.find(budget.name, CHOSEN)
    other = next(c for c in record.measured_proposals if c.budget == budget.name and c.assignment != row.assignment)
    for loss, expected in ((other.loss_deployed, other.assignment), (2 * other.loss_deployed, row.assignment)):
        earlier = replace(row, assignment=other.assignment, loss_deployed=loss, brier_deployed=None)
        results = tuple(earlier if r == row else r for r in record.results)
        replace(record, results=results).save(tmp_path / "run" / "record.json")
        assert chosen_for(stored, run, budget) == expected


def test_the_best_of_a_search_is_what_is_exported_and_evaluated_later(finished, record):
    from flows.commands.stored import StoredRun, chosen_for

    run = open_run(parse_config(finished.document))
    for budget in run.budgets:
        chosen = chosen_for(StoredRun.open(finished.folder), run, budget)
        assert chosen == record.find(budget.name, CHOSEN).assignment


def test_each_layer_is_prepared_once_with_and_without_corrections(finished):
    run = open_run(parse_config(finished.document))
    layers = range(run.space.num_layers)
    tasks = finished.calls.of("prepare")
    done = [(task.plain, task.layer) for task in tasks if isinstance(task, LayerTask)]
    assert sorted(done) == [(plain, layer) for plain in (False, True) for layer in layers]
    swept = [(task.plain, task.block, task.layers) for task in tasks if isinstance(task, SweepTask)]
    assert sorted(swept) == [(False, block, tuple(layers)) for block in range(len(run.preparation.blocks))]
    assert not list(finished.folder.glob("prepared/*/inputs"))
    assert run.preparation.unprepared() == []


def test_what_ships_is_corrected_and_the_record_says_what_that_is_worth(record):
    assert record.corrections == "output_statistics + batchnorm_reestimation"
    rows = [row for row in record.results if row.method != UNIFORM]
    plain = [row for row in rows if row.validation_plain is not None]
    assert {row.budget for row in plain} == set(record.budgets)
    assert all(row.validation.top1 > row.validation_plain.top1 for row in plain)


def test_a_second_run_computes_nothing_and_says_the_same(finished, record, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    calls, _ = run_pipeline(document, tracked=False)
    assert calls.made == []
    again = RunRecord.load(tmp_path / "run" / "record.json")
    assert [(r.assignment, r.loss_deployed, r.validation) for r in again.results] == [
        (r.assignment, r.loss_deployed, r.validation) for r in record.results
    ]
    assert arrays(tmp_path / "run") == arrays(finished.folder)


def test_a_new_budget_measures_no_tile_and_only_what_is_new(finished, record, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    calls, _ = run_pipeline({**document, "budgets": {"average_bits": [2.5, 2.75]}}, tracked=False)
    again = RunRecord.load(tmp_path / "run" / "record.json")
    new = {c.assignment for c in again.measured_proposals} - {c.assignment for c in record.measured_proposals}
    assert calls.of("run_tile") == []
    assert set(calls.of("measure_loss")) == new
    assert len(calls.of("measure_loss")) == len(new) > 0
    reported = {r.assignment for r in again.results} - {r.assignment for r in record.results}
    evaluated = {a for _, group in calls.of("evaluate_batch") for a in group}
    assert reported <= evaluated <= reported | {a.with_corrections("none") for a in reported}


@pytest.mark.system
def test_a_damaged_and_a_lost_chunk_are_the_only_ones_measured_again(finished, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    plan = open_run(parse_config(document)).plan
    damaged, lost = (next(t for t in plan.tiles if t.kind == kind and t.sample_block == 2) for kind in ("gram", "pairs"))
    chunks = tmp_path / "run" / "store.zarr"
    file = chunks / "gram" / "sums" / "c" / "2" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (chunks / "pairs" / "sums" / "c" / "2" / "0" / "0").unlink()
    calls, _ = run_pipeline(document, tracked=False)
    assert sorted(calls.made) == sorted([("run_tile", damaged), ("run_tile", lost)])
    assert arrays(tmp_path / "run") == arrays(finished.folder)
    notes = RunRecord.load(tmp_path / "run" / "record.json").notes
    assert any("2 damaged tiles were" in note for note in notes)


@pytest.mark.system
def test_a_run_that_dies_between_tiles_computes_only_the_absent_ones(finished, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    plan = open_run(parse_config(document)).plan
    shutil.rmtree(tmp_path / "run" / "evaluations")
    absent = [tile for k, tile in enumerate(plan.tiles) if k % 4 == 1 and tile.kind != "pairs"]
    store = MeasurementStore.open(tmp_path / "run" / "store.zarr")
    for tile in absent:
        store.group[f"{tile.kind}/done"][tile.sample_block, tile.number] = 0
    calls, _ = run_pipeline(document, tracked=False)
    assert calls.of("run_tile") == absent
    assert arrays(tmp_path / "run") == arrays(finished.folder)


def test_what_an_earlier_run_of_other_settings_left_is_not_shown_as_of_this_one(finished, tmp_path):
    document = copy_of(finished, tmp_path / "run")
    run = tmp_path / "run"
    exported = run / "exports" / "3_bits"
    other = json.loads((exported / "assignment.json").read_text()) | {"bits": {}}
    (exported / "assignment.json").write_text(json.dumps(other))
    for name in ("network.onnx", "packed.safetensors", "assignment_mct.py", "mine.txt"):
        (exported / name).write_text("of another assignment")
    run_pipeline({**document, "estimators": ["layerwise", "gauss_newton"]}, tracked=False)
    assert {file.stem for file in (run / "matrices").iterdir()} == {"layerwise", "gauss_newton"}
    assert not (run / "plots" / "heat_map_pairwise.png").exists()
    assert {file.name for file in exported.iterdir()} == {"README.md", "assignment.json", "weights.safetensors", "mine.txt"}


def test_a_run_of_other_constraints_that_died_early_leaves_no_answer_that_breaks_them(finished, tmp_path):
    """Its settings are new then, and the record of before."""
    document = copy_of(finished, tmp_path / "run")
    row = RunRecord.load(finished.folder / "record.json").find("3 bits", CHOSEN)
    bound = row.size_bytes - 2000
    config = parse_config({**document, "constraints": [{"kind": "size", "bound": bound}]})
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    stored, run = StoredRun.open(tmp_path / "run"), open_run(config)
    assert run.space.size_bytes(chosen_for(stored, run, Budget("average_bits", 3.0))) <= bound


def test_a_run_in_which_uniform_bits_have_no_finite_loss_is_recorded(finished, tmp_path, monkeypatch):
    document = copy_of(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations")
    plain = RunEvaluation.loss

    def broken(self: RunEvaluation, assignment: Assignment) -> Counts:
        counts = plain(self, assignment)
        nowhere = replace(counts, loss=math.nan, briers=(math.nan,) * counts.num_images, hits="0" * counts.num_images)
        return nowhere if set(assignment.bits) == {2} else counts

    monkeypatch.setattr(RunEvaluation, "loss", broken)
    run_pipeline(document, tracked=False)
    record = RunRecord.load(tmp_path / "run" / "record.json")
    for budget in record.budgets:
        assert record.find(budget, UNIFORM).loss_deployed == math.inf
        assert math.isfinite(record.find(budget, CHOSEN).loss_deployed)
    assert "inf" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize("added", ["", ", bias=False"], ids=["own bias", "a bias that corrections added"])
@pytest.mark.parametrize("result", ["network", "(network, example)"])
def test_the_snippet_of_a_factory_takes_what_a_factory_may_give(result, added, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = f"factory_{len(result)}_{len(added)}"
    (tmp_path / f"{module}.py").write_text(
        f"import torch\ndef make():\n    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3{added}))\n"
        f"    example = torch.zeros(1, 1, 2, 2)\n    return {result}\n"
    )
    network = NetworkSettings(source="factory", name=f"{module}:make")
    scope: dict = {}
    monkeypatch.syspath_prepend(tmp_path)
    run = SimpleNamespace(config=SimpleNamespace(network=network), loaded=SimpleNamespace(image_shape=(1, 2, 2)))
    snippet = loading_snippet(run, bool(added))
    state = {"1.weight": torch.ones(3, 4), "1.bias": torch.full((3,), 2.0)}
    save_file(state, tmp_path / "weights.safetensors")
    exec(snippet, scope)
    assert torch.equal(scope["network"](torch.zeros(1, 1, 2, 2)), torch.full((1, 3), 2.0))
    assert torch.equal(scope["network"][1].weight, state["1.weight"])


def test_an_exported_readme_says_inputs_outputs_and_accuracy(finished, record):
    for budget in record.budgets:
        readme = (finished.folder / "exports" / budget.replace(" ", "_") / "README.md").read_text()
        assert "Input: float32 (images, 1, 28, 28): pixels / 255, minus 0.286, divided by 0.353" in readme
        assert "Output: logits of 10 classes" in readme
        validation = record.find(budget, CHOSEN).validation
        assert f"Measured: top-1 {100 * validation.top1:.2f} % (95 %: " in readme
        assert f"on {validation.num_images:,} images" in readme


def test_an_export_loads_back_with_its_snippet_and_has_the_recorded_accuracy(finished, record, slices, monkeypatch):
    x, y = slices.validation.load(0, 100)
    for budget in record.budgets:
        folder = finished.folder / "exports" / budget.replace(" ", "_")
        snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        monkeypatch.chdir(folder)
        scope: dict = {}
        exec(snippet, scope)
        row = record.find(budget, CHOSEN)
        with torch.no_grad():
            hits = scope["network"].eval()(x).argmax(1) == y
        assert float(hits.double().mean()) == row.validation.top1
        document = json.loads((folder / "assignment.json").read_text())
        assert document["bits"] == dict(zip(record.layer_names, row.assignment.bits, strict=True))
        assert document["size_bytes"] == row.size_bytes
        state = dict(scope["network"].named_parameters())
        for name, bits in document["bits"].items():
            assert all(len(channel.unique()) <= 2**bits - 1 for channel in state[name])


def test_mlflow_has_a_parent_run_and_a_child_for_each_result(finished, record):
    from mlflow import MlflowClient

    receipt = finished.receipt
    assert receipt.delivered, receipt.problem
    client = MlflowClient(receipt.uri)
    runs = client.search_runs([receipt.experiment_id], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == receipt.parent_run_id]
    assert [run.info.run_id for run in parents] == [receipt.parent_run_id]
    assert len(children) == len(record.results) == len(runs) - 1
    assert all(run.info.status == "FINISHED" for run in runs)


def test_the_parent_run_says_what_it_was_made_with(finished, record):
    """The revision of the code, versions, device, and hashes of network and settings."""
    from mlflow import MlflowClient

    tags = MlflowClient(finished.receipt.uri).get_run(finished.receipt.parent_run_id).data.tags
    root = Path(clado.__file__).parents[1]
    known = git_revision(root)
    assert tags["git_revision"].split("-")[0] == known.split("-")[0]
    assert {"python", "torch", "device", "weights_sha256", "fingerprint"} <= {name for name, value in tags.items() if value}
    assert tags["weights_sha256"] == record.provenance["weights_sha256"]


def test_the_revision_is_that_of_the_checkout_and_says_where_files_differ(tmp_path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_revision(tmp_path) == ""
    (tmp_path / "file").write_text("one")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "inside").mkdir()
    assert git_revision(tmp_path / "inside") == ""


def test_the_folder_holds_what_the_readme_says(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "store.zarr",
        "matrices",
        "evaluations",
        "record.json",
        "table.md",
        "plots",
        "exports",
        "mlflow-delivered.json",
    }
    assert {path.stem for path in (finished.folder / "matrices").iterdir()} == set(ESTIMATORS)
    assert not list(finished.folder.rglob("*.part*"))


def test_channels_last_turns_weights_and_images_and_changes_rounding_alone(tmp_path, slices, model):
    document = config(tmp_path / "turned", network={"source": "zoo", "name": "resnet20_fashion_mnist", "channels_last": True})
    network = open_run(parse_config(document)).float_network
    kernels = [weight for weight in network.weights if weight.ndim == 4 and weight[0, 0].numel() > 1 and weight.shape[1] > 1]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    images = slices.validation.load(0, 4)[0]
    tolerance.assert_close(network.logits(images), replaced_logits(model, {}, images), tolerance.of_layers(network.layers))


@pytest.mark.parametrize(
    ("name", "chosen", "only_avx2", "turned"),
    [
        ("mobilenetv2_fashion_mnist", None, False, True),  # depthwise
        ("mobilenetv2_fashion_mnist", False, True, False),
        ("resnet20_fashion_mnist", None, False, False),
        ("resnet20_fashion_mnist", None, True, True),
    ],
)
def test_channels_last_is_the_default_where_convolutions_are_faster_so(name, chosen, only_avx2, turned, tmp_path, monkeypatch):
    monkeypatch.setattr("clado.network.network.ONLY_AVX2", only_avx2)
    settings = {"source": "zoo", "name": name} | ({} if chosen is None else {"channels_last": chosen})
    document = config(tmp_path / "run", network=settings, cluster={"kind": "inline", "device": "cpu"})
    assert open_run(parse_config(document)).float_network.channels_last is turned
