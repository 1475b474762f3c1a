"""The contract for worker processes, and what only they can do wrong."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from clado.errors import MeasurementError
from flows import clusters
from tests.contracts.cluster import ClusterContract, configuration

pytestmark = pytest.mark.system
LOCAL = {"kind": "local", "workers": 2}


class TestLocal(ClusterContract):
    settings = LOCAL


def where(document: dict[str, Any], item: int) -> tuple[int, str | None, int]:
    """A task that says who computed it, and with how many threads."""
    import torch

    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


def die_once(document: dict[str, Any], item: tuple[str, int]) -> int:
    """A task that kills its own worker the first time that item 1 is computed."""
    folder, number = item
    marker = Path(folder, "died")
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(document: dict[str, Any], item: int) -> int:
    """A task that no worker survives."""
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_tasks_run_in_other_processes_with_the_threads_asked_for():
    config = configuration(LOCAL)
    with clusters.start(config) as workers:
        found = list(workers.map(where, config, range(12)))
    pids = {pid for pid, _, _ in found}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    assert {(omp, threads) for _, omp, threads in found} == {("1", 1)}


def test_a_worker_that_is_killed_costs_no_result(tmp_path):
    config = configuration(LOCAL)
    with clusters.start(config) as workers:
        assert sorted(workers.map(die_once, config, [(str(tmp_path), k) for k in range(6)])) == list(range(6))
    assert (tmp_path / "died").exists()


def test_a_task_that_no_worker_survives_is_given_up_with_advice():
    config = configuration(LOCAL)
    with clusters.start(config) as workers, pytest.raises(MeasurementError, match="want of memory; use fewer workers"):
        list(workers.map(die, config, range(3)))
