"""Runs: `run.json`, which says what a run is, and one TrainState for each iteration it has finished."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flows.runs.inputs import apply_settings
from flows.runs.produce import Reproduction, now
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, RunRecord, TrainState, check_name, derive_seed, prefixed
from schemas.config import differences, parse_config
from schemas.errors import ConfigError
from schemas.presets import merged
from schemas.settings import NAME_PATTERN, RunConfig

if TYPE_CHECKING:
    from flows.control.warm_policies import WarmPolicies
    from flows.language.warm_models import WarmModels


class Run:
    """An open run: its record, the store it is in, and the models it keeps warm."""

    def __init__(self, store: Store, record: RunRecord, config: RunConfig) -> None:
        self.store, self.record, self.config = store, record, config
        self.inputs: dict[str, ArtifactRef] = dict(record.inputs)  # imported files and models, by role
        self.rerun: str | None = None  # the stage that is to be computed although its artifact is there
        self.reproduction: Reproduction | None = None  # what came of that
        self.found: list[ArtifactRef] = []  # artifacts that were there already, in the order they were asked for
        self.said = float("-inf")  # when an iteration was last spoken of
        self._models: WarmModels | WarmPolicies | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def models(self) -> WarmModels | WarmPolicies:
        """Models of this process; for a control task its policies and environments."""
        if self._models is None:
            from flows.chains import chain
            self._models = chain(self).Warm(self.store, self.config)
        return self._models

    def close(self) -> None:
        """Lets go of its models, and ends its environments."""
        if self._models is not None:
            self._models.close()
            self._models = None

    @property
    def finished(self) -> bool:
        """Whether all iterations are there."""
        last = self.last()
        return last is not None and last.iteration >= self.config.iterations

    @property
    def progress(self) -> str:
        """For people: how far it is."""
        last = self.last()
        there = "to be prepared" if last is None else f"{last.iteration} there"
        return f"{self.config.iterations} iterations, {there}"

    def seed(self, iteration: int, stage: str) -> int:
        """Of a stage in an iteration."""
        return derive_seed(self.config.seed, iteration, stage)

    # --- iterations ---

    def state(self, iteration: int) -> TrainState:
        """After that iteration. Raises `ConfigError` if it was not reached."""
        state = self.store.get(self.state_key(iteration), TrainState)
        if state is None:
            raise ConfigError(f"run {self.name!r} has no iteration {iteration}; it has {self.reached()}")
        return state

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

    def require_unfinished(self) -> None:
        """Raises `ConfigError` when all iterations are there."""
        if self.finished:
            raise ConfigError(f"run {self.name!r} is finished: {self.last().iteration} of {self.config.iterations} "
                              f"iterations; baton train --run {self.name} --iterations N trains on")

    def save(self, state: TrainState) -> None:
        """Commits the state of an iteration; one that is there already stays."""
        self.store.put(self.state_key(state.iteration), state)

    def metrics_of(self, artifacts: Mapping[str, ArtifactRef]) -> dict[str, float]:
        """`stage/metric` of the artifacts."""
        return {key: value for stage, ref in artifacts.items()
                for key, value in prefixed(stage, self.store.manifest(ref).metrics).items()}

    def evaluation_due(self, iteration: int, last: int) -> bool:
        """Whether that iteration is evaluated; the `last` one always is."""
        every = self.config.evaluate.every
        return iteration == last or (every > 0 and iteration % every == 0)

    def reached(self) -> str:
        """For people: which iterations there are."""
        there = self.iterations()
        return "none yet" if not there else f"{there[0]}…{there[-1]}" if len(there) > 1 else f"{there[0]} alone"

    def state_key(self, iteration: int) -> str:
        """Where that state lies in the store."""
        return f"runs/{self.name}/iterations/{iteration:06d}.json"


# --- making and opening ---

def create_or_open(store: Store, name: str, config: RunConfig, inputs: Mapping[str, ArtifactRef]) -> Run:
    """The run of that name, made if there is none. Raises `ConfigError` saying what differs from what it was made with."""
    record = RunRecord(name=name, config=_settled(config).model_dump(mode="json"), inputs=dict(inputs), created=now())
    if not store.files.exists(record_key(name)) and store.files.names(f"runs/{name}/iterations"):
        raise ConfigError(f"run {name!r} is not whole, a fork or removal of it was interrupted; baton rm {name}, then again")
    store.put(record_key(name), record)
    run = open_run(store, name)
    require_same(run, config, inputs)
    return run


def require_same(run: Run, config: RunConfig, inputs: Mapping[str, ArtifactRef]) -> None:
    """Raises `ConfigError` saying in what the run differs from config and inputs, if it does."""
    lines = differences(run.config.decides(), config.decides())
    lines += [f"data.{role}: other content" for role in sorted({*inputs, *run.inputs})
              if inputs.get(role) != run.inputs.get(role)]
    if lines:
        raise ConfigError(f"run {run.name!r} exists with another config ({'; '.join(lines)}); "
                          "set them back, or choose another name with --run")


def open_run(
    store: Store, name: str, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> Run:
    """An existing run. Raises `ConfigError` if there is none.

    `overrides`: whole sections or single values, nested as in the config, that replace those it was made with;
    `settings`: the same as `a.b=value`, applied after them.
    """
    check_name(name, "run name")
    record = store.get(record_key(name), RunRecord)
    if record is None:
        there = ", ".join(run_names(store)) or "none"
        raise ConfigError(f"no run {name!r} in {store.uri}; runs there: {there} (--store or BATON_STORE chooses the store)")
    data = apply_settings(merged(record.config, overrides or {}), settings)
    return Run(store, record, _settled(parse_config(data, f"run {name!r}")))


def run_names(store: Store) -> list[str]:
    """Names of all runs, in order."""
    return [name for name in store.files.names("runs")
            if re.fullmatch(NAME_PATTERN, name) and store.files.exists(record_key(name))]


def run_folders(store: Store) -> list[str]:
    """Names of all folders of runs, whole or not, in order."""
    return [name for name in store.files.names("runs") if re.fullmatch(NAME_PATTERN, name)
            and store.files.names(f"runs/{name}")]


def record_key(name: str) -> str:
    """Where a run's record lies in the store."""
    return f"runs/{name}/run.json"


def _settled(config: RunConfig) -> RunConfig:
    """With the number of threads it runs with, so that it can be used again."""
    execution = config.execution
    settled = execution.model_copy(update={"threads": execution.threads or _cores()})
    return config.model_copy(update={"execution": settled})


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_run(store: Store, name: str) -> None:
    """Its records; its artifacts stay until `baton gc`."""
    remove_states(store, name)
    store.files.remove(record_key(name))
    store.files.remove(f"runs/{name}")


def remove_states(store: Store, name: str) -> None:
    """The last first, so that at any moment the run is one that is not as far."""
    for state in reversed(store.files.names(f"runs/{name}/iterations")):
        store.files.remove(f"runs/{name}/iterations/{state}")


# --- what can be said of a run ---

def overview(run: Run) -> dict[str, Any]:
    """A run in a line: how far it is, and its last numbers."""
    last = run.last()
    metrics = last.metrics if last else {}
    done = last.iteration if last else 0
    return {"run": run.name, "iteration": done, "iterations": max(done, run.config.iterations),
            "reward": metrics.get("reward/score", metrics.get("rollout/episode_return")),
            "kl": metrics.get("gae/kl"), "gold": metrics.get("evaluate/gold"),
            "created": run.record.created, "parent": run.record.parent}


def time_spent(run: Run, state: TrainState) -> list[dict[str, Any]]:
    """Where an iteration's wall time went: each stage as its manifest has it, and what lies between them."""
    manifests = {stage: run.store.manifest(ref) for stage, ref in state.artifacts.items()}
    total = max(state.seconds, sum(manifest.seconds for manifest in manifests.values()))
    rows = [{"stage": stage, "seconds": m.seconds, "part": m.seconds / total, "tokens_per_second": m.tokens_per_second,
             "bytes": m.bytes, "artifact": m.ref.short} for stage, m in manifests.items()]
    between = total - sum(row["seconds"] for row in rows)
    return [*rows, {"stage": "between stages", "seconds": between, "part": between / total, "tokens_per_second": None,
                    "bytes": None, "artifact": None}]


def references(run: Run) -> list[ArtifactRef]:
    """Every artifact the run refers to, inputs first."""
    made = [ref for state in run.states() for ref in (*state.artifacts.values(), *state.models())]
    return list(dict.fromkeys([*run.inputs.values(), *made]))
