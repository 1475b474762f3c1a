"""What workers of this machine fork from: a process that has imported what they need. Importing this module makes it one.

The signals of a terminal or of a batch job are the flow's to heed.
"""

import atexit
import os
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
os.setpgid(0, 0)

import flows.worker  # noqa: E402, F401

_PID = os.getpid()


def _end_at_once() -> None:
    """Ends this process, and none that has forked from it, without taking down libraries, which takes seconds."""
    if os.getpid() == _PID:
        os._exit(0)


atexit.register(_end_at_once)  # behind the imports, hence called before what they have registered
