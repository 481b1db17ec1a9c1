"""The tasks of a control task's stages: each loads what its call names, calls the stage, and saves what it gives.

All that decides a result is in the call, whose settings are those of the recipe; see `StageCall` in schemas/artifacts.py.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium

from flows.control import warm_policies
from flows.control.film import film_of
from flows.control.warm_policies import WarmPolicies
from flows.runs.produce import StageOutput
from flows.runs.work import Task, Work
from schemas.artifacts import Outputs
from schemas.control import (
    ControlEvaluateConfig,
    ControlRewardConfig,
    ControlRolloutConfig,
    EnvironmentConfig,
    PolicyConfig,
    Spaces,
)
from schemas.settings import GAEConfig, KLConfig, PPOConfig
from schemas.tables import EPISODE_FILM, Advantages, Trajectories
from stages import control_evaluate as evaluate_stage
from stages import control_rollout as rollout_stage
from stages import gae as gae_stage
from stages import policy as policy_stage
from stages import ppo as ppo_stage
from stages.ops.guest import switches_kept
from stages.ops.learning_signal import of_actions
from stages.ops.moments import updated_moments


def policy(work: Work[WarmPolicies]) -> StageOutput:
    actor, critic = policy_stage.policy(work.settings(Spaces, "spaces"), work.settings(PolicyConfig), seed=work.call.seed)
    for name, network in (("actor", actor), ("critic", critic)):
        warm_policies.save_network(work.attempt, name, network)
    return StageOutput(policy_stage.metrics(actor, critic))


def rollout(work: Work[WarmPolicies]) -> StageOutput:
    config, reward, before = work.settings(ControlRolloutConfig), work.settings(ControlRewardConfig, "reward"), work.moments
    actor, critic = work.warm.actor(work.model("actor")), work.warm.critic(work.model("critic"))
    with switches_kept(), work.warm.environments(
            work.settings(EnvironmentConfig, "environment"), _function(work), actor.spaces, config.num_envs,
            seed=work.setting("environments_seed"), previous=work.ref_if_given("previous"), rollout=work.call.recipe.ref,
    ) as environments:
        batch = rollout_stage.control_rollout(actor, critic, environments, config, reward, gamma=work.setting("gamma"),
                                              moments=before, seed=work.call.seed)
    work.attempt.table(batch)
    if work.call.iteration == 1:
        work.warn(of_actions(batch.actions.values, actor.spaces))
    moments = updated_moments(before, batch.discounted_returns.values) if reward.normalize == "scale" else None
    return StageOutput(rollout_stage.metrics(batch, actor, reward, before), config.num_envs * config.num_steps,
                       Outputs(moments=moments))


def gae(work: Work[WarmPolicies]) -> StageOutput:
    config, batch = work.settings(GAEConfig), work.table("rollouts", Trajectories)
    advantages = gae_stage.gae(batch, None, batch, batch, config, KLConfig(), kl_coef=0.0)
    work.attempt.table(advantages)
    return StageOutput(gae_stage.metrics(advantages, batch, batch, config, kl_coef=None))


def ppo(work: Work[WarmPolicies]) -> StageOutput:
    config, batch = work.settings(PPOConfig), work.table("rollouts", Trajectories)
    learner = work.warm.take_learner(work.model("actor"), work.model("critic"), work.model_if_given("optimizer"), config)
    metrics = ppo_stage.ppo(
        learner, batch, batch, work.table("advantages", Advantages), config, seed=work.call.seed,
        learning_rate_factor=work.setting("learning_rate_factor"), train_actor=work.setting("train_actor"))
    learner.observe(batch)
    warm_policies.save_learner(work.attempt, learner)
    work.warm.put_learner(work.call.recipe.ref, learner)
    return StageOutput(metrics, len(batch.logprobs.values) * metrics.steps // config.minibatches)


def evaluate(work: Work[WarmPolicies]) -> StageOutput:
    config, actor = work.settings(ControlEvaluateConfig), work.warm.actor(work.model("actor"))
    environment, function = work.settings(EnvironmentConfig, "environment"), _function(work)
    with switches_kept(), work.warm.new_environments(
            environment, function, actor.spaces, config.episodes, seed=work.call.seed, once=True) as environments:
        returns = evaluate_stage.control_evaluate(actor, environments, max_steps=config.max_steps)
    work.attempt.table(returns)
    if config.picture and work.warm.renders:
        film = film_of(environment, function, actor, seed=int(returns.seed[0]), max_steps=config.max_steps,
                       timeout=work.call.execution.environment_timeout)
        work.warm.renders = film is not None
        if film:
            work.attempt.write(EPISODE_FILM, film)
    return StageOutput(evaluate_stage.metrics(returns), int(returns.length.sum()))


TASKS: dict[str, Task] = {task.__name__: task for task in (policy, rollout, gae, ppo, evaluate)}


def _function(work: Work[WarmPolicies]) -> Callable[..., gymnasium.Env] | None:
    """The user's function that makes an environment, none where its id is Gymnasium's."""
    return work.function("environment", work.setting("environment")["id"]) if "environment" in work.call.inputs else None
