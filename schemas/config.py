"""The settings of a run: one frozen class per stage, a doc string per field, unknown keys refused.

Everything in a stage's class decides its result and is part of the identity of what it writes.
`ExecutionConfig` holds what only decides where and how fast it runs, `TrackingConfig` who is told.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from schemas.errors import ConfigError
from schemas.presets import PRESETS

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
    pretraining: str | None = None
    """What `ppo.ptx_coef` mixes in instead of the demonstrations: `{"text": …}` a line."""


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
    """B, responses per iteration."""
    responses_per_prompt: PositiveInt = 1
    """k, responses to each of the B/k prompts of an iteration; must divide `batch_size`."""
    max_new_tokens: PositiveInt = 32
    """The most response tokens; a response cut here has finish reason `length`."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, in rollout, reference and update alike."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What sampling computes in. With bfloat16 the update needs `ppo.recompute_old_logprobs`."""


class ComponentConfig(Settings):
    """One part of the reward."""

    source: str
    """`reward_model`, `file.py:function` beside the config, `package.module:function`, or an `http://…` server."""
    weight: float = 1.0
    """What its value is multiplied with in the sum."""


class RewardConfig(Settings):
    """The score of a response: weighted sum − bias → normalised → clipped → missing-EOS rule → overlong penalty."""

    components: dict[Name, ComponentConfig] = {"reward_model": ComponentConfig(source="reward_model")}
    """Name → component; the names are those of the `components` column and of the metrics."""
    center_on_demonstrations: bool = False
    """Whether the demonstrations' mean is taken off, so that they score 0 on average (Stiennon et al. 2020)."""
    normalize: Literal["none", "scale", "standardize"] = "none"
    """By the moments of all scores so far, this batch's included: divided by σ, or (score − μ)/σ."""
    clip: PositiveFloat | None = None
    """The score is clipped to ± this; null leaves it."""
    missing_eos: Literal["none", "subtract", "replace"] = "none"
    """What happens to the score of a response without EOS: subtract the penalty, or put −penalty in its place."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """The penalty of `missing_eos`."""
    overlong_buffer: PositiveInt | None = None
    """The last so many tokens before the limit cost up to `overlong_penalty`, in proportion (Yu et al. 2025, DAPO)."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What a response of the full length costs, if there is an `overlong_buffer`."""

    @model_validator(mode="after")
    def _some_component(self) -> Self:
        if not self.components:
            raise ValueError("components is empty; name at least one, for example {reward_model: {source: reward_model}}")
        return self


class KLConfig(Settings):
    """What keeps the actor near the reference: β·KL(π‖π_ref), estimated token by token."""

    coef: float = Field(0.05, ge=0)
    """β, per nat; where it starts, if `target` is set."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of a token's KL (Schulman 2020); k1 is log π − log π_ref."""
    placement: Literal["reward", "loss"] = "reward"
    """`reward`: r_t holds −β·kl_t of the rollout's policy. `loss`: the update adds β·kl_t of the policy it trains."""
    target: PositiveFloat | None = None
    """Nats a response to which β is adapted from iteration to iteration (Ziegler et al. 2019); null keeps β."""
    horizon: PositiveFloat = 10_000
    """Responses after which a KL 20% off `target`, or more, would have changed β by a fifth; smaller adapts faster."""

    @model_validator(mode="before")
    @classmethod
    def _one_place(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("placement") in ("both", ["reward", "loss"], ["loss", "reward"])):
            raise ValueError("placement: in the reward and in the loss, one divergence would be charged twice and `target` "
                             "could steer neither; choose reward or loss")
        return data

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("estimator=k1 in the loss has a gradient that is 0 on average; take k2, k3 or placement=reward")
        if self.target is not None and self.coef == 0:
            raise ValueError("target adapts coef by factors, and coef=0 stays 0; set coef above 0, or target to null")
        return self


class ValueConfig(Settings):
    """The critic."""

    start: Literal["reward_model", "actor"] = "reward_model"
    """What the critic's weights are before the first iteration; from the actor, its head starts at 0."""


class GAEConfig(Settings):
    """From rewards to advantages: generalized advantage estimation (Schulman et al. 2016), or without a critic."""

    estimator: Literal["gae", "grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "gae"
    """`gae` needs a critic. The others have none: `grpo` and `rloo` compare the responses to one prompt."""
    gamma: float = Field(1.0, gt=0, le=1)
    """γ, discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: 0 is one-step TD, 1 is Monte Carlo."""
    critic_lambda: float | None = Field(None, ge=0, le=1)
    """λ of the critic's returns (Yuan et al. 2025, VC-PPO); null is that of the advantages."""
    length_adaptive_alpha: PositiveFloat | None = None
    """α: a response of R tokens has λ = 1 − 1/(αR) in the place of `gae_lambda` (Yue et al. 2025, VAPO: 0.05)."""
    bootstrap_truncated: bool = False
    """Whether a response cut at the length limit is continued by the critic's value rather than ended."""
    whiten_rewards: bool = False
    """Whether r_t are divided by their σ over the batch, their mean kept."""
    whiten: Literal["batch", "none"] | None = None
    """Whether advantages get mean 0 and variance 1 over the batch's tokens; null: all but `grpo` and `rloo` do."""
    whiten_unbiased: bool = True
    """Whether the variance of whitening is divided by n − 1 rather than n."""

    @property
    def has_critic(self) -> bool:
        """Whether values are needed."""
        return self.estimator == "gae"

    @property
    def compares_responses(self) -> bool:
        """Whether a response is measured against the others to its prompt."""
        return self.estimator in ("grpo", "rloo", "reinforce++-baseline")

    @property
    def whitens(self) -> bool:
        """`whiten`, or what is conventional for the estimator."""
        return self.whiten == "batch" if self.whiten else self.estimator not in ("grpo", "rloo")

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        for name in ("critic_lambda", "length_adaptive_alpha", "bootstrap_truncated"):
            if getattr(self, name) and not self.has_critic:
                raise ValueError(f"{name} is about a critic's values, and estimator={self.estimator} has none; leave it out")
        return self


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
    dual_clip: float | None = Field(None, gt=1)
    """c: where A < 0 the loss is at most −c·A (Ye et al. 2020); null for no bound."""
    value_clip_range: PositiveFloat | None = 0.2
    """Values are clipped to ± this around those of the rollout; null for no clipping."""
    value_coef: PositiveFloat = 1.0
    """Weight of the value loss; beside an optimizer of its own it only matters to the clipping of the gradient."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """The loss of a minibatch: the mean over its tokens, or the mean over its responses of each one's mean."""
    learning_rate: PositiveFloat = 1e-5
    """The actor's AdamW learning rate, before `schedule`."""
    critic_learning_rate: PositiveFloat = 1e-5
    """The critic's AdamW learning rate, before `schedule`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall, an iteration at a time, to 0 after `schedule_iterations`."""
    schedule_iterations: PositiveInt | None = None
    """Length of a schedule that falls."""
    warmup_iterations: int = Field(0, ge=0)
    """Iterations in which both learning rates rise linearly to full."""
    critic_warmup: int = Field(0, ge=0)
    """The first so many iterations train the critic alone, each on rollouts of its own; the actor stays as it is."""
    adam_epsilon: PositiveFloat = 1e-5
    """AdamW's ε."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of the actor, and those of the critic, are scaled down to this norm."""
    target_kl: PositiveFloat | None = None
    """The update ends after the minibatch whose approximate KL (k3, nats a token) to the rollout's policy exceeds it."""
    recompute_old_logprobs: bool = False
    """Whether π_old is the actor as the update computes it rather than as the rollout sampled it."""
    importance_cap: PositiveFloat | None = None
    """C: with recomputed π_old, tokens weigh min(π_old/π_rollout, C) (Yao et al. 2025); null: they all weigh 1."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the language-modelling loss on `data.pretraining`, or on the demonstrations where there is none."""
    ptx_batch_size: PositiveInt = 32
    """Texts that are mixed into each optimizer step."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.importance_cap is not None and not self.recompute_old_logprobs:
            raise ValueError("importance_cap weighs recomputed against sampled logprobs; set recompute_old_logprobs: true")
        if (self.schedule == "constant") != (self.schedule_iterations is None):
            raise ValueError(f"schedule={self.schedule} with schedule_iterations={self.schedule_iterations}: a falling "
                             "schedule needs its length, a constant one has none")
        return self


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
        data = merged(PRESETS.get(data.get("preset"), {}), data)
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
        yield f"rollout.batch_size={c.rollout.batch_size} does not divide into responses_per_prompt={k}; make it a multiple"
    if c.gae.compares_responses and k == 1:
        yield (f"gae.estimator={estimator} compares the responses to one prompt, and rollout.responses_per_prompt is 1: "
               "every advantage would be 0 or undefined; set it to 2 or more")
    if c.rollout.batch_size == 1 and (c.gae.whitens or c.gae.whiten_rewards):
        yield ("whitening with one response (rollout.batch_size=1) takes away whether it was good; raise the batch size, or "
               "set gae.whiten: none and gae.whiten_rewards: false")
    if c.gae.has_critic and c.value is None:
        yield "gae.estimator=gae needs values: remove value: null, or choose an estimator without a critic"
    if not c.gae.has_critic and c.value is not None:
        yield f"gae.estimator={estimator} has no critic and reads no values; remove the value section, or set value: null"
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
