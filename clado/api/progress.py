"""Progress of a long call: a bar, a callable, or nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from clado.errors import ConfigurationError

Progress = bool | Callable[[int, int], object]
"""True shows a bar of tqdm. A callable is called with (done steps, all steps). False shows nothing."""
Advance = Callable[[int, int], object]


@contextmanager
def showing(progress: Progress, title: str) -> Iterator[Advance]:
    """The function that a loop calls with (done, total) after each step.

    Args:
        progress: As the caller of a public function gave it.
        title: What a bar is called.

    Raises:
        ConfigurationError: `progress` is something else, or tqdm is not installed.
    """
    if progress is False or progress is None:
        yield lambda done, total: None
    elif progress is True:
        bar = _Bar(title)
        try:
            yield bar
        finally:
            bar.close()
    elif callable(progress):
        yield progress
    else:
        raise ConfigurationError(
            f"progress is {progress!r}; expected True for a bar, or a callable that takes (done, total), such as print"
        )


class _Bar:
    """A bar of tqdm, which begins with the first step."""

    def __init__(self, title: str) -> None:
        try:
            self._tqdm = import_module("tqdm.auto").tqdm
        except ImportError:
            raise ConfigurationError(
                "progress=True needs tqdm, which is not installed; expected pip install tqdm, or a callable (done, total)"
            ) from None
        self._title = title
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._tqdm(total=total, desc=self._title)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Closes the bar, and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()
