"""What workers cost a run: memory and time for each of 20,000 tiles on 16 of them, two against one, the flow's loop against a
plain one, start-up and shutdown. Writes SCALE.md. Run: python -m tests.benchmarks.bench_scale

The 16 workers are simulated: two processes hold eight of one thread each, and a tile is zeros instead of sums. Everything else is
what a run does: Dask's scheduler in a process of its own, the run opened by a plugin, the measure phase of the flow, tiles as
`worker.run_tile` computes them, with store, chunks and receipts.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from clado.interaction.estimators import kinds_of
from clado.measuring.kinds import tile_kind
from clado.measuring.plan import Plan, Tile
from clado.records.text import markdown_table, write_text
from clado.run.evaluation import RunEvaluation
from clado.run.inputs import RunInputs
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import load_config
from clado.settings.schema import RunConfig
from clado.storage.measurement_store import MeasurementStore
from flows import clusters, worker
from flows.clusters._dask import LOOPBACK, ON_LOOPBACK, scheduler_environment, threads
from flows.phases import measure
from tests.benchmarks.bench_measure import machine
from tests.benchmarks.pages import filled
from tests.system.running import free_port

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "demo.yaml"
HOSTS, WORKERS = 2, 16
ROWS, BLOCKS = 3, 870  # of the demo's 66 options: 22 tiles of pairs and one of singles in each block, 20,010 in all
MARKS = (2_000, 10_000, 20_000)  # receipts after which memory is looked at
IMAGES = 64  # of the network's own tiles
ROUNDS = 3


@dataclass
class Watch:
    """Stands in for the progress of a phase: when its loop begins, when a receipt arrives, and what `look` says at the marks."""

    look: Callable[[], list[float]] = list
    looks: dict[int, list[float]] = field(default_factory=dict)
    receipts: int = 0
    begin: float = 0.0
    end: float = 0.0

    @contextmanager
    def __call__(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        self.begin = time.perf_counter()
        yield self.advance

    def advance(self, amount: float) -> None:
        self.end = time.perf_counter()
        self.receipts += 1
        if self.receipts in MARKS:
            self.looks[self.receipts] = self.look()

    @property
    def seconds(self) -> float:
        """From the first tile submitted to the last receipt."""
        return self.end - self.begin


def settings(folder: Path, *overrides: str) -> RunConfig:
    """The demo in another folder."""
    return load_config(DEMO, [f"folder={folder}", *overrides])


def measured(config: RunConfig, workers: clusters.Workers, watch: Watch) -> Watch:
    """The flow's measure phase."""
    run = open_run(config)
    workers.open_run(run)
    with patch.object(measure, "progress", watch):
        measure.measure(run, workers)
    return watch


# --- twenty thousand tiles


def zeros(run: RunInputs, tile: Tile) -> np.ndarray:
    """A tile that costs nothing to measure."""
    shape = tile_kind(tile.kind).shape(run.space)
    return np.zeros((len(tile.rows), *shape[1:]) if tile.rows else shape)


def host(address: str, count: int) -> None:
    """Workers in this process that measure nothing, until it is ended."""
    from distributed import Worker

    worker.measure_tile = zeros
    RunEvaluation.bench = property(lambda evaluation: evaluation.inputs)

    async def work() -> None:
        started = [Worker(address, nthreads=1, host="127.0.0.1", **LOOPBACK) for _ in range(count)]
        await asyncio.gather(*started)
        await asyncio.gather(*(one.finished() for one in started))

    asyncio.run(work())


def module(*words: object) -> list[str]:
    """This file as a command."""
    return [sys.executable, "-m", "tests.benchmarks.bench_scale", *map(str, words)]


def empty_store(run: OpenedRun) -> None:
    """A store of as many tiles as are asked for, none of them measured."""
    plan = Plan(run.space, run.sample_blocks, kinds_of(run.config.estimators), ROWS)
    MeasurementStore.create(run.store_path, plan, run.identity.document, run.identity.coverage, run.identity.provenance)


def echo(document: dict[str, Any], item: int) -> int:
    """A task that does nothing."""
    return item


def megabytes(processes: list[psutil.Process]) -> list[float]:
    """Resident memory of each."""
    return [process.memory_info().rss / 2**20 for process in processes]


def cpu_seconds(processes: list[psutil.Process]) -> list[float]:
    """CPU time of each so far."""
    return [sum(process.cpu_times()[:2]) for process in processes]


def many_tiles(folder: Path) -> str:
    """Section of the page."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    environment = {
        **os.environ, **scheduler_environment(), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    dask = [str(Path(sys.executable).with_name("dask")), "scheduler", "--host", "127.0.0.1", "--port", str(port), *ON_LOOPBACK]
    config = settings(
        folder / "many", "cluster.kind=address", f"cluster.address={address}", f"cluster.workers={WORKERS}",
        f"data.sensitivity_images={BLOCKS}", f"data.sample_blocks={BLOCKS}", "data.calibration_images=0", "corrections=[]",
        "estimators=[pairwise]",
    )  # fmt: skip
    run = open_run(config)
    empty_store(run)
    with ExitStack() as stack, open(os.devnull, "w") as nowhere:
        started = [subprocess.Popen(dask, env=environment, stdout=nowhere, stderr=nowhere)]
        stack.callback(started[0].kill)
        for _ in range(HOSTS):
            one = subprocess.Popen(module("--host", address, WORKERS // HOSTS), env=environment, stdout=nowhere, stderr=nowhere)
            stack.callback(one.kill)
            started.append(one)
        workers = stack.enter_context(clusters.start(config))
        workers.client.wait_for_workers(WORKERS, timeout=300)
        looked = [psutil.Process(started[0].pid), psutil.Process()]
        all_of_them = [*looked, *(psutil.Process(one.pid) for one in started[1:])]
        workers.open_run(run)

        def tasks() -> Watch:
            watch = Watch()
            with watch("", 0) as advance:
                for _ in workers.map(echo, config, range(len(run.plan.tiles))):
                    advance(1)
            return watch

        tiles = len(run.plan.tiles)
        before, spent = megabytes(looked), cpu_seconds(all_of_them)
        whole = measured(config, workers, Watch(look=lambda: megabytes(looked)))
        spent = [1e3 * (b - a) / tiles for a, b in zip(spent, cpu_seconds(all_of_them), strict=True)]
        bare = tasks()
    assert MeasurementStore.open(run.store_path).missing(run.plan) == []
    assert whole.receipts == bare.receipts == tiles
    rows = [
        [f"{mark:,}" if mark else "0", *(f"{value:.0f}" for value in megabytes_each)]
        for mark, megabytes_each in {0: before, **whole.looks}.items()
    ]
    return "\n".join([
        f"## {tiles:,} tiles on {WORKERS} workers",
        "",
        f"A tile takes {1e3 * whole.seconds / tiles:.1f} ms, from the first one submitted to the last receipt (goal 10). It "
        f"takes {1e3 * bare.seconds / tiles:.1f} ms if the task does nothing at all, not even open the store and write a chunk. "
        f"CPU time a tile: scheduler {spent[0]:.1f} ms, flow {spent[1]:.1f} ms, workers {sum(spent[2:]):.1f} ms.",
        "",
        markdown_table(["tiles received", "scheduler, MB", "flow, MB"], rows),
        "",
        f"Workers are {HOSTS} processes with {WORKERS // HOSTS} workers of one thread each; memory is resident memory.",
    ])  # fmt: skip


# --- the network's own tiles


def own(folder: Path, workers: int) -> RunConfig:
    """The demo with fewer images, and where its workers are."""
    return settings(folder, f"data.sensitivity_images={IMAGES}", f"cluster.workers={workers}")


def loop(folder: Path) -> None:
    """Prints the seconds of a plain loop over the tiles in this process."""
    from clado.measuring.measurements import measure_tile

    config = own(folder, 1)
    run = open_run(config)
    store = run.identity.open_store()
    store.extend(run.plan)
    begin = time.perf_counter()
    for tile in run.plan.tiles:
        store.write(tile, measure_tile(run.evaluation.bench, tile))
    print(time.perf_counter() - begin)


def by_workers(folder: Path, workers: int) -> float:
    """Seconds of the measure phase with worker processes."""
    config = own(folder, workers)
    open_run(config).identity.open_store()
    with clusters.start(config) as started:
        started.client.wait_for_workers(workers, timeout=300)
        return measured(config, started, Watch()).seconds


def by_loop(folder: Path) -> float:
    """Seconds of a plain loop, in a process with a worker's environment."""
    environment = {**os.environ, **threads(own(folder, 1).cluster)}
    printed = subprocess.run(module("--loop", folder), env=environment, check=True, capture_output=True, text=True).stdout
    return float(printed.splitlines()[-1])


def own_tiles(folder: Path) -> str:
    """Section of the page."""
    prepared = open_run(own(folder / "prepared", 1))
    assert prepared.preparation.corrected
    times_of: dict[str, list[float]] = {"plain loop": [], "one worker": [], "two workers": []}
    for number in range(ROUNDS):
        for name, seconds in (
            ("plain loop", by_loop),
            ("one worker", lambda f: by_workers(f, 1)),
            ("two workers", lambda f: by_workers(f, 2)),
        ):
            run = folder / f"{name[:3]}{number}"
            run.mkdir(parents=True)
            os.symlink(folder / "prepared" / "prepared", run / "prepared")
            times_of[name].append(seconds(run))
    tiles = len(prepared.plan.tiles)
    plain, one, two = (min(times) for times in times_of.values())
    rows = [[name, " ".join(f"{each:.1f}" for each in times), f"{min(times):.1f}"] for name, times in times_of.items()]
    return "\n".join([
        "## Two workers against one, one against a plain loop",
        "",
        f"The {tiles} tiles of the demo's network on {IMAGES} images, {ROUNDS} rounds of all three in turn. Seconds are from "
        "the first tile submitted to the last receipt.",
        "",
        markdown_table(["", "rounds", "best"], rows),
        "",
        f"- two workers are **{one / two:.2f}** times as fast as one (goal 1.7)",
        f"- one worker takes **{one / plain:.2f}** of the plain loop's time (goal 1.10)",
    ])  # fmt: skip


# --- the command


def command(folder: Path) -> str:
    """Section of the page: what `clado run` prints of its start and end."""
    words = [Path(sys.executable).with_name("clado"), "run", DEMO, f"folder={folder / 'command'}", "data.sensitivity_images=32",
             "data.validation_images=500", "search.evaluations=0", "estimators=[layerwise]"]  # fmt: skip
    printed = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stderr
    line = next(line for line in printed.splitlines() if line.startswith("Start-up took"))
    up, down = map(float, re.findall(r"([\d.]+) s", line)[:2])
    return "\n".join([
        "## Start-up and shutdown",
        "",
        f"They take {up + down:.0f} s of `clado run demo.yaml` with two workers (goal 45). That is imports, the network's "
        f"export, Prefect's embedded server, Dask, workers, sessions, and their end. It prints: `{line}`",
    ])  # fmt: skip


def main() -> None:
    """Measures everything and writes the page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--host", nargs=2, help=argparse.SUPPRESS)
    options.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--only", choices=["tiles", "own", "command"], help="print one section, write nothing")
    arguments = options.parse_args()
    if arguments.host:
        return host(arguments.host[0], int(arguments.host[1]))
    if arguments.loop:
        return loop(arguments.loop)
    sections = {"tiles": many_tiles, "own": own_tiles, "command": command}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        texts = [make(Path(folder)) for name, make in sections.items() if arguments.only in (None, name)]
    page = "\n\n".join([
        "# What workers cost a run\n\nWritten by `python -m tests.benchmarks.bench_scale`.\n\n"
        f"Machine: {machine()}; load average {load:.1f} when it began and {os.getloadavg()[0]:.1f} at its end.",
        *texts,
    ])  # fmt: skip
    print(page)
    if arguments.only is None:
        write_text(HERE / "SCALE.md", filled(page + "\n"))


if __name__ == "__main__":
    main()
