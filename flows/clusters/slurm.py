"""Worker processes as SLURM batch jobs, one job for each. The scheduler is in the flow's process, which jobs can reach."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clado.errors import ConfigurationError
from clado.settings.cluster import ClusterSettings
from flows.clusters import optional
from flows.clusters._dask import LOOPBACK, ON_LOOPBACK, DaskWorkers, configure, connected, quiet, threads
from flows.clusters._tls import protocol, security

RESUBMIT = "15s"  # seconds between two counts of the jobs; missing jobs are then submitted again


@contextmanager
def start(settings: ClusterSettings) -> Iterator[DaskWorkers]:
    """Submits `workers` jobs and cancels them when the context ends. A job that ends earlier is submitted again."""
    library = optional("dask_jobqueue", "dask-jobqueue", "slurm")
    _check(settings)
    quiet()
    configure()
    assert settings.slurm is not None  # checked with the settings
    if settings.slurm.log_folder is not None:
        settings.slurm.log_folder.mkdir(parents=True, exist_ok=True)  # sbatch loses the output of a job if the folder is absent
    with library.SLURMCluster(scheduler_options=dict(LOOPBACK), **_options(settings)) as cluster:
        cluster.adapt(minimum_jobs=settings.workers, maximum_jobs=settings.workers, interval=RESUBMIT)
        with connected(cluster, settings) as workers:
            yield workers


def describe(settings: ClusterSettings) -> str:
    """The script of one job, with placeholders for the scheduler's address and the worker's name. Submits nothing."""
    library = optional("dask_jobqueue.slurm", "dask-jobqueue", "slurm")
    script: str = library.SLURMJob(f"{protocol(settings)}SCHEDULER:PORT", name="WORKER", **_options(settings)).job_script()
    return script


def _check(settings: ClusterSettings) -> None:
    """Raises ConfigurationError if SLURM would refuse the job, before anything starts."""
    if shutil.which("sbatch") is None:
        raise ConfigurationError(
            "cluster kind slurm submits jobs with sbatch, which is not here; expected a node of a SLURM cluster"
        )
    trial = subprocess.run(
        ["sbatch", "--test-only"], input=describe(settings), text=True, capture_output=True, timeout=60, check=False
    )
    if trial.returncode:
        raise ConfigurationError(
            f"sbatch refuses the job of a worker ({trial.stderr.strip()}); expected other settings of cluster.slurm: "
            "`clado cluster CONFIG` prints the script"
        )


def _options(settings: ClusterSettings) -> dict[str, Any]:
    slurm = settings.slurm
    assert slurm is not None  # checked with the settings
    logs = [] if slurm.log_folder is None else [f"--output={slurm.log_folder.absolute()}/clado-%j.txt"]
    gpus = [f"--gres=gpu:{slurm.gpus}"] if slurm.gpus else []
    exports = [f"export {name}={value}" for name, value in threads(settings).items()]
    return {
        "job_name": "clado",
        "cores": 1,  # tasks at a time
        "processes": 1,
        "job_cpu": settings.threads_per_worker,
        "memory": slurm.memory,
        "queue": slurm.partition,
        "account": slurm.account,
        "walltime": slurm.walltime,
        "interface": slurm.interface,
        "python": slurm.python,
        "job_extra_directives": [*gpus, *logs, *slurm.directives],
        "job_script_prologue": [*exports, *slurm.prologue],
        "worker_extra_args": [*ON_LOOPBACK],
        "protocol": protocol(settings),
        "security": security(settings),
    }
