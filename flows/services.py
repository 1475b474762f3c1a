"""Servers and workers of one machine, on loopback: `clado up` starts them, `clado down` ends them.

    prefect     server of flow runs and schedules     mlflow    server of records
    scheduler   of Dask, and `workers` its processes   runner    Prefect's worker: starts scheduled runs in this folder

Each is a process in its own session, and outlives the command. A folder has their process ids and start times
(services.json), their output (NAME.log) and their SQLite databases. The start time shows whether a process id now belongs to
another process.
"""

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

import psutil

from clado.errors import ConfigurationError, ServerError, StoreError
from clado.records.text import write_text
from clado.settings.cluster import ClusterSettings
from clado.settings.redaction import redact

HOST, POOL, LIST = "127.0.0.1", "clado", "services.json"
NAMES = ("prefect", "mlflow", "scheduler", "workers", "runner")  # in the order of their start
DATABASES = ("prefect", "mlflow")  # names on PostgreSQL
GRACE = 20.0  # seconds until a process that does not end is killed


@dataclass(frozen=True)
class Ports:
    """The ports of the servers."""

    prefect: int = 4200
    """The port of Prefect's server."""
    mlflow: int = 5000
    """The port of MLflow's server."""
    dask: int = 8786
    """The port of Dask's scheduler. The next port answers HTTP."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make commands use the servers."""
        return {
            "PREFECT_API_URL": f"http://{HOST}:{self.prefect}/api",
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{self.mlflow}",
            "DASK_SCHEDULER_ADDRESS": f"tcp://{HOST}:{self.dask}",
        }


@dataclass(frozen=True)
class Service:
    """A process that `up` starts."""

    command: tuple[str, ...]
    """Its command line."""
    environment: Mapping[str, str]
    """Environment variables that it needs in addition to those of this process."""
    is_healthy: Callable[[], bool]
    """Whether it answers."""


def declare(folder: Path, ports: Ports, workers: int, database: str | None) -> dict[str, Service]:
    """The services by name, in the order of their start.

    `database` is the URL of a PostgreSQL server; None means SQLite.
    """
    from flows.clusters._dask import ON_LOOPBACK, scheduler_environment, threads

    url = ports.environment
    prefect, mlflow, scheduler = url["PREFECT_API_URL"], url["MLFLOW_TRACKING_URI"], url["DASK_SCHEDULER_ADDRESS"]
    quiet = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    home = {**quiet, "PREFECT_HOME": str(folder / "prefect")}
    prefect_database, mlflow_database = _database_urls(folder, database)
    # MLflow's jobs are seven processes that judge language models
    records = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ARTIFACTS_DESTINATION": f"{folder}/mlflow-artifacts"}
    http = f"{HOST}:{ports.dask + 1}"
    counts = f"http://{http}/json/counts.json"
    # URLs of databases hold passwords, and everybody can read command lines. So they go into the environment
    return {
        "prefect": Service(
            ("prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect)),
            # its pages use this address; without it they would use the default port
            {**home, "PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database, "PREFECT_SERVER_UI_API_URL": prefect},
            lambda: _get(f"{prefect}/health") is True,
        ),
        "mlflow": Service(
            ("mlflow", "server", "--host", HOST, "--port", str(ports.mlflow), "--workers", "1"),
            {**quiet, **records, "MLFLOW_BACKEND_STORE_URI": mlflow_database},
            lambda: _get(f"{mlflow}/health") is not None,
        ),
        "scheduler": Service(
            ("dask", "scheduler", "--host", HOST, "--port", str(ports.dask), "--no-dashboard", "--dashboard-address", http),
            {**quiet, **scheduler_environment()},
            lambda: _member(_get(counts), "workers") is not None,
        ),
        "workers": Service(
            ("dask", "worker", scheduler, "--host", HOST, "--nworkers", str(workers), "--nthreads", "1", *ON_LOOPBACK),
            {**quiet, **threads(ClusterSettings())},
            lambda: _member(_get(counts), "workers") == workers,
        ),
        "runner": Service(
            ("prefect", "worker", "start", "--pool", POOL, "--type", "process"),
            {**home, **url},
            lambda: "ONLINE" in [_member(w, "status") for w in _get(f"{prefect}/work_pools/{POOL}/workers/filter", {}) or []],
        ),
    }  # fmt: skip


def up(folder: Path, ports: Ports, workers: int, database: str | None, patience: float) -> bool:
    """Starts the services and waits until each answers. After a failure, none of them runs.

    Args:
        folder: Where the services keep their files.
        ports: Where the servers listen.
        workers: How many Dask workers there are.
        database: The URL of a PostgreSQL server; None means SQLite.
        patience: Seconds until a service must answer.

    Returns:
        False if the services already run, else True.

    Raises:
        ConfigurationError: A port or the database cannot be used.
        ServerError: A service ends, or does not answer in time.
    """
    folder = folder.resolve()
    processes = _read(folder)
    if processes:
        absent = [name for name in NAMES if processes.get(name) is None]  # also the services that a killed `up` did not start
        if absent:
            raise ServerError(
                f"of the services in {folder}, {', '.join(absent)} have ended or never started ({_log(folder, absent[0])}); "
                "clado down, then up"
            )
        return False
    _refuse_taken(ports)
    if database is not None:
        _make_databases(database)
    (folder / "prefect").mkdir(parents=True, exist_ok=True)
    services = declare(folder, ports, workers, database)
    started: dict[str, Popen[bytes]] = {}
    try:
        # the workers of Dask and Prefect need servers that answer
        for names in (NAMES[:3], NAMES[3:]):
            for name in names:
                started[name] = _start(folder, name, services[name])
                _write(folder, ports, started)
            for name in names:
                _wait(folder, name, services[name], started[name], patience)
    except BaseException:
        down(folder)
        raise
    return True


def down(folder: Path) -> list[str]:
    """Ends the services of a folder and their child processes, in reverse order. Returns the names of those that ran."""
    folder = folder.resolve()
    running = {name: process for name, process in reversed(_read(folder).items()) if process is not None}
    for process in running.values():
        _end(process)
    (folder / LIST).unlink(missing_ok=True)
    return list(running)


def exported(folder: Path) -> dict[str, str]:
    """The environment variables of the services that a folder lists."""
    document = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return dict(document["environment"])


def _database_urls(folder: Path, database: str | None) -> tuple[str, str]:
    """The URLs of Prefect's and MLflow's databases."""
    if database is None:
        return f"sqlite+aiosqlite:///{folder}/prefect.db", f"sqlite:///{folder}/mlflow.db"
    from sqlalchemy.engine import make_url

    server = make_url(database)
    prefect = server.set(drivername="postgresql+asyncpg", database="prefect")
    mlflow = server.set(drivername="postgresql", database="mlflow")
    return prefect.render_as_string(hide_password=False), mlflow.render_as_string(hide_password=False)


def _make_databases(database: str) -> None:
    """Creates the databases that are missing. The servers create and migrate their tables."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    expected = "expected postgresql://USER:PASSWORD@HOST:PORT of a server that runs, and pip install 'clado[servers]'"
    try:
        url = make_url(database)
    except ArgumentError:
        raise ConfigurationError(f"--database {redact(database)} is not a URL; {expected}") from None
    if url.get_backend_name() != "postgresql":
        raise ConfigurationError(f"--database {redact(database)} is not PostgreSQL; {expected}")
    try:
        engine = create_engine(
            url.set(drivername="postgresql", database=url.database or "postgres"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            existing = set(connection.execute(text("SELECT datname FROM pg_database")).scalars())
            for name in DATABASES:
                if name not in existing:
                    connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
    except (ImportError, SQLAlchemyError) as error:
        reason = redact(str(error)).splitlines()[0]
        raise ConfigurationError(f"--database {redact(database)} cannot be used ({reason}); {expected}") from None


def _refuse_taken(ports: Ports) -> None:
    """Raises ConfigurationError for equal ports, or ports that cannot be used."""
    numbers = {"prefect": ports.prefect, "mlflow": ports.mlflow, "dask": ports.dask, "dask and one": ports.dask + 1}
    if len(set(numbers.values())) < len(numbers):
        raise ConfigurationError(f"ports {sorted(numbers.values())} are not all different; Dask needs its port and the next one")
    for name, port in numbers.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                option = f"--{name.split()[0]}-port"
                raise ConfigurationError(
                    f"port {port} of {HOST} cannot be used ({error}); stop what listens there, or name another port with {option}"
                ) from None


def _start(folder: Path, name: str, service: Service) -> Popen[bytes]:
    program = Path(sys.executable).with_name(service.command[0])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_BACKEND"))}
    with _log(folder, name).open("wb") as output:
        return Popen(
            [str(program), *service.command[1:]], env={**inherited, **service.environment}, stdin=DEVNULL, stdout=output,
            stderr=STDOUT, start_new_session=True,
        )  # fmt: skip


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _wait(folder: Path, name: str, service: Service, process: Popen[bytes], patience: float) -> None:
    end = time.monotonic() + patience
    while not service.is_healthy():
        log = _log(folder, name)
        if process.poll() is not None:
            last = redact("\n  ".join(log.read_text(errors="replace").splitlines()[-5:]))
            raise ServerError(f"{name} ended at once (exit {process.returncode}); the end of {log}:\n  {last}")
        if time.monotonic() > end:
            raise ServerError(f"{name} does not answer after {patience:.0f} s; see {log}, or allow more with --timeout")
        time.sleep(0.2)


def _write(folder: Path, ports: Ports, started: Mapping[str, Popen[bytes]]) -> None:
    """Process ids, each with the start time of the process."""
    processes = {}
    for name, process in started.items():
        with suppress(psutil.NoSuchProcess):
            processes[name] = {"pid": process.pid, "began": psutil.Process(process.pid).create_time()}
    environment = {
        **ports.environment,
        "PREFECT_HOME": str(folder / "prefect"),
    }  # otherwise its command makes one in the home folder
    write_text(folder / LIST, json.dumps({"environment": environment, "processes": processes}, indent=1))


def _read(folder: Path) -> dict[str, psutil.Process | None]:
    """The services that a folder lists. None for one that has ended."""
    if not (folder / LIST).is_file():
        return {}
    try:
        document = json.loads((folder / LIST).read_text(encoding="utf-8"))
        return {name: _process(**entry) for name, entry in document["processes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{folder / LIST} is damaged ({error}), so it is unknown what runs; stop the services by hand and remove the file"
        ) from None


def _process(pid: int, began: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        runs = abs(process.create_time() - began) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if runs else None


def _end(process: psutil.Process) -> None:
    """Ends a service and its child processes: first by SIGTERM, then by SIGKILL. Prefect's worker may ignore SIGTERM."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for survivor in alive:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=GRACE)


def _get(url: str, document: dict[str, Any] | None = None) -> Any:
    """A server's answer as JSON, or as text if it is not JSON. None if there is no good answer."""
    body = None if document is None else json.dumps(document).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read().decode(errors="replace")
    except (OSError, HTTPException):  # nothing listens yet, or a program that does not speak HTTP
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _member(answer: Any, key: str) -> Any:
    """A member of an answer. None if the answer is not an object: another program may use the port."""
    return answer.get(key) if isinstance(answer, dict) else None
