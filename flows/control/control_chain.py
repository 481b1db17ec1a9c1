"""The chain of a control task: what comes before the first iteration, and which stage of one reads what."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flows.control import control_tasks
from flows.control.warm_policies import WarmPolicies
from flows.orchestration.tasks import said
from flows.runs.run import Run
from schemas.artifacts import ModelRef, Moments, TrainState
from schemas.errors import ConfigError

STAGES, Warm = control_tasks.STAGES, WarmPolicies


def prepare(run: Run) -> TrainState:
    """State 0: an untrained actor and critic, and how the actor does."""
    started = time.perf_counter()
    artifacts = {"policy": said(run, control_tasks.policy(run, 0))}
    actor, critic = (ModelRef(artifact=artifacts["policy"], folder=name) for name in ("actor", "critic"))
    artifacts["evaluate"] = said(run, control_tasks.evaluate(run, 0, updated_actor=actor))
    state = TrainState(
        iteration=0, actor=actor, critic=critic, optimizer=None, reference=None, reward_model=None,
        baseline=artifacts["evaluate"], artifacts=artifacts, metrics=run.metrics_of(artifacts),
        seconds=time.perf_counter() - started)
    run.save(state)
    return state


def iteration(run: Run, state: TrainState, last: int) -> TrainState:
    """The iteration after `state`; evaluated if it is due, or the `last` one. Stages already committed are found."""
    i = state.iteration + 1
    made = {"rollout": control_tasks.rollout(
        run, i, actor=state.actor, critic=state.critic, previous=state.artifacts.get("rollout"),
        reward_moments=state.reward_moments)}
    made["gae"] = control_tasks.gae(run, i, rollouts=made["rollout"])
    made["ppo"] = control_tasks.ppo(run, i, actor=state.actor, critic=state.critic, optimizer=state.optimizer,
                                    rollouts=made["rollout"], advantages=made["gae"])
    actor, critic, optimizer = (ModelRef(artifact=made["ppo"], folder=name) for name in ("actor", "critic", "optimizer"))
    if run.evaluation_due(i, last):
        made["evaluate"] = control_tasks.evaluate(run, i, updated_actor=actor)
    metrics = run.metrics_of(made)
    return state.model_copy(update=dict(iteration=i, actor=actor, critic=critic, optimizer=optimizer, artifacts=made,
                                        metrics=metrics, reward_moments=Moments.measured("rollout", metrics)))


def line(metrics: Mapping[str, float]) -> str:
    """An iteration in a line: returns of training and of an evaluation, KL of the update."""
    trained = f"{metrics['rollout/episode_return']:9.2f}" if "rollout/episode_return" in metrics else "  no end "
    evaluated = f"  evaluated {metrics['evaluate/episode_return']:9.2f}" if "evaluate/episode_return" in metrics else ""
    return f"return {trained}  approx KL {metrics.get('ppo/approx_kl', 0.0):.4f}{evaluated}"


# --- one stage again ---

def saved(stage: str, run: Run, recorded: Run, iteration: int) -> dict[str, Callable[[], Any]]:
    """What tasks are given, by the names of their parameters, from the states before and after that iteration.

    Raises `ConfigError` where `run`, with other settings than those `recorded`, cannot use what was saved.
    """
    after = run.state(iteration)
    before = run.state(iteration - 1) if iteration else after
    if stage in ("rollout", "ppo", "evaluate") and run.config.policy != recorded.config.policy:
        raise ConfigError(f"--set policy…: {stage} of this run has policies of the recorded sizes; make another run")
    if stage == "rollout" and iteration > 1:
        _require_same_episodes(run, recorded)
    return {
        "actor": lambda: before.actor,
        "critic": lambda: before.critic,
        "optimizer": lambda: before.optimizer,
        "updated_actor": lambda: after.actor,
        "previous": lambda: before.artifacts.get("rollout"),
        "reward_moments": lambda: _moments(run, recorded, before),
        "rollouts": lambda: after.artifacts["rollout"],
        "advantages": lambda: after.artifacts["gae"],
    }


def _require_same_episodes(run: Run, recorded: Run) -> None:
    """Raises `ConfigError` where `run` could not go on with the episodes that are open."""
    if run.config.seed != recorded.config.seed:
        raise ConfigError("seed: the episodes that the iteration before left open were reset with seeds that derive from "
                          f"{recorded.config.seed}; make another run")
    if run.config.rollout.num_envs != recorded.config.rollout.num_envs:
        raise ConfigError("rollout.num_envs: the episodes that the iteration before left open belong to "
                          f"{recorded.config.rollout.num_envs} environments; make another run")
    if run.config.gae.gamma != recorded.config.gae.gamma:
        raise ConfigError("gae.gamma: the discounted returns that the iterations before left were summed with "
                          f"{recorded.config.gae.gamma:g}; make another run")


def forked(run: Run, recorded: Run, state: TrainState) -> TrainState:
    """The state that a fork with the settings of `run` begins from. Raises `ConfigError` where it cannot."""
    if state.iteration:
        _require_same_episodes(run, recorded)
    return state.model_copy(update={"reward_moments": _moments(run, recorded, state)})


def _moments(run: Run, recorded: Run, state: TrainState) -> Moments:
    """Those of the batches before. Raises `ConfigError` where the settings scale by moments that the run did not keep."""
    if run.config.reward.normalize != "none" and recorded.config.reward.normalize == "none" and state.iteration:
        raise ConfigError("reward.normalize: the run kept no running moments of discounted returns; set it to none, or "
                          "make another run")
    return state.reward_moments
