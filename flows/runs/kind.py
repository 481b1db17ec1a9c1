"""What flows ask of a kind of run, a language model's or a control task's: its chain of stages, tasks and warm models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from flows.runs.run import Run
from flows.runs.start import Check, CheckNew
from flows.runs.work import Task
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, ModelRef, Produced, StageCall, TrainState
from schemas.errors import StoreError
from schemas.settings import ExecutionConfig, Settings, later_settings

ITERATION_DECIDES = frozenset({"critic_warmup", "warmup_iterations", "schedule", "schedule_iterations"})
"""Settings of `ppo` whose outcome in an iteration is in its call in their place."""
V = TypeVar("V")


class Perform(Protocol):
    """Performs calls that do not need each other's results, side by side where that is allowed."""

    def __call__(self, *calls: StageCall) -> dict[str, Produced]:
        """Stage → what came of its call."""


class Chain(Protocol):
    """Which stages of a run follow each other, and what each is called with."""

    run: Run

    def prepare(self, perform: Perform) -> TrainState:
        """State 0."""

    def iteration(self, state: TrainState, perform: Perform, evaluated: bool) -> TrainState:
        """The state after `state`."""

    def line(self, metrics: Mapping[str, float]) -> str:
        """An iteration in words."""

    def again(self, stage: str, recorded: Run, iteration: int) -> StageCall:
        """A stage's call with this run's settings, from the saved states of `recorded`. Raises `ConfigError`."""

    def forked(self, recorded: Run, state: TrainState) -> TrainState:
        """What a fork with this run's settings begins from. Raises `ConfigError`."""


class Ended(Protocol):
    """What has to be ended."""

    def end(self) -> None: ...


class Warm(Protocol):
    """What a process keeps in memory between calls."""

    loaded: int
    """How many models were read from the store."""
    beside: Ended | None
    """The processes that keep the same beside this one, of a stage that several ranks make."""

    def holds(self, model: ModelRef) -> bool:
        """Whether the model is in memory."""

    def forget(self, artifact: ArtifactRef) -> None:
        """Lets go of what is warm of an artifact, so that it is read from the store."""

    def close(self) -> None:
        """Lets go of everything."""


class WarmLater:
    """What a process will keep in memory once a stage asks for it; the libraries of models take seconds to import."""

    def __init__(self, make: Callable[[], Warm]) -> None:
        self._make, self.beside = make, None

    @cached_property
    def _made(self) -> Warm:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    @property
    def loaded(self) -> int:
        return self._made.loaded if "_made" in self.__dict__ else 0

    def forget(self, artifact: ArtifactRef) -> None:
        self._end_those_beside()  # they have it too
        self._made.forget(artifact)

    def close(self) -> None:
        self._end_those_beside()
        if "_made" in self.__dict__:
            self._made.close()

    def _end_those_beside(self) -> None:
        if self.beside is not None:
            self.beside.end()
            self.beside = None


@dataclass(frozen=True)
class KindOfRun:
    """What a kind of run brings: declared once, in flows/language/language_run.py and flows/control/control_run.py."""

    chain: Callable[[Run], Chain]
    task: Callable[[str], Task]
    """What does the work of a stage; libraries that others need are not imported for it."""
    warm: Callable[[Store, ExecutionConfig], Warm]
    check: Check
    """Raises `ConfigError`."""
    check_new: CheckNew
    """Raises `ConfigError`."""


def settings_of(section: Settings, exclude: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """A section as part of a call's settings; without those that were added `Later` and are as it was before."""
    later = {name for name, before in later_settings(type(section)).items() if getattr(section, name) == before}
    return section.model_dump(mode="json", exclude={*exclude, *later})


def made_in(made: Mapping[str, Produced]) -> dict[str, Any]:
    """The fields of a state that say what was made."""
    return {"artifacts": {stage: produced.ref for stage, produced in made.items()}, "seconds": 0.0,
            "metrics": {f"{stage}/{name}": value for stage, produced in made.items()
                        for name, value in produced.metrics.items()}}


def require(output: V | None, stage: str, name: str) -> V:
    """What the next iteration needs of a stage's outputs. Raises `StoreError` if it is missing."""
    if output is None:
        raise StoreError(f"{stage}: its manifest holds no output {name!r}, which the next iteration needs; remove the "
                         "artifact, and the same command makes it again")
    return output
