"""The lease of a run: one process at a time works on it. Others wait, and then find what it has made.

A lease saves work and decides nothing: should two work all the same, each commit is put if absent, and both go on with it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from flows.files import explained
from flows.produce import now
from flows.runs import Run
from flows.store import Store

log = logging.getLogger("baton")


@contextmanager
def lease(run: Run) -> Iterator[None]:
    """Holds the run's lease, after waiting for who holds it."""
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {now()}"

    def waiting(other: bytes) -> None:
        log.warning("run %s is being worked on by %s; waiting for it", run.name, other.decode() or "another process")

    with explained(run.store.uri):
        held = run.store.files.exclusive(_key(run.name), holder.encode(), waiting)
    with held:
        yield


def holder_of(store: Store, name: str) -> str | None:
    """Who works on the run, if anybody does."""
    holder = store.files.holder(_key(name))
    return None if holder is None else holder.decode() or "another process"


def _key(name: str) -> str:
    return f"runs/{name}/lease"
