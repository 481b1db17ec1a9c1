"""A flow that a command runs: on whose server, and under which tags."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tagged(flow: Callable[..., Any], name: str, **parameters: Any) -> Any:
    """Runs the flow, which is found on Prefect's page by the tags `baton` and the run's name."""
    from prefect import tags
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.orchestration.server import a_server, server_errors

    alone = not server_is_named()  # no server is watching for heartbeats, and stopping them takes a second
    with (server_errors("what was committed is whole, the same command goes on"), tags("baton", name),
          temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None} if alone else {}),
          a_server()):
        return flow(name, **parameters)


def begin_server() -> None:
    """Starts the server that the flow will have where none is named, and does not wait for it."""
    from flows.orchestration.server import begin_own_server

    begin_own_server()


def server_is_named() -> bool:
    """Whether the environment or one of Prefect's files names a server, on whose page a flow run can be seen.

    Where there is no such file Prefect, whose import takes a second, is not asked.
    """
    home, project = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser(), Path("pyproject.toml")
    files = (home / "profiles.toml", Path("prefect.toml"), Path(".env"))
    if not (any(name.startswith("PREFECT_API") or name == "PREFECT_PROFILES_PATH" for name in os.environ)
            or any(file.is_file() for file in files)
            or (project.is_file() and "[tool.prefect" in project.read_text(encoding="utf-8", errors="replace"))):
        return False
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())
