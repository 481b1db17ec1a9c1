"""The tasks of a language model's stages: each loads what its call names, calls the stage, and saves what it gives.

All that decides a result is in the call, whose settings are those of the recipe; see `StageCall` in schemas/artifacts.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flows.language.model_folders import load_causal, load_gguf, load_scalar, save_learner, save_model
from flows.language.server_access import server_token
from flows.language.warm_models import Adapters, Reading, WarmModels
from flows.runs.inputs import GGUF
from flows.runs.produce import StageOutput
from flows.runs.rows import Rows
from flows.runs.work import Task, Work
from schemas.artifacts import ModelRef, Moments, Outputs, derive_seed
from schemas.errors import ConfigError
from schemas.language import BaseModelConfig, EvaluateConfig, LoRAConfig, RewardModelConfig, RolloutConfig, SFTConfig
from schemas.reward_settings import ComponentConfig, RewardConfig
from schemas.settings import PPOConfig
from schemas.tables import Advantages, ReferenceLogprobs, Rewards, Rollouts, Samples, ScoredTexts, TokenRewards, Values
from stages import base_model as base_model_stage
from stages import evaluate as evaluate_stage
from stages import ppo as ppo_stage
from stages import reference as reference_stage
from stages import resample as resample_stage
from stages import reward as reward_stage
from stages import reward_bias as reward_bias_stage
from stages import reward_model as reward_model_stage
from stages import rollout as rollout_stage
from stages import sft as sft_stage
from stages import value as value_stage
from stages.ops.brought_scorer import BroughtScorer
from stages.ops.builtin_rewards import builtin_scorer
from stages.ops.conversations import Prompt, prompt_of
from stages.ops.distribution import SETTINGS, distribution_of
from stages.ops.guest import Patience
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.learning_signal import cut_texts, flat_groups, of_components, of_policy
from stages.ops.moments import updated_moments
from stages.ops.precision import Precision
from stages.ops.prompts import demonstrations_as_texts, pretraining_as_texts, prompt_order
from stages.ops.reward_server import RewardServer
from stages.ops.rewards import Scorer, function_scorer, model_scorer, seeing_special_tokens
from stages.ops.sampling import ModelSampler
from stages.ops.texts import Texts
from stages.ops.turns import Partner

# --- once, before the first iteration ---


def base_model(work: Work[WarmModels]) -> StageOutput:
    if gguf := work.ref_if_given("gguf"):
        model = LanguageModel(*load_gguf(work.store.file(gguf, GGUF)))
    else:
        model = base_model_stage.base_model(list(work.rows("demonstrations")), work.settings(BaseModelConfig),
                                            seed=work.call.seed)
    save_model(work.attempt, "model", model)
    return StageOutput(base_model_stage.metrics(model))


def sft(work: Work[WarmModels]) -> StageOutput:
    model = work.warm.trainable(work.model("base"), load_causal, _reading(work), _adapters(work), _precision(work))
    metrics = sft_stage.sft(model, list(work.rows("demonstrations")), work.settings(SFTConfig), seed=work.call.seed)
    save_model(work.attempt, "actor", model)
    return StageOutput(metrics)


def reward_model(work: Work[WarmModels]) -> StageOutput:
    model = work.warm.trainable(work.model("start"), load_scalar, _reading(work), _adapters(work), _precision(work))
    metrics = reward_model_stage.reward_model(model, list(work.rows("pairs")), list(work.rows("heldout_pairs")),
                                              work.settings(RewardModelConfig), seed=work.call.seed)
    save_model(work.attempt, "reward_model", model)
    return StageOutput(metrics)


def reward_bias(work: Work[WarmModels]) -> StageOutput:
    config = work.settings(RewardConfig)
    reading, rows = _reading(work), work.rows("demonstrations")
    texts = demonstrations_as_texts(reading.tokenizer(_tokenizer(work, "tokenizer")), rows, reading.chat_template)
    scorers = _scorers(work, config)
    rewards = reward_bias_stage.reward_bias(scorers, texts, config)
    work.attempt.table(rewards)
    work.warn(cut_texts(_cut(scorers), config, len(texts)))
    metrics = reward_bias_stage.metrics(rewards)
    return StageOutput(metrics, _tokens(texts) if _runs_models(work) else None, Outputs(bias=metrics.bias))


# --- every iteration ---

def rollout(work: Work[WarmModels]) -> StageOutput:
    config, prompts = work.settings(RolloutConfig), work.rows("prompts")
    k = config.responses_per_prompt
    ids = np.repeat(prompt_order(len(prompts), config.batch_size // k, seed=work.setting("order_seed"),
                                 iteration=work.setting("iteration")), k)

    def part(rows: slice) -> tuple[Rollouts]:
        sampler = ModelSampler(work.warm.actor(work.model("actor"), _reading(work), _precision(work)))
        return rollout_stage.rollout(sampler, [prompt_of(prompts[int(i)]) for i in ids[rows]], ids[rows], config,
                                     seed=work.call.seed, partner=_partner(work, config), first_row=rows.start),

    (rollouts,) = work.in_parts(len(ids), part, (Rollouts,), unit=k)
    work.attempt.table(rollouts)
    return StageOutput(rollout_stage.metrics(rollouts), int(rollouts.sampled_lengths.sum()))


def reference(work: Work[WarmModels]) -> StageOutput:
    rollouts = work.table("rollouts", Rollouts)

    def part(rows: slice) -> tuple[ReferenceLogprobs]:
        model = work.warm.reference(work.model("reference_model"), _precision(work))
        distribution = distribution_of(_sampling(work), model.tokenizer, model.eos_ids)
        return reference_stage.reference(model, rollouts.part(rows), distribution),

    (scored,) = work.in_parts(len(rollouts), part, (ReferenceLogprobs,), unit=_group(work))
    work.attempt.table(scored)
    rollouts = _of_the_shard(work, rollouts)
    return StageOutput(reference_stage.metrics(scored, rollouts), _tokens(rollouts))


def reward(work: Work[WarmModels]) -> StageOutput:
    config, rollouts, before = work.settings(RewardConfig), work.table("rollouts", Rollouts), work.moments
    known = {"bias": work.setting("bias"), "moments": before, "max_new_tokens": work.setting("max_new_tokens")}
    scorers: dict[str, Scorer] = {}
    cut: Counter[str] = Counter()

    def part(rows: slice) -> tuple[Rewards, TokenRewards | None, ScoredTexts | None]:
        if not scorers:
            scorers.update(_scorers(work, config))
        some = rollouts.part(rows)
        made = (*reward_stage.reward(scorers, some, config, **known), reward_stage.texts(scorers, some))
        cut.update(_cut(scorers))
        return made

    rewards, *beside = work.in_parts(len(rollouts), part, (Rewards, TokenRewards, ScoredTexts), unit=_group(work))
    rollouts = _of_the_shard(work, rollouts)
    cut.update(_cut_in_parts(work))
    if work.call.shard is None:  # moments and groups are the whole batch's
        rewards = reward_stage.of_components(rewards.components, rollouts, config, **known)
    for table in (rewards, *beside):
        if table is not None:
            work.attempt.table(table)
    if work.call.shard is None:
        work.warn([*of_components(rewards.components), *cut_texts(cut, config, len(rollouts))])
    moments = updated_moments(before, rewards.raw_score) if config.normalize != "none" else None
    return StageOutput(reward_stage.metrics(rewards, config, before, cut),
                       _tokens(rollouts) if _runs_models(work) else None, Outputs(moments=moments))


def resample(work: Work[WarmModels]) -> StageOutput:
    config, rewards, prompts = work.settings(RolloutConfig), work.settings(RewardConfig, "reward"), work.rows("prompts")
    scorers, iteration = _scorers(work, rewards), work.setting("iteration")

    def order(number: int) -> np.ndarray:
        return prompt_order(len(prompts), len(prompts), seed=derive_seed(work.setting("order_seed"), number, "round"),
                            iteration=iteration)

    actor = work.warm.actor(work.model("actor"), _reading(work), _precision(work))
    first = work.table("rollouts", Rollouts), work.table("rewards", Rewards), work.table_beside("rewards", TokenRewards)
    score = partial(reward_stage.reward, scorers, config=rewards, bias=work.setting("bias"), moments=Moments(),
                    max_new_tokens=config.max_new_tokens)
    found = resample_stage.resample(ModelSampler(actor), _Prompts(prompts), first, score, config, order=order,
                                    seed=work.call.seed, partner=_partner(work, config))
    for table in (found.rollouts, found.rewards, found.tokens, found.dropped, reward_stage.texts(scorers, found.rollouts)):
        if table is not None:
            work.attempt.table(table)
    metrics = resample_stage.metrics(found, config.responses_per_prompt)
    work.warn(flat_groups(metrics.flat_groups, config))
    return StageOutput(metrics, int(found.rollouts.sampled_lengths.sum()))


@dataclass(frozen=True)
class _Prompts:
    """Of an imported file, read by need."""

    rows: Rows

    def __getitem__(self, row: int) -> Prompt:
        return prompt_of(self.rows[row])


def value(work: Work[WarmModels]) -> StageOutput:
    rollouts = work.table("rollouts", Rollouts)

    def part(rows: slice) -> tuple[Values]:
        return value_stage.value(work.warm.critic(work.model("critic"), _precision(work)), rollouts.part(rows)),

    (values,) = work.in_parts(len(rollouts), part, (Values,), unit=_group(work))
    work.attempt.table(values)
    rollouts = _of_the_shard(work, rollouts)
    return StageOutput(value_stage.metrics(values, rollouts), _tokens(rollouts))


def ppo(work: Work[WarmModels]) -> StageOutput:
    config, rollouts = work.settings(PPOConfig), work.table("rollouts", Rollouts)
    learner = work.warm.take_learner(work.model("actor"), work.model_if_given("critic"), work.model_if_given("optimizer"),
                                     config, _sampling(work), _adapters(work), _precision(work))
    penalty = None
    if reference := work.table_if_given("reference", ReferenceLogprobs):
        penalty = ppo_stage.KLLoss(reference, work.setting("kl_coef"), work.setting("kl_estimator"))
    texts = _texts(work, learner.actor) if config.ptx_coef else None
    with _over_ranks(work, learner) as training:
        metrics = ppo_stage.ppo(
            training, rollouts, work.table_if_given("values", Values), work.table("advantages", Advantages), config,
            seed=work.call.seed, learning_rate_factor=work.setting("learning_rate_factor"),
            train_actor=work.setting("train_actor"), kl_loss=penalty, texts=texts)
    work.warn(of_policy(metrics.entropy, learner.actor.module.get_input_embeddings().num_embeddings))
    save_learner(work.attempt, learner)
    work.warm.put_learner(work.call.recipe.ref, learner)
    return StageOutput(metrics, _tokens(rollouts) * metrics.steps // config.minibatches)


def evaluate(work: Work[WarmModels]) -> StageOutput:
    sampling, rewards = work.settings(RolloutConfig, "rollout"), work.settings(RewardConfig, "reward")
    config, prompts = work.settings(EvaluateConfig), work.rows("prompts")
    scorers: dict[str, Scorer] = {}
    judges: dict[str, Scorer] = {}
    cut: Counter[str] = Counter()

    def part(rows: slice) -> tuple[Samples]:
        if not scorers:
            scorers.update(_scorers(work, rewards, "actor"))
            judges.update(_judges(work, config, rewards))
        actor = work.warm.actor(work.model("actor"), _reading(work), _precision(work))
        reference = work.warm.reference(work.model("reference_model"), _precision(work))
        samples = evaluate_stage.evaluate(
            ModelSampler(actor), reference, [prompt_of(prompts[i]) for i in range(rows.start, rows.stop)], scorers,
            judges, _baseline(work), sampling, rewards, bias=work.setting("bias"), seed=work.call.seed,
            config=config, partner=_partner(work, sampling), first_prompt=rows.start)
        cut.update(_cut(scorers))
        return samples,

    (samples,) = work.in_parts(len(prompts), part, (Samples,))
    samples = evaluate_stage.sampled_first(samples)
    work.attempt.table(samples)
    cut.update(_cut_in_parts(work))
    if work.call.shard is None:
        work.warn(cut_texts(cut, rewards, len(samples)))
    return StageOutput(evaluate_stage.metrics(samples, config, cut), int(samples.response_length.sum()))


TASKS: dict[str, Task] = {task.__name__: task for task in (
    base_model, sft, reward_model, reward_bias, rollout, reference, reward, resample, value, ppo, evaluate)}


# --- what several of them need ---

def _over_ranks(work: Work[WarmModels], learner: LanguageModelLearner) -> AbstractContextManager[LanguageModelLearner]:
    """The learner, or one whose layers are sharded over the ranks."""
    if not work.call.execution.fsdp:
        return nullcontext(learner)
    from stages.ops.fsdp import fully_sharded  # which takes a second

    return fully_sharded(learner)


def _of_the_shard(work: Work[WarmModels], rollouts: Rollouts) -> Rollouts:
    """Those of its rows that the call is about."""
    return rollouts if work.call.shard is None else rollouts.part(work.call.shard.rows(len(rollouts), _group(work)))


def _group(work: Work[WarmModels]) -> int:
    """How many responses there are to a prompt; their rows follow each other."""
    return work.made_with("rollouts").get("responses_per_prompt", 1)


def _tokens(rollouts: Rollouts | Texts) -> int:
    """Prompt and response tokens: what a model that scores them reads."""
    return len(rollouts.prompt_tokens.values) + len(rollouts.response_tokens.values)


def _adapters(work: Work[WarmModels]) -> Adapters | None:
    """What is trained instead of all weights."""
    return Adapters(work.settings(LoRAConfig, "lora"), work.call.seed) if "lora" in work.call.settings else None


def _precision(work: Work[WarmModels]) -> Precision:
    """What models compute in, and weights that stay are held in."""
    settings = work.call.settings
    return Precision(**{name: settings[name] for name in ("compute", "weights") if name in settings})


def _sampling(work: Work[WarmModels]) -> dict[str, Any]:
    """The settings that decide the distribution that the rollouts were drawn from."""
    work.setting("temperature")
    return {name: work.call.settings[name] for name in SETTINGS if name in work.call.settings}


def _partner(work: Work[WarmModels], config: RolloutConfig) -> Partner | None:
    """Who answers responses of several turns."""
    if config.turns is None:
        return None
    source = config.turns.function
    return Partner(source, work.function("turns", source), config.turns.max_turns, config.turns.max_reply_tokens,
                   _patience(work), _columns(work))


def _texts(work: Work[WarmModels], actor: LanguageModel) -> Texts:
    """The texts that the update mixes in, as the actor reads them; tokenized once in a process."""
    role = "pretraining" if "pretraining" in work.call.inputs else "demonstrations"
    reading = _reading_of(work.made_with("rollouts"))
    tokenizer = reading.tokenizer(actor.tokenizer)

    def tokenized() -> Texts:
        if role == "pretraining":
            return pretraining_as_texts(tokenizer, work.rows(role))
        return demonstrations_as_texts(tokenizer, work.rows(role), reading.chat_template)

    return work.warm.texts(work.ref(role), work.model("actor"), reading, tokenized)


def _reading(work: Work[WarmModels]) -> Reading:
    """How this call's prompts are read."""
    work.setting("chat_template")
    return _reading_of(work.call.settings)


def _reading_of(settings: dict[str, Any]) -> Reading:
    return Reading(settings["chat_template"], settings.get("special_tokens_in_text", True))


def _scorers(work: Work[WarmModels], config: RewardConfig, tokenizer: str = "tokenizer") -> dict[str, Scorer]:
    """Component → scorer. `tokenizer`: the role of the model whose special tokens they see, if they are to."""
    return {name: _scorer(work, f"reward.{name}", part, tokenizer if config.special_tokens else None)
            for name, part in config.components.items()}


def _scorer(work: Work[WarmModels], role: str, part: ComponentConfig, tokenizer: str | None) -> Scorer:
    execution, source = work.call.execution, part.source
    match part.kind:
        case "reward_model":
            return model_scorer(work.warm.reward_model(work.model("reward_model"), _precision(work)))
        case "model":
            return BroughtScorer(work.warm.scorer(work.model(role)), part, _columns(work))
        case "builtin":
            encoder = work.warm.encoder(work.model(role)) if part.model else None
            return builtin_scorer(source, part.builtin, _patience(work), _columns(work), encoder)
        case "server":
            scorer = RewardServer(source, server_token(source), execution.server_timeout, execution.server_tries,
                                  execution.server_batch_size, execution.server_concurrency, part.columns, _columns(work))
        case "function":
            scorer = function_scorer(source, work.function(role, source), _patience(work), _columns(work))
    return scorer if tokenizer is None else seeing_special_tokens(scorer, _tokenizer(work, tokenizer))


def _patience(work: Work[WarmModels]) -> Patience:
    return Patience(work.call.execution.function_patience, work.call.execution.function_timeout)


@dataclass(frozen=True)
class _Columns:
    """An imported file of prompts."""

    rows: Rows

    def of(self, rollouts: Rollouts | Texts, names: Sequence[str]) -> dict[str, list[Any]]:
        """B values of each, None where a row has none."""
        ids = rollouts.prompt_id if isinstance(rollouts, Rollouts) else rollouts.row_id
        rows = [self.rows[int(i)] for i in ids]
        return {name: [row.get(name) for row in rows] for name in names}


def _columns(work: Work[WarmModels]) -> _Columns | None:
    """Those of the file that this call's prompts are of, if it reads it."""
    role = next((role for role in ("prompts", "demonstrations") if role in work.call.inputs), None)
    return role and _Columns(work.rows(role))


def _cut(scorers: dict[str, Scorer]) -> dict[str, int]:
    """How many texts were too long for each reward model that is brought, of those that it read last."""
    return {name: scorer.cut for name, scorer in scorers.items() if isinstance(scorer, BroughtScorer)}


def _cut_in_parts(work: Work[WarmModels]) -> Counter[str]:
    """The same, of the shards that the call joins."""
    found: Counter[str] = Counter()
    for ref in work.call.parts:
        found.update({name.removeprefix("cut_"): int(value) for name, value in work.store.manifest(ref).metrics.items()
                      if name.startswith("cut_")})
    return found


def _judges(work: Work[WarmModels], config: EvaluateConfig, rewards: RewardConfig) -> dict[str, Scorer]:
    """By name, each with the role of its input."""
    tokenizer = "actor" if rewards.special_tokens else None
    if config.judge:
        return {"judge": _scorer(work, "judge", ComponentConfig(source=config.judge), tokenizer)}
    return {name: _scorer(work, f"judges.{name}", part, tokenizer) for name, part in config.judges.items()}


def _baseline(work: Work[WarmModels]) -> Samples | None:
    """What wins are over. Raises `ConfigError` where it is of other prompts."""
    baseline = work.table_if_given("baseline", Samples)
    if baseline is not None:
        theirs = dict(zip(baseline.prompt_ids.tolist(), baseline.prompt, strict=True))
        prompts = dict(enumerate(row["prompt"] for row in work.rows("prompts")))
        if theirs != prompts:
            first = next(i for i in sorted({*theirs, *prompts}) if theirs.get(i) != prompts.get(i))
            raise ConfigError(f"evaluate.against: that run was evaluated on other prompts, from row {first + 1} on; wins "
                              "are of responses to the same ones")
    return baseline


def _runs_models(work: Work[WarmModels]) -> bool:
    """Whether models are among what scores."""
    return any(isinstance(ref, ModelRef) for role, ref in work.call.inputs.items() if role.startswith("reward"))


def _tokenizer(work: Work[WarmModels], role: str) -> PreTrainedTokenizerBase:
    return work.warm.tokenizer(work.model(role))
