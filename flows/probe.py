"""A short measurement that turns a plan into an ETA."""

import time

from clado.measure import measure_tile
from flows.session import Session

LIMIT_SECONDS = 20.0


def eta_text(session: Session) -> str:
    """Times one small tile and some whole forwards, at most 20 s, and scales by multiply-accumulates. Writes nothing."""
    from clado.probes import Plan, Tile

    plan, space, workers = session.plan, session.space, session.config.cluster.workers
    bench, begin = session.bench, time.perf_counter()
    measure_tile(bench, Tile("singles", 0))  # warms up: the first run compiles kernels and loads images
    done, spent = 0, 0.0
    rows = max(1, min(space.num_options, plan.rows_per_tile) // 8)
    samples = [
        Tile("singles", 0),
        *(Tile("pairs", 0, 0, first, first + rows) for first in range(0, space.num_options - rows, 2 * rows)),
    ]
    for tile in samples:
        if time.perf_counter() - begin > LIMIT_SECONDS * 0.6:
            break
        started = time.perf_counter()
        measure_tile(bench, tile)
        spent += time.perf_counter() - started
        done += Plan.macs(plan, tile, session.workload)
    measuring = sum(plan.macs(tile, session.workload) for tile in plan.tiles) * spent / done / workers
    images, started, counted = session.slices.validation, time.perf_counter(), 0
    while time.perf_counter() - begin < LIMIT_SECONDS * 0.8 and counted < min(len(images), 512):
        batch, _ = images.load(counted, min(counted + 128, len(images)))
        session.network.logits(batch)
        counted += len(batch)
    each = (time.perf_counter() - started) / max(counted, 1) * len(images) / workers
    most = 1 + len(session.budgets) * (1 + len(session.config.estimators))
    return (
        f"  ETA: measuring {measuring:.0f} s, evaluation at most {most * each:.0f} s "
        f"({most} assignments of {len(images):,} images) on {workers} workers, if each is as fast as this process"
    )
