"""Prefect's server: the own one of a command, started early; of one that cannot be reached which, why, and what to do."""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

from schemas.addresses import without_user_info
from schemas.errors import PrefectError

_own: set[str] = set()  # addresses of servers that end with this process


def lasting_server() -> str:
    """The address of the server whose pages outlive this command; empty where there is none."""
    address = PREFECT_API_URL.value() or ""
    return "" if address in _own else address


class OwnServer:
    """The server of a command for which none is named: a process that ends when the command does, killed or not.

    It takes some seconds to come up, in which inputs are checked and libraries imported. Prefect would start one of its own
    with the first flow; that imports the whole server into this process too, and leaves it behind after a kill.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._api = ""
        self._errors = TemporaryFile()  # noqa: SIM115, open as long as the server writes to it

    def begin(self) -> None:
        """Starts it, and does not wait; nothing where a server is named, or where it was begun."""
        if self._process is not None or PREFECT_API_URL.value():
            return
        with socket.create_server(("127.0.0.1", 0)) as listening:  # inherited: no other process can take the port
            self._api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.orchestration.server_process", str(listening.fileno())],
                pass_fds=(listening.fileno(),), stdin=subprocess.PIPE, stderr=self._errors,
                start_new_session=True,  # Ctrl-C is not for it
                env={**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)})
        _own.add(self._api)
        atexit.register(self._end)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside it flows run on it, or on the one that is named. Waits until it answers.

        Raises `PrefectError` if it ends, or does not answer in Prefect's time for a server of this kind.
        """
        if self._process is None:
            yield
            return
        patience = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + patience
        while not self._answers():
            if (code := self._process.poll()) is not None:
                raise PrefectError(f"Prefect's own server ended with code {code}: {self._last_error()}")
            if time.monotonic() > deadline:
                raise PrefectError(f"Prefect's own server did not answer in {patience} s; "
                                   "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS is how long it may take")
            time.sleep(0.05)
        with temporary_settings({PREFECT_API_URL: self._api}):
            yield

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self._api}/health", timeout=1, trust_env=False).is_success
        return False

    def _last_error(self) -> str:
        """The line that says what was raised, of the last traceback."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        return (raised or [line for line in lines if line.strip()] or ["it wrote nothing"])[-1][:300]

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def server_errors(then: str) -> Iterator[None]:
    """Raises `PrefectError` for what goes wrong inside it about the server; `then`: what to do once that is mended."""
    try:
        yield
    except (httpx.TransportError, PrefectHTTPStatusError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "reach API" not in str(error):
            raise
        where = PREFECT_API_URL.value()
        if not where:
            raise PrefectError(f"Prefect's own server, which lasts as long as this command: {error!r}; {then}") from error
        raise PrefectError(f"Prefect at {without_user_info(where)}: {_reason(error)}; {then}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 401:
        return "PREFECT_API_AUTH_STRING is not the server's PREFECT_SERVER_API_AUTH_STRING (401)"
    if isinstance(error, PrefectHTTPStatusError):
        return str(error)
    return (f"{str(error) or type(error).__name__}: start it (prefect server start, make pool), or set PREFECT_API_URL to "
            "another or to none")
