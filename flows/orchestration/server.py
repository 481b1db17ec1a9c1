"""Prefect's server: the own one of a command, started early; of one that cannot be reached which, why, and what to do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from schemas.addresses import without_user_info
from schemas.errors import PrefectError


class OwnServer:
    """The server that Prefect starts for a command where none is named, and that ends with it.

    It takes some ten seconds to come up, in a process of its own, in which inputs are checked and libraries imported.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def begin(self) -> None:
        """Starts it, and does not wait; nothing where a server is named, or where it was begun."""
        if self._thread is None and not PREFECT_API_URL.value():
            self._thread = Thread(target=self._start, name="prefect server", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when it answers. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        from prefect.server.api.server import SubprocessASGIServer

        if hasattr(signal, "pthread_sigmask"):  # inherited: Ctrl-C, which a terminal sends to the server too, ends the
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # command, which then tells the server so
        try:
            SubprocessASGIServer().start()  # the one that every client of this process takes
        except BaseException as error:
            self._error = error


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
