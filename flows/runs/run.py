"""Runs: `run.json`, which says what a run is, and one TrainState for each iteration it has finished."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.store.lease import require_free
from flows.store.store import Store
from schemas.artifacts import (
    ArtifactRef,
    ModelRef,
    RunRecord,
    StageCall,
    TrainState,
    check_name,
    derive_seed,
)
from schemas.config import apply_settings, config_of_record, differences, like_record, parse_config
from schemas.errors import ConfigError
from schemas.presets import merged
from schemas.records import now
from schemas.settings import NAME_PATTERN, RunConfig
from schemas.stages import STAGES


@dataclass(frozen=True)
class Run:
    """A run as it was made, with the settings that hold now. What it has come to is asked of the store each time."""

    store: Store
    record: RunRecord
    config: RunConfig

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def inputs(self) -> dict[str, ArtifactRef]:
        """Imported files and models, by role."""
        return self.record.inputs

    def seed(self, iteration: int, stage: str) -> int:
        """Of a stage in an iteration."""
        return derive_seed(self.config.seed, iteration, stage)

    def call(
        self, stage: str, iteration: int, settings: dict[str, Any], *, seed: int | None = None,
        **inputs: ArtifactRef | ModelRef | None,
    ) -> StageCall:
        """That stage's call with those settings, and those inputs that are there."""
        declared = STAGES[self.config.kind][stage]
        return StageCall(
            kind=declared.kind, stage=declared.name, version=declared.version, settings=settings, seed=seed,
            inputs={role: ref for role, ref in inputs.items() if ref is not None}, iteration=iteration,
            store=self.store.absolute, execution=self.config.execution, snapshot=self.config.snapshot_due(iteration))

    # --- iterations ---

    def state(self, iteration: int) -> TrainState:
        """After that iteration. Raises `ConfigError` if it was not reached."""
        state = self.state_if_reached(iteration)
        if state is None:
            raise ConfigError(f"run {self.name!r} has no iteration {iteration}; it has {self.reached()}")
        return state

    def state_if_reached(self, iteration: int) -> TrainState | None:
        """After that iteration, none if it was not reached."""
        return self.store.get(self.state_key(iteration), TrainState)

    def states(self) -> list[TrainState]:
        """All, the prepared one first."""
        return [self.state(iteration) for iteration in self.iterations()]

    def last(self) -> TrainState | None:
        """The latest, none before `prepare` is done."""
        there = self.iterations()
        return self.state(there[-1]) if there else None

    def iterations(self) -> list[int]:
        """Which there are, in order."""
        names = self.store.files.names(f"runs/{self.name}/iterations")
        return sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"[0-9]+\.json", name))

    def recorded(self, stage: str, iteration: int) -> ArtifactRef:
        """What that stage of that iteration wrote. Raises `ConfigError` saying what there is instead."""
        artifacts = self.state(iteration).artifacts
        if stage not in artifacts:
            raise ConfigError(f"run {self.name!r} has no stage {stage!r} in iteration {iteration}; "
                              f"it has {', '.join(artifacts)}")
        return artifacts[stage]

    def finished_by(self, state: TrainState | None) -> bool:
        """Whether `state`, its last one, is that of the last iteration."""
        return state is not None and state.iteration >= self.config.iterations

    def require_unfinished(self, state: TrainState | None) -> None:
        """Raises `ConfigError` when all iterations are there; `state`: the last one."""
        if self.finished_by(state):
            raise ConfigError(f"run {self.name!r} is finished: {state.iteration} of {self.config.iterations} "
                              f"iterations; baton train --run {self.name} --iterations N trains on")

    def save(self, state: TrainState) -> None:
        """Commits the state of an iteration; one that is there already stays."""
        self.store.put(self.state_key(state.iteration), state)

    def reached(self) -> str:
        """For people: which iterations there are."""
        there = self.iterations()
        return "none yet" if not there else f"{there[0]}…{there[-1]}" if len(there) > 1 else f"{there[0]} alone"

    def state_key(self, iteration: int) -> str:
        """Where that state lies in the store."""
        return state_key(self.name, iteration)


# --- making and opening ---

def create(store: Store, name: str, config: RunConfig, inputs: Mapping[str, ArtifactRef]) -> Run:
    """A new run of that name; one that another process has made meanwhile, if it is the same. Raises `ConfigError`."""
    config = with_threads(config)
    record = RunRecord(name=name, config=config.model_dump(mode="json"), inputs=dict(inputs), created=now())
    if store.files.names(f"runs/{name}/iterations"):
        raise ConfigError(f"run {name!r} is not whole, a fork or removal of it was interrupted; baton rm {name}, then again")
    if store.put(record_key(name), record):
        return Run(store, record, config)
    run = open_run(store, name)
    require_same(run, config, inputs)
    return run


def require_same(run: Run, config: RunConfig, inputs: Mapping[str, ArtifactRef]) -> None:
    """Raises `ConfigError` saying in what the run differs from config and inputs, if it does."""
    lines = differences(run.config.decides(), like_record(config, run.record.config).decides())
    lines += [f"data.{role}: other content" for role in sorted({*inputs, *run.inputs})
              if inputs.get(role) != run.inputs.get(role)]
    if lines:
        raise ConfigError(f"run {run.name!r} exists with another config ({'; '.join(lines)}); "
                          "set them back, or choose another name with --run")


def open_run(store: Store, name: str) -> Run:
    """An existing run, as it was made. Raises `ConfigError` if there is none."""
    run = find_run(store, name)
    if run is None:
        there = ", ".join(run_names(store)) or "none"
        raise ConfigError(f"no run {name!r} in {store.uri}; runs there: {there} (--store or BATON_STORE chooses the store)")
    return run


def find_run(store: Store, name: str) -> Run | None:
    """As `open_run`; none if there is none."""
    check_name(name, "run name")
    record = store.get(record_key(name), RunRecord)
    return record and Run(store, record, with_threads(config_of_record(record.config, f"run {name!r}")))


def changed(run: Run, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()) -> Run:
    """The run with other settings. Raises `ConfigError` if they do not fit it.

    `overrides`: whole sections or single values, nested as in the config; `settings`: the same as `a.b=value`, applied
    after them.
    """
    data = apply_settings(merged(run.config.model_dump(mode="json"), overrides or {}), settings)
    return Run(run.store, run.record, with_threads(parse_config(data, f"run {run.name!r}")))


def run_names(store: Store) -> list[str]:
    """Names of all runs, in order."""
    return [name for name in possible_runs(store) if store.files.exists(record_key(name))]


def run_folders(store: Store) -> list[str]:
    """Names of all folders of runs, whole or not, in order; one that holds a lease alone is of no run yet."""
    return [name for name in possible_runs(store) if {*store.files.names(f"runs/{name}")} - {"lease"}]


def possible_runs(store: Store) -> list[str]:
    """Names of what may be runs, or be about to be, in order; one call to the store, however many there are."""
    return [name for name in store.files.names("runs") if re.fullmatch(NAME_PATTERN, name)]


def record_key(name: str) -> str:
    """Where a run's record lies in the store."""
    return f"runs/{name}/run.json"


def state_key(name: str, iteration: int) -> str:
    """Where the state of an iteration lies in the store."""
    return f"runs/{name}/iterations/{iteration:06d}.json"


def lease_key(name: str) -> str:
    """Where a run's lease lies in the store."""
    return f"runs/{name}/lease"


def with_threads(config: RunConfig) -> RunConfig:
    """With the number of threads it runs with, so that it can be used again."""
    execution = config.execution
    threads = execution.threads or max(1, _cores() // execution.ranks)
    execution = execution.model_copy(update={"threads": threads})
    return config.model_copy(update={"execution": execution})


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_run(store: Store, name: str) -> None:
    """Its records; its artifacts stay until `baton gc`. Raises `ConfigError` if there is none, or a process works on it."""
    if name not in (there := run_folders(store)):
        raise ConfigError(f"no run {name!r} in {store.uri}; runs there: {', '.join(there) or 'none'}")
    with require_free(store, lease_key(name), f"run {name!r}"):
        remove_states(store, name)
        store.files.remove(record_key(name))
        store.files.remove(f"runs/{name}")  # the lease's file too, which a process that waits for it notices


def require_there(run: Run) -> None:
    """Raises `ConfigError` if the run was removed while its lease was waited for."""
    if not run.store.files.exists(record_key(run.name)):
        raise ConfigError(f"run {run.name!r} was removed meanwhile; make it again with baton train CONFIG --run {run.name}")


def remove_states(store: Store, name: str) -> None:
    """The last first, so that at any moment the run is one that is not as far."""
    for state in reversed(store.files.names(f"runs/{name}/iterations")):
        store.files.remove(f"runs/{name}/iterations/{state}")


def references(run: Run) -> list[ArtifactRef]:
    """Every artifact the run refers to, inputs first."""
    made = [ref for state in run.states() for ref in (*state.artifacts.values(), *state.models())]
    return list(dict.fromkeys([*run.inputs.values(), *made]))
