"""No cluster: tasks run in the flow's own process, one after another. For small networks, debugging and tests."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clado.errors import CladoError
from clado.settings.cluster import ClusterSettings
from clado.settings.schema import RunConfig
from flows.clusters import RETRIES, given_up

if TYPE_CHECKING:
    from clado.run.opened_run import OpenedRun


class InlineWorkers:
    """The interface of workers, without worker processes."""

    def open_run(self, run: "OpenedRun") -> None:
        """Keeps the flow's run, so that tasks find it."""
        from flows import worker

        worker.keep(run)

    def map(self, function: Callable[[dict[str, Any], Any], Any], config: RunConfig, items: Iterable[Any]) -> Iterator[Any]:
        """Calls the function for each item in turn."""
        document = config.model_dump(mode="json")
        for item in items:
            yield _result(function, document, item)


def _result(function: Callable[[dict[str, Any], Any], Any], document: dict[str, Any], item: Any) -> Any:
    for retries_left in range(RETRIES, -1, -1):
        try:
            return function(document, item)
        except Exception as error:
            if retries_left:
                continue
            if isinstance(error, CladoError):
                raise
            raise given_up(item, error) from error


@contextmanager
def start(settings: ClusterSettings) -> Iterator[InlineWorkers]:
    """Computes tasks in this process."""
    yield InlineWorkers()


def describe(settings: ClusterSettings) -> str:
    """Says what `start` starts."""
    return "no workers: tasks run in the flow's own process, one after another"
