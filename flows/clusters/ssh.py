"""Worker processes on other machines, started over SSH. The scheduler runs on the first of them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clado.errors import ServerError
from clado.settings.cluster import ClusterSettings, SshSettings
from flows.clusters import optional
from flows.clusters._dask import LOOPBACK, DaskWorkers, configure, connected, quiet, threads
from flows.clusters._tls import protocol, tls_options

IDLE_TIMEOUT = "2 hours"  # seconds without a task until scheduler and workers end: their flow may be lost


@contextmanager
def start(settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """Starts `workers` processes on `ssh.hosts` in turn, and ends them with the context. A killed worker is started again."""
    optional("asyncssh", "asyncssh", "ssh")
    from distributed import SpecCluster
    from distributed.deploy.ssh import Scheduler, Worker  # not SSHCluster, which gives all workers one environment

    from flows.clusters._tls import security

    ssh = _section(settings)
    quiet()
    configure()
    connection = {"connect_options": _connect_options(ssh), "remote_python": ssh.python}
    common: dict[str, Any] = {"protocol": protocol(settings), "security": tls_options(settings), "interface": ssh.interface}
    common = {key: value for key, value in common.items() if value is not None} | LOOPBACK
    scheduler = {"address": ssh.hosts[0], "kwargs": {**common, "port": 0, "idle_timeout": IDLE_TIMEOUT}, **connection}
    workers = {
        number: {
            "cls": Worker,
            "options": {"address": host, "kwargs": {**common, "nthreads": 1, "env": environment}, **connection},
        }
        for number, (host, environment) in enumerate(_places(settings))
    }
    try:
        cluster = SpecCluster(workers, {"cls": Scheduler, "options": scheduler}, security=security(settings), name="clado-ssh")
    except Exception as error:
        raise ServerError(
            f"workers do not start over SSH ({type(error).__name__}: {error}); expected this to work: "
            f"ssh {ssh.hosts[0]} {ssh.python or 'PYTHON'} -c 'import clado, distributed'"
        ) from None
    with cluster, connected(cluster, settings) as connected_workers:
        yield connected_workers


def describe(settings: ClusterSettings) -> str:
    """Says which worker runs on which host."""
    lines = [f"scheduler: {_section(settings).hosts[0]}"]
    for number, (host, environment) in enumerate(_places(settings)):
        gpu = f", CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']}" if "CUDA_VISIBLE_DEVICES" in environment else ""
        lines.append(f"worker {number}: {host}{gpu}")
    return "\n".join(lines)


def _places(settings: ClusterSettings) -> list[tuple[str, dict[str, str]]]:
    """(host, environment) of each worker: hosts in turn, and the GPUs of a host in turn."""
    ssh, places = _section(settings), []
    num_workers: Counter[str] = Counter()
    for number in range(settings.workers):
        host = ssh.hosts[number % len(ssh.hosts)]
        gpu = {} if ssh.gpus_per_host is None else {"CUDA_VISIBLE_DEVICES": str(num_workers[host] % ssh.gpus_per_host)}
        places.append((host, {**threads(settings), **gpu}))
        num_workers[host] += 1
    return places


def _connect_options(ssh: SshSettings) -> dict[str, Any]:
    """Options of asyncssh. It refuses a host with an unknown key."""
    options = {
        "username": ssh.user,
        "port": ssh.port,
        "client_keys": None if ssh.key_file is None else [str(ssh.key_file.expanduser())],
        "known_hosts": None if ssh.known_hosts is None else str(ssh.known_hosts.expanduser()),
    }
    return {key: value for key, value in options.items() if value is not None}


def _section(settings: ClusterSettings) -> SshSettings:
    assert settings.ssh is not None  # checked with the settings
    return settings.ssh
