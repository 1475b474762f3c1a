"""Record: writes the results as a record, tables, plots and exported networks."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite, nan
from pathlib import Path
from typing import Any

import clado
from clado.choosing.choice import safe_methods
from clado.choosing.local_search import Searched
from clado.choosing.proposals import Budget, Proposal
from clado.errors import NetworkError
from clado.evaluation import Counts, compared
from clado.exporting.model import export_model
from clado.interaction import estimators
from clado.interaction.estimators import with_interactions
from clado.interaction.matrix import InteractionMatrix
from clado.quantization.preparation import names_of
from clado.quantization.reconstruction import EFFORTS
from clado.records.results import CHOSEN, FLOAT, LOCAL_SEARCH, Comparison, MeasuredProposal, Result, SearchSummary
from clado.records.run_record import RunRecord
from clado.records.serving import Serving
from clado.records.text import write_text
from clado.reporting import page, plots, tables
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.commands.export import budget_folder, export, model_folder
from flows.phases.choose import Choice, predicted_loss

LIBRARIES = (
    "torchvision",
    "zarr",
    "distributed",
    "prefect",
    "pyscipopt",
    "mlflow",
)  # others are in RunIdentity.provenance


def record(
    run: OpenedRun,
    choice: Choice,
    accuracies: Mapping[Assignment, Counts],
    notes: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    serving: Serving | None = None,
) -> RunRecord:
    """Writes record.json, table.md, plots, report.html and the chosen network of every budget.

    Args:
        run: The run.
        choice: What was chosen.
        accuracies: Counts on the validation set.
        notes: The notes of earlier phases, in their order.
        seconds: Seconds of each phase.
        serving: Measurements in the runtime of the settings.

    Returns:
        The record that was written.
    """
    chosen = [row for row in choice.results if row.method == CHOSEN]
    notes = [*notes, *(write_models(run, chosen) if run.config.tracking.models else []), *write_exports(run, chosen)]
    recorded = replace(record_of(run, choice, accuracies, notes, seconds or {}), serving=serving)
    recorded.save(run.folder / "record.json")
    write_text(run.folder / "table.md", tables.markdown(recorded))
    matrices = choice.matrices.named
    _remove_others(run.folder / "plots", plots.save_all(recorded, matrices, run.folder / "plots"))
    _remove_others(run.folder / "matrices", [run.folder / "matrices" / f"{name}.npz" for name in matrices])
    page.write(run.folder)
    return recorded


def record_of(
    run: OpenedRun,
    choice: Choice,
    accuracies: Mapping[Assignment, Counts],
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> RunRecord:
    """The record of a run whose proposals have been measured and evaluated."""
    space, config = run.space, run.config
    validation = {assignment: counts.accuracy() for assignment, counts in accuracies.items()}
    results = tuple(
        replace(
            row,
            validation=validation.get(row.assignment),
            validation_plain=validation.get(row.assignment.with_corrections("none")) if config.corrections else None,
        )
        for row in choice.results
    )
    return RunRecord(
        network=run.loaded.description,
        layer_names=space.names,
        layer_weights=tuple(layer.num_weights for layer in space.layers),
        fingerprint=run.identity.open_store().fingerprint,
        criterion=config.criterion,
        corrections=names_of(config.corrections),
        imagenet=run.slices.imagenet,
        measured_proposals=measured_proposals(run, choice),
        searches=summaries(choice),
        stability=choice.stability,
        baseline=next(iter(choice.matrices.named.values())).baseline,
        float_accuracy=validation[space.nothing],
        results=results,
        comparisons=comparisons_of(run, results, accuracies),
        seconds=dict(seconds),
        forwards=forwards_of(run, choice, accuracies),
        notes=(*run.notes, *notes),
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
        unsearched=tuple(run.float_network.coverage()),
        provenance=provenance_of(run),
        data=data_of(run),
        costs={
            name: {"forwards": forwards, "backwards": backwards}
            for name, (forwards, backwards) in estimators.costs(config.estimators, run.plan).items()
        },
    )


def comparisons_of(run: OpenedRun, results: Sequence[Result], accuracies: Mapping[Assignment, Counts]) -> tuple[Comparison, ...]:
    """Comparisons for each budget on the same validation images.

    They compare the chosen answer with float and all others, and estimators with interactions with those without.
    """
    named, comparisons = run.config.estimators, []
    safe, interacting = [name for name in named if name in safe_methods()], with_interactions(named)
    for budget in dict.fromkeys(row.budget for row in results):
        answers = {FLOAT: run.space.nothing} | {row.method: row.assignment for row in results if row.budget == budget}
        pairs = [(CHOSEN, method) for method in answers if method != CHOSEN]
        pairs += [(method, other) for method in interacting[:1] for other in safe[:1]]
        for method, other in pairs:
            one, another = answers.get(method), answers.get(other)
            if one is not None and another is not None and one != another:
                compared_rows = compared(budget, method, other, accuracies[one], accuracies[another])
                comparisons += [] if compared_rows is None else [compared_rows]
    return tuple(comparisons)


def forwards_of(run: OpenedRun, choice: Choice, accuracies: Mapping[Assignment, Counts]) -> dict[str, int]:
    """Forward images of each tile kind, of choosing, and of accuracies."""
    plan, representative = run.plan, run.evaluation.representative
    tried = {representative(assignment) for searched in choice.searched.values() for assignment in searched.tried}
    others = {representative(assignment) for assignment in choice.other_corrections} - tried
    measured, evaluated = ({representative(assignment) for assignment in counts} for counts in (choice.losses, accuracies))
    num_images, num_validation = len(run.decision), len(run.slices.validation)
    reestimated = sum(assignment.corrected == "all" for assignment in measured)
    reconstructed = [assignment for assignment in measured if assignment.is_reconstructed]
    is_labelled = all(counts.top1 is not None for counts in accuracies.values())
    choosing = {
        "proposals": len(measured - tried - others) * num_images,
        "reconstruction": sum(EFFORTS[assignment.corrected].trained_images for assignment in reconstructed),
        "local_search": len(tried) * num_images,
        "other_corrections": len(others) * num_images,
        "batchnorm_reestimation": (1 + reestimated) * run.preparation.images_per_reestimation,
        "validation": (len(evaluated) + (not is_labelled)) * num_validation,
    }
    measuring: dict[str, int] = {
        kind: plan.forward_images([tile for tile in plan.tiles if tile.kind == kind]) for kind in plan.kinds
    }
    return {**measuring, **{name: count for name, count in choosing.items() if count}}


def summaries(choice: Choice) -> tuple[SearchSummary, ...]:
    """The start and the gain of each budget's local search."""
    return tuple(
        SearchSummary(
            budget.name,
            choice.surrogate,
            _proposer(choice.proposals, budget, searched),
            searched.start_loss,
            searched.best_loss,
            searched.gain,
            len(searched.tried),
        )
        for budget, searched in choice.searched.items()
    )


def _proposer(proposals: Iterable[Proposal], budget: Budget, searched: Searched) -> str:
    """Who proposed the start of a search, for this budget or for another."""
    makers = [p for p in proposals if p.assignment == searched.start and p.method != LOCAL_SEARCH]
    proposer = next((p.method for p in makers if p.budget == budget), None)
    return proposer or f"{makers[0].method} for {makers[0].budget.name}"


def measured_proposals(run: OpenedRun, choice: Choice) -> tuple[MeasuredProposal, ...]:
    """All assignments measured for each budget: proposals, variants, and those of the local search, in this order."""
    predictor = _predictor(choice.matrices.every)

    def measured(proposal: Proposal) -> MeasuredProposal:
        assignment, predicted = proposal.assignment, proposal.loss_predicted
        counts, by = choice.losses[assignment], ""
        loss, brier = counts.accuracy().loss, float(counts.each_brier.mean()) if counts.hits else nan
        if predicted is None and predictor is not None and (predicted := predicted_loss(predictor, assignment)) is not None:
            by = predictor.estimator
        return MeasuredProposal(
            proposal.budget.name,
            proposal.method,
            assignment,
            run.space.size_bytes(assignment),
            loss if isfinite(loss) else None,
            predicted,
            brier if isfinite(brier) else None,
            float(counts.each_hit.mean()) if counts.hits else None,
            by,
        )

    return tuple(
        measured(proposal)
        for budget in dict.fromkeys(proposal.budget for proposal in choice.proposals)
        for proposal in choice.proposals
        if proposal.budget == budget
    )


def _predictor(matrices: Mapping[str, InteractionMatrix]) -> InteractionMatrix | None:
    """The matrix that predicts losses if the proposing one does not: the first by `Estimator.prediction_order`."""
    names = sorted(matrices, key=lambda name: estimators.estimator_of(name).prediction_order)
    return next((matrices[name] for name in names if not matrices[name].ranking_only), None)


def provenance_of(run: OpenedRun) -> dict[str, str]:
    """Versions, device, hash of the weights, and the revision of this code if it is a checkout."""
    known = {"python": platform.python_version(), **{name: str(value) for name, value in run.identity.provenance.items()}}
    for name in LIBRARIES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:  # an optional library
            continue
    return {
        **known,
        "weights_sha256": run.loaded.weights_sha256,
        "git_revision": git_revision(Path(clado.__file__).parents[1]),
    }


def data_of(run: OpenedRun) -> dict[str, dict[str, Any]]:
    """The number of images and the hash of each set that the run read."""
    names = ("calibration", "sensitivity", "validation")
    slices = {**{name: getattr(run.slices, name) for name in names}, "decision": run.decision}
    return {f"{name}_set": {"num_images": len(part), "sha256": part.sha256} for name, part in slices.items() if len(part)}


def git_revision(root: Path) -> str:
    """The commit of a checkout, with "-dirty" if files differ from it. Empty if `root` is not a checkout."""
    command = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*command, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10, check=True)
        if Path(top.stdout.strip()).resolve() != root.resolve():  # clado is installed inside another project's folder
            return ""
        arguments = [*command, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _remove_others(folder: Path, kept: Sequence[Path]) -> None:
    """Removes files of an earlier run with other estimators. All of them can be made again from the store."""
    for file in folder.iterdir():
        if file not in kept and file.suffix in {path.suffix for path in kept}:
            file.unlink()


def write_exports(run: OpenedRun, chosen: Sequence[Result]) -> list[str]:
    """Exports the chosen networks as safetensors. Returns a note of those that a torch module cannot hold."""
    refused = _written(chosen, lambda budget: budget_folder(run, budget), lambda row, folder: export(run, row.assignment, folder))
    return [f"there is no export of {', '.join(budgets)}: {reason}" for reason, budgets in refused.items()]


def write_models(run: OpenedRun, chosen: Sequence[Result]) -> list[str]:
    """Writes the chosen networks as models for MLflow. Returns a note of those that a torch module cannot hold."""

    def write(row: Result, folder: Path) -> None:
        export_model(folder, *run.preparation.deployed(row.assignment), run.config.network)

    refused = _written(chosen, lambda budget: model_folder(run, budget), write)
    return [f"MLflow gets no model of {', '.join(budgets)}: {reason}" for reason, budgets in refused.items()]


def _written(
    chosen: Sequence[Result], folder_of: Callable[[str], Path], write: Callable[[Result, Path], object]
) -> dict[str, list[str]]:
    """Writes each chosen network to its budget's folder. Returns the refused budgets by reason."""
    refused: dict[str, list[str]] = {}
    for row in chosen:
        folder = folder_of(row.budget)
        try:
            write(row, folder)
        except NetworkError as error:
            shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have left a network with other bits
            refused.setdefault(str(error), []).append(row.budget)
    return refused
