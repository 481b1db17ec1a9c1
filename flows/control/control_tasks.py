"""The tasks of a control task's chain, one per stage; see flows/orchestration/tasks.py for what all tasks are."""

from __future__ import annotations

from flows.control import warm_policies as policies
from flows.control.environments import look_at
from flows.control.film import film_of
from flows.orchestration.tasks import ITERATION_DECIDES, given, settings_of, stage_task
from flows.runs.produce import Made, produce
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, ModelRef, Moments, Recipe
from schemas.settings import KLConfig
from schemas.tables import EPISODE_FILM, Advantages, Trajectories
from stages import control_evaluate as evaluate_stage
from stages import control_rollout as rollout_stage
from stages import gae as gae_stage
from stages import policy as policy_stage
from stages import ppo as ppo_stage
from stages.ops.optim import learning_rate_factor


@stage_task
def policy(run: Run, iteration: int) -> ArtifactRef:
    spaces = look_at(run.config.environment, policies.environment_function(run), run.config.execution.environment_timeout)
    recipe = Recipe(stage="policy", version=policy_stage.VERSION, inputs={}, seed=run.seed(iteration, "policy"),
                    config=settings_of(run.config.policy, spaces=spaces.model_dump(mode="json")))

    def make(attempt):
        actor, critic = policy_stage.policy(spaces, run.config.policy, seed=recipe.seed)
        for name, network in (("actor", actor), ("critic", critic)):
            policies.save_network(attempt, name, network)
        return Made(policy_stage.metrics(actor, critic))

    return produce(run, recipe, make)


@stage_task
def rollout(run: Run, iteration: int, actor: ModelRef, critic: ModelRef, previous: ArtifactRef | None,
            reward_moments: Moments) -> ArtifactRef:
    config, reward, gamma = run.config.rollout, run.config.reward, run.config.gae.gamma
    scaled = {"moments": reward_moments.model_dump(mode="json")} if reward.normalize != "none" else {}
    recipe = Recipe(
        stage="rollout", version=rollout_stage.VERSION, seed=run.seed(iteration, "rollout"),
        config=settings_of(config, environment=settings_of(run.config.environment), reward=settings_of(reward), gamma=gamma,
                           environments_seed=run.seed(0, "environments"), **scaled),
        inputs=given(actor=actor.artifact, critic=critic.artifact, previous=previous,
                     environment=run.inputs.get("environment")))

    def make(attempt):
        policy, values = run.models.actor(actor), run.models.critic(critic)
        with run.models.environments(run, policy.spaces, previous, recipe.ref) as environments:
            batch = rollout_stage.control_rollout(policy, values, environments, config, reward, gamma=gamma,
                                                  moments=reward_moments, seed=recipe.seed)
        attempt.table(batch)
        return Made(rollout_stage.metrics(batch, policy, reward, reward_moments), config.num_envs * config.num_steps)

    return produce(run, recipe, make)


@stage_task
def gae(run: Run, iteration: int, rollouts: ArtifactRef) -> ArtifactRef:
    config = run.config.gae
    recipe = Recipe(stage="gae", version=gae_stage.VERSION, config=settings_of(config), inputs={"rollouts": rollouts})

    def make(attempt):
        batch = run.store.table(rollouts, Trajectories)
        advantages = gae_stage.gae(batch, None, batch, batch, config, KLConfig(), kl_coef=0.0)
        attempt.table(advantages)
        return Made(gae_stage.metrics(advantages, batch, batch, config, kl_coef=None))

    return produce(run, recipe, make)


@stage_task
def ppo(run: Run, iteration: int, actor: ModelRef, critic: ModelRef, optimizer: ModelRef | None, rollouts: ArtifactRef,
        advantages: ArtifactRef) -> ArtifactRef:
    config = run.config.ppo
    factor, train_actor = learning_rate_factor(iteration, config), iteration > config.critic_warmup
    recipe = Recipe(
        stage="ppo", version=ppo_stage.VERSION, seed=run.seed(iteration, "ppo"),
        config=settings_of(config, ITERATION_DECIDES, learning_rate_factor=factor, train_actor=train_actor),
        inputs=given(actor=actor.artifact, critic=critic.artifact, optimizer=optimizer and optimizer.artifact,
                     rollouts=rollouts, advantages=advantages))

    def make(attempt):
        batch = run.store.table(rollouts, Trajectories)
        learner = run.models.take_learner(actor, critic, optimizer)
        metrics = ppo_stage.ppo(learner, batch, batch, run.store.table(advantages, Advantages), config, seed=recipe.seed,
                                learning_rate_factor=factor, train_actor=train_actor)
        learner.observe(batch)
        policies.save_learner(attempt, learner)
        run.models.put_learner(recipe.ref, learner)
        return Made(metrics, len(batch.logprobs.values) * metrics.steps // config.minibatches)

    return produce(run, recipe, make)


@stage_task
def evaluate(run: Run, iteration: int, updated_actor: ModelRef) -> ArtifactRef:
    config = run.config.evaluate
    recipe = Recipe(
        stage="evaluate", version=evaluate_stage.VERSION, seed=run.seed(0, "evaluate"),
        config=settings_of(config, frozenset({"every"}), environment=settings_of(run.config.environment)),
        inputs=given(actor=updated_actor.artifact, environment=run.inputs.get("environment")))

    def make(attempt):
        actor = run.models.actor(updated_actor)
        with policies.new_environments(run, actor.spaces, config.episodes, seed=recipe.seed, once=True) as environments:
            returns = evaluate_stage.control_evaluate(actor, environments, max_steps=config.max_steps)
        attempt.table(returns)
        if config.picture and run.models.renders:
            film = film_of(run.config, policies.environment_function(run), actor, seed=int(returns.seed[0]))
            run.models.renders = film is not None
            if film:
                attempt.write(EPISODE_FILM, film)
        return Made(evaluate_stage.metrics(returns), int(returns.length.sum()))

    return produce(run, recipe, make)


STAGES = {stage.__name__: stage for stage in (policy, rollout, gae, ppo, evaluate)}
