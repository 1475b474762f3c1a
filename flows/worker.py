"""Code on a Dask worker: the opened run, which is loaded once, and the functions that tasks call."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from distributed import Worker, WorkerPlugin

from clado.errors import ServerError
from clado.evaluation import Counts
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Tile
from clado.network.portable import PortableGraph
from clado.run.checks import checked
from clado.run.evaluation import BatchCounts, BatchItem
from clado.run.opened_run import OpenedRun, open_run
from clado.run.preparation import PreparationTask
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from clado.space import Assignment


@dataclass(frozen=True)
class Receipt:
    """The report of a task. No tensor passes through the scheduler."""

    tile: Tile
    """The tile that was measured."""
    evaluations: int
    """Number of losses that it holds."""
    seconds: float
    """How long it took on the worker."""


class RunPlugin(WorkerPlugin):
    """Opens the run on every worker, also on a restarted one."""

    name = "clado-run"

    def __init__(self, config: RunConfig, contents: str | None = None, exported: PortableGraph | None = None) -> None:
        self.document: dict[str, Any] = config.model_dump(mode="json")
        self.contents = contents  # what the flow's run holds
        self.exported = exported  # its network's graph: a worker takes seconds to export one

    def setup(self, worker: Worker) -> None:
        """Called by Dask when the worker starts."""
        # Ctrl-C and the signals that end a batch job reach every process of a group; the flow handles them
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if self.document["cluster"]["kind"] in ("local", "local_gpus") and os.name == "posix":
                os.setpgid(0, 0)
        if self.contents in (None, last_opened(self.document, self.exported).identity.contents):
            return
        forget()  # a worker that outlives a run may hold an older network or older images
        if last_opened(self.document, self.exported).identity.contents != self.contents:
            raise ServerError(
                f"worker {worker.address} holds another network or other images than the flow, under the same settings; expected "
                "the same files there, and a worker that was started after the last change to the network's code: restart it"
            )


@dataclass(frozen=True)
class _LastOpened:
    """The run that this process opened last."""

    document: dict[str, Any]
    """Its settings as a task gets them."""
    run: OpenedRun
    """The opened run."""
    is_checked: bool = False
    """Whether its images and budgets have been checked."""


_last_opened: list[_LastOpened] = []  # at most one: a network and its images are large


def forget() -> None:
    """Forgets the open run, so that the next one is loaded again even if its settings are the same."""
    _last_opened.clear()


def keep(run: OpenedRun, is_checked: bool = False) -> None:
    """Keeps an opened run for the tasks of this process."""
    _last_opened[:] = [_LastOpened(run.config.model_dump(mode="json"), run, is_checked)]


def last_opened(document: dict[str, Any], exported: PortableGraph | None = None) -> OpenedRun:
    """The run of a task's settings. If this process did not open it last, it is opened now and kept.

    `exported` is the graph of its network, if it is known.
    """
    if not _last_opened or _last_opened[0].document != document:
        forget()
        _last_opened.append(_LastOpened(document, open_run(parse_config(document), exported=exported)))
    return _last_opened[0].run


def checked_run(config: RunConfig) -> OpenedRun:
    """A run that has been checked. The check is made once in a process: by the command, before it starts anything."""
    if not _last_opened or not _last_opened[0].is_checked or _last_opened[0].run.config != config:
        forget()
        keep(checked(open_run(config, checking=True)), is_checked=True)
    return _last_opened[0].run


def run_tile(document: dict[str, Any], tile: Tile) -> Receipt:
    """Measures one tile and writes its chunk."""
    run = last_opened(document)
    begin = time.perf_counter()
    run.identity.store.write(tile, measure_tile(run.evaluation.bench_of(tile.kind), tile))
    return Receipt(tile, run.plan.evaluations(tile), time.perf_counter() - begin)


def prepare(document: dict[str, Any], task: PreparationTask) -> PreparationTask:
    """Does one task of preparing, and writes its files."""
    last_opened(document).preparation.do(task)
    return task


def reconstruct(document: dict[str, Any], assignment: Assignment) -> Assignment:
    """Reconstructs the network of an assignment, and writes it."""
    last_opened(document).preparation.reconstructed(assignment)
    return assignment


def measure_loss(document: dict[str, Any], assignment: Assignment) -> tuple[Assignment, Counts]:
    """Sums of a deployed assignment's loss over the decision set."""
    return assignment, last_opened(document).evaluation.loss(assignment)


def evaluate_batch(document: dict[str, Any], item: BatchItem) -> BatchCounts:
    """Counts of assignments on one evaluation batch of the validation set. The images are decoded once."""
    return last_opened(document).evaluation.count_batch(item)
