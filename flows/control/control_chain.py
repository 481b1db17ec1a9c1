"""The chain of a control task: what comes before the first iteration, and which stage of one reads what.

Each stage has a method that makes its call, with the settings that decide its result and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flows.control.environments import look_at
from flows.runs.functions import stored_function
from flows.runs.kind import ITERATION_DECIDES, Perform, made_in, require, settings_of
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, ModelRef, Moments, Produced, StageCall, TrainState
from schemas.control import Spaces
from schemas.errors import ConfigError
from stages.ops.optim import learning_rate_factor


@dataclass(frozen=True)
class ControlChain:
    """The chain of one run."""

    run: Run

    # --- which stages follow each other ---

    def prepare(self, perform: Perform) -> TrainState:
        """State 0: an untrained actor and critic, and how the actor does."""
        made = perform(self.policy())
        actor, critic = (ModelRef(artifact=made["policy"].ref, folder=name) for name in ("actor", "critic"))
        made |= perform(self.evaluate(0, actor))
        return TrainState(iteration=0, actor=actor, critic=critic, optimizer=None, reference=None, reward_model=None,
                          baseline=made["evaluate"].ref, **made_in(made))

    def iteration(self, state: TrainState, perform: Perform, evaluated: bool) -> TrainState:
        """The iteration after `state`. Stages already committed are found."""
        i = state.iteration + 1
        made = perform(self.rollout(i, state.actor, state.critic, state.artifacts.get("rollout"), state.reward_moments))
        rollouts = made["rollout"].ref
        made |= perform(self.gae(i, rollouts))
        made |= perform(self.ppo(i, state.actor, state.critic, state.optimizer, rollouts, made["gae"].ref))
        actor, critic, optimizer = (ModelRef(artifact=made["ppo"].ref, folder=name)
                                    for name in ("actor", "critic", "optimizer"))
        if evaluated:
            made |= perform(self.evaluate(i, actor))
        return state.model_copy(update=dict(iteration=i, actor=actor, critic=critic, optimizer=optimizer,
                                            reward_moments=self._next_moments(made["rollout"]), **made_in(made)))

    def _next_moments(self, rollout: Produced) -> Moments:
        if self.run.config.reward.normalize == "none":
            return Moments()
        return require(rollout.outputs.moments, "rollout", "moments")

    @staticmethod
    def line(metrics: Mapping[str, float]) -> str:
        """An iteration in a line: returns of training and of an evaluation, KL of the update."""
        trained = f"{metrics['rollout/episode_return']:9.2f}" if "rollout/episode_return" in metrics else "  no end "
        evaluated = f"  evaluated {metrics['evaluate/episode_return']:9.2f}" if "evaluate/episode_return" in metrics else ""
        return f"return {trained}  approx KL {metrics.get('ppo/approx_kl', 0.0):.4f}{evaluated}"

    # --- what each stage is called with ---

    def policy(self) -> StageCall:
        config = settings_of(self.run.config.policy) | {"spaces": settings_of(self._spaces())}
        return self.run.call("policy", 0, config, seed=self.run.seed(0, "policy"))

    def rollout(self, iteration: int, actor: ModelRef, critic: ModelRef, previous: ArtifactRef | None,
                moments: Moments) -> StageCall:
        config = self.run.config
        settings = settings_of(config.rollout) | {
            "environment": settings_of(config.environment), "reward": settings_of(config.reward), "gamma": config.gae.gamma,
            "environments_seed": self.run.seed(0, "environments")}
        if config.reward.normalize != "none":
            settings["moments"] = moments.model_dump(mode="json")
        return self.run.call("rollout", iteration, settings, seed=self.run.seed(iteration, "rollout"), actor=actor,
                             critic=critic, previous=previous, environment=self.run.inputs.get("environment"))

    def gae(self, iteration: int, rollouts: ArtifactRef) -> StageCall:
        return self.run.call("gae", iteration, settings_of(self.run.config.gae), rollouts=rollouts)

    def ppo(self, iteration: int, actor: ModelRef, critic: ModelRef, optimizer: ModelRef | None, rollouts: ArtifactRef,
            advantages: ArtifactRef) -> StageCall:
        config = self.run.config.ppo
        settings = settings_of(config, ITERATION_DECIDES) | {
            "learning_rate_factor": learning_rate_factor(iteration, config), "train_actor": iteration > config.critic_warmup}
        return self.run.call("ppo", iteration, settings, seed=self.run.seed(iteration, "ppo"), actor=actor, critic=critic,
                             optimizer=optimizer, rollouts=rollouts, advantages=advantages)

    def evaluate(self, iteration: int, actor: ModelRef) -> StageCall:
        settings = settings_of(self.run.config.evaluate, {"every"}) | {
            "environment": settings_of(self.run.config.environment)}
        return self.run.call("evaluate", iteration, settings, seed=self.run.seed(0, "evaluate"), actor=actor,
                             environment=self.run.inputs.get("environment"))

    def _spaces(self) -> Spaces:
        config, ref = self.run.config, self.run.inputs.get("environment")
        function = stored_function(self.run.store, ref, config.environment.id) if ref else None
        return look_at(config.environment, function, config.execution.environment_timeout)

    # --- one stage again ---

    def again(self, stage: str, recorded: Run, iteration: int) -> StageCall:
        """That stage's call with this run's settings, from the states of `recorded` before and after that iteration.

        Raises `ConfigError` where what was saved cannot be used with other settings than those it was made with.
        """
        run, after = self.run, recorded.state(iteration)
        before, made = recorded.state(iteration - 1) if iteration else after, after.artifacts
        if stage in ("rollout", "ppo", "evaluate") and run.config.policy != recorded.config.policy:
            raise ConfigError(f"--set policy…: {stage} of this run has policies of the recorded sizes; make another run")
        match stage:
            case "policy":
                return self.policy()
            case "rollout":
                if iteration > 1:
                    self._require_same_episodes(recorded)
                return self.rollout(iteration, before.actor, before.critic, before.artifacts.get("rollout"),
                                    self._moments(recorded, before))
            case "gae":
                return self.gae(iteration, made["rollout"])
            case "ppo":
                return self.ppo(iteration, before.actor, before.critic, before.optimizer, made["rollout"], made["gae"])
            case "evaluate":
                return self.evaluate(iteration, after.actor)
        raise ConfigError(f"stage {stage!r}: a run of this kind has none of that name")

    def forked(self, recorded: Run, state: TrainState) -> TrainState:
        """The state that a fork with this run's settings begins from. Raises `ConfigError` where it cannot."""
        if state.iteration:
            self._require_same_episodes(recorded)
        return state.model_copy(update={"reward_moments": self._moments(recorded, state)})

    def _require_same_episodes(self, recorded: Run) -> None:
        """Raises `ConfigError` where this run could not go on with the episodes that are open."""
        config, old = self.run.config, recorded.config
        if config.seed != old.seed:
            raise ConfigError("seed: the episodes that the iteration before left open were reset with seeds that derive "
                              f"from {old.seed}; make another run")
        if config.rollout.num_envs != old.rollout.num_envs:
            raise ConfigError("rollout.num_envs: the episodes that the iteration before left open belong to "
                              f"{old.rollout.num_envs} environments; make another run")
        if config.gae.gamma != old.gae.gamma:
            raise ConfigError("gae.gamma: the discounted returns that the iterations before left were summed with "
                              f"{old.gae.gamma:g}; make another run")

    def _moments(self, recorded: Run, state: TrainState) -> Moments:
        """Those of the batches before. Raises `ConfigError` where settings scale by moments that the run did not keep."""
        now, old = self.run.config.reward, recorded.config.reward
        if now.normalize != "none" and old.normalize == "none" and state.iteration:
            raise ConfigError("reward.normalize: the run kept no running moments of discounted returns; set it to none, or "
                              "make another run")
        return state.reward_moments
