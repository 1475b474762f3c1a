"""Workers of a Dask scheduler that already runs, on any machine."""

from contextlib import AbstractContextManager

from clado.settings.cluster import ClusterSettings
from flows.clusters._dask import ON_LOOPBACK, DaskWorkers, connected


def start(settings: ClusterSettings) -> AbstractContextManager[DaskWorkers]:
    """A client of the scheduler at `address`. Scheduler and workers outlive the context."""
    return connected(settings.address, settings)


def describe(settings: ClusterSettings) -> str:
    """The commands that must have been run before `start`."""
    tls = settings.tls
    files = "" if tls is None else f" --tls-ca-file {tls.ca_file} --tls-cert {tls.cert} --tls-key {tls.key}"
    quiet = " ".join(ON_LOOPBACK)
    port = str(settings.address).rpartition(":")[2]
    return (
        f"expects, with the same clado installed:\n  dask scheduler --port {port} {quiet}{files}\n"
        f"  {settings.workers} x dask worker {settings.address} --nthreads 1 {quiet}{files}"
    )
