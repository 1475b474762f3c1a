"""What lives on a Dask worker: the network, the sensitivity set and the store, loaded once, and the functions that tasks call."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from distributed import Worker, WorkerPlugin

from clado.errors import ServerError
from clado.evaluation import Counts, evaluation_batches
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Tile
from clado.run.opened_run import EVALUATION_BATCH, OpenedRun
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from clado.space import Assignment


@dataclass(frozen=True)
class Receipt:
    """What a task reports: the tile, its probes, and seconds in the worker. No tensor passes through the scheduler."""

    tile: Tile
    evaluations: int
    seconds: float


class SessionPlugin(WorkerPlugin):
    """Opens the run's session on every worker, also on one that is restarted."""

    name = "clado-session"

    def __init__(self, config: RunConfig, contents: str | None = None) -> None:
        self.document: dict[str, Any] = config.model_dump(mode="json")
        self.contents = contents  # what the flow's session holds

    def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts."""
        # Ctrl-C in a terminal, and what ends a batch job, reach every process of a group: they are the flow's to heed
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if self.document["cluster"]["kind"] in ("local", "local_gpus") and os.name == "posix":
                os.setpgid(0, 0)
        if self.contents in (None, open_session(self.document).contents):
            return
        # a worker that outlives a run may hold the network or the images of before
        _last.clear()
        OpenedRun.open.cache_clear()
        if open_session(self.document).contents != self.contents:
            raise ServerError(
                f"worker {worker.address} holds another network or other images than the flow, under the same settings; expected "
                "the same files there, and a worker that was started after the last change to the network's code: restart it"
            )


_last: list[tuple[dict[str, Any], RunConfig]] = []  # what the last task was given: to validate it again takes a millisecond


def open_session(document: dict[str, Any]) -> OpenedRun:
    """The session of a configuration, opened once in a process."""
    if not _last or _last[0][0] != document:
        _last[:] = [(document, parse_config(document))]
    return OpenedRun.open(_last[0][1])


def run_tile(document: dict[str, Any], tile: Tile) -> Receipt:
    """Measures one tile and writes its chunk."""
    session = open_session(document)
    begin = time.perf_counter()
    session.store.write(tile, measure_tile(session.bench_of(tile.kind), tile))
    return Receipt(tile, session.plan.evaluations(tile), time.perf_counter() - begin)


def prepare_layer(document: dict[str, Any], item: tuple[bool, int]) -> tuple[bool, int]:
    """Quantizes one layer, with corrections or plain, and writes its file."""
    open_session(document).prepare_layer(*item)
    return item


def measure_loss(document: dict[str, Any], assignment: Assignment) -> tuple[Assignment, Counts]:
    """Sums of an assignment's loss over the sensitivity set, as it ships."""
    return assignment, open_session(document).loss(assignment)


def measure_probe_loss(document: dict[str, Any], assignment: Assignment) -> tuple[Assignment, Counts]:
    """The same as probes see it."""
    return assignment, open_session(document).probe_loss(assignment)


def evaluate_batch(
    document: dict[str, Any], item: tuple[int, tuple[Assignment, ...]]
) -> tuple[int, list[tuple[Assignment, Counts]]]:
    """Counts of each assignment on one shard of the validation set, which is decoded once for all of them."""
    session = open_session(document)
    shard, asked = item
    start, stop = evaluation_batches(len(session.slices.validation), EVALUATION_BATCH)[shard]
    found = session.accuracies(asked, start, stop)
    return shard, list(zip(asked, found, strict=True))
