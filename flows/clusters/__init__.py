"""Where tasks run: one file for each kind of cluster. Choosing another is a change of configuration only.

A cluster is a module of this folder with a context manager `start(settings: ClusterSettings) -> Workers`. To add one, add a file
and subclass `ClusterContract` (tests/contracts/cluster.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, TypeVar

from clado.config import RunConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    """Processes that hold the run's session and compute tasks."""

    def open_session(self, config: RunConfig) -> None:
        """Makes every worker, present and future, load the run's network and data."""

    def map(
        self, function: Callable[[dict[str, Any], Item], Result], config: RunConfig, items: Iterable[Item]
    ) -> Iterator[Result]:
        """`function(configuration, item)` for each item, results as they complete. Each call is one task."""


def start(config: RunConfig) -> AbstractContextManager[Workers]:
    """The workers that the configuration names, until the context ends."""
    workers: AbstractContextManager[Workers] = import_module(f"flows.clusters.{config.cluster.kind}").start(config.cluster)
    return workers
