"""Stages as Prefect tasks. A task is given a call, never tensors; the store decides what is done.

Prefect persists and caches nothing. A task whose artifact was there ends in a state named `Found`; one that raises a
`TransientError` is tried again, since every stage is safe to repeat.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.context import TagsContext
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed, State
from prefect.utilities.annotations import quote

from flows.orchestration import page
from flows.store.writer import RETRY_DELAYS
from schemas.artifacts import Produced, StageCall
from schemas.errors import StoppedError, TransientError
from stages.ops.progress import interrupted_by, progress_bar

log = logging.getLogger("baton")
page.configure_events()  # now: Prefect begins to tell its server before it calls a flow
PATIENCE = 30.0  # seconds that a signal waits for stages in threads of their own


class Spread(Protocol):
    """What of a run is made in parts, and where; see `flows/runners/spread.py`."""

    def shards(self, call: StageCall) -> tuple[StageCall, ...]:
        """The calls of its shards; none where it is not cut."""

    def elsewhere(self, call: StageCall) -> Callable[[StageCall], Produced] | None:
        """What performs it outside of this process; none: this process does."""


@dataclass(frozen=True)
class StageTasks:
    """Performs the calls of a run as tasks of the flow run that it is in: `flows.runs.kind.Perform`."""

    run: str
    perform: Callable[[StageCall], Produced]
    at_once: int
    """How many of the calls that do not need each other this process performs side by side."""
    spread: Spread | None = None

    def __call__(self, *calls: StageCall) -> dict[str, Produced]:
        if self.spread is not None:
            calls = self._joining(calls)
        return {call.stage: produced for call, produced in zip(calls, self._all(calls), strict=True)}

    def _joining(self, calls: tuple[StageCall, ...]) -> tuple[StageCall, ...]:
        """The calls, those that are cut with their shards, which are made."""
        cut = [self.spread.shards(call) for call in calls]
        made = iter(self._all(tuple(part for parts in cut for part in parts)))
        return tuple(call.model_copy(update={"parts": tuple(next(made).ref for _ in parts)})
                     for call, parts in zip(calls, cut, strict=True))

    def _all(self, calls: tuple[StageCall, ...]) -> list[Produced]:
        """What came of each: those for elsewhere side by side, and beside them `at_once` here."""
        begun, here, made = Together(), [], {}
        try:
            for place, call in enumerate(calls):
                perform = self.spread and self.spread.elsewhere(call)
                if perform is None or len(calls) == 1:
                    here.append((place, call, perform or self.perform))
                else:
                    made[place] = self._begun(call, begun.of(perform))
            elsewhere = list(made.values())
            with _bar_of(elsewhere, begun):
                for some in _side_by_side(here, self.at_once):
                    made |= self._here(some, begun)
                wait(elsewhere)  # all of them, so that none still writes when another's error ends the flow
        except BaseException:  # a signal, or an error of one that is made here
            begun.end()
            raise
        return [each.result() if isinstance(each := made[place], PrefectFuture | State) else each
                for place in range(len(calls))]

    def _here(
        self, calls: list[tuple[int, StageCall, Callable[[StageCall], Produced]]], begun: Together
    ) -> dict[int, Produced | State | PrefectFuture]:
        """Place → what came of the call: one in this thread, several in threads of their own."""
        if len(calls) == 1:
            ((place, call, perform),) = calls
            return {place: _task(call.stage)(self.run, call.iteration, _part(call), quote(call), quote(perform))}
        futures = {place: self._begun(call, begun.of(perform)) for place, call, perform in calls}
        wait(list(futures.values()))
        return futures

    def _begun(self, call: StageCall, perform: Callable[[StageCall], Produced]) -> PrefectFuture:
        return _task(call.stage).submit(self.run, call.iteration, _part(call), quote(call), quote(perform))


class Together:
    """Performs calls in threads, which no signal reaches, and can end them all."""

    def __init__(self) -> None:
        self.at_work = 0
        self.stop, self.changed = threading.Event(), threading.Condition()

    def of(self, perform: Callable[[StageCall], Produced]) -> Callable[[StageCall], Produced]:
        """The same, which can be ended."""
        return lambda call: self._performed(perform, call)

    def _performed(self, perform: Callable[[StageCall], Produced], call: StageCall) -> Produced:
        """Raises `StoppedError` at the next step of a progress bar once they are ended, and leaves nothing of the stage."""
        with self.changed:
            if self.stop.is_set():
                raise StoppedError(f"{call.stage}: not begun")
            self.at_work += 1
        try:
            with interrupted_by(self.stop):
                return perform(call)
        finally:
            with self.changed:
                self.at_work -= 1
                self.changed.notify_all()

    def end(self) -> None:
        """Returns when none is at work, or when one that no bar can end has been waited for."""
        self.stop.set()
        with self.changed:
            if not self.changed.wait_for(lambda: not self.at_work, PATIENCE):
                log.warning("%d stages have not ended after %.0f s; a reward function or server may keep them", self.at_work,
                            PATIENCE)


def _side_by_side(
    calls: list[tuple[int, StageCall, Callable[[StageCall], Produced]]], at_once: int
) -> list[list[tuple[int, StageCall, Callable[[StageCall], Produced]]]]:
    """Cut so that each part has at most so many, and none of one stage twice: they would share its models."""
    parts: list[list[tuple[int, StageCall, Callable[[StageCall], Produced]]]] = []
    for each in calls:
        free = (part for part in parts if len(part) < at_once and all(each[1].stage != other.stage for _, other, _ in part))
        if (part := next(free, None)) is None:
            parts.append(part := [])
        part.append(each)
    return parts


@contextmanager
def _bar_of(futures: list[PrefectFuture], begun: Together) -> Iterator[None]:
    """Inside it a bar shows how many of what is made elsewhere are done."""
    if not futures:
        yield
        return
    with progress_bar(total=len(futures), desc="elsewhere") as bar:
        for future in futures:
            future.add_done_callback(lambda _: begun.stop.is_set() or bar.update())
        yield


def _part(call: StageCall) -> str:
    """Of the name of its task run."""
    return f"-{call.shard.name}" if call.shard else ""


@cache
def _task(stage: str) -> Task:
    """The task named after the stage.

    What it reads is passed in quotes: Prefect would search all of it for futures, which takes as long as the rest of a task.
    """

    @task(name=stage, task_run_name="{run}-" + stage + "-{iteration:06d}{part}", persist_result=False, cache_policy=NO_CACHE,
          retries=len(RETRY_DELAYS), retry_delay_seconds=list(RETRY_DELAYS), retry_condition_fn=_is_transient)
    def staged(
        run: str, iteration: int, part: str, call: StageCall, perform: Callable[[StageCall], Produced]
    ) -> Produced | State:
        with page.progress(f"{stage} of iteration {iteration}"):
            produced = perform(call)
        if produced.how == "found":
            return Completed(name="Found", message=f"{produced.ref.short} was committed before", data=produced)
        return produced

    return staged


def _is_transient(task: Task, task_run: TaskRun, state: State) -> bool:
    """Whether the task is tried again: a server or a network has failed."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, TransientError):
        return False
    log.warning("%s: %s", task.name, error)
    return True


def untagged() -> TagsContext:
    """Inside it tasks do not inherit the tags of their flow run: for each one Prefect would ask its server, before every
    task, whether a limit on that tag lets it begin."""
    return TagsContext(current_tags=set())
