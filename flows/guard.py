"""What the command keeps from the user of Prefect's faults: tracebacks of errors that are not Prefect's, and of an interrupt."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from clado.choosing.program import Program, Solution, Solve, Status
from clado.errors import CladoError, FolderBusy, ServerError, SolverInterrupted, StoreError
from clado.space import Assignment

GRACE = 10.0  # seconds in which what was started is ended, before a further signal ends the command at once


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; a second run on it is refused. The lock dies with the process, however it ends."""
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
                f"{folder} is on a file system that offers no locks ({error.strerror}); expected another folder for the "
                "run (folder: runs/…)"
            ) from None
        yield


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def farewell(interrupt: type[BaseException]) -> tuple[str, int]:
    """What the command says when a signal ends it, and its exit code."""
    word, code = ("terminated", 143) if issubclass(interrupt, Terminated) else ("interrupted", 130)
    return f"clado: {word}; what was measured is kept, and the same command goes on from there", code


def end_in_peace(interrupt: type[BaseException]) -> None:
    """From here on the command ends because of a signal, and one more does not disturb it: a second Ctrl-C in the middle of
    Dask's end would leave workers and tracebacks. Where that takes longer than GRACE, the next one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return
    began = time.monotonic()

    def heed(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > GRACE:
            text, code = farewell(interrupt)
            os.write(2, f"{text}\n".encode())
            os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, heed)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Around a solver, which heeds Ctrl-C and returns its best: SIGTERM is as good here. Gives the signals that came."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def uninterrupted(solve: Solve, keep: Callable[[Solution], None] = lambda best: None) -> Solve:
    """The solver, but Ctrl-C or SIGTERM ends what it is part of, as anywhere else; `keep` is given its best until then."""

    def heeding(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
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

    return heeding


@contextmanager
def insistent(seconds: float = 5.0) -> Iterator[None]:
    """Within a flow: SIGTERM comes again after some seconds, until it has ended what is inside.

    Prefect's handler raises, and Python drops what is raised while it collects garbage or deletes an object: the run would go on.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[threading.Timer] = []

    def heed(number: int, frame: FrameType | None) -> None:
        waiting.append(threading.Timer(seconds, os.kill, (os.getpid(), number)))
        waiting[-1].daemon = True
        waiting[-1].start()
        handler(number, frame)

    signal.signal(signal.SIGTERM, heed)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        if signal.getsignal(signal.SIGTERM) is heed:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def orchestrated(outside: Callable[[], bool], complete: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Around the call of a flow: a failure of Prefect itself (`outside` the flow's phases) is one message, an interrupt is one.
    Where the flow is `complete` and only Prefect could not be told, that is said and the run stands.

    Whatever Prefect says of an interrupt is not heard.
    SIGTERM is Prefect's while the flow runs: it unwinds the flow, then sends the signal again, to the handler that is set here.
    The embedded server ends when this process does, however that ends.
    """
    from prefect.exceptions import TerminationSignal

    interrupted: list[type[KeyboardInterrupt]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if interrupted:  # one more while this handler runs: an exception here would leave logging's lock taken for ever
            return
        interrupted.append(KeyboardInterrupt if number == signal.SIGINT else Terminated)
        end_in_peace(interrupted[0])
        logging.disable(logging.CRITICAL)
        raise interrupted[0]

    _watch_embedded_server()
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_not_the_users)
    try:
        yield
    except TerminationSignal:
        raise Terminated from None
    except Exception as error:
        if interrupted:
            raise interrupted[0] from None
        if complete():
            print(f"clado: the run is complete, but Prefect was not told ({type(error).__name__}): {_told()}", file=sys.stderr)
            return
        if isinstance(error, CladoError) or not outside():
            raise
        raise ServerError(f"Prefect did not start ({type(error).__name__}: {error}): {_advice()}") from None
    finally:
        if not interrupted:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_not_the_users(record: logging.LogRecord) -> bool:
    """Drops the traceback of an error that the command prints as one message, and what Prefect says of a signal."""
    told = isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], CladoError)
    return not told and not any(words in record.getMessage() for words in ("Crash detected!", "Finished in state Crashed"))


def _watch_embedded_server() -> None:
    """Makes Prefect's embedded server end with this process, also where that is killed with -9, and not before: Ctrl-C in a
    terminal reaches every process, and so does what ends a batch job; the server would be gone before the run has ended.

    A shell holds the other end of a pipe that only this process keeps open: it reads the end of it when this process is no more.
    """
    from prefect.server.api import server as prefects

    class Watched(prefects.SubprocessASGIServer):
        def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
            # in a session of its own, which signals to this one do not reach; Prefect offers no way to ask for that
            names = vars(prefects)
            names["subprocess"] = SimpleNamespace(Popen=partial(subprocess.Popen, start_new_session=True))
            try:
                server = super()._run_uvicorn_command()
            finally:
                names["subprocess"] = subprocess
            watch = ["/bin/sh", "-c", 'read -r _; kill -9 "$1" 2>/dev/null', "clado-watch", str(server.pid)]
            self.watcher = subprocess.Popen(
                watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            return server

        def stop(self) -> None:
            super().stop()
            if watcher := self.__dict__.pop("watcher", None):
                watcher.kill()
                watcher.communicate()

    if os.name == "posix":
        Watched()  # Prefect keeps one server for each port, and None is the port of the embedded one: it will take this


def _told() -> str:
    return f"{os.environ.get('PREFECT_API_URL', 'its page')} shows it as running until somebody deletes it there"


def _advice() -> str:
    url = os.environ.get("PREFECT_API_URL")
    if url:
        return f"start the server at {url}, or unset PREFECT_API_URL (or Prefect's profile) to use an embedded one"
    return (
        "its embedded server needs a free port on 127.0.0.1 and a folder to write to (PREFECT_HOME); "
        "or run `prefect server start` and set PREFECT_API_URL"
    )
