"""The settings of a whole run: its sections, what they say against each other, and how they are read."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from schemas.errors import ConfigError
from schemas.presets import PRESETS
from schemas.settings import (
    BaseModelConfig,
    ComponentConfig,
    DataConfig,
    EvaluateConfig,
    ExecutionConfig,
    GAEConfig,
    KLConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    Settings,
    SFTConfig,
    TrackingConfig,
    ValueConfig,
)


class RunConfig(Settings):
    """A whole training run."""

    preset: Literal["classic", "reasoning"] | None = None
    """What the other settings start from instead of their defaults; see schemas/presets.py."""
    seed: int = Field(0, ge=0)
    """Every stage's seed derives from (this, iteration, stage)."""
    iterations: PositiveInt = 10
    """PPO iterations; may be raised later to train on."""
    data: DataConfig
    base_model: BaseModelConfig = BaseModelConfig()
    sft: SFTConfig | None = None
    """Left out: the base model is the first actor."""
    reward_model: RewardModelConfig | None = None
    """Left out: no reward model is trained."""
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    kl: KLConfig = KLConfig()
    value: ValueConfig | None = None
    """Left out: `start: reward_model`, or no critic where `gae.estimator` has none."""
    gae: GAEConfig = GAEConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    execution: ExecutionConfig = ExecutionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """The preset below what is written, and a critic where the estimator needs one and none is spoken of."""
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        data = merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, data)
        gae = data.get("gae")
        if "value" not in data and (not isinstance(gae, dict) or gae.get("estimator", "gae") == "gae"):
            data["value"] = {}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*_inconsistencies(self), *_meaningless(self)]
        if problems:
            raise ValueError(problems[0])
        return self

    @property
    def minibatch_size(self) -> int:
        """Rows per optimizer step of `ppo`."""
        return self.rollout.batch_size // self.ppo.minibatches

    def decides(self) -> dict[str, Any]:
        """The settings that decide what a run's artifacts are: all but inputs' paths, length of the run, speed, tracking."""
        settings = self.model_dump(mode="json", exclude={"preset", "data", "iterations", "execution", "tracking"})
        settings["base_model"]["source"] = "a model" if self.base_model.source else None  # compared by its content
        return settings


def _inconsistencies(c: RunConfig):
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


def _meaningless(c: RunConfig):
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
    if c.ppo.schedule_iterations and c.iterations > c.ppo.schedule_iterations:
        yield (f"iterations={c.iterations} go on after ppo.schedule_iterations={c.ppo.schedule_iterations}, where the "
               "learning rate is 0; raise it, or train less")
    if c.rollout.precision != "float32" and not c.ppo.recompute_old_logprobs:
        yield (f"rollout.precision={c.rollout.precision} samples from another policy than the float32 one that is updated; "
               "set ppo.recompute_old_logprobs: true (and ppo.importance_cap: 2)")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `below` with the values of `above` put over it, section by section."""
    out = copy.deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def parse_config(data: Any, where: str) -> RunConfig:
    """`RunConfig` from what a YAML file holds. Raises `ConfigError` with one line naming `where` and the key."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(data).__name__}")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None


def _first_line(error: ValidationError) -> str:
    """One finding: key, what was expected, what was found. An unknown key first, since it is why another is missing."""
    findings = error.errors(include_url=False)
    finding = next((f for f in findings if f["type"] == "extra_forbidden"), findings[0])
    key = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(finding["loc"][-1]), _known_keys(finding["loc"][:-1]), 1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if finding["type"] == "missing":
        return f"{key}: missing"
    if finding["type"] == "value_error":
        reason = str(finding["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    message = finding["msg"].removeprefix("Input ").rstrip(".")
    return f"{key}: {message}, found {finding['input']!r}"


def _known_keys(path: tuple) -> list[str]:
    """The keys a section has; none where the path leads into a free mapping."""
    section: Any = RunConfig
    for part in path:
        field = section.model_fields.get(part)
        kinds = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), ComponentConfig)
    return list(section.model_fields)


def differences(stored: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: stored → given` for each setting in which two dumped configs differ."""
    lines = []
    for key in sorted({*stored, *given}):
        a, b, path = stored.get(key), given.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}.")
        elif a != b:
            lines.append(f"{path}: {a} → {b}")
    return lines
