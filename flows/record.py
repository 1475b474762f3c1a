"""Record: what was found becomes a file, plots, exported networks and an MLflow run."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from clado import plots, report, tracking
from clado.candidates import choose
from clado.records import CHOSEN, Result, RunRecord, write_text
from flows.export import budget_folder, export
from flows.run import Run


def record_of(run: Run) -> RunRecord:
    """The record of a run whose proposals are measured and evaluated."""
    session = run.session
    losses = {assignment: counts.accuracy().loss for assignment, counts in run.losses.items()}
    rows = choose(session.space, run.proposals, losses, session.limits)
    accuracies = {assignment: counts.accuracy() for assignment, counts in run.accuracies.items()}
    results = tuple(Result(**{**row.__dict__, "validation": accuracies.get(row.assignment)}) for row in rows)
    baseline = next(iter(run.matrices.values())).baseline
    space = session.space
    return RunRecord(
        network=session.loaded.description,
        layer_names=space.names,
        layer_weights=tuple(layer.num_weights for layer in space.layers),
        fingerprint=session.open_store().fingerprint,
        criterion=session.config.criterion,
        baseline=baseline,
        float_accuracy=accuracies[space.nothing],
        results=results,
        seconds=run.clock.seconds,
        forwards={
            kind: run.session.plan.forward_images([t for t in session.plan.tiles if t.kind == kind])
            for kind in session.plan.kinds
        },
        notes=tuple(run.notes),
    )


@task(name="record", cache_policy=NO_CACHE, persist_result=False)
def record(run: Run) -> None:
    """Writes record.json, table.md, plots and the chosen network of every budget."""
    session, found = run.session, record_of(run)
    found.save(session.folder / "record.json")
    write_text(session.folder / "table.md", report.markdown(found))
    plots.save_all(found, run.matrices, session.folder / "plots")
    for row in found.results:
        if row.method == CHOSEN:
            export(session, row.assignment, budget_folder(session, row.budget))


@task(name="track", cache_policy=NO_CACHE, persist_result=False)
def track(run: Run) -> tracking.Receipt:
    """Mirrors the record to MLflow; a tracker that does not answer is a warning, not a failure."""
    session, config = run.session, run.session.config
    found = RunRecord.load(session.folder / "record.json")
    return tracking.track(
        found,
        session.folder,
        config.model_dump(mode="json"),
        experiment=config.tracking.experiment,
        uri=config.tracking.uri,
        tags={**{key: str(value) for key, value in session.provenance.items()}, "prefect_flow_run_id": str(flow_run.id or "")},
        matrices={name: session.folder / "matrices" / f"{name}.npz" for name in run.matrices},
        plots=sorted((session.folder / "plots").glob("*.png")),
        exports={budget: budget_folder(session, budget) for budget in found.budgets},
        description=report.markdown(found),
    )
