"""Record: what was found becomes a file, plots, exported networks and an MLflow run."""

import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

import clado
from clado.errors import NetworkError
from clado.exporting.model import export_model
from clado.interaction import estimators
from clado.quantization.preparation import names_of
from clado.records import CHOSEN, Receipt, Result, RunRecord, write_text
from clado.reporting import page, plots, tables
from clado.run.opened_run import OpenedRun
from clado.tracking import delivery, notes
from flows import artifacts
from flows.commands.export import budget_folder, export, model_folder
from flows.phases.choose import measured_proposals, summaries
from flows.phases.run import Run

LIBRARIES = ("torchvision", "zarr", "distributed", "prefect", "pyscipopt", "mlflow")  # beside those of OpenedRun.provenance


def record_of(run: Run) -> RunRecord:
    """The record of a run whose proposals are measured and evaluated."""
    session = run.session
    probe_losses = {assignment: counts.accuracy().loss for assignment, counts in run.probe_losses.items()}
    accuracies = {assignment: counts.accuracy() for assignment, counts in run.accuracies.items()}
    results = tuple(
        replace(
            row,
            loss_probe_model=probe_losses.get(row.assignment),
            validation=accuracies.get(row.assignment),
            validation_plain=accuracies.get(row.assignment.with_corrections("none")) if session.config.corrections else None,
        )
        for row in run.results()
    )
    baseline = next(iter(run.matrices.values())).baseline
    space = session.space
    tried = {assignment for searched in run.searched.values() for assignment in searched.tried}
    num_images = len(session.slices.sensitivity)
    reestimated = sum(assignment.corrected == "all" for assignment in run.losses)
    choosing = {
        "proposals": len(run.losses.keys() - tried) * num_images,
        "local_search": len(tried) * num_images,
        "batchnorm_reestimation": (1 + reestimated) * session.images_per_reestimation,
    }
    return RunRecord(
        network=session.loaded.description,
        layer_names=space.names,
        layer_weights=tuple(layer.num_weights for layer in space.layers),
        fingerprint=session.open_store().fingerprint,
        criterion=session.config.criterion,
        corrections=names_of(session.config.corrections),
        imagenet=session.slices.imagenet,
        measured_proposals=measured_proposals(run),
        searches=summaries(run),
        stability=run.stability,
        baseline=baseline,
        float_accuracy=accuracies[space.nothing],
        results=results,
        seconds=run.clock.seconds,
        forwards={
            kind: run.session.plan.forward_images([t for t in session.plan.tiles if t.kind == kind])
            for kind in session.plan.kinds
        }
        | {name: count for name, count in choosing.items() if count},
        notes=(*session.notes, *run.notes),
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
        unsearched=tuple(session.float_network.coverage()),
        provenance=provenance_of(session),
        data=data_of(session),
        costs={
            name: {"forwards": forwards, "backwards": backwards}
            for name, (forwards, backwards) in estimators.costs(session.config.estimators, session.plan).items()
        },
    )


def provenance_of(session: OpenedRun) -> dict[str, str]:
    """Versions, device, hash of the weights, and the revision of this code where it is a checkout."""
    known = {"python": platform.python_version(), **{name: str(value) for name, value in session.provenance.items()}}
    for name in LIBRARIES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return {
        **known,
        "weights_sha256": session.loaded.weights_sha256,
        "git_revision": git_revision(Path(clado.__file__).parents[1]),
    }


def data_of(session: OpenedRun) -> dict[str, dict[str, Any]]:
    """Number of images and hash of each set that the run read."""
    names = ("calibration", "sensitivity", "validation")
    slices = {name: getattr(session.slices, name) for name in names}
    return {f"{name}_set": {"num_images": len(part), "sha256": part.sha256} for name, part in slices.items() if len(part)}


def git_revision(root: Path) -> str:
    """Commit of a checkout, with "-dirty" where files differ from it; empty where `root` is none."""
    command = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*command, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10, check=True)
        if Path(top.stdout.strip()).resolve() != root.resolve():  # installed into another project's folder
            return ""
        asked = [*command, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@task(name="record", cache_policy=NO_CACHE, persist_result=False)
def record(run: Run) -> None:
    """Writes record.json, table.md, plots, report.html and the chosen network of every budget."""
    session = run.session
    chosen = [row for row in run.results() if row.method == CHOSEN]
    if session.config.tracking.models:
        run.notes += write_models(session, chosen)
    run.notes += write_exports(session, chosen)
    found = record_of(run)
    found.save(session.folder / "record.json")
    write_text(session.folder / "table.md", tables.markdown(found))
    drawn = plots.save_all(found, run.matrices, session.folder / "plots")
    _remove_others(session.folder / "plots", drawn)
    _remove_others(session.folder / "matrices", [session.folder / "matrices" / f"{name}.npz" for name in run.matrices])
    page.write(session.folder)


def _remove_others(folder: Path, kept: Sequence[Path]) -> None:
    """Removes what an earlier run of other estimators left in a folder; all of it can be made again from the store."""
    for file in folder.iterdir():
        if file not in kept and file.suffix in {path.suffix for path in kept}:
            file.unlink()


def write_exports(session: OpenedRun, chosen: Sequence[Result]) -> list[str]:
    """The chosen networks as safetensors, and a note of those that a torch module cannot hold."""
    refused: dict[str, list[str]] = {}
    for row in chosen:
        folder = budget_folder(session, row.budget)
        try:
            export(session, row.assignment, folder)
        except NetworkError as error:
            shutil.rmtree(folder, ignore_errors=True)  # of other bits
            refused.setdefault(str(error), []).append(row.budget)
    return [f"there is no export of {', '.join(budgets)}: {reason}" for reason, budgets in refused.items()]


def write_models(session: OpenedRun, chosen: Sequence[Result]) -> list[str]:
    """The chosen networks as MLflow gets them, and a note of those that a torch module cannot hold."""
    refused: dict[str, list[str]] = {}
    for row in chosen:
        folder = model_folder(session, row.budget)
        try:
            export_model(folder, *session.deployed(row.assignment), session.config.network)
        except NetworkError as error:
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier run of other bits may have left
            refused.setdefault(str(error), []).append(row.budget)
    return [f"MLflow gets no model of {', '.join(budgets)}: {reason}" for reason, budgets in refused.items()]


@contextmanager
def failure_recorded(session: OpenedRun) -> Iterator[None]:
    """Around a run: an error goes on as it is, once MLflow and the run's failure.txt have it with its traceback."""
    config = session.config
    try:
        yield
    except Exception as error:
        delivery.track_failure(
            error,
            session.folder,
            config.model_dump(mode="json"),
            network=session.loaded.description,
            experiment=config.tracking.experiment,
            uri=config.tracking.uri,
            tags=_tags(session),
        )
        raise
    (session.folder / notes.FAILURE).unlink(missing_ok=True)


def _tags(session: OpenedRun) -> dict[str, str]:
    """Provenance, and where Prefect has the run."""
    return {**provenance_of(session), "prefect_flow_run_id": str(flow_run.id or "")}


def models_of(session: OpenedRun, found: RunRecord) -> dict[str, Path]:
    """Folders of the models that were written, by budget."""
    folders = {budget: model_folder(session, budget) for budget in found.budgets}
    return {budget: folder for budget, folder in folders.items() if folder.is_dir()}


@task(name="track", cache_policy=NO_CACHE, persist_result=False)
def track(run: Run) -> Receipt:
    """Mirrors the record to MLflow; a tracker that does not answer is a warning, not a failure."""
    session, config = run.session, run.session.config
    found = RunRecord.load(session.folder / "record.json")
    receipt = delivery.track(
        found,
        session.folder,
        config.model_dump(mode="json"),
        experiment=config.tracking.experiment,
        uri=config.tracking.uri,
        tags=_tags(session),
        matrices={name: session.folder / "matrices" / f"{name}.npz" for name in run.matrices},
        plots=sorted((session.folder / "plots").glob("*.png")),
        exports={b: folder for b in found.budgets if (folder := budget_folder(session, b)).is_dir()},
        models=models_of(session, found) if config.tracking.models else {},
        description=tables.markdown(found),
    )
    artifacts.show(found, receipt)
    return receipt
