"""Worker processes on this machine, one task at a time each."""

from contextlib import AbstractContextManager

from clado.settings.cluster import ClusterSettings
from flows.clusters._dask import DaskWorkers, prepare_processes, processes


def prepare(settings: ClusterSettings) -> None:
    """Starts the process from which workers fork."""
    prepare_processes(settings)


def start(settings: ClusterSettings) -> AbstractContextManager[DaskWorkers]:
    """A scheduler and `workers` processes on loopback, which end with the context. A killed worker is started again."""
    return processes(settings, [{}] * settings.workers)


def describe(settings: ClusterSettings) -> str:
    """Says what `start` starts."""
    return f"{settings.workers} worker processes on this machine, {settings.threads_per_worker} thread(s) each"
