"""The settings of a language model's run: its sections, and what they say against each other."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from schemas.presets import PRESETS, merged
from schemas.settings import (
    BaseModelConfig,
    DataConfig,
    EvaluateConfig,
    KLConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    ValueConfig,
)


class LanguageConfig(RunConfig):
    """A whole training run of a language model."""

    preset: Literal["classic", "reasoning"] | None = None
    """What the other settings start from instead of their defaults; see schemas/presets.py."""
    data: DataConfig
    base_model: BaseModelConfig = BaseModelConfig()
    sft: SFTConfig | None = None
    """Left out: the base model is the first actor."""
    reward_model: RewardModelConfig | None = None
    """Left out: no reward model is trained."""
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    kl: KLConfig = KLConfig()
    value: ValueConfig | None = ValueConfig()
    """The critic; null, or left out, where `gae.estimator` has none."""
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """The preset below what is written, and no critic where the estimator has none and none is spoken of."""
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        data = merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, data)
        gae = data.get("gae")
        if "value" not in data and isinstance(gae, dict) and gae.get("estimator", "gae") != "gae":
            data["value"] = None
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*_inconsistencies(self), *_meaningless(self)]
        if problems:
            raise ValueError(problems[0])
        return self

    def decides(self) -> dict[str, Any]:
        """As `RunConfig`'s, without the paths of inputs."""
        settings = super().decides()
        del settings["preset"], settings["data"]
        settings["base_model"]["source"] = "a model" if self.base_model.source else None  # compared by its content
        return settings


def _inconsistencies(c: LanguageConfig):
    """One line for each thing the sections say against each other."""
    if c.rollout.batch_size % c.ppo.minibatches:
        yield (f"rollout.batch_size={c.rollout.batch_size} does not divide into "
               f"ppo.minibatches={c.ppo.minibatches}; make it a multiple")
    new_model, sources = c.base_model.source is None, {part.source for part in c.reward.components.values()}
    changed = [name for name, value in c.base_model if value != BaseModelConfig.model_fields[name].default]
    if not new_model and (extra := set(changed) - {"source", "chat_template"}):
        yield f"base_model.{sorted(extra)[0]} describes a new model, but base_model.source names one; remove either"
    if new_model and c.sft is None:
        yield "a new base model has to be trained: add an sft section, or name a pretrained one in base_model.source"
    if new_model and c.base_model.chat_template:
        yield "base_model.chat_template: a new model's tokenizer has no chat template; leave it false"
    if (new_model or c.sft) and not c.data.demonstrations:
        yield "data.demonstrations is missing; sft learns from it"
    if c.reward_model and not (c.data.pairs and c.data.heldout_pairs):
        yield "data.pairs and data.heldout_pairs are needed; reward_model learns from the one and is tested on the other"
    if "reward_model" in sources and not c.reward_model:
        yield "reward.components uses the reward model, but there is no reward_model section; add it or another source"
    if c.value and c.value.start == "reward_model" and not c.reward_model:
        yield "value.start is reward_model, but there is no reward_model section; set value.start: actor"
    if new_model and c.rollout.max_new_tokens >= c.base_model.context_length:
        yield (f"rollout.max_new_tokens={c.rollout.max_new_tokens} leaves no room for a prompt in "
               f"base_model.context_length={c.base_model.context_length}")


def _meaningless(c: LanguageConfig):
    """One line for each choice of algorithm that takes the meaning from another."""
    estimator, k = c.gae.estimator, c.rollout.responses_per_prompt
    if c.rollout.batch_size % k:
        yield (f"rollout.batch_size={c.rollout.batch_size} does not divide into rollout.responses_per_prompt={k}; "
               "make it a multiple")
    if c.gae.compares_responses and k == 1:
        yield (f"gae.estimator={estimator} compares the responses to one prompt, and rollout.responses_per_prompt is 1: "
               "every advantage would be 0; set it to 2 or more")
    if c.rollout.batch_size == 1 and (c.gae.whitens or c.gae.whiten_rewards):
        yield ("whitening with one response (rollout.batch_size=1) takes away whether it was good; raise the batch size, or "
               "set gae.whiten: none and gae.whiten_rewards: false")
    if c.gae.has_critic and c.value is None:
        yield "gae.estimator=gae needs values: give a value section (value: {}), or choose an estimator without a critic"
    if not c.gae.has_critic and c.value is not None:
        yield f"gae.estimator={estimator} has no critic and reads no values; remove the value section, or set value: null"
    if c.kl.target is not None and c.rollout.batch_size >= 5 * c.kl.horizon:
        yield (f"kl.horizon={c.kl.horizon:g} is so short that one iteration of rollout.batch_size={c.rollout.batch_size} "
               "could bring kl.coef to 0 or below; make it longer than a fifth of the batch, better many batches")
    if c.reward.normalize != "none" and c.rollout.batch_size == 1:
        yield "reward.normalize with rollout.batch_size=1: the first score has no spread; raise the batch size"
    if not c.gae.has_critic and c.ppo.critic_warmup:
        yield f"ppo.critic_warmup={c.ppo.critic_warmup}, but gae.estimator={estimator} has no critic; set it to 0"
    if (buffer := c.reward.overlong_buffer) and buffer > c.rollout.max_new_tokens:
        yield f"reward.overlong_buffer={buffer} is longer than rollout.max_new_tokens={c.rollout.max_new_tokens}; shorten it"
    if c.reward.center_on_demonstrations and not c.data.demonstrations:
        yield "reward.center_on_demonstrations needs data.demonstrations"
    if c.ppo.ptx_coef and not (c.data.pretraining or c.data.demonstrations):
        yield "ppo.ptx_coef needs data.pretraining or data.demonstrations to learn from"
    if c.rollout.precision != "float32" and not c.ppo.recompute_old_logprobs:
        yield (f"rollout.precision={c.rollout.precision} samples from another policy than the float32 one that is updated; "
               "set ppo.recompute_old_logprobs: true (and ppo.importance_cap: 2)")
