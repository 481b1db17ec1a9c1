"""Prefect's server: that of a command alone, started early; of one that cannot be reached which, why, and what to do."""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from tempfile import TemporaryFile

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from schemas.addresses import without_user_info
from schemas.errors import PrefectError


class OwnServer:
    """The server of a command for which none is named: a process that ends when the command does, killed or not.

    It takes some seconds to come up, in which inputs are checked and libraries imported. Prefect would start one of its own
    with the first flow; that imports the whole server into this process too, and leaves it behind after a kill.
    """

    def __init__(self) -> None:
        """Starts it, and does not wait."""
        self.said = TemporaryFile()  # noqa: SIM115, open as long as the server writes to it
        with socket.create_server(("127.0.0.1", 0)) as listening:  # inherited: no other process can take the port
            self.api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.orchestration.server_process", str(listening.fileno())],
                pass_fds=(listening.fileno(),), stdin=subprocess.PIPE, stdout=self.said, stderr=self.said,
                start_new_session=True,  # Ctrl-C is not for it
                env={**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)})
        atexit.register(self._end)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside it flows run on it. Waits until it answers.

        Raises `PrefectError` if it has ended, or does not answer in Prefect's time for a server of this kind.
        """
        patience = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        try:
            httpx.get(f"{self.api}/health", timeout=patience, trust_env=False).raise_for_status()
        except httpx.TimeoutException as error:
            raise PrefectError(f"Prefect's server of this command did not answer in {patience} s; "
                               "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS is how long it may take") from error
        except httpx.TransportError as error:
            self._require_alive(error)
            raise
        with temporary_settings({PREFECT_API_URL: self.api, PREFECT_UI_URL: ""}):  # it has no page to be named in a log
            try:
                yield
            except httpx.TransportError as error:
                self._require_alive(error)
                raise

    def _require_alive(self, error: Exception) -> None:
        """Raises `PrefectError` if the process is not there any more, or not in a moment."""
        with suppress(subprocess.TimeoutExpired):
            raise PrefectError(f"Prefect's server of this command ended with code {self.process.wait(2)}: "
                               f"{self._last_error()}; the same command goes on") from error

    def _last_error(self) -> str:
        """The line that says what was raised, of the last traceback."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        return (raised or [line for line in lines if line.strip()] or ["it wrote nothing"])[-1][:300]

    def _end(self) -> None:
        self.process.kill()  # a process that was forked off this one may hold the other end of its input
        self.process.wait()


_own: OwnServer | None = None  # of this process


def begin_own_server() -> None:
    """Starts the server that `a_server` gives where none is named, and does not wait for it."""
    global _own
    if not PREFECT_API_URL.value() and (_own is None or _own.process.poll() is not None):
        _own = OwnServer()


@contextmanager
def a_server() -> Iterator[None]:
    """Inside it flows run on the server that is named, else on one of this process alone, which is started if it was not.

    Raises `PrefectError` if that does not come up.
    """
    begin_own_server()
    with nullcontext() if PREFECT_API_URL.value() else _own.serving():
        yield


def lasting_server() -> str:
    """The address of the server whose pages outlive this command; empty where there is none."""
    address = PREFECT_API_URL.value() or ""
    return "" if _own is not None and address == _own.api else address


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
            raise PrefectError(f"Prefect's server of this command: {error!r}; {then}") from error
        raise PrefectError(f"Prefect at {without_user_info(where)}: {_reason(error)}; {then}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 401:
        return "PREFECT_API_AUTH_STRING is not the server's PREFECT_SERVER_API_AUTH_STRING (401)"
    if isinstance(error, PrefectHTTPStatusError):
        return str(error)
    return (f"{str(error) or type(error).__name__}: start it (prefect server start, make pool), or set PREFECT_API_URL to "
            "another or to none")
