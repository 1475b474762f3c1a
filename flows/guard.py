"""Signals and failures of Prefect: one message for each, and no traceback for an interrupt or for a CladoError."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from clado.choosing.program import Program, Solve
from clado.choosing.solution import Solution, Status
from clado.errors import CladoError, FolderBusy, ServerError, SolverInterrupted, StoreError
from clado.space import Assignment
from flows.embedded import foreign_url

GRACE = 10.0  # seconds for an orderly end; after them, another signal ends the command at once


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process. A second run on it is refused. The lock ends with the process."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(
                f"another run is writing to {folder}; wait for it, or name another folder (folder: runs/…)"
            ) from None
        except OSError as error:
            raise StoreError(
                f"{folder} is on a file system without locks ({error.strerror}); expected another folder for the "
                "run (folder: runs/…)"
            ) from None
        yield


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def farewell(interrupt: type[BaseException]) -> tuple[str, int]:
    """Prints the message of a command that a signal ends, and returns its exit code."""
    word, code = ("terminated", 143) if issubclass(interrupt, Terminated) else ("interrupted", 130)
    return f"clado: {word}; what was measured is kept, and the same command continues from there", code


def end_in_peace(interrupt: type[BaseException]) -> None:
    """Ignores further signals while the command ends, for GRACE seconds. After that, the next one ends the process at once.

    Without this, a second Ctrl-C while Dask ends would leave workers and tracebacks.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    begin = time.monotonic()

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - begin > GRACE:
            text, code = farewell(interrupt)
            os.write(2, f"{text}\n".encode())
            os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Around a solver: SIGTERM has the effect of Ctrl-C, after which a solver returns its best. Yields the received signals."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def uninterrupted(solve: Solve, keep: Callable[[Solution], None] = lambda best: None) -> Solve:
    """The solver, except that Ctrl-C or SIGTERM ends the command. `keep` receives the best solution so far."""

    def solve_or_end(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        solution = None
        with interruptible() as signals:
            try:
                solution = solve(program, starts)
            except CladoError as error:
                if not signals and not isinstance(error, SolverInterrupted):
                    raise
        if solution is not None and solution.status is not Status.INTERRUPTED and not signals:
            return solution
        if solution is not None:
            keep(solution)
        signal.raise_signal(signals[0] if signals else signal.SIGINT)
        raise KeyboardInterrupt

    return solve_or_end


@contextmanager
def insistent(seconds: float = 5.0) -> Iterator[None]:
    """Sends SIGTERM again after some seconds, until the context has ended. Use it inside a flow.

    Prefect's handler raises an exception. Python drops exceptions of garbage collection and of deleting an object, and the run
    would continue.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    timers: list[threading.Timer] = []

    def repeat(number: int, frame: FrameType | None) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), number)))
        timers[-1].daemon = True
        timers[-1].start()
        handler(number, frame)

    signal.signal(signal.SIGTERM, repeat)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        if signal.getsignal(signal.SIGTERM) is repeat:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def orchestrated(outside: Callable[[], bool], complete: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Around the call of a flow: a failure of Prefect becomes one message, and so does an interrupt.

    Prefect handles SIGTERM while the flow runs. It unwinds the flow, then sends the signal again to the handler that is set here.
    Prefect's own messages about an interrupt are dropped.

    Args:
        outside: Whether an error comes from outside the flow's phases, so from Prefect.
        complete: Whether the flow is complete. Then the run is good, and the message says that Prefect does not know it.
    """
    from prefect.exceptions import TerminationSignal

    interrupted: list[type[KeyboardInterrupt]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if interrupted:  # a second signal while this handler runs: an exception here would leave the lock of logging locked
            return
        interrupted.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
        end_in_peace(interrupted[0])
        logging.disable(logging.CRITICAL)
        raise interrupted[0]

    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_for_the_user)
    try:
        yield
    except TerminationSignal:
        raise Terminated from None
    except Exception as error:
        if interrupted:
            raise interrupted[0] from None
        if complete():
            print(
                f"clado: the run is complete, but Prefect was not told ({type(error).__name__}): {_leftover()}", file=sys.stderr
            )
            return
        if isinstance(error, CladoError) or not outside():
            raise
        raise did_not_start(error) from None
    finally:
        if not interrupted:
            for number, handler in previous.items():
                signal.signal(number, handler)


def did_not_start(error: Exception) -> ServerError:
    """The message for a Prefect that does not start."""
    return ServerError(f"Prefect did not start ({type(error).__name__}: {error}): {_advice()}")


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Drops the traceback of an error that the command prints as one message, and Prefect's messages about a signal."""
    is_message = isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], CladoError)
    return not is_message and not any(words in record.getMessage() for words in ("Crash detected!", "Finished in state Crashed"))


def _leftover() -> str:
    return f"{foreign_url() or 'its page'} shows the run as running until somebody deletes it there"


def _advice() -> str:
    if url := foreign_url():
        return f"start the server at {url}, or unset PREFECT_API_URL (or Prefect's profile) to use an embedded one"
    return (
        "its embedded server needs a free port on 127.0.0.1 and a folder to write to (PREFECT_HOME); "
        "or run `prefect server start` and set PREFECT_API_URL"
    )
