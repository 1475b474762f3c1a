"""Where tasks run: one file for each kind of cluster. Only the settings change for another kind.

A cluster is a module of this folder with a context manager `start(settings: ClusterSettings) -> Workers` and a function
`describe(settings) -> str` that says, or prints, what `start` would start. If starting takes long and needs no answer of others,
it has `prepare(settings)` too. That begins what can begin before the network is known. Then `start` is called in the background.
To add one, add a file and subclass `ClusterContract` (tests/contracts/cluster.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from clado.errors import ConfigurationError, MeasurementError
from clado.plugins import load
from clado.settings.schema import RunConfig

if TYPE_CHECKING:  # commands that only describe a cluster need not load a network
    from clado.run.opened_run import OpenedRun

Item = TypeVar("Item")
Result = TypeVar("Result")


RETRIES = 2  # how often a task is repeated after an error that its worker survives


class Workers(Protocol):
    """Processes that hold an opened run and compute tasks."""

    def open_run(self, run: "OpenedRun") -> None:
        """Makes every worker, present and future, load the run's network and data.

        If a worker's contents differ from the flow's (`RunIdentity.contents`), it loads them again or is refused.
        """

    def map(
        self, function: Callable[[dict[str, Any], Item], Result], config: RunConfig, items: Iterable[Item]
    ) -> Iterator[Result]:
        """The results of `function(configuration, item)` for each item, as they complete. Each call is one task.

        A task that fails is repeated RETRIES times. Then a CladoError is raised unchanged. `given_up` converts any other error.
        """


def start(config: RunConfig) -> AbstractContextManager[Workers]:
    """The workers that the configuration names, until the context ends."""
    workers: AbstractContextManager[Workers] = load("clusters", config.cluster.name).start(config.cluster)
    return workers


def prepare(config: RunConfig) -> None:
    """Begins to start workers, where that is possible before the network is known. They end with this process."""
    if hasattr(module := load("clusters", config.cluster.name), "prepare"):
        module.prepare(config.cluster)


@contextmanager
def in_background(run: "OpenedRun") -> Iterator[None]:
    """During this context workers start in the background, and `opened` returns them. Only for clusters that have `prepare`."""
    if not hasattr(load("clusters", run.config.cluster.name), "prepare"):
        yield
        return
    _started.append(_Background(run))
    try:
        yield
    finally:
        _started.pop().close()


@contextmanager
def opened(run: "OpenedRun") -> Iterator[Workers]:
    """Workers that have opened a run, until the context ends: those that start in the background, or new ones."""
    for background in _started:
        if background.run is run:
            try:
                yield background.wait()
            finally:
                background.close()
            return
    with start(run.config) as workers:
        workers.open_run(run)
        yield workers


class _Background:
    """Workers that a background thread starts."""

    def __init__(self, run: "OpenedRun") -> None:
        self.run = run
        self._stack = ExitStack()
        self._workers: Workers | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._start, name="clado-workers", daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            workers = self._stack.enter_context(start(self.run.config))
            workers.open_run(self.run)
            self._workers = workers
        except BaseException as error:
            self._error = error

    def wait(self) -> Workers:
        """The workers, once they have opened the run."""
        self._thread.join()
        if self._workers is None:
            assert self._error is not None
            raise self._error
        return self._workers

    def close(self) -> None:
        """Ends them."""
        self._thread.join()
        self._stack.close()


_started: list[_Background] = []  # at most one at a time


def describe(config: RunConfig) -> str:
    """What `start` would start: a sentence, or the script or manifest for another system. Starts nothing."""
    text: str = load("clusters", config.cluster.name).describe(config.cluster)
    return text


def given_up(item: object, error: Exception) -> MeasurementError:
    """The message for a task that fails each time. The error itself is its cause, and goes into the run's failure.txt."""
    return MeasurementError(
        f"{item} failed {RETRIES + 1} times, the last time with {type(error).__name__}: {' '.join(str(error).split())[:300]}. "
        "What was measured is kept, and the same command continues; the traceback is in failure.txt of the run's folder"
    )


def optional(module: str, package: str, kind: str) -> ModuleType:
    """Imports a library that only one kind of cluster needs. ConfigurationError names the extra to install if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"cluster kind {kind} needs the package {package}, which is not installed ({error}); "
            f"expected: pip install 'clado[{kind}]', or another cluster.kind"
        ) from None
