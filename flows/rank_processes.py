"""A stage made by several ranks (`execution.ranks`): this process, rank 0, and others of this machine beside it.

Each performs the same call, with its models in memory, and they meet in torch.distributed (stages/ops/ranks.py); what rank 0
has then made is written, what the others have is dropped. Their processes are begun with the first such call and stay for
the next, so that a rank that has made an update begins the next one with its own weights and optimizer.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from flows.chains import kind_of, warm_of
from flows.child_process import begin
from flows.runs.kind import Warm
from flows.runs.produce import StageOutput
from flows.runs.work import Work
from flows.store.attempt import Attempt
from flows.store.store import Store, existing_store
from schemas.artifacts import StageCall
from schemas.errors import BatonError, TransientError, error_named
from schemas.settings import ExecutionConfig
from schemas.stages import STAGES
from stages.ops.device import Device, keep_freed_memory
from stages.ops.progress import listened_to, pause

log = logging.getLogger("baton")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # the ranks are on one machine
READY, DONE, ECHO = "ready", "done", "echo"  # what a rank says, beside errors by the name of their class
T = TypeVar("T")


def work_on(call: StageCall, store: Store, warm: Warm, attempt: Attempt) -> StageOutput:
    """A stage's work by one process, or one rank."""
    Device(call.execution.device).use_threads(call.execution.threads)
    return kind_of(call.kind).task(call.stage)(Work(call, store, warm, attempt))


def ranks_of(call: StageCall) -> int:
    """How many make it."""
    return call.execution.ranks if STAGES[call.kind][call.stage].ranked else 1


def ranks_beside(warm: Warm, call: StageCall) -> Ranks:
    """Those beside this process, which keep what it keeps warm; begun if they are not there."""
    if warm.beside is None:
        warm.beside = Ranks(call.execution)
    return warm.beside


# --- rank 0 ---

class Ranks:
    """The processes beside this one."""

    def __init__(self, execution: ExecutionConfig) -> None:
        self.size = execution.ranks
        self._others: list[tuple[multiprocessing.Process, Connection]] = []
        self._at_work = False

    @property
    def fresh(self) -> bool:
        """Whether they have nothing in memory yet."""
        return not self._others

    def together(self, call: StageCall, make: Callable[[], T]) -> T:
        """What `make`, this rank's part, gives, the others being at theirs. Raises what any of them raises, `TransientError`
        if one ends; the processes are then ended, and others take their place."""
        if not self._others:
            self._begin()
        self._at_work = True
        try:
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder, "meeting")
                for _, pipe in self._others:
                    pipe.send((call.model_dump_json(), str(place)))
                self._heard(call, READY)
                with _joined(place, 0, call.execution):
                    made = make()
                self._heard(call, DONE)
            self._at_work = False
            return made
        except BaseException as error:
            reason = self._reason(call) if isinstance(error, _EndedError | OSError | EOFError) or _is_echo(error) else None
            self.end()
            if reason is None:
                raise
            raise reason from None

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._others.append((process, ours))

    def _heard(self, call: StageCall, what: str) -> None:
        """Returns when each of them has said so. Raises the error that one says instead, or `_EndedError`."""
        for process, pipe in self._others:
            while not pipe.poll(0.2):
                pause(0, call.stage)
                if not process.is_alive() and not pipe.poll():
                    raise _EndedError
            said, message = pipe.recv()
            if said == ECHO:
                raise _EndedError
            if said != what:
                raise error_named(said, message)

    def _reason(self, call: StageCall) -> BatonError | None:
        """Why this rank could not go on: the error of another one, or its end. The rest then fail as this one does."""
        for process, pipe in self._others:
            process.join(2)  # it ends by itself after an error
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll():
                    said, message = pipe.recv()
                    if said not in (READY, DONE, ECHO):
                        return error_named(said, message)
        for rank, (process, _) in enumerate(self._others, 1):
            if process.exitcode:
                return TransientError(f"{call.stage} of iteration {call.iteration}: rank {rank} of {self.size}, process "
                                      f"{process.pid}, has ended, killed or out of memory; it is made again")
        return None

    def end(self) -> None:
        """Ends the processes, whatever they are at: what they have is written nowhere."""
        for process, pipe in self._others:
            pipe.close()  # at which one that waits for a call ends by itself, and leaves nothing behind
            process.join(0 if self._at_work else 10)
            process.kill()
            process.join()
        self._others, self._at_work = [], False


class _EndedError(Exception):
    """One of the others has ended, or could not go on without another one."""


def _is_echo(error: BaseException) -> bool:
    """Whether a rank only says that another one is not there any more."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextmanager
def _joined(place: Path, rank: int, execution: ExecutionConfig) -> Iterator[None]:
    """Inside it torch.distributed knows the ranks, which meet in that file."""
    import torch
    import torch.distributed as dist

    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)
    cuda, hook = Device(execution.device).name == "cuda", sys.excepthook
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.FileStore(str(place), execution.ranks), rank=rank,
                            world_size=execution.ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch wraps it, each time


# --- the others ---

def _serve(pipe: Connection, rank: int) -> None:
    """Performs what comes, until the process that began this one is gone or closes the pipe."""
    begin()
    log.setLevel(logging.CRITICAL)  # rank 0 says it
    keep_freed_memory()
    store: Store | None = None
    warm: Warm | None = None
    with contextlib.suppress(EOFError, OSError):  # of the pipe
        while True:
            text, place = pipe.recv()
            try:
                call = StageCall.model_validate_json(text)
                if store is None:
                    store = existing_store(call.store)
                    warm = warm_of(call.kind, store, call.execution)
                attempt = store.attempt(call.recipe)
                import torch.distributed  # noqa: F401 - which takes seconds, before the others wait
                pipe.send((READY, ""))
                try:
                    with _joined(Path(place), rank, call.execution), listened_to(lambda bar, done, total: None):
                        work_on(call, store, warm, attempt)
                finally:
                    store.discard(attempt)
            except Exception as error:
                said = str(error) if isinstance(error, BatonError) else f"rank {rank}: {error!r}"
                pipe.send((ECHO if _is_echo(error) else type(error).__name__, said))
                return  # the other ranks notice
            pipe.send((DONE, ""))
