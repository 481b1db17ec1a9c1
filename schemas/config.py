"""The settings of a run: one frozen class per stage, a doc string per field, unknown keys refused.

Everything in a stage's class decides its result and is part of the identity of what it writes.
`ExecutionConfig` holds what only decides where and how fast it runs, `TrackingConfig` who is told.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from schemas.errors import ConfigError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Settings(BaseModel):
    """Base of all settings: immutable, strict about keys, documented by the strings below its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Settings):
    """The input files, JSON lines, relative to the config file. They enter the store by their content."""

    prompts: str
    """Training prompts: `{"prompt": …}` a line."""
    heldout_prompts: str
    """Prompts for `evaluate`, never trained on: `{"prompt": …}` a line."""
    demonstrations: str | None = None
    """What `sft` learns from: `{"prompt": …, "completion": …}` a line."""
    pairs: str | None = None
    """What `reward_model` learns from: `{"prompt": …, "chosen": …, "rejected": …}` a line."""
    heldout_pairs: str | None = None
    """Pairs the reward model is only tested on."""


class BaseModelConfig(Settings):
    """Where training starts: a pretrained model (`source`), or a new GPT-2 with a byte-level BPE tokenizer."""

    source: str | None = None
    """A folder in Hugging Face format, relative to the config file, or the name of a model on the hub."""
    chat_template: bool = False
    """Whether a prompt is put to the models as a user's turn in the tokenizer's chat template."""
    vocab_size: int = Field(1024, ge=259)
    """New model: V, entries of the tokenizer trained from the demonstrations (256 bytes, 3 special tokens at least)."""
    context_length: PositiveInt = 128
    """New model: the most tokens of prompt and response together."""
    layers: PositiveInt = 4
    """New model: transformer blocks."""
    heads: PositiveInt = 4
    """New model: attention heads; must divide `width`."""
    width: PositiveInt = 128
    """New model: size of the residual stream."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}; make it a multiple")
        return self


class SFTConfig(Settings):
    """Supervised fine-tuning on demonstrations (TRL's SFTTrainer)."""

    epochs: PositiveFloat = 3
    """Passes over the demonstrations."""
    batch_size: PositiveInt = 32
    """Demonstrations per optimizer step."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW; warmed up over `warmup_ratio` of the steps, then falls linearly to 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Part of the steps in which the learning rate rises from 0."""
    completion_only: bool = True
    """Whether the loss leaves out the prompt's tokens."""


class RewardModelConfig(Settings):
    """Reward-model training on preference pairs (TRL's RewardTrainer): −log σ(r_chosen − r_rejected)."""

    epochs: PositiveFloat = 1
    """Passes over the pairs."""
    batch_size: PositiveInt = 32
    """Pairs per optimizer step."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW; warmed up over `warmup_ratio` of the steps, then falls linearly to 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Part of the steps in which the learning rate rises from 0."""
    center_coef: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps rewards near 0 (Eisenstein et al. 2023)."""


class RolloutConfig(Settings):
    """Sampling responses from the actor."""

    batch_size: PositiveInt = 128
    """B, responses per iteration, one to a prompt."""
    max_new_tokens: PositiveInt = 32
    """The most response tokens; a response cut here has finish reason `length`."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, in rollout, reference and update alike."""


class ComponentConfig(Settings):
    """One part of the reward."""

    source: str
    """`reward_model`, `file.py:function` beside the config, `package.module:function`, or an `http://…` server."""
    weight: float = 1.0
    """What its value is multiplied with in the sum."""


class RewardConfig(Settings):
    """The score of a response: components weighted and summed, then clipped, then the missing-EOS rule."""

    components: dict[Name, ComponentConfig] = {"reward_model": ComponentConfig(source="reward_model")}
    """Name → component; the names are those of the `components` column and of the metrics."""
    clip: PositiveFloat | None = None
    """The sum is clipped to ± this; null leaves it."""
    missing_eos: Literal["none", "subtract", "replace"] = "none"
    """What happens to the score of a response without EOS: subtract the penalty, or put −penalty in its place."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """The penalty of `missing_eos`."""

    @model_validator(mode="after")
    def _some_component(self) -> Self:
        if not self.components:
            raise ValueError("components is empty; name at least one, for example {reward_model: {source: reward_model}}")
        return self


class ValueConfig(Settings):
    """The critic."""

    start: Literal["reward_model", "actor"] = "reward_model"
    """What the critic's weights are before the first iteration; from the actor, its head starts at 0."""


class GAEConfig(Settings):
    """KL penalty and generalized advantage estimation (Schulman et al. 2016)."""

    kl_coef: float = Field(0.05, ge=0)
    """β: reward per nat of KL to the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of a token's KL (Schulman 2020); k1 is log π − log π_ref."""
    gamma: float = Field(1.0, gt=0, le=1)
    """γ, discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: 0 is one-step TD, 1 is Monte Carlo."""
    whiten: bool = True
    """Whether advantages get mean 0 and variance 1 over the batch's response tokens."""
    bootstrap_truncated: bool = False
    """Whether a response cut at the length limit is continued by the critic's value rather than ended."""


class PPOConfig(Settings):
    """The clipped policy update and the value regression (Schulman et al. 2017)."""

    epochs: PositiveInt = 4
    """Passes over the batch."""
    minibatches: PositiveInt = 4
    """Optimizer steps per pass; must divide rollout.batch_size."""
    clip_range_low: float = Field(0.2, gt=0, lt=1)
    """ε_low: the ratio is clipped below at 1 − ε_low."""
    clip_range_high: PositiveFloat = 0.2
    """ε_high: the ratio is clipped above at 1 + ε_high."""
    value_clip_range: PositiveFloat | None = 0.2
    """Values are clipped to ± this around those of the rollout; null for no clipping."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    learning_rate: PositiveFloat = 1e-5
    """The actor's AdamW learning rate, constant."""
    critic_learning_rate: PositiveFloat = 1e-5
    """The critic's AdamW learning rate, constant."""
    adam_epsilon: PositiveFloat = 1e-5
    """AdamW's ε."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of the actor, and those of the critic, are scaled down to this norm."""
    target_kl: PositiveFloat | None = None
    """The update ends after the minibatch whose approximate KL (k3, nats a token) to the rollout's policy exceeds it."""


class EvaluateConfig(Settings):
    """Sampling on held-out prompts."""

    every: int = Field(1, ge=0)
    """Evaluate each so many iterations; the start and the last iteration always; 0: only those."""
    judge: str | None = None
    """`file.py:function` or `package.module:function` whose score is reported as gold and never trained on."""


class ExecutionConfig(Settings):
    """Where and how fast; not part of any identity. Recorded with every artifact, and used again by resume and rerun."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where models run; of several GPUs, CUDA_VISIBLE_DEVICES chooses the one."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null takes the cores there are. The last bits of results depend on it."""
    micro_batch_tokens: PositiveInt = 4096
    """The most tokens, padding included, in one forward or backward pass."""
    generation_batch_size: PositiveInt = 256
    """The most responses generated side by side."""
    warm_models: PositiveInt = 5
    """Models kept in memory between stages; 1 on a machine that holds only one (the update itself needs two)."""


class TrackingConfig(Settings):
    """MLflow, a mirror of the store; training never waits for it."""

    enabled: bool = True
    """Whether runs are mirrored to MLflow."""
    uri: str | None = None
    """MLflow's tracking URI; null is MLFLOW_TRACKING_URI if set, else sqlite beside the store."""
    experiment: str = "baton"
    """MLflow experiment."""


class RunConfig(Settings):
    """A whole training run."""

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
    value: ValueConfig = ValueConfig()
    gae: GAEConfig = GAEConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    execution: ExecutionConfig = ExecutionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(_inconsistencies(self))
        if problems:
            raise ValueError(problems[0])
        return self

    @property
    def minibatch_size(self) -> int:
        """Rows per optimizer step of `ppo`."""
        return self.rollout.batch_size // self.ppo.minibatches

    def decides(self) -> dict[str, Any]:
        """The settings that decide what a run's artifacts are: all but inputs' paths, length of the run, speed, tracking."""
        settings = self.model_dump(mode="json", exclude={"data", "iterations", "execution", "tracking"})
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
    if c.value.start == "reward_model" and not c.reward_model:
        yield "value.start is reward_model, but there is no reward_model section; set value.start: actor"
    if new_model and c.rollout.max_new_tokens >= c.base_model.context_length:
        yield (f"rollout.max_new_tokens={c.rollout.max_new_tokens} leaves no room for a prompt in "
               f"base_model.context_length={c.base_model.context_length}")


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
