"""Faults of real processes: what was measured is kept, what is absent is measured, and the matrix is the same bit for bit."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from clado.errors import ServerError
from clado.records.run_record import RunRecord
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from flows import clusters
from flows.clusters import Workers, _dask
from flows.phases.measure import Measurement, measure
from tests.running import config
from tests.system.running import PATIENCE, Bench, chunk_times, end_group, measured, wait_for
from tests.system.test_clusters import machines
from tests.system.test_deployments import ask, prefect_server

TILES = 10  # pairs and gram of four sample blocks, uncorrected layers of one: a quarter of them
pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


def measure_only(document: dict, during=lambda run, workers: None) -> Measurement:
    """The measure phase with the configured workers, without Prefect; `during` is called in a thread while tiles are computed."""
    settings = parse_config(document)
    run = open_run(settings)
    run.identity.open_store()
    with clusters.start(settings) as workers:
        workers.open_run(run)
        thread = threading.Thread(target=during, args=(run, workers))
        thread.start()
        measurement = measure(run, workers)
        thread.join()
    return measurement


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_measure_what_one_process_measures_bit_for_bit(finished, tmp_path, workers):
    document = config(tmp_path / "run", cluster={"kind": "local", "workers": workers})
    measurement = measure_only(document)
    assert measurement.computed == measurement.tiles == TILES
    assert measured(tmp_path / "run" / "store.zarr") == measured(finished.folder / "store.zarr")


def test_a_worker_killed_in_mid_tile_costs_no_number(finished, tmp_path):
    document = config(tmp_path / "run", cluster={"kind": "local", "workers": 2})
    killed = []

    def kill_one(run: OpenedRun, workers: Workers) -> None:
        store = run.identity.open_store()
        wait_for(lambda: len(store.missing(run.plan)) <= 4, "the first tiles")  # only pairs are left: seconds each
        killed.append(min(workers.client.run(os.getpid).values()))
        os.kill(killed[0], signal.SIGKILL)

    measurement = measure_only(document, kill_one)
    assert killed
    assert measurement.computed == TILES
    assert measured(tmp_path / "run" / "store.zarr") == measured(finished.folder / "store.zarr")


def test_all_workers_killed_once_cost_no_number(finished, tmp_path):
    document = config(tmp_path / "run", cluster={"kind": "local", "workers": 2})
    killed = []

    def kill_all(run: OpenedRun, workers: Workers) -> None:
        store = run.identity.open_store()
        wait_for(lambda: len(store.missing(run.plan)) <= 4, "the first tiles")
        killed.extend(workers.client.run(os.getpid).values())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    measurement = measure_only(document, kill_all)
    assert len(killed) == 2
    assert measurement.computed == TILES
    assert measured(tmp_path / "run" / "store.zarr") == measured(finished.folder / "store.zarr")


def test_a_scheduler_that_is_killed_ends_the_run_and_the_next_one_goes_on(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(_dask, "CONNECT_TIMEOUT", 5.0)  # the client tries that long to find it again
    with machines(tmp_path / "first") as started:
        document = config(tmp_path / "run", cluster={"kind": "address", "address": started.address})

        def kill_scheduler(run: OpenedRun, workers: Workers) -> None:
            store = run.identity.open_store()
            wait_for(lambda: len(store.missing(run.plan)) <= 4, "the first tiles")
            started.kill("scheduler")

        with pytest.raises(ServerError, match="scheduler was lost; what was measured is kept"):
            measure_only(document, kill_scheduler)
    run = open_run(parse_config(document))
    done = len(run.plan.tiles) - len(run.identity.missing_tiles())
    assert TILES // 2 <= done < TILES
    with machines(tmp_path / "second") as started:
        measurement = measure_only({**document, "cluster": {"kind": "address", "address": started.address}})
    assert measurement.computed == TILES - done
    assert measured(tmp_path / "run" / "store.zarr") == measured(finished.folder / "store.zarr")


@pytest.fixture
def half_way(tmp_path):
    """A run of the command with two workers that has measured some of its tiles, and not all. All its processes are suspended."""
    bench = Bench(tmp_path / "bench")
    bench.write(cluster={"kind": "local", "workers": 2})
    assert len(bench.plan.tiles) == TILES  # the plan is made before the run begins
    process = bench.start("run", "clado.yaml", name="first")
    try:
        wait_for(lambda: len(bench.done()) >= 3, "some tiles", process)
        bench.suspend()
        yield bench, process
    finally:
        end_group(process)


def check_resumed(bench: Bench, finished, done: list, times: dict[str, int]) -> None:
    """Runs the command again: only absent tiles are written, and the matrix is that of a run without faults."""
    store = bench.run_folder / "store.zarr"
    text = bench.run("run", "clado.yaml", name="second")
    later = chunk_times(store)
    unchanged = [name for name, when in times.items() if later[name] == when]
    assert len(unchanged) >= len(done)  # every tile that was done was left alone
    assert len(later) - len(unchanged) <= TILES - len(done)  # and no more than the absent ones were computed
    assert measured(store) == measured(finished.folder / "store.zarr")
    ours, theirs = (RunRecord.load(folder / "record.json") for folder in (bench.run_folder, finished.folder))
    assert [(r.assignment, r.loss_deployed, r.validation.top1) for r in ours.results] == [
        (r.assignment, r.loss_deployed, r.validation.top1) for r in theirs.results
    ]
    assert re.search(r"^Start-up took \d+\.\d s, shutdown \d+\.\d s; \d+ s in all\.$", text, flags=re.M)
    assert bench.outside() == []


def test_a_run_killed_half_way_goes_on_from_there(half_way, finished):
    bench, process = half_way
    assert len(bench.living()) >= 5  # itself, its workers, Prefect's server and what watches that
    os.kill(process.pid, signal.SIGKILL)
    bench.resume()
    process.wait(60)
    wait_for(lambda: not bench.living(), "the end of its workers and of Prefect's server")
    done, times = bench.done(), chunk_times(bench.run_folder / "store.zarr")
    assert 3 <= len(done) < TILES
    assert not (bench.run_folder / "record.json").exists()
    check_resumed(bench, finished, done, times)


def test_an_interrupted_run_says_so_leaves_no_process_and_goes_on(half_way, finished):
    bench, process = half_way
    for _ in range(2):  # as an impatient user does
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        bench.resume()
        time.sleep(0.3)
    assert process.wait(180) == 130, bench.printed("first")
    text = bench.printed("first")
    assert text.count("clado: interrupted") == 1
    assert [word for word in ("Traceback", "ERROR", "terminate called") if word in text] == []
    wait_for(lambda: not bench.living(), "the end of every process")
    done, times = bench.done(), chunk_times(bench.run_folder / "store.zarr")
    assert 3 <= len(done) < TILES
    check_resumed(bench, finished, done, times)


@pytest.mark.parametrize(
    "terminate",
    [
        lambda process: process.send_signal(signal.SIGTERM),  # as a service manager does: the command alone
        lambda process: os.killpg(process.pid, signal.SIGTERM),  # as what ends a batch job does: the whole group
    ],
    ids=["command", "group"],
)
def test_a_second_run_is_refused_and_a_terminated_one_leaves_no_process_and_goes_on(half_way, finished, terminate):
    bench, process = half_way
    second = bench.start("run", "clado.yaml", name="refused")
    assert second.wait(PATIENCE) == 2
    assert "another run is writing to" in bench.printed("refused")
    assert "Traceback" not in bench.printed("refused")
    terminate(process)
    bench.resume()
    assert process.wait(180) == 143, bench.printed("first")
    text = bench.printed("first")
    assert "clado: terminated; what was measured is kept" in text
    assert "Traceback" not in text
    wait_for(lambda: not bench.living(), "the end of every process")
    done, times = bench.done(), chunk_times(bench.run_folder / "store.zarr")
    assert 3 <= len(done) < TILES
    check_resumed(bench, finished, done, times)


def test_a_prefect_server_that_is_restarted_costs_no_number_and_knows_how_the_run_ended(finished, tmp_path):
    with prefect_server(tmp_path) as (api, restart):
        bench = Bench(tmp_path / "bench", {"PREFECT_API_URL": api})
        bench.write()
        process = bench.start("run", "clado.yaml")
        try:
            wait_for(bench.done, "the first tile", process)
            restart()
            assert process.wait(PATIENCE) == 0, bench.printed()
        finally:
            end_group(process)
        runs = ask(f"{api}/flow_runs/filter", {})
    assert [run["state_type"] for run in runs] == ["COMPLETED"]
    assert "Traceback" not in bench.printed()
    assert measured(bench.run_folder / "store.zarr") == measured(finished.folder / "store.zarr")
    assert bench.outside() == []


def test_the_watch_sees_and_stops_a_look_up(tmp_path):
    bench = Bench(tmp_path / "bench", executable=Path(sys.executable))
    process = bench.start("-c", "import socket; socket.getaddrinfo('example.org', 443)")
    assert process.wait(60) != 0
    assert bench.outside()[0].startswith("socket.getaddrinfo example.org")
    process = bench.start("-c", "import socket; socket.create_connection(('10.255.255.1', 9), timeout=1)")
    assert process.wait(60) != 0
    assert "10.255.255.1" in bench.outside()[1]
