"""Workers of a Dask client, for every cluster that uses Dask."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dask
import distributed.utils
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError

from clado.errors import CladoError, MeasurementError, ServerError
from clado.settings.cluster import ClusterSettings
from clado.settings.schema import RunConfig
from flows.clusters import RETRIES, given_up
from flows.clusters._inspection import Inspection, located
from flows.clusters._tls import protocol, security

if TYPE_CHECKING:
    from clado.run.opened_run import OpenedRun

DEATHS = 3  # a task fails after it has ended this many workers
# Settings of a scheduler that we start. A worker holds one task at a time, so that its loss concerns only this task. A worker
# that is silent while it opens a large network is not lost, unless its connection closes.
SCHEDULER = {"allowed-failures": DEATHS, "worker-saturation": 1.0, "worker-ttl": "1 hour"}
CONNECT_TIMEOUT = 30.0  # seconds until a scheduler must answer
# Dask serves metrics over HTTP also without its dashboard: a scheduler at 8787, a worker at a free port of every interface
LOOPBACK = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
ON_LOOPBACK = ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")  # the same, as command-line arguments
WINDOW = 1000  # tasks that a scheduler holds at once: more than it has workers
POLL = 0.05  # seconds between two looks for ended tasks; the scheduler holds more of them, so no worker waits
PATROL = 5.0  # seconds between two counts of the workers, while no task ends
# Dask makes workers return every freed page at once. Each tensor then costs page faults, and the demo's forwards take 2.7 times
# as long. These limits of glibc are large enough to prevent that: bytes from which memory is trimmed, and mapped.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
_template_environment: dict[str, str] | None = None  # the process from which workers fork
KEPT = "what was measured is kept: start it again, and the same command continues from there"


class DaskWorkers:
    """Native Dask tasks from a client in the flow's process. They end when the flow ends."""

    def __init__(self, client: Client, patience: float) -> None:
        self.client = client
        self.patience = patience  # seconds without any worker until the run ends
        self.plugins: list[str] = []

    def open_run(self, run: "OpenedRun") -> None:
        """Registers plugins: each worker, present or future, is inspected and loads network and data."""
        from flows.worker import RunPlugin

        config = located(run.config)
        try:
            for plugin in (Inspection(config), RunPlugin(config, run.identity.contents, run.float_network.portable)):
                self.plugins.append(f"{plugin.name}-{config.run_folder}")  # another run on the same scheduler has another name
                self.client.register_plugin(plugin, self.plugins[-1])
        except ImportError as error:
            raise ServerError(
                f"a worker cannot import what a run needs ({error}); expected the same version of clado on every worker"
            ) from None

    def map(self, function: Callable[[dict[str, Any], Any], Any], config: RunConfig, items: Iterable[Any]) -> Iterator[Any]:
        """Results as they complete. The scheduler and this process hold at most WINDOW tasks, for any number of items.

        Tasks begin in the order of the items, so that neighbouring tasks of a worker are neighbouring items. After an error, or
        when the caller stops early, waiting tasks are cancelled.
        """
        document = located(config).model_dump(mode="json")
        numbered, name = enumerate(items), f"{function.__name__}-{uuid4().hex}"
        running = as_completed(loop=self.client.loop)
        pending: dict[Future[Any], Any] = {}
        try:
            while True:
                if len(pending) <= WINDOW // 2 and (batch := list(islice(numbered, WINDOW // 2))):
                    futures = self._submit(function, document, batch, name)
                    pending |= zip(futures, (item for _, item in batch), strict=True)
                    running.update(futures)
                if not pending:
                    return
                for future in self._next_batch(running):
                    yield self._result(future, pending[future])
                    del pending[future]
                    future.release()
        finally:
            with suppress(CommClosedError, OSError):
                self.client.cancel(list(pending))

    def _submit(
        self, function: Callable[[dict[str, Any], Any], Any], document: dict[str, Any], batch: list[tuple[int, Any]], name: str
    ) -> list[Future[Any]]:
        """Submits a batch of (number, item), with less priority than all earlier batches.

        All keys begin with one name. Dask then counts the tasks of all batches together, sees more tasks than workers, and keeps
        waiting tasks at the scheduler. Each task has its own key, so that a task that is submitted again is computed again.
        """
        numbers, items = zip(*batch, strict=True)
        keys = [(name, number) for number in numbers]
        try:
            return self.client.map(function, [document] * len(items), items, key=keys, retries=RETRIES, priority=-numbers[0])
        except ClosedClientError:
            raise ServerError(f"the Dask scheduler was lost; {KEPT}") from None

    def _next_batch(self, running: "as_completed") -> list[Future[Any]]:
        """Waits for at least one future, and returns those that have ended. Meanwhile it counts workers, so the wait ends."""
        check = self._patrol()
        while not (batch := running.next_batch(block=False)):
            time.sleep(POLL)
            check()
        return list(batch)

    def _patrol(self) -> Callable[[], None]:
        """A function to call while no task ends. It counts the workers every PATROL seconds.

        It raises ServerError if there was no worker for `patience` seconds.
        """
        last_check = last_worker = time.monotonic()

        def check() -> None:
            nonlocal last_check, last_worker
            if time.monotonic() - last_check < PATROL:
                return
            last_check = time.monotonic()
            last_worker = last_check if self._count() else last_worker
            if last_check - last_worker > self.patience:
                raise ServerError(f"no worker has been there for {self.patience:.0f} s; {KEPT}")

        return check

    def _count(self) -> int:
        try:
            return len(self.client.nthreads())
        except (CommClosedError, OSError):
            return 0

    def _result(self, future: Future[Any], item: Any) -> Any:
        if future.cancelled():
            raise ServerError(f"the Dask scheduler was lost; {KEPT}")
        check = self._patrol()
        try:
            while True:
                try:
                    return future.result(timeout=PATROL)
                except TimeoutError:
                    if future.status == "error":  # the task raised this TimeoutError
                        raise
                    check()  # the worker that held the result is lost, so the task is computed again
        except CladoError:
            raise
        except KilledWorker as error:
            raise MeasurementError(
                f"{item} ended its worker process more than {error.allowed_failures} times, most likely because it ran out of "
                "memory; use fewer workers, or lower measure.memory_limit_mb or measure.batch_images"
            ) from None
        except CommClosedError:
            raise ServerError(f"the Dask scheduler was lost; {KEPT}") from None
        except Exception as error:
            raise given_up(item, error) from error

    def close(self) -> None:
        """Removes the plugins, so that workers that outlive the run do not open it again."""
        for name in self.plugins:
            with suppress(Exception):  # the cluster may have ended already
                self.client.unregister_worker_plugin(name)


@contextmanager
def connected(target: Any, settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """The workers of a cluster or of a scheduler's address. Waits for the first worker."""
    quiet()
    try:
        client = Client(target, security=security(settings), set_as_default=False, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError) as error:
        raise ServerError(
            f"no Dask scheduler answers at {target} ({error}); expected one that runs, with the same cluster.tls: dask scheduler"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=settings.start_timeout)
        except TimeoutError:
            address = getattr(target, "scheduler_address", target)
            raise ServerError(
                f"the scheduler at {address} has no worker after {settings.start_timeout:.0f} s; expected some, "
                "such as `dask worker ADDRESS --nthreads 1` starts, or a longer cluster.start_timeout"
            ) from None
        workers = DaskWorkers(client, settings.start_timeout)
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def processes(settings: ClusterSettings, environments: list[dict[str, str]]) -> Iterator[DaskWorkers]:
    """A scheduler and one worker process on loopback for each environment; a killed worker is started again."""
    quiet()
    configure()
    forks = _template_environment == threads(settings)
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver" if forks else "spawn"})
    common = {"host": "127.0.0.1", "protocol": protocol(settings), "security": security(settings), **LOOPBACK}
    # the flow reports what happens to a task; other errors of a worker come from connections that end with the run
    worker_options = {"nthreads": 1, "memory_limit": 1 / len(environments), "silence_logs": logging.CRITICAL}
    workers = {
        number: {"cls": Nanny, "options": {**common, **worker_options, "env": {**threads(settings), **environment}}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**common, "port": 0}}
    with (
        SpecCluster(workers, scheduler, security=common["security"], silence_logs=logging.ERROR) as cluster,
        connected(cluster, settings) as connection,
    ):
        yield connection


def prepare_processes(settings: ClusterSettings) -> None:
    """Starts a process that imports what workers need. The workers of `processes` fork from it.

    Libraries read their environment when they are loaded. So this process serves the first settings only. Workers with
    other settings import the libraries themselves.
    """
    global _template_environment  # noqa: PLW0603
    if _template_environment is not None or "forkserver" not in multiprocessing.get_all_start_methods():
        return
    _template_environment = threads(settings)
    multiprocessing.set_forkserver_preload(["flows.clusters._template"])
    distributed.utils._forkserver_preload_set = True  # otherwise Dask replaces the list, and imports pandas for it
    before = dict(os.environ)
    os.environ.update(_template_environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def threads(settings: ClusterSettings) -> dict[str, str]:
    """Environment of a worker: the sizes of thread pools and the limits of the allocator, which libraries read at their start."""
    sizes = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(settings.threads_per_worker))
    return sizes | ALLOCATOR


def scheduler_environment() -> dict[str, str]:
    """SCHEDULER as environment variables of a scheduler's process."""
    return {f"DASK_DISTRIBUTED__SCHEDULER__{name.upper().replace('-', '_')}": str(value) for name, value in SCHEDULER.items()}


def configure() -> None:
    """Sets the settings of SCHEDULER and of the allocator, for clusters that this process starts. Workers are not profiled."""
    dask.config.set({"distributed.worker.profile.enabled": False})  # it walks the stack of a task every 10 ms
    dask.config.set({f"distributed.scheduler.{name}": value for name, value in SCHEDULER.items()})
    dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ALLOCATOR.items()})


def quiet() -> None:
    """Keeps Dask's log lines (shutdown, heartbeat) out of the terminal. Warnings of tasks are still shown."""
    for name in (
        "distributed",
        "distributed.worker",
        "distributed.scheduler",
        "distributed.nanny",
        "distributed.core",
        "tornado",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
