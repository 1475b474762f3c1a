"""Worker processes on this machine, each pinned to one GPU by CUDA_VISIBLE_DEVICES."""

import os
from contextlib import AbstractContextManager

from clado.errors import ConfigurationError
from clado.settings.cluster import ClusterSettings
from flows.clusters._dask import DaskWorkers, processes


def start(settings: ClusterSettings) -> AbstractContextManager[DaskWorkers]:
    """A scheduler and `workers` processes on loopback, which end with the context. Each worker sees one GPU."""
    return processes(settings, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in pins(settings)])


def describe(settings: ClusterSettings) -> str:
    """Says which worker is pinned to which GPU."""
    return "\n".join(f"worker {number}: CUDA_VISIBLE_DEVICES={gpu}" for number, gpu in enumerate(pins(settings)))


def pins(settings: ClusterSettings) -> list[str]:
    """The GPU of each worker.

    Raises:
        ConfigurationError: There are too few GPUs, and they may not be shared.
    """
    names = gpus()
    if not names:
        raise ConfigurationError("cluster kind local_gpus found no GPU that torch can use; expected one or more, or kind: local")
    if settings.workers > len(names) and not settings.share_gpus:
        raise ConfigurationError(
            f"{settings.workers} workers do not have a GPU each: there are {len(names)} ({', '.join(names)}); "
            f"expected cluster.workers={len(names)} or less, or cluster.share_gpus=true"
        )
    return [names[number % len(names)] for number in range(settings.workers)]


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers or identifiers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ([str(k) for k in range(count)] if visible is None else visible.split(","))[:count]
