"""Leases: one process at a time works on a thing. Others wait, and then find what it has made.

A lease of a run saves work and decides nothing: should two work all the same, each commit is put if absent, and both go on
with it. The lease of `gc` is what a start waits for, since only removal cannot be undone:

    a start, an iteration   holds its run's lease, then waits until no gc is running
    gc                      holds its own, and leaves all artifacts alone while any run's lease is held

so that whatever a process has found stays where it was found.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from flows.store.files import disk_errors
from flows.store.store import Store
from schemas.errors import ConfigError
from schemas.records import now

log = logging.getLogger("baton")
GC = "gc/lease"


@contextmanager
def lease(store: Store, key: str, what: str) -> Iterator[None]:
    """Holds the lease, after waiting for the process that holds it. `what`: what it is of, for people."""

    def waiting(holder: str) -> None:
        log.warning("%s is in use by %s; waiting for it", what, holder)

    with _held(store, key, waiting):
        yield


@contextmanager
def working_on(store: Store, key: str, what: str) -> Iterator[None]:
    """Holds the lease of a run, and has waited for a `gc` that began before."""
    with lease(store, key, what):
        wait_for_gc(store)
        yield


def wait_for_gc(store: Store) -> None:
    """Returns when no `gc` is running that began before."""
    if holder_of(store, GC):
        with lease(store, GC, "the store"):
            pass


@contextmanager
def require_free(store: Store, key: str, what: str) -> Iterator[None]:
    """Holds the lease. Raises `ConfigError` if another process does."""

    def waiting(holder: str) -> None:
        if holder_of(store, key):  # or it is gone, and its lease lapses
            raise ConfigError(f"{what} is in use by {holder}; end that first")

    with _held(store, key, waiting):
        yield


def holder_of(store: Store, key: str) -> str | None:
    """The process that holds the lease, if one does."""
    holder = store.files.holder(key)
    return None if holder is None else _name(holder)


@contextmanager
def _held(store: Store, key: str, waiting: Callable[[str], None]) -> Iterator[None]:
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {now()}"
    with ExitStack() as stack:
        with disk_errors(store.uri):
            stack.enter_context(store.files.exclusive(key, holder.encode(), lambda other: waiting(_name(other))))
        yield


def _name(holder: bytes) -> str:
    return holder.decode() or "another process"
