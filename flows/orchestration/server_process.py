"""The process of a command's own Prefect server: `python -m flows.orchestration.server_process SOCKET`.

SOCKET: the number of a file descriptor that listens. Ends with its standard input, which is when the command has ended, in
whatever way; what it was told is in its database by then.
"""

from __future__ import annotations

import os
import sys
import threading

import uvicorn


def main() -> None:
    os.environ |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1",
                   "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR"}  # read when Prefect is imported
    threading.Thread(target=_end_with_input, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, fd=int(sys.argv[1]), log_level="error", lifespan="on")


def _end_with_input() -> None:
    while os.read(0, 1):  # unbuffered: a reader of sys.stdin could not be ended with the interpreter
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
