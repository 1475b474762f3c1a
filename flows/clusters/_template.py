"""The process that workers of this machine fork from. Importing this module imports what they need.

It ignores signals of a terminal or of a batch job, because the flow handles them.
"""

import atexit
import os
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
os.setpgid(0, 0)

import flows.worker  # noqa: E402, F401

_PID = os.getpid()


def _end_at_once() -> None:
    """Ends this process at once, but not those that forked from it. Shutting down libraries would take seconds."""
    if os.getpid() == _PID:
        os._exit(0)


atexit.register(_end_at_once)  # registered after the imports, so it is called before what they have registered
