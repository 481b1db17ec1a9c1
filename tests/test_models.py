"""Models from folders and back, and the cache that keeps them warm."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.language.model_folders import load_scalar, load_tokenizer
from flows.language.warm_models import Reading, WarmModels
from flows.runs.run import open_run
from flows.store.store import Store


@pytest.fixture
def run(trained):
    return open_run(Store(trained[1]), "tiny")


def test_a_critic_from_an_actor_begins_at_0_with_its_body(run):
    folder = run.store.folder(run.state(0).actor.artifact, "actor")
    critic, actor = load_scalar(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert not critic.score.weight.any()
    assert torch.equal(critic.transformer.wte.weight, actor.transformer.wte.weight)


def test_a_critic_from_a_reward_model_keeps_its_head(run):
    folder = run.store.folder(run.state(0).reward_model.artifact, "reward_model")
    assert load_scalar(folder).score.weight.any()


def test_a_tokenizer_without_padding_pads_with_eos(run, tmp_path):
    folder = run.store.folder(run.state(0).actor.artifact, "actor")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_models_stay_warm_up_to_the_limit(run):
    models = WarmModels(run.store, run.config.execution.model_copy(update={"warm_models": 2}))
    state = run.state(1)
    first = models.actor(state.actor, Reading(False, True)).module
    assert models.actor(state.actor, Reading(True, True)).module is first and models.loaded == 1
    models.critic(state.critic)
    models.reference(state.reference)
    assert models.actor(state.actor, Reading(False, True)).module is not first and models.loaded == 4


def test_training_takes_models_out_of_the_cache(run):
    models, state, ppo = WarmModels(run.store, run.config.execution), run.state(1), run.config.ppo
    warm = models.actor(state.actor, Reading(False, True)).module
    learner = models.take_learner(state.actor, state.critic, state.optimizer, ppo, {"temperature": 1.0})
    assert learner.actor.module is warm
    assert models.actor(state.actor, Reading(False, True)).module is not warm
    models.put_learner(run.state(2).actor.artifact, learner)
    again = run.state(2)
    assert models.actor(again.actor, Reading(False, True)).module is warm
    assert models.take_learner(again.actor, again.critic, again.optimizer, ppo, {"temperature": 1.0}) is learner


def test_a_warm_learner_of_other_settings_is_not_used(run):
    models, state, ppo = WarmModels(run.store, run.config.execution), run.state(2), run.config.ppo
    learner = models.take_learner(state.actor, state.critic, state.optimizer, ppo, {"temperature": 1.0})
    models.put_learner(state.actor.artifact, learner)
    other = ppo.model_copy(update={"learning_rate": 0.5})
    learner = models.take_learner(state.actor, state.critic, state.optimizer, other, {"temperature": 1.0})
    assert learner.learning_rates["actor"] == 0.5 and len(learner.optimizers["actor"].state) > 0


def test_texts_are_tokenized_once_for_all_checkpoints_with_one_tokenizer(run):
    """Each checkpoint has its own copy of the tokenizer; other texts, or the same in a chat template, are others."""
    models, calls = WarmModels(run.store, run.config.execution), []
    texts = lambda state, template=False, role="demonstrations": models.texts(  # noqa: E731
        run.inputs[role], run.state(state).actor, template, lambda: calls.append(1) or object())
    assert texts(0) is texts(1) is texts(2) and len(calls) == 1
    assert texts(2) is not texts(2, template=True) is not texts(2, role="pairs") and len(calls) == 3


def test_optimizer_moments_are_read_back(run):
    state = run.state(2)
    models = WarmModels(run.store, run.config.execution)
    learner = models.take_learner(state.actor, state.critic, state.optimizer, run.config.ppo, {"temperature": 1.0})
    steps = {float(s["step"]) for o in learner.optimizers.values() for s in o.state.values()}
    assert steps == {8.0}  # 2 iterations × 2 epochs × 2 minibatches
    assert all(np.isfinite(s["exp_avg"].numpy()).all() for o in learner.optimizers.values() for s in o.state.values())


def test_weights_lie_where_those_of_a_trained_model_do(run):
    """In torch's own memory, which is aligned; a mapped file begins anywhere, and the last bits depend on it."""
    models = WarmModels(run.store, run.config.execution)
    state = run.state(1)
    for model in (models.actor(state.actor, Reading(False, True)), models.critic(state.critic),
                  models.reward_model(state.reward_model)):
        assert {weight.data_ptr() % 64 for weight in model.module.parameters()} == {0}
