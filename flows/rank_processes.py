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
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

from flows.chains import kind_of, warm_of
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
HOST = "127.0.0.1"
T = TypeVar("T")


def work_on(call: StageCall, store: Store, warm: Warm, attempt: Attempt) -> StageOutput:
    """A stage's work by one process, or one rank."""
    Device(call.execution.device).use_threads(call.execution.threads)
    return kind_of(call.kind).task(call.stage)(Work(call, store, warm, attempt))


def ranks_of(call: StageCall) -> int:
    """How many make it."""
    return call.execution.ranks if STAGES[call.kind][call.stage].ranked else 1


# --- rank 0 ---

class Ranks:
    """The processes beside this one."""

    def __init__(self, execution: ExecutionConfig) -> None:
        self.execution, self.fresh = execution, True
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # for them: DDP would warn of what trainers ask of it
        context = multiprocessing.get_context("spawn")
        self._others: list[tuple[multiprocessing.Process, Connection]] = []
        for rank in range(1, execution.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._others.append((process, ours))

    def together(self, call: StageCall, make: Callable[[], T]) -> T:
        """What `make`, this rank's part, gives, the others being at theirs. Raises what any of them raises, `TransientError`
        if one ends; the processes are then ended, and others take their place."""
        import torch.distributed as dist

        self.fresh = False
        meeting = dist.TCPStore(HOST, 0, self.execution.ranks, is_master=True, wait_for_workers=False)
        try:
            for _, pipe in self._others:
                pipe.send((call.model_dump_json(), meeting.port))
            with _joined(meeting, 0, call.execution):
                made = make()
            for rank, (process, pipe) in enumerate(self._others, 1):
                while not pipe.poll(0.2):
                    pause(0, call.stage)
                    if not process.is_alive():
                        raise RuntimeError(f"rank {rank} has ended")
                if (error := pipe.recv()) is not None:
                    raise error_named(*error)
            return made
        except BaseException as error:
            reason = self._reason(call) if isinstance(error, RuntimeError | OSError | EOFError) else None
            self.end()
            if reason is None:
                raise
            raise reason from None

    def _reason(self, call: StageCall) -> BatonError | None:
        """Why this rank could not go on: the error of another one, or its end. The others then fail as this one does."""
        errors = [error_named(*said) for process, pipe in self._others if (said := _last_words(process, pipe))]
        for error in errors:
            if type(error) is not BatonError:
                return error
        for rank, (process, _) in enumerate(self._others, 1):
            if process.exitcode:
                return TransientError(f"{call.stage} of iteration {call.iteration}: rank {rank} of {self.execution.ranks}, "
                                      f"process {process.pid}, has ended, killed or out of memory; it is made again")
        return errors[0] if errors else None

    def end(self) -> None:
        """Ends the processes, whatever they are at: what they have is written nowhere."""
        for process, pipe in self._others:
            pipe.close()
            process.kill()
            process.join()
        self._others = []
        if _kept.get("ranks") is self:
            del _kept["ranks"]


_kept: dict[str, Ranks] = {}


def beside(execution: ExecutionConfig) -> Ranks:
    """The ranks of this process with these settings, begun if they are not there."""
    there = _kept.get("ranks")
    if there is not None and there.execution != execution:
        there.end()
        there = None
    if there is None:
        there = _kept["ranks"] = Ranks(execution)
    return there


def end_ranks() -> None:
    """Ends the processes beside this one, if there are any."""
    if (there := _kept.get("ranks")) is not None:
        there.end()


def _last_words(process: multiprocessing.Process, pipe: Connection) -> tuple[str, str] | None:
    """Name and message of the error of a rank that has ended, or is about to."""
    process.join(2)
    with contextlib.suppress(EOFError, OSError):
        return pipe.recv() if pipe.poll() else None
    return None


@contextmanager
def _joined(meeting: object, rank: int, execution: ExecutionConfig) -> Iterator[None]:
    """Inside it torch.distributed knows the ranks, and libraries that read its environment do."""
    import torch
    import torch.distributed as dist

    cuda = Device(execution.device).name == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", store=meeting, rank=rank, world_size=execution.ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- the others ---

def _serve(pipe: Connection, rank: int) -> None:
    """Performs what comes, until the process that began this one is gone or closes the pipe."""
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore", FutureWarning)  # as the command does
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    keep_freed_memory()
    store: Store | None = None
    warm: Warm | None = None
    while True:
        try:
            text, port = pipe.recv()
        except (EOFError, OSError):
            return
        call = StageCall.model_validate_json(text)
        try:
            if store is None or store.uri != call.store:
                store = existing_store(call.store)
                warm = warm_of(call.kind, store, call.execution)
            meeting = dist.TCPStore(HOST, port, call.execution.ranks, is_master=False)
            attempt = store.attempt(call.recipe)
            try:
                with _joined(meeting, rank, call.execution), listened_to(lambda bar, done, total: None):
                    work_on(call, store, warm, attempt)
            finally:
                store.discard(attempt)
        except Exception as error:
            pipe.send((type(error).__name__, str(error) if isinstance(error, BatonError) else f"rank {rank}: {error!r}"))
            return  # the other ranks notice
        pipe.send(None)
