"""The settings of a language model's run: its sections, and the contradictions between them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from schemas.addresses import Address
from schemas.data import DataConfig
from schemas.presets import PRESETS, merged
from schemas.reward_settings import A_MODEL, ComponentConfig, RewardConfig, by_content
from schemas.settings import KLConfig, Later, Name, RunConfig, Settings
from schemas.stages import Kind


def is_gguf(source: str | None) -> bool:
    """Whether a model's source names a GGUF file, perhaps at a revision."""
    return source is not None and re.search(r"\.gguf(@[^/]+)?$", source, re.IGNORECASE) is not None


class BaseModelConfig(Settings):
    """Where training starts: a pretrained model (`source`), or a new GPT-2 with a byte-level BPE tokenizer."""

    source: str | None = None
    """A folder in Hugging Face format, relative to the config file, or the name of a model on the hub (`org/name`,
    `org/name@revision`); or a GGUF file, there (`model.gguf`) or on the hub (`org/name/model.gguf`)."""
    chat_template: bool | dict[str, Any] = False
    """Whether a prompt is put to the models in the tokenizer's chat template, a text as a user's turn; or what else the
    template is given, such as {enable_thinking: false}."""
    special_tokens_in_text: Annotated[bool, Later(before=True)] = False
    """Whether a special token that is written in a prompt or completion, such as `<|im_end|>`, is that token; else it stays
    text, as anything that a user may write. Those of a chat template are special tokens always."""
    precision: Annotated[Literal["float32", "bfloat16", "int8", "nf4"], Later(before="float32")] = "float32"
    """What the models of the run compute in; those that reward components bring compute in float32. What is trained stays
    float32, with its optimizer. Weights under adapters (`lora`) are held in it: int8 and nf4 are 8 and 4 bits, by
    bitsandbytes, whose products are bfloat16."""
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

    @property
    def is_gguf(self) -> bool:
        """Whether the source is a GGUF file, whose weights are unpacked to float32."""
        return is_gguf(self.source)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}; make it a multiple")
        return self


class LoRAConfig(Settings):
    """Low-rank adapters (Hu et al. 2021) instead of all weights: of `sft`, the reward model, actor and critic. The reference
    is what they begin as, and all of them share one base in memory."""

    rank: PositiveInt = 8
    """r: of the two matrices whose product is added to a weight."""
    alpha: PositiveFloat = 16
    """The product is scaled by alpha/r, or by alpha/√r with `rslora`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers of the body: all that are linear, or those whose names end so, such as [q_proj, v_proj]."""
    dora: bool = False
    """Whether a weight's magnitude is trained beside its direction (Liu et al. 2024, DoRA)."""
    rslora: bool = False
    """Whether the scale is alpha/√r (Kalajdzievski 2023, rsLoRA)."""


class SFTConfig(Settings):
    """Supervised fine-tuning on demonstrations (TRL's SFTTrainer)."""

    epochs: PositiveFloat = 3
    """Passes over the demonstrations."""
    batch_size: PositiveInt = 32
    """Demonstrations per optimizer step."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW; warmed up over `warmup_ratio` of the steps, then falls linearly to 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises from 0."""
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
    """Fraction of the steps in which the learning rate rises from 0."""
    center_coef: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)², which keeps rewards near 0 (Eisenstein et al. 2023)."""


class TurnsOfRollout(Settings):
    """A partner in conversation: a tool, a game, a grader."""

    function: str
    """`file.py:function` beside the config or `package.module:function`: given what its parameters name, as a reward
    function is (of `response` the last turn's), it returns its reply, a text or a message {role, content}, or None to
    end."""
    max_turns: int = Field(4, ge=2)
    """The most turns of the model; `max_new_tokens` is of all of them together."""
    max_reply_tokens: PositiveInt = 256
    """The most tokens of a reply, with what the chat template puts around it."""


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
    """What sampling computes in, where the models compute in float32. With bfloat16 the update needs
    `ppo.recompute_old_logprobs`."""
    stop: Annotated[tuple[str, ...], Later(before=())] = ()
    """Texts that end a response, such as </answer>; it keeps them."""
    stop_tokens: Annotated[tuple[str | int, ...], Later(before=())] = ()
    """Tokens that end a response beside EOS, as they are written or by their ids."""
    suppress_tokens: Annotated[tuple[str | int, ...], Later(before=())] = ()
    """Tokens that are never sampled. They have no part in the distribution, in rollout, reference and update alike."""
    min_new_tokens: Annotated[int, Field(ge=0), Later(before=0)] = 0
    """The fewest response tokens: before that EOS and `stop_tokens` have no part in the distribution, and `stop` ends
    nothing."""
    resample_rounds: Annotated[int, Field(ge=0), Later(before=0)] = 0
    """The most rounds in which groups whose responses all have one score are dropped, and other prompts sampled in their
    place (Yu et al. 2025, DAPO)."""
    turns: Annotated[TurnsOfRollout | None, Later(before=None)] = None
    """Who answers the model, so that a response is a conversation of several turns; null: it is one turn."""

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}; "
                             "lower it")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every response at once; take it out")
        if self.turns and self.min_new_tokens:
            raise ValueError("min_new_tokens is about a response of one turn; leave it 0 with turns")
        return self


class ValueConfig(Settings):
    """The critic."""

    start: Address = "reward_model"
    """What the critic's weights are before the first iteration: `reward_model`, the one trained here; `actor`, with a head
    that starts at 0; or a sequence classifier with one label and the base model's tokenizer, as a folder or a name on the
    hub."""

    @field_validator("start")
    @classmethod
    def _named(cls, start: str) -> str:
        if not start.strip():
            raise ValueError("is empty; name reward_model, actor, or a model")
        return start

    @property
    def brought(self) -> bool:
        """Whether the critic is a model from elsewhere."""
        return self.start not in ("reward_model", "actor")


class EvaluateConfig(Settings):
    """Sampling on held-out prompts."""

    every: int = Field(1, ge=0)
    """Evaluate every so many iterations, and always at the start and after the last; 0: only then."""
    judge: str | None = None
    """`file.py:function` or `package.module:function` whose score is reported as gold and never trained on."""
    judges: Annotated[dict[Name, ComponentConfig], Later(before={})] = Field(default_factory=dict)
    """Several judges, or one of another kind: sources as those of the reward's components. Gold is their weighted sum."""
    samples: Annotated[PositiveInt, Later(before=1)] = 1
    """n, samples of each prompt."""
    greedy: Annotated[bool, Later(before=False)] = False
    """Whether each prompt also gets a response of the likeliest tokens."""
    correct: Annotated[float, Later(before=1.0)] = 1.0
    """The least gold of a response that is right, for pass@k."""
    pass_at: Annotated[tuple[PositiveInt, ...], Later(before=())] = ()
    """Each k of pass@k, at most n."""
    best_of: Annotated[tuple[PositiveInt, ...], Later(before=())] = ()
    """Each k of best-of-k, at most n: the yardstick of sampling k and taking the one that the reward likes best."""
    against: Annotated[str | None, Later(before=None)] = None
    """`run@iteration` whose evaluation wins are over, of the same held-out prompts; null: the starting actor's."""

    def weight_of(self, judge: str) -> float:
        """That judge's weight in gold."""
        return self.judges[judge].weight if judge in self.judges else 1.0

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if self.judge and self.judges:
            raise ValueError("judge and judges: give one of them; judges: {name: {source: …}} takes several")
        for name in ("pass_at", "best_of"):
            if (most := max(getattr(self, name), default=0)) > self.samples:
                raise ValueError(f"{name}: {most} of samples={self.samples} responses to a prompt; raise samples, or lower "
                                 "it")
        if self.against is not None and not re.fullmatch(r"[^@]+@\d+", self.against):
            raise ValueError(f"against={self.against!r}: expected run@iteration, such as base@10")
        return self


class LanguageConfig(RunConfig):
    """A whole training run of a language model."""

    kind: ClassVar[Kind] = "language"
    preset: Literal["classic", "reasoning"] | None = None
    """What the other settings start from instead of their defaults; see schemas/presets.py."""
    data: DataConfig
    base_model: BaseModelConfig = BaseModelConfig()
    lora: LoRAConfig | None = None
    """Left out: all weights are trained."""
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
        """The preset below what is written, and no critic where the estimator has none and the config names none."""
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

    def reserved(self, role: str) -> int:
        """Tokens of the context beside those of a row of that role: for the response and replies to it, or for EOS."""
        turns = self.rollout.turns
        replies = turns.max_reply_tokens * (turns.max_turns - 1) if turns else 0
        return self.rollout.max_new_tokens + replies if role in ("prompts", "heldout_prompts") else 1

    @property
    def functions(self) -> dict[str, str]:
        named = {role: part.source for role, part in self.parts.items() if part.kind == "function"}
        partner = {"turns": self.rollout.turns.function} if self.rollout.turns else {}
        return named | ({"judge": self.evaluate.judge} if self.evaluate.judge else {}) | partner

    @property
    def parts(self) -> dict[str, ComponentConfig]:
        """Role → every component of the reward, and every judge."""
        rewards = {f"reward.{name}": part for name, part in self.reward.components.items()}
        return rewards | {f"judges.{name}": part for name, part in self.evaluate.judges.items()}

    @property
    def models(self) -> dict[str, str]:
        """Role → source of every model that it names."""
        named = {role: part.model for role, part in self.parts.items() if part.model}
        base = {} if self.base_model.source is None else {"base_model": self.base_model.source}
        return base | named | ({"critic": self.value.start} if self.value and self.value.brought else {})

    def decides(self) -> dict[str, Any]:
        """As `RunConfig`'s, without the paths of inputs."""
        settings = super().decides()
        del settings["preset"], settings["data"]
        settings["base_model"]["source"] = self.base_model.source and A_MODEL
        settings["reward"]["components"] = by_content(settings["reward"]["components"])
        settings["evaluate"]["judges"] = by_content(settings["evaluate"]["judges"])
        if self.value and self.value.brought:
            settings["value"]["start"] = A_MODEL
        return settings


def _inconsistencies(c: LanguageConfig):
    """One line for each contradiction between sections."""
    if c.rollout.batch_size % c.ppo.minibatches:
        yield (f"rollout.batch_size={c.rollout.batch_size} does not divide into "
               f"ppo.minibatches={c.ppo.minibatches}; make it a multiple")
    prompts = c.rollout.batch_size // c.rollout.responses_per_prompt
    if c.execution.shards > prompts:
        yield (f"execution.shards={c.execution.shards}: a batch has {prompts} prompts, whose responses stay together; take "
               "at most as many")
    for section, settings in (("sft", c.sft), ("reward_model", c.reward_model)):
        if settings is not None and settings.batch_size % c.execution.ranks:
            yield (f"execution.ranks={c.execution.ranks}: {section}.batch_size={settings.batch_size} does not divide into "
                   "as many; make it a multiple")
    if c.execution.fsdp and c.execution.ranks == 1:
        yield "execution.fsdp: one rank has all there is; set execution.ranks to 2 or more, or fsdp to false"
    if c.execution.fsdp and c.lora:
        yield ("execution.fsdp: what adapters are over stays whole in every rank, and they are small themselves; set it to "
               "false")
    new_model, kinds = c.base_model.source is None, {part.kind for part in c.reward.components.values()}
    changed = [name for name, value in c.base_model if value != BaseModelConfig.model_fields[name].default]
    if not new_model and (extra := set(changed) - {"source", "chat_template", "special_tokens_in_text", "precision"}):
        yield f"base_model.{sorted(extra)[0]} describes a new model, but base_model.source names one; remove either"
    if new_model and c.sft is None:
        yield "a new base model has to be trained: add an sft section, or name a pretrained one in base_model.source"
    if new_model and c.lora:
        yield "lora: a new base model has learned nothing that adapters could be added to; name one in base_model.source"
    if c.base_model.precision in ("int8", "nf4") and not c.lora:
        yield (f"base_model.precision={c.base_model.precision}: weights in so few bits are not trained, adapters over them "
               "are; add a lora section, or take bfloat16")
    if c.execution.attention == "flash_attention_2" and c.base_model.precision == "float32":
        yield "execution.attention=flash_attention_2 computes in bfloat16; set base_model.precision: bfloat16, or take sdpa"
    if new_model and c.base_model.chat_template:
        yield "base_model.chat_template: a new model's tokenizer has no chat template; leave it false"
    if (new_model or c.sft) and not c.data.demonstrations:
        yield "data.demonstrations is missing; sft learns from it"
    if c.reward_model and not (c.data.pairs and c.data.source("heldout_pairs")):
        yield ("data.pairs and data.heldout_pairs are needed; reward_model learns from the one and is tested on the other; "
               "data.heldout: {rows: 64} cuts the latter off")
    if new_model and c.data.too_long != "refuse":
        yield (f"data.too_long={c.data.too_long}: the tokenizer of a new model is made from the demonstrations, so "
               "that what is too long is known only with it; leave it refuse")
    if "reward_model" in {part.kind for part in c.evaluate.judges.values()}:
        yield "evaluate.judges: reward_model is trained on, and a judge is not; name another source"
    if "reward_model" in kinds and not c.reward_model:
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
    if c.ppo.whiten_minibatches and c.rollout.batch_size == c.ppo.minibatches and (
            c.rollout.max_new_tokens == 1 or c.gae.compares_responses):
        yield ("ppo.whiten_minibatches with minibatches of one response, all of whose tokens have one advantage, removes "
               "the learning signal; make ppo.minibatches fewer, or set ppo.whiten_minibatches: false")
    if c.rollout.batch_size == 1 and (c.gae.whitens or c.gae.whiten_rewards):
        yield ("whitening with one response (rollout.batch_size=1) removes the learning signal; raise the batch size, or "
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
    if c.rollout.resample_rounds and k == 1:
        yield ("rollout.resample_rounds drops groups whose responses all have one score, and "
               "rollout.responses_per_prompt is 1; set it to 2 or more, or resample_rounds to 0")
    if c.rollout.resample_rounds and (c.reward.normalize != "none" or c.reward.normalize_components == "batch"):
        setting = "normalize" if c.reward.normalize != "none" else "normalize_components"
        yield (f"rollout.resample_rounds chooses groups by their scores, and reward.{setting}={getattr(c.reward, setting)} "
               "makes scores of all that was sampled; set one of them back")
    if c.reward.normalize_components == "group" and k == 1:
        yield ("reward.normalize_components=group compares the responses to one prompt, and rollout.responses_per_prompt is "
               "1: every score would be 0; set it to 2 or more, or take batch")
    if c.reward.normalize_components == "batch" and c.rollout.batch_size == 1:
        yield "reward.normalize_components=batch with rollout.batch_size=1: every score would be 0; raise the batch size"
    if not c.gae.has_critic and c.ppo.critic_warmup:
        yield f"ppo.critic_warmup={c.ppo.critic_warmup}, but gae.estimator={estimator} has no critic; set it to 0"
    if (buffer := c.reward.overlong_buffer) and buffer > c.rollout.max_new_tokens:
        yield f"reward.overlong_buffer={buffer} is longer than rollout.max_new_tokens={c.rollout.max_new_tokens}; shorten it"
    if c.reward.center_on_demonstrations and not c.data.demonstrations:
        yield "reward.center_on_demonstrations needs data.demonstrations"
    if c.ppo.ptx_coef and not (c.data.pretraining or c.data.demonstrations):
        yield "ppo.ptx_coef needs data.pretraining or data.demonstrations to learn from"
    if c.rollout.precision != "float32" and c.base_model.precision != "float32":
        yield (f"rollout.precision={c.rollout.precision} is about models that compute in float32, and "
               f"base_model.precision={c.base_model.precision}; leave it out")
    elif c.rollout.precision != "float32" and not c.ppo.recompute_old_logprobs:
        yield (f"rollout.precision={c.rollout.precision} samples from another policy than the float32 one that is updated; "
               "set ppo.recompute_old_logprobs: true (and ppo.importance_cap: 2)")
