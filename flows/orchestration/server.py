"""Prefect's server, when it cannot be reached: which one, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from schemas.addresses import without_user_info
from schemas.errors import PrefectError


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
