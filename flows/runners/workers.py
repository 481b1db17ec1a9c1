"""Workers that each make one call at a time, and those that are free."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Protocol

from schemas.artifacts import Produced, StageCall


class Worker(Protocol):
    """A process of its own, here or on another machine, with its models in memory."""

    def perform(self, call: StageCall) -> Produced:
        """Raises `TransientError` if the process ends meanwhile, `StoppedError` if this one is to end, and what the stage
        raises."""

    def end(self) -> None:
        """Ends it, in the middle of a call if need be: what it has not committed is as after a crash."""


class Workers:
    """Performs calls, as many at once as there are workers; the others wait for one that is free."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._all, self._free = workers, queue.SimpleQueue()
        for each in workers:
            self._free.put(each)

    def __call__(self, call: StageCall) -> Produced:
        worker = self._free.get()
        try:
            return worker.perform(call)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        for each in self._all:
            each.end()


def part_of(call: StageCall) -> str:
    """For messages: what of a stage the call is about."""
    part = f", shard {call.shard.index + 1} of {call.shard.of}" if call.shard else ""
    return f"{call.stage} of iteration {call.iteration}{part}"
