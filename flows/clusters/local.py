"""Worker processes on this machine, one task at a time each."""

from collections.abc import Iterator
from contextlib import contextmanager

from clado.config import ClusterSettings
from flows.clusters._dask import DEATHS, DaskWorkers, quiet


@contextmanager
def start(settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """A scheduler and `workers` processes on loopback, ended with the context; a killed worker is started again."""
    import dask
    from distributed import Client, LocalCluster

    threads = str(settings.threads_per_worker)
    quiet()
    # torch sizes its thread pool from the environment, before any code of ours runs
    dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}})
    dask.config.set({"distributed.scheduler.allowed-failures": DEATHS})
    with (
        LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=40,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield DaskWorkers(client)
