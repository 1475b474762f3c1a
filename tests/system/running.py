"""Runs the command in a watched process: every look-up or connection beyond loopback, also of its children, is noted."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import yaml

from clado.measuring.kinds import tile_kinds
from clado.measuring.plan import Plan, Tile
from clado.run.opened_run import OpenedRun, open_run
from clado.settings.loading import parse_config
from clado.storage.measurement_store import MeasurementStore
from tests.running import config

COMMAND = Path(sys.executable).with_name("clado")
PATIENCE = 420.0  # seconds until a wait is a failure; a busy machine takes long to start processes
# Python loads sitecustomize in every process that it starts: the command, its workers, Prefect's server.
WATCH = """
import os, sys

def _note(event, args):
    if event == "socket.connect":
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "::1", "0.0.0.0", "::") or str(host).startswith("127."):
        return
    with open(os.environ["OUTSIDE_LOG"], "a") as log:
        log.write(f"{event} {host} by {' '.join(sys.argv)[:200]}\\n")
    raise OSError(f"the test allows no look-up of {host}")

sys.addaudithook(_note)
"""
SMALL = {
    "data": {"sensitivity_images": 8, "sample_blocks": 2, "calibration_images": 64, "validation_images": 50},
    "estimators": ["layerwise"],
    "budgets": {"average_bits": [3.0]},
}


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen | None = None) -> None:
    """Polls until a condition holds; fails after much patience, or when the process ends first."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        assert process is None or process.poll() is None, f"the process ended ({process.returncode}) before {what}"
        time.sleep(0.05)


def free_port() -> int:
    """A port to listen on later. It is below those that the system assigns, so that no other process gets it first."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


@dataclass
class Bench:
    """A folder with a configuration, and the command run in it with nothing but that folder as its home."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    executable: Path = COMMAND

    def __post_init__(self) -> None:
        (self.folder / "watch").mkdir(parents=True)
        (self.folder / "watch" / "sitecustomize.py").write_text(WATCH)

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def write(self, **changes) -> None:
        """The reduced configuration as clado.yaml, with the default of where MLflow writes."""
        document = {**config(self.run_folder), **changes}
        del document["tracking"]
        (self.folder / "clado.yaml").write_text(yaml.safe_dump(document))

    def start(self, *arguments: object, name: str = "out") -> subprocess.Popen:
        """Starts a command in its own process group. Its output goes into a file."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "PYTEST"))}
        watch = {"PYTHONPATH": str(self.folder / "watch"), "OUTSIDE_LOG": str(self.folder / "outside.log")}
        environment = {**variables, "HOME": str(self.folder), **watch, **self.environment}
        with (self.folder / f"{name}.txt").open("w") as output:
            return subprocess.Popen(
                [self.executable, *map(str, arguments)], cwd=self.folder, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def printed(self, name: str = "out") -> str:
        return (self.folder / f"{name}.txt").read_text()

    def run(self, *arguments: object, name: str = "out") -> str:
        """Runs a command to its end, which must be a good one."""
        process = self.start(*arguments, name=name)
        try:
            assert process.wait(PATIENCE) == 0, self.printed(name)
        finally:
            end_group(process)
        assert "Traceback" not in self.printed(name)
        return self.printed(name)

    def outside(self) -> list[str]:
        """What the processes looked up or connected to beyond loopback."""
        log = self.folder / "outside.log"
        return log.read_text().splitlines() if log.exists() else []

    def opened(self) -> OpenedRun:
        return open_run(parse_config(yaml.safe_load((self.folder / "clado.yaml").read_text())))

    @cached_property
    def plan(self) -> Plan:
        """The plan of the configuration. Opening a run takes seconds, in which another process may measure every tile."""
        return self.opened().plan

    def processes(self) -> list[psutil.Process]:
        """The living processes that were started in its folder, of whatever group."""
        processes = []
        for other in psutil.process_iter():
            with suppress(psutil.Error):
                if other.status() != psutil.STATUS_ZOMBIE and Path(other.cwd()) == self.folder:
                    processes.append(other)
        return processes

    def living(self) -> list[str]:
        """Their command lines."""
        lines = []
        for process in self.processes():
            with suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return lines

    def suspend(self) -> None:
        """Stops all of them until `resume`."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        """Lets those that live go on."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.resume()

    def done(self) -> list[Tile]:
        """Tiles that the store has so far."""
        if not (self.run_folder / "store.zarr").exists():
            return []
        missing = set(MeasurementStore.open(self.run_folder / "store.zarr").missing(self.plan))
        return [tile for tile in self.plan.tiles if tile not in missing]


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of the processes that a command started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def measured(store: Path) -> dict[str, bytes]:
    """Every measured number of a store."""
    group = MeasurementStore.open(store).group
    return {kind: np.asarray(group[f"{kind}/sums"][:]).tobytes() for kind in tile_kinds()}


def chunk_times(store: Path) -> dict[str, int]:
    """When each chunk of sums was written."""
    return {str(p.relative_to(store)): p.stat().st_mtime_ns for p in store.glob("*/sums/c/**/*") if p.is_file()}
