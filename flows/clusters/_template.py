"""What workers of this machine fork from: a process that has imported what they need. Importing this module makes it one.

The signals of a terminal or of a batch job are the flow's to heed.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
os.setpgid(0, 0)

import flows.worker  # noqa: E402, F401
