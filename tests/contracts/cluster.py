"""What every kind of cluster keeps. Subclass with `settings` for a new file of flows/clusters."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest

from clado.errors import CladoError, MeasurementError
from clado.run.opened_run import open_run
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from clado.storage.measurement_store import MeasurementStore
from flows import clusters
from flows.clusters import Workers
from flows.clusters._inspection import located
from flows.clusters.inline import InlineWorkers
from flows.worker import run_tile

NETWORK = {"source": "zoo", "name": "resnet20_fashion_mnist"}
SMALL = {
    "data": {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 0, "validation_images": 50},
    "bits": [2, 4],
    "corrections": [],
    "estimators": ["layerwise", "gauss_newton"],
    "budgets": {"average_bits": [3.0]},
}


def echo(document: dict[str, Any], item: Any) -> tuple[dict[str, Any], Any]:
    """A task that returns its argument."""
    return document, item


def note(document: dict[str, Any], item: tuple[str, int]) -> int:
    """A task that leaves one file for each time it is called."""
    folder, number = item
    Path(folder, f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return number


def fail(document: dict[str, Any], item: int) -> int:
    """A task that cannot be done for one item."""
    if item == 3:
        raise MeasurementError("item 3 has no finite loss")
    return item


def where(document: dict[str, Any], item: int) -> tuple[int, str | None, int]:
    """A task that says who computed it, and with how many threads."""
    import torch

    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


def open_ports(document: dict[str, Any], item: int) -> int:
    """A task that says at how many ports others than this machine's processes can reach its process."""
    listening = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return sum(one.laddr.ip not in ("127.0.0.1", "::1") for one in listening)


def die_once(document: dict[str, Any], item: tuple[str, int]) -> int:
    """A task that kills its own worker the first time that item 1 is computed, once the results of the others are received."""
    folder, number = item
    marker = Path(folder, "died")
    note(document, item)
    if number == 1 and not marker.exists():
        while len(list(Path(folder).glob("received-*"))) < 5:
            time.sleep(0.01)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def configuration(settings: dict[str, Any], **more: Any) -> RunConfig:
    """A configuration with this cluster."""
    return parse_config({"network": NETWORK, "cluster": settings, **more})


def measured_by(workers: Workers, settings: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """Every number that workers measure of a small run."""
    config = configuration(settings, folder=str(folder), **SMALL)
    run = open_run(config)
    run.identity.open_store()
    workers.open_run(run)
    receipts = list(workers.map(run_tile, config, run.plan.tiles))
    assert {receipt.tile for receipt in receipts} == set(run.plan.tiles)
    group = MeasurementStore.open(run.store_path).group
    return {kind: np.asarray(group[f"{kind}/sums"][:]).tobytes() for kind in run.plan.kinds}


@cache
def measured_inline() -> dict[str, bytes]:
    """The same, in this process."""
    with TemporaryDirectory() as folder:
        return measured_by(InlineWorkers(), {"kind": "inline"}, Path(folder) / "run")


class ClusterContract:
    """Laws of workers: each item is computed once, its result comes back, its error too."""

    settings: dict[str, Any]

    @classmethod
    @contextmanager
    def prepared(cls, folder: Path) -> Iterator[dict[str, Any]]:
        """The settings; a kind that needs more than this process starts it here."""
        yield cls.settings

    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls, tmp_path_factory):
        with (
            cls.prepared(tmp_path_factory.mktemp("cluster")) as cls.settings,
            clusters.start(configuration(cls.settings)) as started,
        ):
            yield started

    def test_it_says_what_it_would_start(self, workers):
        assert len(clusters.describe(configuration(self.settings))) > 20

    def test_every_item_comes_back_with_the_configuration(self, workers):
        config = configuration(self.settings)
        results = list(workers.map(echo, config, range(7)))
        assert sorted(item for _, item in results) == list(range(7))
        assert all(located(parse_config(document)) == located(config) for document, _ in results)

    def test_each_item_is_computed_once(self, workers, tmp_path):
        items = [(str(tmp_path), number) for number in range(9)]
        assert sorted(workers.map(note, configuration(self.settings), items)) == list(range(9))
        assert Counter(file.name.split("-")[0] for file in tmp_path.iterdir()) == {str(k): 1 for k in range(9)}

    def test_equal_items_are_computed_each_time(self, workers, tmp_path):
        for _ in range(2):
            assert list(workers.map(note, configuration(self.settings), [(str(tmp_path), 1)] * 3)) == [1] * 3
        assert len(list(tmp_path.iterdir())) == 6

    def test_no_items_are_no_work(self, workers):
        assert list(workers.map(echo, configuration(self.settings), [])) == []

    def test_an_error_of_a_task_is_the_callers(self, workers):
        with pytest.raises(CladoError, match="item 3 has no finite loss"):
            list(workers.map(fail, configuration(self.settings), range(5)))
        assert sorted(workers.map(fail, configuration(self.settings), range(3))) == [0, 1, 2]  # and the next call is well

    def test_a_caller_may_stop_early(self, workers):
        results = workers.map(echo, configuration(self.settings), range(20))
        next(results)
        results.close()
        assert len(list(workers.map(echo, configuration(self.settings), range(4)))) == 4

    def test_a_session_is_measured_bit_for_bit_as_in_one_process(self, workers, tmp_path):
        assert measured_by(workers, self.settings, tmp_path / "run") == measured_inline()


class ProcessContract(ClusterContract):
    """Laws of workers that are processes: they are others, and may die."""

    def test_tasks_run_in_other_processes_with_the_threads_asked_for(self, workers):
        config = configuration(self.settings)
        places = list(workers.map(where, config, range(12)))
        pids = {pid for pid, _, _ in places}
        assert os.getpid() not in pids
        assert 1 <= len(pids) <= config.cluster.workers
        assert {(omp, threads) for _, omp, threads in places} == {("1", 1)}

    def test_a_worker_is_reached_at_one_port_at_most(self, workers):
        """Its own, which TLS guards: Dask's HTTP server stays on loopback."""
        (ports,) = workers.map(open_ports, configuration(self.settings), [0])
        assert ports <= 1

    def test_a_worker_that_is_killed_costs_no_result_and_no_task_but_its_own(self, workers, tmp_path):
        items = [(str(tmp_path), number) for number in range(6)]
        results = []
        for number in workers.map(die_once, configuration(self.settings), items):  # the others while it lives: it holds up none
            results.append(number)
            (tmp_path / f"received-{number}").touch()
        assert (sorted(results[:-1]), results[-1]) == ([0, 2, 3, 4, 5], 1)
        started = Counter(int(file.name.split("-")[0]) for file in tmp_path.glob("[0-9]*"))
        assert started == {**dict.fromkeys(range(6), 1), 1: 2}
