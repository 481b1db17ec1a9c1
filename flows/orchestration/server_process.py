"""The process of the Prefect server that a command has alone: `python -m flows.orchestration.server_process SOCKET`.

SOCKET: the number of a file descriptor that listens. Ends with its standard input, which is when the command has ended, in
whatever way, and all that it has forked; states and log lines that it was sent are in its database by then.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

import uvicorn
from uvicorn.main import STARTUP_FAILURE


def main() -> None:
    os.environ |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1",
                   "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR"}  # read when Prefect is imported
    threading.Thread(target=_end_with_input, daemon=True).start()
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    server.run([socket.socket(fileno=int(sys.argv[1]))])  # fd= would take it for one without Nagle's delay, 44 ms a reply
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _end_with_input() -> None:
    while os.read(0, 1):  # unbuffered: a reader of sys.stdin could not be ended with the interpreter
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
