"""The chain of a language model: what comes before the first iteration, and which stage of one reads what."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flows.language import language_tasks
from flows.language.warm_models import WarmModels
from flows.orchestration.tasks import said
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, ModelRef, Moments, TrainState
from schemas.errors import ConfigError
from schemas.settings import RewardConfig
from stages.ops.kl import adapted_kl_coef

STAGES, Warm = language_tasks.STAGES, WarmModels


def prepare(run: Run) -> TrainState:
    """State 0: the starting actor, critic and reward model, and how the actor does before any PPO."""
    started, artifacts = time.perf_counter(), {}
    if run.config.base_model.source is None:
        artifacts["base_model"] = said(run, language_tasks.base_model(run, 0))
    actor = base_of(run, artifacts)
    if run.config.sft:
        artifacts["sft"] = said(run, language_tasks.sft(run, 0, base=actor))
        actor = ModelRef(artifact=artifacts["sft"], folder="actor")
    reward_model = None
    if run.config.reward_model:
        artifacts["reward_model"] = said(run, language_tasks.reward_model(run, 0, start=actor))
        reward_model = ModelRef(artifact=artifacts["reward_model"], folder="reward_model")
    bias = 0.0
    if run.config.reward.center_on_demonstrations:
        artifacts["reward_bias"] = said(run, language_tasks.reward_bias(
            run, 0, reference_model=actor, reward_model=reward_model))
        bias = run.store.manifest(artifacts["reward_bias"]).metrics["bias"]
    artifacts["evaluate"] = said(run, language_tasks.evaluate(
        run, 0, updated_actor=actor, reference_model=actor, reward_model=reward_model, baseline=None, reward_bias=bias))
    critic = run.config.value and (reward_model if run.config.value.start == "reward_model" else actor)
    state = TrainState(
        iteration=0, actor=actor, critic=critic, optimizer=None, reference=actor, reward_model=reward_model,
        baseline=artifacts["evaluate"], artifacts=artifacts, kl_coef=run.config.kl.coef, reward_bias=bias,
        metrics=run.metrics_of(artifacts), seconds=time.perf_counter() - started)
    run.save(state)
    return state


def base_of(run: Run, artifacts: dict[str, ArtifactRef]) -> ModelRef:
    """The base model: the one made for the run, or the one it was given."""
    return ModelRef(artifact=artifacts.get("base_model") or run.inputs["base_model"], folder="model")


def iteration(run: Run, state: TrainState, last: int) -> TrainState:
    """The iteration after `state`; evaluated if it is due, or the `last` one. Stages already committed are found."""
    i = state.iteration + 1
    made = {"rollout": language_tasks.rollout(run, i, actor=state.actor)}
    rollouts = made["rollout"]
    made["reference"] = language_tasks.reference(run, i, reference_model=state.reference, rollouts=rollouts)
    made["reward"] = language_tasks.reward(run, i, reward_model=state.reward_model, rollouts=rollouts,
                                  reward_bias=state.reward_bias, reward_moments=state.reward_moments)
    if state.critic:
        made["value"] = language_tasks.value(run, i, critic=state.critic, rollouts=rollouts)
    values = made.get("value")
    made["gae"] = language_tasks.gae(run, i, rollouts=rollouts, reference=made["reference"], rewards=made["reward"],
                            values=values, kl_coef=state.kl_coef)
    made["ppo"] = language_tasks.ppo(
        run, i, actor=state.actor, critic=state.critic, optimizer=state.optimizer, rollouts=rollouts,
        reference=made["reference"], values=values, advantages=made["gae"], kl_coef=state.kl_coef)
    actor = ModelRef(artifact=made["ppo"], folder="actor")
    if run.evaluation_due(i, last):
        made["evaluate"] = language_tasks.evaluate(run, i, updated_actor=actor, reference_model=state.reference,
                                          reward_model=state.reward_model, baseline=state.baseline,
                                          reward_bias=state.reward_bias)
    metrics = run.metrics_of(made)
    return state.model_copy(update=dict(
        iteration=i, actor=actor, critic=ModelRef(artifact=made["ppo"], folder="critic") if state.critic else None,
        optimizer=ModelRef(artifact=made["ppo"], folder="optimizer"), artifacts=made, metrics=metrics,
        kl_coef=_next_kl_coef(run, state, metrics["gae/kl"]), reward_moments=Moments.measured("reward", metrics)))


def _next_kl_coef(run: Run, state: TrainState, kl: float) -> float:
    """β after the iteration that follows `state`; kept in a critic warm-up, where the KL is 0 and nobody's merit."""
    if state.iteration < run.config.ppo.critic_warmup:
        return state.kl_coef
    return adapted_kl_coef(state.kl_coef, kl, run.config.rollout.batch_size, run.config.kl)


def line(metrics: Mapping[str, float]) -> str:
    """An iteration in a line: reward, KL, gold."""
    gold = f"  gold {metrics['evaluate/gold']:7.3f}" if "evaluate/gold" in metrics else ""
    return f"reward {metrics['reward/score']:7.3f}  KL {metrics['gae/kl']:6.2f}{gold}"


# --- one stage again ---

def saved(stage: str, run: Run, recorded: Run, iteration: int) -> dict[str, Callable[[], Any]]:
    """What tasks are given, by the names of their parameters, from the states before and after that iteration.

    Raises `ConfigError` where `run`, with other settings than those `recorded`, cannot use what was saved.
    """
    after = run.state(iteration)
    before = run.state(iteration - 1) if iteration else after
    changed = run.config.kl.coef != recorded.config.kl.coef
    if stage == "ppo" and run.config.kl.placement != recorded.config.kl.placement:
        raise ConfigError("kl.placement: the recorded advantages were made with the other: the KL would be charged twice, "
                          "or not at all; make another run")
    return {
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


def forked(run: Run, recorded: Run, state: TrainState) -> TrainState:
    """The state that a fork with the settings of `run` begins from. Raises `ConfigError` where it cannot."""
    if run.config.gae.has_critic and not state.critic:
        raise ConfigError(f"gae.estimator={run.config.gae.estimator}: it needs a critic, and run {recorded.name!r} has none")
    judged = lambda config: config.evaluate.judge or _raw(config.reward)  # noqa: E731 - what gold is
    if judged(run.config) != judged(recorded.config):
        raise ConfigError("evaluate.judge: wins are over what the starting actor got from the judge of the run, "
                          "or from its reward where there is none; make another run")
    changed = run.config.kl.coef != recorded.config.kl.coef
    return state.model_copy(update={
        "critic": state.critic if run.config.gae.has_critic else None,
        "kl_coef": run.config.kl.coef if changed else state.kl_coef,
        "reward_bias": _bias(run.config.reward, recorded.config.reward, state),
        "reward_moments": _moments(run.config.reward, recorded.config.reward, state)})


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
