"""`baton …`: the commands, each of which reads its arguments, calls a flow or the store, and gives what is printed."""

from __future__ import annotations

import atexit
import signal
import sys
from gc import freeze

from flows.cli import (  # noqa: F401, their commands
    examples,
    report_commands,
    store_commands,
    train_commands,
    view_commands,
    what_if_commands,
)
from flows.cli.command import run_command, terminate


def main() -> None:
    """The `baton` command."""
    signal.signal(signal.SIGTERM, terminate)
    atexit.register(freeze)  # else the interpreter takes two seconds to free what it has imported, object by object
    sys.exit(run_command())


if __name__ == "__main__":
    main()
