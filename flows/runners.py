"""What makes the shards of a stage: this process, or others on this machine (`execution.runner`).

A shard is a call of its own (`StageCall.shards`), whose artifact is found if it was committed before, so that one that is
lost is made again alone. The stage's own call then joins them.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from flows.chains import warm_of
from flows.perform import perform
from flows.runs.kind import Warm
from flows.store.store import Store
from schemas.artifacts import Produced, StageCall
from schemas.errors import StoppedError, TransientError
from schemas.settings import ExecutionConfig
from schemas.stages import STAGES
from stages.ops.progress import listened_to, pause

log = logging.getLogger("baton")
ALL = 1 << 30
Perform = Callable[[StageCall], Produced]


@dataclass(frozen=True)
class Shards:
    """How the stages of a run are cut into shards, and what makes these."""

    store: Store
    execution: ExecutionConfig
    perform: Perform
    at_once: int
    """How many side by side."""
    settle: Callable[[], object] = lambda: None
    """Called before other processes are to read what was made last: returns when it is committed."""

    def of(self, call: StageCall) -> tuple[StageCall, ...]:
        """The calls of its shards; none where it is not cut, or its artifact is there."""
        cut = self.execution.shards > 1 and STAGES[call.kind][call.stage].sharded
        if not cut or self.store.find(call.recipe.ref) is not None:
            return ()
        self.settle()
        return call.shards()


@contextmanager
def shards_of(store: Store, execution: ExecutionConfig, here: Perform, settle: Callable[[], object]) -> Iterator[Shards]:
    """`here`: performs in this process; `settle`: commits what is pending."""
    if execution.runner == "inline" or execution.shards == 1:
        yield Shards(store, execution, here, at_once=1)
        return
    count = min(execution.workers, execution.shards)
    with contextlib.closing(Processes(count)) as processes:
        yield Shards(store, execution, processes, ALL, settle)  # they wait for a process that is free


class Processes:
    """Performs calls in processes of their own, as many at once as there are, each with its models in memory.

    A process that ends, killed or out of memory, costs the call that it was at, which raises `TransientError`; another takes
    its place.
    """

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process() for _ in range(count)]
        for each in self._all:
            self._free.put(each)

    def __call__(self, call: StageCall) -> Produced:
        process = self._free.get()
        try:
            return process.perform(call)
        finally:
            self._free.put(process)

    def close(self) -> None:
        """Ends them, in the middle of a call if need be: what they have not committed is as after a crash."""
        for each in self._all:
            each.end()


class _Process:
    """One of them, begun with its first call."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._id: int | None = None
        self._ended = False

    def perform(self, call: StageCall) -> Produced:
        """Raises `TransientError` if the process ends meanwhile, `StoppedError` if this one is ended, and what the stage
        raises."""
        if self._ended:
            raise StoppedError(f"{call.stage}: not begun")
        try:
            if self._executor is None:
                self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
                self._id = self._executor.submit(os.getpid).result()
            return Produced.model_validate_json(_waited(self._executor.submit(_perform, call.model_dump_json()), call))
        except BrokenProcessPool:
            lost, self._executor, self._id = self._id, None, None
            part = f"shard {call.shard.index + 1} of {call.shard.of}" if call.shard else "it"
            raise TransientError(f"{call.stage} of iteration {call.iteration}: process {lost}, which made {part}, has "
                                 "ended, killed or out of memory; it is made again") from None

    def end(self) -> None:
        self._ended = True
        if self._executor is not None:
            if self._id is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._id, signal.SIGTERM)
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _waited(future: Future[str], call: StageCall) -> str:
    """What it gives. Raises `StoppedError` once the event of `interrupted_by` is set."""
    while not wait([future], timeout=0.2).done:
        pause(0, call.stage)
    return future.result()


# --- in the process ---

_here: tuple[Store, ExecutionConfig, Warm] | None = None


def _begin() -> None:
    """Ctrl-C is for the process that began this one; should that be killed, this one ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _perform(text: str) -> str:
    """The call as JSON to what came of it as JSON."""
    global _here
    call = StageCall.model_validate_json(text)
    if _here is None or (_here[0].uri, _here[1]) != (call.store, call.execution):
        store = Store(call.store)
        _here = store, call.execution, warm_of(call.kind, store, call.execution)
    with listened_to(lambda bar, done, total: None):  # no bars beside each other on one terminal
        return perform(call, _here[0], _here[2]).model_dump_json()
