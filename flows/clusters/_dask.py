"""Workers behind a Dask client, shared by every kind of cluster that is one."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed import Client, KilledWorker, as_completed

from clado.config import RunConfig
from clado.errors import MeasurementError

RETRIES = 2  # of one task, on errors that a worker may survive
DEATHS = 3  # of workers, until the task that each was computing is given up


class DaskWorkers:
    """Tasks as native Dask tasks from a client in the flow's process: they end when the flow ends."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def open_session(self, config: RunConfig) -> None:
        """Registers the plugin, which loads network and data on every worker, also on one that is restarted."""
        from flows.worker import SessionPlugin

        self.client.register_plugin(SessionPlugin(config))

    def map(self, function: Callable[[dict[str, Any], Any], Any], config: RunConfig, items: Iterable[Any]) -> Iterator[Any]:
        """Submits all items at once; on an error, or when the caller stops early, what has not begun is cancelled."""
        work = list(items)
        documents = [config.model_dump(mode="json")] * len(work)
        # pure=False: a task that is asked for again is computed again
        futures = self.client.map(function, documents, work, pure=False, retries=RETRIES)
        try:
            for future in as_completed(futures, loop=self.client.loop):
                try:
                    result = future.result()
                except KilledWorker as error:
                    raise MeasurementError(
                        f"a task ended its worker process more than {DEATHS} times ({error.task}), most likely for want of "
                        "memory; use fewer workers, or lower measure.memory_limit_mb or measure.batch_images"
                    ) from None
                yield result
                future.release()
        finally:
            self.client.cancel(futures)


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
