"""The lease of a run: one process at a time works on it. Others wait, and then find what it has made.

A lease saves work and decides nothing: should two work all the same, each commit is put if absent, and both go on with it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flows.runs.produce import now
from flows.store.files import explained
from flows.store.store import Store

log = logging.getLogger("baton")


@contextmanager
def lease(store: Store, name: str) -> Iterator[None]:
    """Holds the lease of the run `name`, after waiting for who holds it."""
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {now()}"

    def waiting(other: bytes) -> None:
        log.warning("run %s is being worked on by %s; waiting for it", name, other.decode() or "another process")

    with ExitStack() as stack:
        with explained(store.uri):
            stack.enter_context(store.files.exclusive(_key(name), holder.encode(), waiting))
        yield


def holder_of(store: Store, name: str) -> str | None:
    """Who works on the run, if anybody does."""
    holder = store.files.holder(_key(name))
    return None if holder is None else holder.decode() or "another process"


def _key(name: str) -> str:
    return f"runs/{name}/lease"
