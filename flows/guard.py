"""What the command keeps from the user of Prefect's faults: tracebacks of errors that are not Prefect's, and of an interrupt."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clado.errors import CladoError, ServerError


@contextmanager
def orchestrated(outside: Callable[[], bool]) -> Iterator[None]:
    """Around the call of a flow: a failure of Prefect itself (`outside` the flow's phases) is one message, an interrupt is one.

    Ctrl-C reaches the embedded server too, so that Prefect cannot record the flow's end: whatever it says of that is not heard.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        logging.disable(logging.CRITICAL)
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if in_main else None
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_not_the_users)
    try:
        yield
    except Exception as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        if isinstance(error, CladoError) or not outside():
            raise
        raise ServerError(f"Prefect did not start ({type(error).__name__}: {error}): {_advice()}") from None
    finally:
        if in_main and not interrupted.is_set():
            signal.signal(signal.SIGINT, before)


def _is_not_the_users(record: logging.LogRecord) -> bool:
    """Drops the traceback of an error that the command prints as one message."""
    return not (record.exc_info and isinstance(record.exc_info[1], CladoError))


def _advice() -> str:
    url = os.environ.get("PREFECT_API_URL")
    if url:
        return f"start the server at {url}, or unset PREFECT_API_URL to use an embedded one"
    return (
        "its embedded server needs a free port on 127.0.0.1 and a folder to write to (PREFECT_HOME); "
        "or run `prefect server start` and set PREFECT_API_URL"
    )
