"""The run that a flow works on: opened by the command line, which has checked it, or asked for by a work pool."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from flows.chains import check_inputs
from flows.runs.run import Run
from flows.runs.start import Request, Source, start
from flows.store.store import Store, existing_store
from schemas.errors import ConfigError
from schemas.settings import Overrides

_opened: ContextVar[Run | None] = ContextVar("opened run", default=None)


@contextmanager
def opened(run: Run) -> Iterator[None]:
    """Inside it a flow works on this run, which is checked, instead of opening it again."""
    token = _opened.set(run)
    try:
        yield
    finally:
        _opened.reset(token)


def requested(name: str, config: Source | None, overrides: Overrides, root: str | None) -> Run:
    """The run that a flow is asked for: made from `config` if there is one, else one that is there.

    `root`: where the store is; none: where BATON_STORE says. Raises `ConfigError`.
    """
    return _opened.get() or start(Request(store_of_flow(root).uri, name, config, overrides=overrides), check_inputs)


def store_of_flow(root: str | None) -> Store:
    """The store that a flow is to use. Raises `ConfigError` if it is not there.

    A folder has to be there already: a worker that has not mounted it would else begin a store of its own.
    """
    root = root or os.environ.get("BATON_STORE")
    if not root:
        raise ConfigError(f"no store: give the parameter store, or set BATON_STORE for the worker on {socket.gethostname()}")
    return existing_store(root)
