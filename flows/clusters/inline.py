"""No cluster: tasks run in the flow's own process, one after another. For small networks, debugging and tests."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from clado.config import ClusterSettings, RunConfig


class InlineWorkers:
    """The interface of workers, without any."""

    def open_session(self, config: RunConfig) -> None:
        """Nothing to do: the session opens with the first task."""

    def map(self, function: Callable[[dict[str, Any], Any], Any], config: RunConfig, items: Iterable[Any]) -> Iterator[Any]:
        """Calls the function for each item in turn."""
        document = config.model_dump(mode="json")
        for item in items:
            yield function(document, item)


@contextmanager
def start(settings: ClusterSettings) -> Iterator[InlineWorkers]:
    """Workers without processes."""
    yield InlineWorkers()
