"""A short measurement that turns a plan into an ETA."""

import time

from clado.measure import measure_tile
from clado.probes import Tile
from flows.session import Session

LIMIT_SECONDS = 20.0


def eta_text(session: Session) -> str:
    """Times some whole forwards and as many small tiles as fit into 20 s, and scales by multiply-accumulates. Writes nothing."""
    plan, space, workers, work = session.plan, session.space, session.config.cluster.workers, session.workload
    begin = time.perf_counter()
    forward = _seconds_per_image(session)
    # a tile runs at another rate than whole forwards; where not even a small one fits, theirs has to do
    rate, done, spent = forward / work.macs, 0, 0.0
    rows = max(1, min(space.num_options, plan.rows_per_tile) // 8)
    warm_up = Tile("singles", 0)
    pairs = [Tile("pairs", 0, 0, first, first + rows) for first in range(0, space.num_options - rows, 2 * rows)]
    for tile in [warm_up, warm_up, *(pairs if "pairs" in plan.kinds else [])]:
        if time.perf_counter() - begin + 1.5 * plan.macs(tile, work) * rate > LIMIT_SECONDS:
            break
        started = time.perf_counter()
        measure_tile(session.bench, tile)
        seconds, macs = time.perf_counter() - started, plan.macs(tile, work)
        # of the two warm-ups the second counts: the first loads images and compiles kernels
        spent, done = (seconds, macs) if tile is warm_up else (spent + seconds, done + macs)
        rate = spent / done
    measuring = sum(plan.macs(tile, work) for tile in plan.tiles) * rate / workers
    images = session.slices.validation
    most = 1 + len(session.budgets) * (1 + len(session.config.estimators))
    return (
        f"  ETA: measuring {measuring:.0f} s, evaluation at most {most * len(images) * forward / workers:.0f} s "
        f"({most} assignments of {len(images):,} images) on {workers} workers, if each is as fast as this process"
    )


def _seconds_per_image(session: Session) -> float:
    """Seconds of a whole forward of one image: of batches that grow from one image until they take a second."""
    images, count = session.slices.validation, 1
    while True:
        batch, _ = images.load(0, count)
        session.network.logits(batch[:1])
        started = time.perf_counter()
        session.network.logits(batch)
        seconds = time.perf_counter() - started
        if seconds > 1.0 or count >= min(128, len(images)):
            return seconds / len(batch)
        count = min(4 * count, 128, len(images))
