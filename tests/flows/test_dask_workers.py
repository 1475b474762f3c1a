"""Any number of tasks through Dask: few are held at a time, they begin in order, and a slow one holds up no other.

Scheduler and workers are in this process; those of processes are in tests/system/test_clusters.py, speed and memory in
tests/benchmarks/bench_scale.py.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, LocalCluster

from clado.errors import MeasurementError, ServerError
from clado.measuring.kinds import tile_kinds
from clado.measuring.plan import Plan, sample_blocks
from clado.settings.loading import parse_config
from flows import worker
from flows.clusters import _dask
from flows.clusters._dask import DaskWorkers, configure, quiet
from flows.worker import RunPlugin
from tests.contracts.cluster import configuration
from tests.running import config
from tests.synthetic import make_space

CONFIG = configuration({"kind": "local"})
WINDOW = 8
begun: list[Any] = []
gate = threading.Event()


@pytest.fixture(scope="module")
def cluster():
    quiet()
    configure()
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0", threads_per_worker=1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    monkeypatch.setattr(_dask, "WINDOW", WINDOW)
    begun.clear()
    gate.clear()


@contextmanager
def workers(cluster: LocalCluster, count: int) -> Iterator[DaskWorkers]:
    cluster.scale(count)
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(count)
        yield DaskWorkers(client, patience=60)
    deadline = time.monotonic() + 60  # what was taken back may still begin: not in the next test
    while any(worker.state.tasks for worker in cluster.workers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin(document: dict[str, Any], item: Any) -> Any:
    begun.append(item)
    return item


def wait_at_first(document: dict[str, Any], item: int) -> int:
    if item == 0:
        assert gate.wait(60)
    return begin(document, item)


def fail_late(document: dict[str, Any], item: int) -> int:
    if item == 30:
        raise MeasurementError("item 30 has no finite loss")
    return begin(document, item)


def test_scheduler_and_flow_hold_a_window_of_tasks_and_nothing_afterwards(cluster):
    held = []
    with workers(cluster, 2) as started:
        for _ in started.map(begin, CONFIG, range(100)):
            held.append((len(cluster.scheduler.tasks), len(started.client.futures)))
        assert sorted(begun) == list(range(100))
        assert max(max(pair) for pair in held) <= WINDOW + 1  # and the one that is handed over
        assert len(started.client.futures) == 0


def test_items_that_are_not_asked_for_yet_are_not_made_yet(cluster):
    items = []
    with workers(cluster, 1) as started:
        results = started.map(begin, CONFIG, (items.append(k) or k for k in range(1000)))
        next(results)
        assert len(items) <= WINDOW
        results.close()


def test_tiles_begin_in_the_order_of_the_plan_which_keeps_a_block_and_its_prefixes_together(cluster):
    plan = Plan(make_space(), sample_blocks(12, 4), tuple(tile_kinds()), rows_per_tile=2)
    with workers(cluster, 1) as started:
        assert set(started.map(begin, CONFIG, plan.tiles)) == set(plan.tiles)
    assert begun == list(plan.tiles)
    row_kinds = [name for name, kind in tile_kinds().items() if kind.has_row_tiles]
    of_pairs = [(tile.kind, tile.sample_block) for tile in begun if tile.kind in row_kinds]
    assert sum(a != b for a, b in zip(of_pairs[:-1], of_pairs[1:], strict=True)) == 4 * len(row_kinds) - 1


def test_a_slow_task_holds_up_no_other(cluster):
    with workers(cluster, 2) as started:
        results = started.map(wait_at_first, CONFIG, range(40))
        others = [next(results) for _ in range(39)]
        gate.set()
        assert list(results) == [0]
    assert sorted(others) == list(range(1, 40))


def test_an_error_takes_back_what_has_not_begun(cluster):
    with workers(cluster, 1) as started:
        with pytest.raises(MeasurementError, match="item 30"):
            list(started.map(fail_late, CONFIG, range(1000)))
        assert begun[:30] == list(range(30))
        assert len(begun) < 30 + 2 * WINDOW
        assert list(started.map(begin, CONFIG, ["next"])) == ["next"]


def test_a_worker_that_holds_the_network_of_before_opens_it_anew_or_is_refused(tmp_path):
    """As one that outlives a run does when the weights' file has changed, or the code of a factory that it has imported."""
    settings = parse_config(config(tmp_path / "run"))
    here = SimpleNamespace(address="tcp://127.0.0.1:1")
    try:
        stale = worker.last_opened(settings.model_dump(mode="json"))
        fresh = stale.identity.contents
        stale.identity.__dict__["contents"] = "of before"
        RunPlugin(settings, fresh).setup(here)
        assert worker.last_opened(settings.model_dump(mode="json")) is not stale
        RunPlugin(settings).setup(here)
        with pytest.raises(ServerError, match=r"holds another network or other images than the flow.* restart it"):
            RunPlugin(settings, "another").setup(here)
    finally:
        worker.forget()
