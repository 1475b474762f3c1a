"""Measure: workers write absent tiles to the store, then the sums of all tiles are read."""

from dataclasses import dataclass

from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.run.opened_run import OpenedRun
from clado.storage.measurement_store import MeasurementStore
from flows import worker
from flows.clusters import Workers
from flows.progress import progress


@dataclass(frozen=True)
class Measurement:
    """The result of the measure phase."""

    measured: Measured
    """The sums of every tile of the plan."""
    computed: int
    """Tiles computed now."""
    tiles: int
    """Tiles of the plan."""
    evaluations: dict[str, int]
    """Evaluations done now, by tile kind."""
    notes: tuple[str, ...]
    """Notes for the reader of the record."""


def measure(run: OpenedRun, workers: Workers) -> Measurement:
    """Computes the tiles that the store lacks, and reads all. A damaged chunk counts as missing."""
    notes: list[str] = []
    store, plan = run.identity.open_store(), run.plan
    store.extend(plan)
    todo = store.missing(plan)
    damaged = store.damaged(tile for tile in plan.tiles if tile not in set(todo))
    if damaged:
        tiles = "tile was" if len(damaged) == 1 else "tiles were"
        notes.append(f"{len(damaged)} damaged {tiles} measured again (the checksum differed)")
        todo = store.missing(plan)
    drift = store.provenance_differences(run.identity.provenance)
    if drift and len(todo) < len(plan.tiles):
        notes.append("the store was begun with other versions or on another device: " + "; ".join(drift))
    evaluations: dict[str, int] = {}
    cost = {tile: plan.macs(tile, run.workload) for tile in todo}
    in_flight = run.config.cluster.workers * max(cost.values(), default=0.0)
    with progress("measuring", sum(cost.values()), in_flight) as advance:
        for receipt in workers.map(worker.run_tile, run.config, todo):
            evaluations[receipt.tile.kind] = evaluations.get(receipt.tile.kind, 0) + receipt.evaluations
            advance(cost[receipt.tile])
    store = MeasurementStore.open(run.store_path)
    measured = Measured(run.space, run.config.criterion, store.counts, store.gather(plan))
    notes += estimators.non_finite(measured)
    return Measurement(measured, len(todo), len(plan.tiles), evaluations, tuple(notes))
