"""The chain of a language model: what comes before the first iteration, and which stage of one reads what.

Each stage has a method that makes its call, with the settings that decide its result and no others. An iteration gives it
what the stages before have just made; a rerun what a saved state names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flows.runs.functions import stored_function
from flows.runs.inputs import stored_rows
from flows.runs.kind import ITERATION_DECIDES, Perform, made_in, require, settings_of
from flows.runs.run import Run, open_run
from schemas.artifacts import ArtifactRef, ModelRef, Moments, Produced, StageCall, TrainState
from schemas.errors import ConfigError
from schemas.reward_settings import RewardConfig, by_content
from stages.ops.distribution import SETTINGS
from stages.ops.kl import adapted_kl_coef
from stages.ops.optim import learning_rate_factor
from stages.ops.reward_function import asked

READING = frozenset({"special_tokens_in_text"})  # settings of the base model that are about texts, beside the template
OF_A_BATCH = frozenset({"batch_size", "responses_per_prompt", "resample_rounds"})  # settings of rollouts for training
HOW_IT_IS_USED = READING | {"precision"}  # settings of the base model that do not decide what a new one is


@dataclass(frozen=True)
class LanguageChain:
    """The chain of one run."""

    run: Run

    # --- which stages follow each other ---

    def prepare(self, perform: Perform) -> TrainState:
        """State 0: the starting actor, critic and reward model, and how the actor does before any PPO."""
        config, made = self.run.config, {}
        if config.base_model.source is None or config.base_model.is_gguf:
            made |= perform(self.base_model())
        actor = self._base(made)
        if config.sft:
            made |= perform(self.sft(actor))
            actor = ModelRef(artifact=made["sft"].ref, folder="actor")
        reward_model, bias = None, 0.0
        if config.reward_model:
            made |= perform(self.reward_model(actor))
            reward_model = ModelRef(artifact=made["reward_model"].ref, folder="reward_model")
        if config.reward.center_on_demonstrations:
            made |= perform(self.reward_bias(actor, reward_model))
            bias = require(made["reward_bias"].outputs.bias, "reward_bias", "bias")
        against = self._against()
        made |= perform(self.evaluate(0, actor, actor, reward_model, against, bias))
        critic = config.value and self._critic(actor, reward_model)
        return TrainState(
            iteration=0, actor=actor, critic=critic, optimizer=None, reference=actor, reward_model=reward_model,
            baseline=against or made["evaluate"].ref, kl_coef=config.kl.coef, reward_bias=bias, **made_in(made))

    def iteration(self, state: TrainState, perform: Perform, evaluated: bool) -> TrainState:
        """The iteration after `state`. Stages already committed are found."""
        i = state.iteration + 1
        made = perform(self.rollout(i, state.actor))
        rollouts = made["rollout"].ref
        scores = [self.reward(i, state.reference, state.reward_model, rollouts, state.reward_bias, state.reward_moments)]
        if self.run.config.rollout.resample_rounds:
            made |= perform(*scores)
            made |= perform(self.resample(i, state.actor, state.reference, state.reward_model, rollouts, made["reward"].ref,
                                          state.reward_bias))
            rollouts, scores = made["resample"].ref, []
        if self.run.config.kl.needs_reference:
            scores.insert(0, self.reference(i, state.reference, rollouts))
        if state.critic:
            scores.append(self.value(i, state.critic, rollouts))
        made |= perform(*scores)
        rewards = made.get("resample", made["reward"]).ref
        reference, values = (made[stage].ref if stage in made else None for stage in ("reference", "value"))
        made |= perform(self.gae(i, rollouts, reference, rewards, values, state.kl_coef))
        made |= perform(self.ppo(i, state.actor, state.critic, state.optimizer, rollouts, reference, values,
                                 made["gae"].ref, state.kl_coef))
        actor, critic, optimizer = (ModelRef(artifact=made["ppo"].ref, folder=name)
                                    for name in ("actor", "critic", "optimizer"))
        if evaluated:
            made |= perform(self.evaluate(i, actor, state.reference, state.reward_model, state.baseline,
                                          state.reward_bias))
        return state.model_copy(update=dict(
            iteration=i, actor=actor, critic=critic if state.critic else None, optimizer=optimizer,
            kl_coef=self._next_kl_coef(state, made["gae"]), reward_moments=self._next_moments(made["reward"]),
            **made_in(made)))

    def _critic(self, actor: ModelRef, reward_model: ModelRef | None) -> ModelRef:
        """The critic before the first iteration."""
        if self.run.config.value.brought:
            return self._brought("critic")
        return reward_model if self.run.config.value.start == "reward_model" else actor

    def _brought(self, role: str) -> ModelRef:
        return ModelRef(artifact=self.run.inputs[role], folder="model")

    def _base(self, made: Mapping[str, Produced]) -> ModelRef:
        """The base model: the one made for the run, or the one it was given."""
        if "base_model" in made:
            return ModelRef(artifact=made["base_model"].ref, folder="model")
        return self._brought("base_model")

    def _next_kl_coef(self, state: TrainState, gae: Produced) -> float:
        """β after the iteration that follows `state`; kept in a critic warm-up, where the actor stays and the KL is 0."""
        config = self.run.config
        if config.kl.target is None or state.iteration < config.ppo.critic_warmup:
            return state.kl_coef
        return adapted_kl_coef(state.kl_coef, require(gae.outputs.kl, "gae", "kl"), config.rollout.batch_size, config.kl)

    def _next_moments(self, reward: Produced) -> Moments:
        if self.run.config.reward.normalize == "none":
            return Moments()
        return require(reward.outputs.moments, "reward", "moments")

    @staticmethod
    def line(metrics: Mapping[str, float]) -> str:
        """An iteration in a line: reward, KL, gold."""
        kl = f"  KL {metrics['gae/kl']:6.2f}" if "gae/kl" in metrics else ""
        gold = f"  gold {metrics['evaluate/gold']:7.3f}" if "evaluate/gold" in metrics else ""
        return f"reward {metrics['reward/score']:7.3f}{kl}{gold}"

    # --- what each stage is called with ---

    def base_model(self) -> StageCall:
        if self.run.config.base_model.is_gguf:
            return self.run.call("base_model", 0, {}, gguf=self.run.inputs["base_model"])
        return self.run.call("base_model", 0, settings_of(self.run.config.base_model, exclude=HOW_IT_IS_USED),
                             seed=self.run.seed(0, "base_model"),
                             demonstrations=self.run.inputs["demonstrations"])

    def sft(self, base: ModelRef) -> StageCall:
        settings = settings_of(self.run.config.sft) | self._template | self._lora | self._precision
        return self.run.call("sft", 0, settings,
                             seed=self.run.seed(0, "sft"), base=base, demonstrations=self.run.inputs["demonstrations"])

    def reward_model(self, start: ModelRef) -> StageCall:
        return self.run.call(
            "reward_model", 0, settings_of(self.run.config.reward_model) | self._template | self._lora | self._precision,
            seed=self.run.seed(0, "reward_model"), start=start, pairs=self.run.inputs["pairs"],
            heldout_pairs=self.run.inputs["heldout_pairs"])

    def reward_bias(self, tokenizer: ModelRef, reward_model: ModelRef | None) -> StageCall:
        return self.run.call(
            "reward_bias", 0, _components(self.run.config.reward) | self._template | self._scoring, tokenizer=tokenizer,
            demonstrations=self.run.inputs["demonstrations"], **self._reward_inputs(reward_model))

    def rollout(self, iteration: int, actor: ModelRef) -> StageCall:
        order = {"order_seed": self.run.seed(0, "prompt_order"), "iteration": iteration}
        settings = settings_of(self.run.config.rollout, exclude={"resample_rounds"}) | order
        settings |= self._template | self._precision
        return self.run.call("rollout", iteration, settings,
                             seed=self.run.seed(iteration, "rollout"), actor=actor, prompts=self.run.inputs["prompts"],
                             turns=self.run.inputs.get("turns"))

    def reference(self, iteration: int, reference_model: ModelRef, rollouts: ArtifactRef) -> StageCall:
        return self.run.call("reference", iteration, self._sampling(rollouts) | self._precision,
                             reference_model=reference_model, rollouts=rollouts)

    def reward(self, iteration: int, tokenizer: ModelRef, reward_model: ModelRef | None, rollouts: ArtifactRef, bias: float,
               moments: Moments) -> StageCall:
        config = self.run.config.reward
        settings = settings_of(config) | _components(config) | self._scoring | {
            "bias": bias, "max_new_tokens": self._made_with(rollouts)["max_new_tokens"]}
        prompts = self.run.inputs["prompts"] if self._reads_prompts else None
        if config.normalize != "none":
            settings["moments"] = moments.model_dump(mode="json")
        return self.run.call("reward", iteration, settings, rollouts=rollouts, prompts=prompts,
                             **self._reward_inputs(reward_model),
                             tokenizer=tokenizer if config.special_tokens else None)

    def resample(self, iteration: int, actor: ModelRef, tokenizer: ModelRef, reward_model: ModelRef | None,
                 rollouts: ArtifactRef, rewards: ArtifactRef, bias: float) -> StageCall:
        config = self.run.config
        settings = settings_of(config.rollout) | self._template | self._precision | {
            "order_seed": self.run.seed(0, "resample_order"), "iteration": iteration, "bias": bias,
            "reward": settings_of(config.reward) | _components(config.reward)}
        return self.run.call(
            "resample", iteration, settings, seed=self.run.seed(iteration, "resample"), actor=actor, rollouts=rollouts,
            rewards=rewards, prompts=self.run.inputs["prompts"], turns=self.run.inputs.get("turns"),
            tokenizer=tokenizer if config.reward.special_tokens else None, **self._reward_inputs(reward_model))

    def value(self, iteration: int, critic: ModelRef, rollouts: ArtifactRef) -> StageCall:
        return self.run.call("value", iteration, self._precision, critic=critic, rollouts=rollouts)

    def gae(self, iteration: int, rollouts: ArtifactRef, reference: ArtifactRef | None, rewards: ArtifactRef,
            values: ArtifactRef | None, kl_coef: float) -> StageCall:
        kl = self.run.config.kl
        settings = {"kl_coef": kl_coef, "kl_estimator": kl.estimator, "kl_placement": kl.placement}
        return self.run.call("gae", iteration, settings_of(self.run.config.gae) | settings, rollouts=rollouts,
                             reference=reference, rewards=rewards, values=values)

    def ppo(self, iteration: int, actor: ModelRef, critic: ModelRef | None, optimizer: ModelRef | None,
            rollouts: ArtifactRef, reference: ArtifactRef | None, values: ArtifactRef | None, advantages: ArtifactRef,
            kl_coef: float) -> StageCall:
        config, kl = self.run.config.ppo, self.run.config.kl
        settings = settings_of(config, exclude=ITERATION_DECIDES) | {
            "learning_rate_factor": learning_rate_factor(iteration, config),
            "train_actor": iteration > config.critic_warmup} | self._sampling(rollouts) | self._lora | self._precision
        mixed = {}
        if kl.placement == "loss":
            settings |= {"kl_coef": kl_coef, "kl_estimator": kl.estimator}
        if config.ptx_coef:
            role = "pretraining" if "pretraining" in self.run.inputs else "demonstrations"
            mixed = {role: self.run.inputs[role]}
        return self.run.call(
            "ppo", iteration, settings, seed=self.run.seed(iteration, "ppo"), actor=actor, critic=critic,
            optimizer=optimizer, rollouts=rollouts, reference=reference if kl.placement == "loss" else None, values=values,
            advantages=advantages, **mixed)

    def evaluate(self, iteration: int, actor: ModelRef, reference_model: ModelRef, reward_model: ModelRef | None,
                 baseline: ArtifactRef | None, bias: float) -> StageCall:
        config = self.run.config
        settings = {"rollout": settings_of(config.rollout, exclude=OF_A_BATCH),
                    "reward": _components(config.reward), "bias": bias, "judge": config.evaluate.judge}
        settings |= settings_of(config.evaluate, exclude={"every", "judge", "against"})
        if config.evaluate.judges:
            settings["judges"] = by_content(settings["judges"])
        return self.run.call(
            "evaluate", iteration, settings | self._template | self._precision, seed=self.run.seed(0, "evaluate"),
            actor=actor, reference_model=reference_model, baseline=baseline, prompts=self.run.inputs["heldout_prompts"],
            turns=self.run.inputs.get("turns"),
            judge=self.run.inputs["judge"] if config.evaluate.judge else None, **self._reward_inputs(reward_model),
            **self._inputs_of("judges."))

    @property
    def _template(self) -> dict[str, Any]:
        """How prompts are read."""
        base = self.run.config.base_model
        return {"chat_template": base.chat_template} | {
            name: value for name, value in settings_of(base).items() if name in READING}

    @property
    def _lora(self) -> dict[str, Any]:
        """What is trained, if not all weights."""
        return {"lora": settings_of(self.run.config.lora)} if self.run.config.lora else {}

    @property
    def _precision(self) -> dict[str, Any]:
        """What models compute in, and weights under adapters are held in, where that is not float32."""
        precision = self.run.config.base_model.precision
        if precision == "float32":
            return {}
        return {"compute": "bfloat16"} | ({"weights": precision} if self.run.config.lora else {})

    @property
    def _scoring(self) -> dict[str, Any]:
        """The same where the reward model that is trained here may score."""
        return self._precision if self._scored_by_own else {}

    @property
    def _scored_by_own(self) -> bool:
        return any(part.kind == "reward_model" for part in self.run.config.reward.components.values())

    def _made_with(self, rollouts: ArtifactRef) -> dict[str, Any]:
        """Settings the rollouts were made with."""
        return self.run.store.recipe(rollouts).config

    def _sampling(self, rollouts: ArtifactRef) -> dict[str, Any]:
        """What decides the distribution that the rollouts were drawn from, so that their tokens are scored by no other."""
        made = self._made_with(rollouts)
        names = SETTINGS if "min_new_tokens" in made else [name for name in SETTINGS if name != "stop_tokens"]
        return {name: made[name] for name in names if name in made}

    @cached_property
    def _reads_prompts(self) -> bool:
        """Whether a part of the reward reads more of the prompts' rows than their texts: columns, or conversations."""
        parts = self.run.config.reward.components.values()
        if any(part.reads for part in parts):
            return True
        if any(part.kind == "model" for part in parts) and "messages" in stored_rows(
                self.run.store, self.run.inputs["prompts"]).columns:
            return True
        return any(asked(stored_function(self.run.store, self.run.inputs[role], source)).reads_prompts
                   for role, source in self.run.config.functions.items() if role.startswith("reward."))

    def _reward_inputs(self, reward_model: ModelRef | None) -> dict[str, ArtifactRef | ModelRef | None]:
        """Artifacts that the reward's components are, by role."""
        return self._inputs_of("reward.") | ({"reward_model": reward_model} if self._scored_by_own else {})

    def _inputs_of(self, kind: str) -> dict[str, ArtifactRef | ModelRef]:
        """Functions and models of the components whose roles begin so."""
        functions = {role: self.run.inputs[role] for role in self.run.config.functions if role.startswith(kind)}
        return functions | {role: self._brought(role) for role in self.run.config.models if role.startswith(kind)}

    def _against(self) -> ArtifactRef | None:
        """The evaluation of another run that wins are over, none where it is the starting actor's. Raises `ConfigError`."""
        if (named := self.run.config.evaluate.against) is None:
            return None
        name, iteration = named.rsplit("@", 1)
        return open_run(self.run.store, name).recorded("evaluate", int(iteration))

    # --- one stage again ---

    def again(self, stage: str, recorded: Run, iteration: int) -> StageCall:
        """That stage's call with this run's settings, from the states of `recorded` before and after that iteration.

        Raises `ConfigError` where what was saved cannot be used with other settings than those it was made with.
        """
        run, after = self.run, recorded.state(iteration)
        before, made = recorded.state(iteration - 1) if iteration else after, after.artifacts
        rollouts, rewards = (made.get("resample", made.get(stage)) for stage in ("rollout", "reward"))
        match stage:
            case "base_model":
                return self.base_model()
            case "sft":
                base = made.get("base_model") or run.inputs["base_model"]
                return self.sft(ModelRef(artifact=base, folder="model"))
            case "reward_model":
                return self.reward_model(after.reference)
            case "reward_bias":
                return self.reward_bias(after.reference, after.reward_model)
            case "rollout":
                return self.rollout(iteration, before.actor)
            case "reference":
                return self.reference(iteration, after.reference, rollouts)
            case "reward":
                return self.reward(iteration, after.reference, after.reward_model, made["rollout"],
                                   self._bias(recorded, after), self._moments(recorded, before))
            case "value":
                return self.value(iteration, before.critic, rollouts)
            case "resample":
                if "resample" not in made or not run.config.rollout.resample_rounds:
                    raise ConfigError(f"run {recorded.name!r} has no stage 'resample' in iteration {iteration}; "
                                      "rollout.resample_rounds of a new run brings it")
                return self.resample(iteration, before.actor, after.reference, after.reward_model, made["rollout"],
                                     made["reward"], self._bias(recorded, after))
            case "gae":
                self._require_reference(made)
                return self.gae(iteration, rollouts, made.get("reference"), rewards,
                                self._values(recorded, iteration), self._kl_coef(recorded, before))
            case "ppo":
                self._require_same_placement(recorded)
                self._require_reference(made)
                critic = before.critic if run.config.gae.has_critic else None
                return self.ppo(iteration, before.actor, critic, before.optimizer, rollouts, made.get("reference"),
                                self._values(recorded, iteration), made["gae"], self._kl_coef(recorded, before))
            case "evaluate":
                baseline = after.baseline if iteration else None
                if run.config.evaluate.against or recorded.config.evaluate.against != run.config.evaluate.against:
                    baseline = self._against()
                return self.evaluate(iteration, after.actor, after.reference, after.reward_model, baseline,
                                     self._bias(recorded, after))
        raise ConfigError(f"stage {stage!r}: a run of this kind has none of that name")

    def forked(self, recorded: Run, state: TrainState) -> TrainState:
        """The state that a fork with this run's settings begins from. Raises `ConfigError` where it cannot."""
        config, old = self.run.config, recorded.config
        if config.gae.has_critic and not state.critic:
            raise ConfigError(f"gae.estimator={config.gae.estimator}: it needs a critic, and run {recorded.name!r} has none")
        judge, old_judge = (c.evaluate.judge or c.evaluate.judges or _raw(c.reward) for c in (config, old))
        if config.evaluate.against != old.evaluate.against:
            raise ConfigError("evaluate.against: what wins are over was decided when the run was made; make another run")
        if judge != old_judge:
            raise ConfigError("evaluate.judge: wins are over what the starting actor got from the judge of the run, "
                              "or from its reward where there is none; make another run")
        return state.model_copy(update={
            "critic": state.critic if config.gae.has_critic else None, "kl_coef": self._kl_coef(recorded, state),
            "reward_bias": self._bias(recorded, state), "reward_moments": self._moments(recorded, state)})

    def _require_reference(self, made: Mapping[str, ArtifactRef]) -> None:
        """Raises `ConfigError` where a KL is to be charged that was not measured."""
        if self.run.config.kl.coef > 0 and "reference" not in made:
            raise ConfigError("kl.coef: the run has no reference logprobs (kl.measure is false), so that there is no KL to "
                              "charge; set it to 0, or make another run")

    def _values(self, recorded: Run, iteration: int) -> ArtifactRef | None:
        return recorded.recorded("value", iteration) if self.run.config.gae.has_critic else None

    def _kl_coef(self, recorded: Run, state: TrainState) -> float:
        """β of the state, unless the settings name another."""
        coef = self.run.config.kl.coef
        return state.kl_coef if coef == recorded.config.kl.coef else coef

    def _require_same_placement(self, recorded: Run) -> None:
        if self.run.config.kl.placement != recorded.config.kl.placement:
            raise ConfigError("kl.placement: the recorded advantages were made with the other: the KL would be charged "
                              "twice, or not at all; make another run")

    def _bias(self, recorded: Run, state: TrainState) -> float:
        """What is taken off the weighted sum. Raises `ConfigError` where the run did not score its demonstrations so."""
        now, old = self.run.config.reward, recorded.config.reward
        if not now.center_on_demonstrations:
            return 0.0
        if not old.center_on_demonstrations or now.components != old.components:
            raise ConfigError("reward.center_on_demonstrations: the run has no demonstrations scored with these components; "
                              "set it to false, or make another run")
        return state.reward_bias

    def _moments(self, recorded: Run, state: TrainState) -> Moments:
        """Those of the scores before. Raises `ConfigError` where settings normalise by moments that the run did not keep."""
        now, old = self.run.config.reward, recorded.config.reward
        if now.normalize != "none" and (old.normalize == "none" or _raw(now) != _raw(old)):
            raise ConfigError("reward.normalize: the run kept no running moments of these scores; set it to none, or make "
                              "another run")
        return state.reward_moments


def _components(config: RewardConfig) -> dict[str, Any]:
    """What of the reward's settings decides the raw score."""
    found = {name: value for name, value in settings_of(config).items() if name in ("components", "special_tokens")}
    return found | {"components": by_content(found["components"])}


def _raw(config: RewardConfig) -> tuple:
    """What decides the raw score."""
    return config.components, config.center_on_demonstrations, config.special_tokens
