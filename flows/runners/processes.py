"""`execution.runner: processes`: workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from flows.child_process import begin
from flows.runners.performer import Outcome, Performer
from flows.runners.workers import part_of
from schemas.artifacts import Produced, StageCall
from schemas.errors import StoppedError, TransientError
from stages.ops.progress import pause


class Process:
    """One of them, begun with its first call. One that ends, killed or out of memory, costs the call that it was at; another
    takes its place."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._id: int | None = None
        self._ended, self._at_work = False, False

    def perform(self, call: StageCall) -> Produced:
        """As `Worker.perform`."""
        if self._ended:
            raise StoppedError(f"{call.stage}: not begun")
        self._at_work = True
        try:
            if self._executor is None:
                self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin)
                self._id = self._executor.submit(os.getpid).result()
            answer = _waited(self._executor.submit(_perform, call.model_dump_json()), call)
        except BrokenProcessPool:
            lost, self._executor, self._id = self._id, None, None
            raise TransientError(f"{part_of(call)}: process {lost}, which made it, has ended, killed or out of memory; it "
                                 "is made again") from None
        self._at_work = False
        return Outcome.model_validate_json(answer).result()

    def end(self) -> None:
        """As `Worker.end`."""
        self._ended = True
        if self._executor is not None:
            if self._id is not None and self._at_work:  # else it ends by itself, and leaves nothing behind
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._id, signal.SIGTERM)
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None


def _waited(future: Future[str], call: StageCall) -> str:
    """What it gives. Raises `StoppedError` once the event of `interrupted_by` is set."""
    while not wait([future], timeout=0.2).done:
        pause(0, call.stage)
    return future.result()


# --- in the process ---

_performer = Performer()


def _perform(text: str) -> str:
    return _performer.perform(text)
