"""One stage again, from saved artifacts: with the same settings to see that it gives the same bytes, or with others."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows import tasks
from flows.inputs import check_function, functions_of, import_files, recipes_of
from flows.produce import Reproduction
from flows.runs import Run, open_run
from flows.store import Store
from flows.train import base_of
from schemas.artifacts import ArtifactRef, Moments, TrainState
from schemas.errors import ConfigError
from schemas.settings import RewardConfig


@dataclass(frozen=True)
class StageResult:
    """What a rerun came to."""

    recorded: ArtifactRef  # what the run has
    ref: ArtifactRef  # what these settings give
    reproduction: Reproduction | None  # none where that is a new artifact
    models_loaded: int

    @property
    def verdict(self) -> str:
        """`same` or `different` bytes, or `new` artifact."""
        if self.reproduction is None:
            return "new"
        return "different" if self.reproduction.different else "same"


@flow(name="stage", flow_run_name="{name}-{stage}-{iteration}", persist_result=False)
def stage_flow(
    name: str, store: str, stage: str, iteration: int, settings: tuple[str, ...] = ()
) -> StageResult:
    """That stage of that iteration, computed again; the run itself is left alone. Raises `ConfigError`.

    `settings`: `a.b=value`, what to change of the run's config.
    """
    recorded_run = open_run(Store(Path(store)), name)
    run = open_run(recorded_run.store, name, _as_recorded(recorded_run, stage, iteration), settings)
    use_new_functions(run, recorded_run)
    run.rerun = stage
    ref = tasks.STAGES[stage](run, iteration, **arguments(run, recorded_run, stage, iteration))
    return StageResult(run.recorded(stage, iteration), ref, run.reproduction, run.models.loaded)


def _as_recorded(run: Run, stage: str, iteration: int) -> dict[str, Any]:
    """The execution settings the artifact was made with: its last bits depend on them."""
    manifest = run.store.find(run.recorded(stage, iteration))
    return {"execution": manifest.environment.execution} if manifest else {}


def use_new_functions(run: Run, recorded: Run) -> None:
    """Imports the functions that the settings name and the run did not; files are looked for below this folder.

    Raises `ConfigError`, also where a setting names another preset, other data or another base model: those belong
    to a run.
    """
    for section in ("preset", "data", "base_model"):
        if getattr(run.config, section) != getattr(recorded.config, section):
            raise ConfigError(f"--set {section}…: it belongs to the run as a whole; make another run with it")
    old = functions_of(recorded.config)
    files = {role: [check_function(source, Path.cwd())] for role, source in functions_of(run.config).items()
             if old.get(role) != source}
    run.inputs |= import_files(run.store, run.config, files, recipes_of(files))


def arguments(run: Run, recorded: Run, stage: str, iteration: int) -> dict[str, Any]:
    """The stage's inputs, by the names of its task's parameters, from the saved states before and after it."""
    after = run.state(iteration)
    before = run.state(iteration - 1) if iteration else after
    changed = run.config.kl.coef != recorded.config.kl.coef
    if stage == "ppo" and run.config.kl.placement != recorded.config.kl.placement:
        raise ConfigError("kl.placement: the recorded advantages were made with the other: the KL would be charged twice, "
                          "or not at all; make another run")
    saved = {
        "base": lambda: base_of(run, after.artifacts),
        "start": lambda: after.reference,
        "actor": lambda: before.actor,
        "critic": lambda: before.critic if run.config.gae.has_critic else None,
        "optimizer": lambda: before.optimizer,
        "reference_model": lambda: after.reference,
        "reward_model": lambda: after.reward_model,
        "updated_actor": lambda: after.actor,
        "baseline": lambda: after.baseline if iteration else None,
        "kl_coef": lambda: run.config.kl.coef if changed else before.kl_coef,
        "reward_bias": lambda: _bias(run.config.reward, recorded.config.reward, after),
        "reward_moments": lambda: _moments(run.config.reward, recorded.config.reward, before),
        "rollouts": lambda: after.artifacts["rollout"],
        "reference": lambda: after.artifacts["reference"],
        "rewards": lambda: after.artifacts["reward"],
        "values": lambda: run.recorded("value", iteration) if run.config.gae.has_critic else None,
        "advantages": lambda: after.artifacts["gae"],
    }
    wanted = inspect.signature(tasks.STAGES[stage].fn).parameters
    return {name: saved[name]() for name in wanted if name not in ("run", "iteration")}


def _bias(now: RewardConfig, recorded: RewardConfig, state: TrainState) -> float:
    """What is taken off the weighted sum. Raises `ConfigError` where the run did not score its demonstrations so."""
    if not now.center_on_demonstrations:
        return 0.0
    if not recorded.center_on_demonstrations or now.components != recorded.components:
        raise ConfigError("reward.center_on_demonstrations: the run has no demonstrations scored with these components; "
                          "set it to false, or make another run")
    return state.reward_bias


def _moments(now: RewardConfig, recorded: RewardConfig, state: TrainState) -> Moments:
    """Those of the scores before. Raises `ConfigError` where the settings normalise by moments that the run did not keep."""
    if now.normalize != "none" and (recorded.normalize == "none" or _raw(now) != _raw(recorded)):
        raise ConfigError("reward.normalize: the run kept no running moments of these scores; set it to none, or make "
                          "another run")
    return state.reward_moments


def _raw(config: RewardConfig) -> tuple:
    """What decides the raw score."""
    return config.components, config.center_on_demonstrations
