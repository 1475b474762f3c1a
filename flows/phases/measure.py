"""Measure: absent tiles become chunks, chunks become matrices."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado.choosing import proposals
from clado.errors import StoreError
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.storage.measurement_store import MeasurementStore
from flows import worker
from flows.phases.run import Measuring, Run
from flows.progress import progress


@task(name="measure", cache_policy=NO_CACHE, persist_result=False)
def measure(run: Run) -> None:
    """Computes the tiles that the store lacks; a damaged chunk counts as lacking."""
    session, store = run.session, run.session.open_store()
    store.extend(session.plan)
    plan, todo = session.plan, store.missing(session.plan)
    damaged = store.damaged(tile for tile in plan.tiles if tile not in set(todo))
    if damaged:
        run.notes.append(f"{len(damaged)} damaged tiles were found by their checksum and measured again")
        todo = store.missing(plan)
    drift = store.provenance_differences(session.provenance)
    if drift and len(todo) < len(plan.tiles):
        run.notes.append("the store was begun with other versions or on another device: " + "; ".join(drift))
    evaluations: dict[str, int] = {}
    cost = {tile: plan.macs(tile, session.workload) for tile in todo}
    with progress("measuring", sum(cost.values())) as advance:
        for receipt in run.workers.map(worker.run_tile, session.config, todo):
            evaluations[receipt.tile.kind] = evaluations.get(receipt.tile.kind, 0) + receipt.evaluations
            advance(cost[receipt.tile])
    run.measuring = Measuring(len(todo), len(plan.tiles), evaluations)


@task(name="gather", cache_policy=NO_CACHE, persist_result=False)
def gather(run: Run) -> None:
    """Reads the store and lets every estimator make its matrix; keeps them as .npz files."""
    session = run.session
    store = MeasurementStore.open(session.store_path)
    measured = Measured(session.space, session.config.criterion, store.counts, store.gather(session.plan))
    run.measured = measured
    run.notes += estimators.non_finite(measured)
    for name in session.config.estimators:
        run.matrices[name] = estimators.estimate(name, measured)
        run.matrices[name].save(session.folder / "matrices" / f"{name}.npz")
    run.extra_matrices = proposals.extra_matrices(measured, run.matrices)
    run.uncorrected = estimators.uncorrected(measured)
    if not run.matrices:
        raise StoreError(f"{session.store_path} gave no matrix")
