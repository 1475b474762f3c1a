"""Servers and workers of one machine, on loopback: `clado up` starts them, `clado down` ends them.

    prefect     server of flow runs and schedules     mlflow    server of records
    scheduler   of Dask, and `workers` its processes   runner    Prefect's worker: starts scheduled runs in this folder

Each is a process of its own session that outlives the command. A folder keeps who they are (services.json: process ids and when
each began, so that another process of the same id is not taken for ours), what they print (NAME.log) and their SQLite databases.
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
from clado.records import write_text
from clado.settings.cluster import ClusterSettings
from clado.settings.redaction import redact

HOST, POOL, LIST = "127.0.0.1", "clado", "services.json"
NAMES = ("prefect", "mlflow", "scheduler", "workers", "runner")  # in the order in which they start
DATABASES = ("prefect", "mlflow")  # on PostgreSQL
GRACE = 20.0  # seconds between the request to end and the end


@dataclass(frozen=True)
class Ports:
    """Where the servers listen; Dask's scheduler answers HTTP on the port after its own."""

    prefect: int = 4200
    mlflow: int = 5000
    dask: int = 8786

    @property
    def environment(self) -> dict[str, str]:
        """What a shell exports so that commands use the servers."""
        return {
            "PREFECT_API_URL": f"http://{HOST}:{self.prefect}/api",
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{self.mlflow}",
            "DASK_SCHEDULER_ADDRESS": f"tcp://{HOST}:{self.dask}",
        }


@dataclass(frozen=True)
class Service:
    """A command, what it needs in its environment beside ours, and how to tell that it is well."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    well: Callable[[], bool]


def declare(folder: Path, ports: Ports, workers: int, database: str | None) -> dict[str, Service]:
    """The services by name, in the order in which they start; a database is the URL of a PostgreSQL server, else SQLite."""
    from flows.clusters._dask import ON_LOOPBACK, scheduler_environment, threads

    url = ports.environment
    prefect, mlflow, scheduler = url["PREFECT_API_URL"], url["MLFLOW_TRACKING_URI"], url["DASK_SCHEDULER_ADDRESS"]
    quiet = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    home = {**quiet, "PREFECT_HOME": str(folder / "prefect")}
    if database is None:
        stores = {"prefect": f"sqlite+aiosqlite:///{folder}/prefect.db", "mlflow": f"sqlite:///{folder}/mlflow.db"}
    else:
        stores = {"prefect": _on(database, "postgresql+asyncpg", "prefect"), "mlflow": _on(database, "postgresql", "mlflow")}
    # jobs are MLflow's seven processes for judging language models
    records = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ARTIFACTS_DESTINATION": f"{folder}/mlflow-artifacts"}
    http = f"{HOST}:{ports.dask + 1}"
    counts = f"http://{http}/json/counts.json"
    # URLs of databases hold passwords, and command lines are everybody's to read: they go into the environment
    return {
        "prefect": Service(
            ("prefect", "server", "start", "--host", HOST, "--port", str(ports.prefect)),
            {**home, "PREFECT_SERVER_DATABASE_CONNECTION_URL": stores["prefect"]},
            lambda: _get(f"{prefect}/health") is True,
        ),
        "mlflow": Service(
            ("mlflow", "server", "--host", HOST, "--port", str(ports.mlflow), "--workers", "1"),
            {**quiet, **records, "MLFLOW_BACKEND_STORE_URI": stores["mlflow"]},
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
            lambda: "ONLINE" in [_member(one, "status") for one in _get(f"{prefect}/work_pools/{POOL}/workers/filter", {}) or []],
        ),
    }  # fmt: skip


def up(folder: Path, ports: Ports, workers: int, database: str | None, patience: float) -> bool:
    """Starts the services and waits until each is well; False where they are up already. On a failure none is left.

    Raises: ConfigurationError where a port or the database cannot be used, ServerError where a service ends or is not well in
    time.
    """
    folder = folder.resolve()
    known = _read(folder)
    if known:
        gone = [name for name in NAMES if known.get(name) is None]  # also what an `up` that was killed did not start
        if gone:
            raise ServerError(
                f"of the services in {folder}, {', '.join(gone)} ended or never began ({_log(folder, gone[0])}); "
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
        # workers of either kind connect to servers that answer
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
    """Ends the services of a folder with all that they started, the last first; names of those that were running."""
    folder = folder.resolve()
    running = {name: process for name, process in reversed(_read(folder).items()) if process is not None}
    for process in running.values():
        _end(process)
    (folder / LIST).unlink(missing_ok=True)
    return list(running)


def exported(folder: Path) -> dict[str, str]:
    """The environment of the services that a folder lists."""
    document = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return dict(document["environment"])


def _on(database: str, driver: str, name: str) -> str:
    """The URL of a database of a server."""
    from sqlalchemy.engine import make_url

    return make_url(database).set(drivername=driver, database=name).render_as_string(hide_password=False)


def _make_databases(database: str) -> None:
    """Makes the databases that are absent. Their tables are the servers' own to make, and to migrate."""
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
            there = set(connection.execute(text("SELECT datname FROM pg_database")).scalars())
            for name in DATABASES:
                if name not in there:
                    connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
    except (ImportError, SQLAlchemyError) as error:
        told = redact(str(error)).splitlines()[0]
        raise ConfigurationError(f"--database {redact(database)} cannot be used ({told}); {expected}") from None


def _refuse_taken(ports: Ports) -> None:
    wanted = {"prefect": ports.prefect, "mlflow": ports.mlflow, "dask": ports.dask, "dask and one": ports.dask + 1}
    if len(set(wanted.values())) < len(wanted):
        raise ConfigurationError(f"ports {sorted(wanted.values())} are not all different; Dask takes its own and the next")
    for name, port in wanted.items():
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((HOST, port))
            except (OSError, OverflowError) as error:
                option = f"--{name.split()[0]}-port"
                raise ConfigurationError(
                    f"port {port} of {HOST} cannot be used ({error}); end what listens there, or name another with {option}"
                ) from None


def _start(folder: Path, name: str, service: Service) -> Popen[bytes]:
    program = Path(sys.executable).with_name(service.words[0])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_BACKEND"))}
    with _log(folder, name).open("wb") as output:
        return Popen(
            [str(program), *service.words[1:]], env={**kept, **service.environment}, stdin=DEVNULL, stdout=output, stderr=STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _wait(folder: Path, name: str, service: Service, process: Popen[bytes], patience: float) -> None:
    end = time.monotonic() + patience
    while not service.well():
        log = _log(folder, name)
        if process.poll() is not None:
            last = redact("\n  ".join(log.read_text(errors="replace").splitlines()[-5:]))
            raise ServerError(f"{name} ended at once (exit {process.returncode}); the end of {log}:\n  {last}")
        if time.monotonic() > end:
            raise ServerError(f"{name} is not well after {patience:.0f} s; see {log}, or allow more with --timeout")
        time.sleep(0.2)


def _write(folder: Path, ports: Ports, started: Mapping[str, Popen[bytes]]) -> None:
    """Process ids, each with the moment at which the process began."""
    processes = {}
    for name, process in started.items():
        with suppress(psutil.NoSuchProcess):
            processes[name] = {"pid": process.pid, "began": psutil.Process(process.pid).create_time()}
    environment = {**ports.environment, "PREFECT_HOME": str(folder / "prefect")}  # else its command makes one in the home folder
    write_text(folder / LIST, json.dumps({"environment": environment, "processes": processes}, indent=1))


def _read(folder: Path) -> dict[str, psutil.Process | None]:
    """The services that a folder lists, None for one that has ended."""
    if not (folder / LIST).is_file():
        return {}
    try:
        document = json.loads((folder / LIST).read_text(encoding="utf-8"))
        return {name: _process(**entry) for name, entry in document["processes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{folder / LIST} is damaged ({error}), so that it does not say what runs; end the services by hand and remove it"
        ) from None


def _process(pid: int, began: float) -> psutil.Process | None:
    try:
        found = psutil.Process(pid)
        same = abs(found.create_time() - began) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return found if same else None


def _end(process: psutil.Process) -> None:
    """Ends a service and its descendants: asked first, then by force. Prefect's worker, for one, may not heed being asked."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=GRACE)


def _get(url: str, question: dict[str, Any] | None = None) -> Any:
    """A server's answer as JSON (text where it is none), None where there is no good answer."""
    body = None if question is None else json.dumps(question).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read().decode(errors="replace")
    except (OSError, HTTPException):  # not there yet, or what listens there does not speak HTTP
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _member(answer: Any, key: str) -> Any:
    """A member of an answer, None where the answer is no object: a stranger may have taken the port."""
    return answer.get(key) if isinstance(answer, dict) else None
