"""What a process that a run begins for itself does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings


def begin() -> None:
    """Ctrl-C is for the process that began this one; should that be killed, this one ends too. What a user's function prints
    is no JSON: stdout is for the answer of a command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore", FutureWarning)  # as the command does
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
