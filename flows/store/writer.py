"""Commits in the order in which they were given, in a thread beside what is computed meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from schemas.errors import StoreError, TransientError

log = logging.getLogger("baton")
RETRY_DELAYS = (2, 10, 30)  # seconds before what a server or a network has failed is tried again
T = TypeVar("T")


def yield_processor() -> None:
    """Has this thread, where the system can, run when no other wants the processor: the threads of a computation wait for
    each other, so that all of them would be held up."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":  # elsewhere it is of whole processes
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Writer:
    """One job after another. Once one has failed none is begun, and whoever gives the next, or waits, is told.

    As a context: what was given is done at its end, also where an `Exception` ends it, since what was computed is worth
    keeping; a signal stops the job that is at work, and the rest is left.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()  # of the job that is at work
        self._pool = ThreadPoolExecutor(1, "commit", yield_processor)
        self._error: BaseException | None = None
        self._last: Future | None = None
        self._lock = threading.Lock()  # stages may run side by side

    def later(self, job: Callable[[], T]) -> Future[T]:
        """Does the job after all others. Raises what an earlier one has raised."""
        self.check()
        with self._lock:
            self._last = self._pool.submit(self._do, job)
            return self._last

    def check(self) -> None:
        """Raises what a job has raised; what was tried again in vain as a `StoreError` that is not."""
        if isinstance(self._error, TransientError):
            raise StoreError(str(self._error)) from self._error
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Returns when all jobs are done. Raises what one has raised."""
        if self._last is not None:
            wait([self._last])
        self.check()

    def clear(self) -> None:
        """After an error that was dealt with: begins anew."""
        if self._last is not None:
            wait([self._last])
        self._error = self._last = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.stop.set()
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=self.stop.is_set())
            if raised is not None and self._error not in (None, raised, raised.__cause__):
                log.warning("and a commit has failed: %s", self._error)

    def _do(self, job: Callable[[], T]) -> T:
        self.check()
        try:
            return self._tried(job)
        except BaseException as error:
            self._error = error
            raise

    def _tried(self, job: Callable[[], T]) -> T:
        """Once more after a while, where a server or a network has failed."""
        for delay in RETRY_DELAYS:
            try:
                return job()
            except TransientError as error:
                log.warning("%s; tried again after %d s", error, delay)
                if self.stop.wait(delay):
                    raise
        return job()
