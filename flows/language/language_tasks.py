"""The tasks of a language model's chain, one per stage; see flows/orchestration/tasks.py for what all tasks are."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from flows.language.warm_models import load_causal, load_scalar, load_tokenizer, save_learner, save_model
from flows.orchestration.tasks import ITERATION_DECIDES, given, settings_of, stage_task
from flows.runs.inputs import functions_of, stored_function, stored_lines
from flows.runs.produce import Made, produce
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, ModelRef, Moments, Recipe
from schemas.settings import RewardConfig
from schemas.tables import Advantages, ReferenceLogprobs, Rewards, Rollouts, Samples, Values
from stages import base_model as base_model_stage
from stages import evaluate as evaluate_stage
from stages import gae as gae_stage
from stages import ppo as ppo_stage
from stages import reference as reference_stage
from stages import reward as reward_stage
from stages import reward_bias as reward_bias_stage
from stages import reward_model as reward_model_stage
from stages import rollout as rollout_stage
from stages import sft as sft_stage
from stages import value as value_stage
from stages.ops.language_model import LanguageModel
from stages.ops.optim import learning_rate_factor
from stages.ops.prompts import Texts, demonstrations_as_texts, pretraining_as_texts, prompt_order
from stages.ops.rewards import Scorer, function_scorer, model_scorer, server_scorer

# --- once, before the first iteration ---

@stage_task
def base_model(run: Run, iteration: int) -> ArtifactRef:
    config = run.config.base_model
    recipe = Recipe(stage="base_model", version=base_model_stage.VERSION, config=settings_of(config),
                    inputs={"demonstrations": run.inputs["demonstrations"]}, seed=run.seed(iteration, "base_model"))

    def make(attempt):
        model = base_model_stage.base_model(stored_lines(run, "demonstrations"), config, seed=recipe.seed)
        save_model(attempt, "model", model)
        return Made(base_model_stage.metrics(model))

    return produce(run, recipe, make)


@stage_task
def sft(run: Run, iteration: int, base: ModelRef) -> ArtifactRef:
    config, template = run.config.sft, run.config.base_model.chat_template
    recipe = Recipe(stage="sft", version=sft_stage.VERSION, config=settings_of(config, chat_template=template),
                    inputs={"base": base.artifact, "demonstrations": run.inputs["demonstrations"]},
                    seed=run.seed(iteration, "sft"))

    def make(attempt):
        model = run.models.trainable(base, load_causal)
        metrics = sft_stage.sft(model, stored_lines(run, "demonstrations"), config, chat_template=template,
                                seed=recipe.seed)
        save_model(attempt, "actor", model)
        return Made(metrics)

    return produce(run, recipe, make)


@stage_task
def reward_model(run: Run, iteration: int, start: ModelRef) -> ArtifactRef:
    config, template = run.config.reward_model, run.config.base_model.chat_template
    recipe = Recipe(stage="reward_model", version=reward_model_stage.VERSION,
                    config=settings_of(config, chat_template=template),
                    inputs={"start": start.artifact, "pairs": run.inputs["pairs"],
                            "heldout_pairs": run.inputs["heldout_pairs"]}, seed=run.seed(iteration, "reward_model"))

    def make(attempt):
        model = run.models.trainable(start, load_scalar)
        metrics = reward_model_stage.reward_model(model, stored_lines(run, "pairs"), stored_lines(run, "heldout_pairs"),
                                                  config, chat_template=template, seed=recipe.seed)
        save_model(attempt, "reward_model", model)
        return Made(metrics)

    return produce(run, recipe, make)


@stage_task
def reward_bias(run: Run, iteration: int, reference_model: ModelRef, reward_model: ModelRef | None) -> ArtifactRef:
    config, template = run.config.reward, run.config.base_model.chat_template
    recipe = Recipe(
        stage="reward_bias", version=reward_bias_stage.VERSION, config=_sources(config) | {"chat_template": template},
        inputs={"tokenizer": reference_model.artifact, "demonstrations": run.inputs["demonstrations"]}
        | _reward_inputs(run, reward_model))

    def make(attempt):
        tokenizer = load_tokenizer(run.store.folder(reference_model.artifact, reference_model.folder))
        texts = demonstrations_as_texts(tokenizer, stored_lines(run, "demonstrations"), template)
        rewards = reward_bias_stage.reward_bias(_scorers(run, reward_model), texts, config)
        attempt.table(rewards)
        return Made(reward_bias_stage.metrics(rewards), _tokens(texts) if reward_model else None)

    return produce(run, recipe, make)


# --- every iteration ---

@stage_task
def rollout(run: Run, iteration: int, actor: ModelRef) -> ArtifactRef:
    config, template = run.config.rollout, run.config.base_model.chat_template
    order_seed = run.seed(0, "prompt_order")
    recipe = Recipe(
        stage="rollout", version=rollout_stage.VERSION, seed=run.seed(iteration, "rollout"),
        config=settings_of(config, chat_template=template, order_seed=order_seed, iteration=iteration),
        inputs={"actor": actor.artifact, "prompts": run.inputs["prompts"]})

    def make(attempt):
        prompts = [row["prompt"] for row in stored_lines(run, "prompts")]
        k = config.responses_per_prompt
        ids = np.repeat(prompt_order(len(prompts), config.batch_size // k, seed=order_seed, iteration=iteration), k)
        rollouts = rollout_stage.rollout(run.models.actor(actor), [prompts[i] for i in ids], ids, config,
                                         chat_template=template, seed=recipe.seed)
        attempt.table(rollouts)
        return Made(rollout_stage.metrics(rollouts), len(rollouts.response_tokens.values))

    return produce(run, recipe, make)


@stage_task
def reference(run: Run, iteration: int, reference_model: ModelRef, rollouts: ArtifactRef) -> ArtifactRef:
    temperature = _temperature(run, rollouts)
    recipe = Recipe(stage="reference", version=reference_stage.VERSION, config={"temperature": temperature},
                    inputs={"reference_model": reference_model.artifact, "rollouts": rollouts})

    def make(attempt):
        table = run.store.table(rollouts, Rollouts)
        scored = reference_stage.reference(run.models.reference(reference_model), table, temperature=temperature)
        attempt.table(scored)
        return Made(reference_stage.metrics(scored), _tokens(table))

    return produce(run, recipe, make)


@stage_task
def reward(run: Run, iteration: int, reward_model: ModelRef | None, rollouts: ArtifactRef, reward_bias: float,
           reward_moments: Moments) -> ArtifactRef:
    config, limit = run.config.reward, run.store.manifest(rollouts).recipe.config["max_new_tokens"]
    state = {"bias": reward_bias}
    if config.normalize != "none":
        state["moments"] = reward_moments.model_dump(mode="json")
    recipe = Recipe(stage="reward", version=reward_stage.VERSION, config=settings_of(config, max_new_tokens=limit, **state),
                    inputs={"rollouts": rollouts} | _reward_inputs(run, reward_model))

    def make(attempt):
        table = run.store.table(rollouts, Rollouts)
        rewards = reward_stage.reward(_scorers(run, reward_model), table, config, bias=reward_bias,
                                      moments=reward_moments, max_new_tokens=limit)
        attempt.table(rewards)
        return Made(reward_stage.metrics(rewards, config, reward_moments), _tokens(table) if reward_model else None)

    return produce(run, recipe, make)


@stage_task
def value(run: Run, iteration: int, critic: ModelRef, rollouts: ArtifactRef) -> ArtifactRef:
    recipe = Recipe(stage="value", version=value_stage.VERSION, config={},
                    inputs={"critic": critic.artifact, "rollouts": rollouts})

    def make(attempt):
        table = run.store.table(rollouts, Rollouts)
        values = value_stage.value(run.models.critic(critic), table)
        attempt.table(values)
        return Made(value_stage.metrics(values), _tokens(table))

    return produce(run, recipe, make)


@stage_task
def gae(run: Run, iteration: int, rollouts: ArtifactRef, reference: ArtifactRef, rewards: ArtifactRef,
        values: ArtifactRef | None, kl_coef: float) -> ArtifactRef:
    config, kl = run.config.gae, run.config.kl
    recipe = Recipe(
        stage="gae", version=gae_stage.VERSION,
        config=settings_of(config, kl_coef=kl_coef, kl_estimator=kl.estimator, kl_placement=kl.placement),
        inputs={"rollouts": rollouts, "reference": reference, "rewards": rewards} | given(values=values))

    def make(attempt):
        table = run.store.table(rollouts, Rollouts)
        value_table = run.store.table(values, Values) if values else None
        advantages = gae_stage.gae(table, run.store.table(reference, ReferenceLogprobs),
                                   run.store.table(rewards, Rewards), value_table, config, kl, kl_coef=kl_coef)
        attempt.table(advantages)
        return Made(gae_stage.metrics(advantages, table, value_table, config, kl_coef=kl_coef))

    return produce(run, recipe, make)


@stage_task
def ppo(run: Run, iteration: int, actor: ModelRef, critic: ModelRef | None, optimizer: ModelRef | None,
        rollouts: ArtifactRef, reference: ArtifactRef, values: ArtifactRef | None, advantages: ArtifactRef,
        kl_coef: float) -> ArtifactRef:
    config, temperature, in_loss = run.config.ppo, _temperature(run, rollouts), run.config.kl.placement == "loss"
    factor, train_actor = learning_rate_factor(iteration, config), iteration > config.critic_warmup
    settings = settings_of(config, ITERATION_DECIDES, temperature=temperature, learning_rate_factor=factor,
                         train_actor=train_actor)
    settings |= {"kl_coef": kl_coef, "kl_estimator": run.config.kl.estimator} if in_loss else {}
    inputs = {"actor": actor.artifact, "rollouts": rollouts, "advantages": advantages} | given(
        critic=critic and critic.artifact, values=values, optimizer=optimizer and optimizer.artifact,
        reference=reference if in_loss else None, **{_mixed(run): run.inputs[_mixed(run)]} if config.ptx_coef else {})
    recipe = Recipe(stage="ppo", version=ppo_stage.VERSION, config=settings, inputs=inputs, seed=run.seed(iteration, "ppo"))

    def make(attempt):
        table = run.store.table(rollouts, Rollouts)
        learner = run.models.take_learner(actor, critic, optimizer, temperature)
        penalty = None
        if in_loss:
            penalty = ppo_stage.KLLoss(run.store.table(reference, ReferenceLogprobs), kl_coef, run.config.kl.estimator)
        metrics = ppo_stage.ppo(
            learner, table, run.store.table(values, Values) if values else None, run.store.table(advantages, Advantages),
            config, seed=recipe.seed, learning_rate_factor=factor, train_actor=train_actor,
            kl_loss=penalty, texts=_texts(run, learner.actor) if config.ptx_coef else None)
        save_learner(attempt, learner)
        run.models.put_learner(recipe.ref, learner)
        return Made(metrics, _tokens(table) * metrics.steps // config.minibatches)

    return produce(run, recipe, make)


@stage_task
def evaluate(run: Run, iteration: int, updated_actor: ModelRef, reference_model: ModelRef,
             reward_model: ModelRef | None, baseline: ArtifactRef | None, reward_bias: float) -> ArtifactRef:
    sampling, rewards, template = run.config.rollout, run.config.reward, run.config.base_model.chat_template
    inputs = {"actor": updated_actor.artifact, "reference_model": reference_model.artifact,
              "prompts": run.inputs["heldout_prompts"]} | _reward_inputs(run, reward_model)
    inputs |= given(baseline=baseline, judge=run.inputs["judge"] if run.config.evaluate.judge else None)
    recipe = Recipe(
        stage="evaluate", version=evaluate_stage.VERSION, inputs=inputs, seed=run.seed(0, "evaluate"),
        config={"rollout": sampling.model_dump(mode="json", exclude={"batch_size", "responses_per_prompt"}),
                "reward": _sources(rewards), "bias": reward_bias, "judge": run.config.evaluate.judge,
                "chat_template": template})

    def make(attempt):
        samples = evaluate_stage.evaluate(
            run.models.actor(updated_actor), run.models.reference(reference_model),
            [row["prompt"] for row in stored_lines(run, "heldout_prompts")], _scorers(run, reward_model), _judge(run),
            run.store.table(baseline, Samples) if baseline else None, sampling, rewards, bias=reward_bias,
            chat_template=template, seed=recipe.seed)
        attempt.table(samples)
        return Made(evaluate_stage.metrics(samples), int(samples.response_length.sum()))

    return produce(run, recipe, make)


STAGES = {stage.__name__: stage for stage in (base_model, sft, reward_model, reward_bias, rollout, reference, reward, value,
                                          gae, ppo, evaluate)}


# --- what several of them need ---

def _temperature(run: Run, rollouts: ArtifactRef) -> float:
    """At which the rollouts were sampled, so that their tokens are scored at no other."""
    return run.store.manifest(rollouts).recipe.config["temperature"]


def _tokens(rollouts: Rollouts | Texts) -> int:
    """Prompt and response tokens: what a model that scores them reads."""
    return len(rollouts.prompt_tokens.values) + len(rollouts.response_tokens.values)


def _sources(config: RewardConfig) -> dict[str, Any]:
    """What of the reward's settings decides the raw score."""
    return config.model_dump(mode="json", include={"components"})


def _mixed(run: Run) -> str:
    """The role of the texts that the update mixes in."""
    return "pretraining" if "pretraining" in run.inputs else "demonstrations"


def _texts(run: Run, actor: LanguageModel) -> Texts:
    """Those texts, as the actor reads them."""
    rows = stored_lines(run, _mixed(run))
    if _mixed(run) == "pretraining":
        return pretraining_as_texts(actor.tokenizer, rows)
    return demonstrations_as_texts(actor.tokenizer, rows, run.config.base_model.chat_template)


def _reward_inputs(run: Run, reward_model: ModelRef | None) -> dict[str, ArtifactRef]:
    """Artifacts that the reward's components are, by role."""
    functions = {role: run.inputs[role] for role in functions_of(run.config) if role != "judge"}
    used = any(part.source == "reward_model" for part in run.config.reward.components.values())
    return functions | ({"reward_model": reward_model.artifact} if used else {})


def _scorers(run: Run, reward_model: ModelRef | None) -> dict[str, Scorer]:
    """Component → scorer."""
    scorers: dict[str, Scorer] = {}
    for name, part in run.config.reward.components.items():
        if part.source == "reward_model":
            scorers[name] = model_scorer(run.models.reward_model(reward_model))
        elif part.source.startswith(("http://", "https://")):
            scorers[name] = server_scorer(part.source, token=os.environ.get("BATON_REWARD_TOKEN"))
        else:
            scorers[name] = function_scorer(part.source, stored_function(run, f"reward.{name}", part.source))
    return scorers


def _judge(run: Run) -> Scorer | None:
    source = run.config.evaluate.judge
    return function_scorer(source, stored_function(run, "judge", source)) if source else None
