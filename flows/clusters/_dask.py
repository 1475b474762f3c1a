"""Workers behind a Dask client, shared by every kind of cluster that is one."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError

from clado.errors import CladoError, MeasurementError, ServerError
from clado.settings.schema import ClusterSettings, RunConfig
from flows.clusters import RETRIES, given_up
from flows.clusters._inspection import Inspection, located
from flows.clusters._tls import protocol, security

if TYPE_CHECKING:
    from clado.run.opened_run import OpenedRun

DEATHS = 3  # of workers, until the task that each was computing is given up
# What a scheduler that we start keeps to: a worker holds one task at a time, so that its loss costs and blames only that; and one
# that says nothing while it opens a large network is not lost for it, as one whose connection closes is.
SCHEDULER = {"allowed-failures": DEATHS, "worker-saturation": 1.0, "worker-ttl": "1 hour"}
CONNECT_TIMEOUT = 30.0  # seconds until a scheduler that does not answer is given up
# Dask serves metrics over HTTP even without its dashboard: a scheduler at 8787, a worker at a free port of every interface
LOOPBACK = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
ON_LOOPBACK = ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")  # the same, as words of its commands
WINDOW = 1000  # tasks that a scheduler is told of at a time: more than it has workers
PATROL = 5.0  # seconds between looks at whether there are workers, while no task ends
# Dask makes workers give every freed page back at once; then each tensor is paid for in page faults, and the demo's forwards take
# 2.7 times as long. These are glibc's own limits, out of the way: bytes from which memory is trimmed, and mapped.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
KEPT = "what was measured is kept: start it again, and the same command goes on from there"


class DaskWorkers:
    """Tasks as native Dask tasks from a client in the flow's process: they end when the flow ends."""

    def __init__(self, client: Client, patience: float) -> None:
        self.client = client
        self.patience = patience  # seconds without any worker
        self.plugins: list[str] = []

    def open_run(self, run: "OpenedRun") -> None:
        """Registers plugins: each worker is inspected and loads network and data, also one that comes later or is restarted."""
        from flows.worker import RunPlugin

        config = located(run.config)
        try:
            for plugin in (Inspection(config), RunPlugin(config, run.identity.contents)):
                self.plugins.append(f"{plugin.name}-{config.run_folder}")  # another run on the same scheduler has its own
                self.client.register_plugin(plugin, self.plugins[-1])
        except ImportError as error:
            raise ServerError(
                f"a worker cannot import what a run needs ({error}); expected this version of clado there"
            ) from None

    def map(self, function: Callable[[dict[str, Any], Any], Any], config: RunConfig, items: Iterable[Any]) -> Iterator[Any]:
        """Results as they complete. The scheduler and this process hold at most WINDOW tasks, however many items there are.

        Tasks begin in the order of the items, so that a worker's neighbouring tasks are neighbours. On an error, or when the
        caller stops early, what has not begun is cancelled.
        """
        document = located(config).model_dump(mode="json")
        left, name = enumerate(items), f"{function.__name__}-{uuid4().hex}"
        running = as_completed(loop=self.client.loop)
        asked: dict[Future[Any], Any] = {}
        try:
            while True:
                if len(asked) <= WINDOW // 2 and (batch := list(islice(left, WINDOW // 2))):
                    futures = self._submit(function, document, batch, name)
                    asked |= zip(futures, (item for _, item in batch), strict=True)
                    running.update(futures)
                if not asked:
                    return
                for future in self._ended(running):
                    yield self._result(future, asked[future])
                    del asked[future]
                    future.release()
        finally:
            with suppress(CommClosedError, OSError):
                self.client.cancel(list(asked))

    def _submit(
        self, function: Callable[[dict[str, Any], Any], Any], document: dict[str, Any], batch: list[tuple[int, Any]], name: str
    ) -> list[Future[Any]]:
        """Asks for a batch of (number, item), behind all batches before it.

        All keys begin with one name: Dask then counts the tasks of all batches, sees more of them than workers, and keeps those
        that wait at the scheduler. A key of its own for each task: one that is asked for again is computed again.
        """
        numbers, items = zip(*batch, strict=True)
        keys = [(name, number) for number in numbers]
        try:
            return self.client.map(function, [document] * len(items), items, key=keys, retries=RETRIES, priority=-numbers[0])
        except ClosedClientError:
            raise ServerError(f"the Dask scheduler was lost; {KEPT}") from None

    def _ended(self, running: "as_completed") -> list[Future[Any]]:
        """The futures that have ended, at least one. While none does, the workers are counted now and then: nobody waits for
        nobody."""
        look = self._watch()
        while not (batch := running.next_batch(block=False)):
            time.sleep(0.005)
            look()
        return list(batch)

    def _watch(self) -> Callable[[], None]:
        """What is called while nothing happens: now and then it counts the workers, ServerError once none was there for long."""
        looked = alive = time.monotonic()

        def look() -> None:
            nonlocal looked, alive
            if time.monotonic() - looked < PATROL:
                return
            looked = time.monotonic()
            alive = looked if self._count() else alive
            if looked - alive > self.patience:
                raise ServerError(f"no worker has been there for {self.patience:.0f} s; {KEPT}")

        return look

    def _count(self) -> int:
        try:
            return len(self.client.nthreads())
        except (CommClosedError, OSError):
            return 0

    def _result(self, future: Future[Any], item: Any) -> Any:
        if future.cancelled():
            raise ServerError(f"the Dask scheduler was lost; {KEPT}")
        look = self._watch()
        try:
            while True:
                try:
                    return future.result(timeout=PATROL)
                except TimeoutError:
                    if future.status == "error":  # the task's own
                        raise
                    look()  # the worker that had the result is gone, and the task is computed again
        except CladoError:
            raise
        except KilledWorker as error:
            raise MeasurementError(
                f"{item} ended its worker process more than {error.allowed_failures} times, most likely for want of "
                "memory; use fewer workers, or lower measure.memory_limit_mb or measure.batch_images"
            ) from None
        except CommClosedError:
            raise ServerError(f"the Dask scheduler was lost; {KEPT}") from None
        except Exception as error:
            raise given_up(item, error) from error

    def close(self) -> None:
        """Takes the plugins away, so that workers that outlive the run do not open the run again."""
        for name in self.plugins:
            with suppress(Exception):  # the cluster may be gone
                self.client.unregister_worker_plugin(name)


@contextmanager
def connected(target: Any, settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """The workers of a cluster, or of a scheduler's address, as soon as there is one."""
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
    common = {"host": "127.0.0.1", "protocol": protocol(settings), "security": security(settings), **LOOPBACK}
    # what happens to a task is the flow's to tell; a worker's own errors are of connections that end with the run
    own = {"nthreads": 1, "memory_limit": 1 / len(environments), "silence_logs": logging.CRITICAL}
    workers = {
        number: {"cls": Nanny, "options": {**common, **own, "env": {**threads(settings), **environment}}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {**common, "port": 0}}
    with (
        SpecCluster(workers, scheduler, security=common["security"], silence_logs=logging.ERROR) as cluster,
        connected(cluster, settings) as connection,
    ):
        yield connection


def threads(settings: ClusterSettings) -> dict[str, str]:
    """Environment of a worker: libraries size their thread pools and the allocator its limits, before any code of ours runs."""
    sizes = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(settings.threads_per_worker))
    return sizes | ALLOCATOR


def scheduler_environment() -> dict[str, str]:
    """SCHEDULER as environment variables of a scheduler's process."""
    return {f"DASK_DISTRIBUTED__SCHEDULER__{name.upper().replace('-', '_')}": str(value) for name, value in SCHEDULER.items()}


def configure() -> None:
    """Sets SCHEDULER and the allocator for clusters that this process starts."""
    import dask

    dask.config.set({f"distributed.scheduler.{name}": value for name, value in SCHEDULER.items()})
    dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ALLOCATOR.items()})


def quiet() -> None:
    """Keeps Dask's own log lines (shutdown, heartbeat) out of the terminal; warnings of tasks still show."""
    for name in (
        "distributed",
        "distributed.worker",
        "distributed.scheduler",
        "distributed.nanny",
        "distributed.core",
        "tornado",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
