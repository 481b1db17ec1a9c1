"""The update: ratio 1 at the start, gradients however a minibatch is cut, and what stops it."""

import copy
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

from schemas.config import PPOConfig
from schemas.errors import NonFiniteError
from schemas.tables import Advantages, Values
from stages.ops.learner import LanguageModelLearner
from stages.ops.optim import load_state_tensors, state_tensors
from stages.ppo import ppo
from stages.value import value

TEMPERATURE = 0.8


@pytest.fixture
def learner(tiny_model, tiny_critic):
    def make(micro_batch_tokens=4096, **settings):
        config = PPOConfig(**{"epochs": 2, "minibatches": 3, "learning_rate": 1e-3, "critic_learning_rate": 1e-3} | settings)
        actor, critic = (replace(m, module=copy.deepcopy(m.module), micro_batch_tokens=micro_batch_tokens)
                         for m in (tiny_model, tiny_critic))
        return LanguageModelLearner(actor, critic, config, TEMPERATURE)
    return make


@pytest.fixture
def tables(rollouts, tiny_critic):
    """Values of the critic, and advantages and returns drawn at random."""
    values, random = value(tiny_critic, rollouts), np.random.default_rng(3)
    draw = lambda: rollouts.logprobs.with_values(random.normal(size=len(rollouts.logprobs.values)).astype(np.float32))  # noqa: E731
    return values, Advantages(row_id=rollouts.row_id, kl=draw(), rewards=draw(), advantages=draw(), returns=draw())


def test_ratio_is_1_before_the_first_step(learner, rollouts, tables):
    metrics = ppo(learner(epochs=1, minibatches=1), rollouts, *tables, PPOConfig(epochs=1, minibatches=1), seed=0)
    assert abs(metrics.ratio_min - 1) < 1e-5 and abs(metrics.ratio_max - 1) < 1e-5
    assert metrics.approx_kl < 1e-9 and metrics.clip_fraction == 0 and metrics.steps == 1


def test_losses_of_the_first_step_equal_loops_over_tokens(learner, rollouts, tables):
    values, advantages = tables
    metrics = ppo(learner(), rollouts, values, advantages, PPOConfig(epochs=1, minibatches=1), seed=0)
    policy = [oracles.policy_loss(lp, lp, a, 0.2, 0.2)
              for lp, a in zip(rollouts.logprobs.values, advantages.advantages.values, strict=True)]
    value_ = [oracles.value_loss(v, v, g, 0.2) for v, g in zip(values.values.values, advantages.returns.values, strict=True)]
    np.testing.assert_allclose(metrics.policy_loss, np.mean(policy), atol=1e-5)
    np.testing.assert_allclose(metrics.value_loss, np.mean(value_), rtol=1e-4)


def test_values_are_read_where_tokens_are_predicted(rollouts, tiny_critic):
    """By a loop over rows without padding."""
    values = value(tiny_critic, rollouts)
    for row in range(len(rollouts)):
        ids = torch.tensor(np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]])[None]).long()
        with torch.inference_mode():
            states = tiny_critic.module.score(tiny_critic.module.transformer(input_ids=ids).last_hidden_state)[0, :, 0]
        start = len(rollouts.prompt_tokens[row]) - 1
        np.testing.assert_allclose(values.values[row], states[start:-1], atol=2e-6)
        np.testing.assert_allclose(values.bootstrap[row], states[-1], atol=2e-6)


def test_however_a_minibatch_is_cut_the_gradient_is_the_same(learner, rollouts, tables):
    def weights(budget):
        trained = learner(budget, epochs=1, minibatches=1, entropy_coef=0.01)
        ppo(trained, rollouts, *tables, PPOConfig(epochs=1, minibatches=1, entropy_coef=0.01), seed=0)
        return [first_moment for m in (trained.actor, trained.critic)
                for first_moment in gradients(trained, m)]

    def gradients(trained, model):
        optimizer = trained.optimizers["actor" if model is trained.actor else "critic"]
        return [state["exp_avg"].clone() for state in optimizer.state.values()]  # 0.1 × the clipped gradient

    whole = weights(4096)
    for budget in (1, 60, 120):
        for a, b in zip(whole, weights(budget), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-7)


def test_the_gradient_is_that_of_a_mean_over_tokens(learner, rollouts, tables):
    """Against autograd of a loop over rows without padding: the first moment is a tenth of the gradient."""
    values, advantages = tables
    config = PPOConfig(epochs=1, minibatches=1, max_grad_norm=1e9)
    trained, naive = learner(epochs=1, minibatches=1, max_grad_norm=1e9), learner()
    ppo(trained, rollouts, values, advantages, config, seed=0)
    total = 0.0
    for row in range(len(rollouts)):
        ids = torch.tensor(np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]])[None]).long()
        start = len(rollouts.prompt_tokens[row]) - 1
        logprobs = (naive.actor.module(input_ids=ids).logits[0, start:-1] / TEMPERATURE).log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, start + 1 :, None])[:, 0]
        ratio = (chosen - torch.tensor(rollouts.logprobs[row])).exp()
        total = total - (ratio * torch.tensor(advantages.advantages[row])).sum()  # nothing is clipped at ratio 1
    (total / len(rollouts.logprobs.values)).backward()
    for ours, theirs in zip(trained.actor.module.parameters(), naive.actor.module.parameters(), strict=True):
        found = trained.optimizers["actor"].state[ours]["exp_avg"] * 10
        torch.testing.assert_close(found, theirs.grad, rtol=2e-3, atol=2e-6)


def test_clipped_losses_in_the_stage_equal_loops_over_tokens(learner, rollouts, tables):
    """With old logprobs and old values moved away, so that every clip is at work, and an asymmetric range."""
    values, advantages = tables
    random = np.random.default_rng(8)
    move = lambda column, by: column.with_values((column.values + random.choice([-by, by], len(column.values))).astype(np.float32))  # noqa: E731, E501
    old, old_values = move(rollouts.logprobs, 0.5), move(values.values, 1.0)
    config = PPOConfig(epochs=1, minibatches=1, clip_range_low=0.1, clip_range_high=0.3, value_clip_range=0.25)
    metrics = ppo(learner(), replace(rollouts, logprobs=old), replace(values, values=old_values), advantages, config, seed=0)
    tokens = list(zip(rollouts.logprobs.values, old.values, advantages.advantages.values, values.values.values,
                      old_values.values, advantages.returns.values, strict=True))
    policy = np.mean([oracles.policy_loss(lp, o, a, 0.1, 0.3) for lp, o, a, *_ in tokens])
    value_ = np.mean([oracles.value_loss(v, o, g, 0.25) for *_, v, o, g in tokens])
    np.testing.assert_allclose([metrics.policy_loss, metrics.value_loss], [policy, value_], rtol=1e-4)
    assert metrics.clip_fraction == 1
    np.testing.assert_allclose([metrics.ratio_min, metrics.ratio_max], [np.exp(-0.5), np.exp(0.5)], rtol=1e-4)


def test_the_update_raises_what_was_good_and_lowers_what_was_bad(learner, rollouts, tables):
    values, advantages = tables
    trained = learner()
    before = trained.actor
    ppo(trained, rollouts, values, advantages, PPOConfig(epochs=2, minibatches=3), seed=0)
    from stages.ops.models import score_tokens
    change = score_tokens(before, rollouts, TEMPERATURE, "test").values - rollouts.logprobs.values
    assert np.corrcoef(change, advantages.advantages.values)[0, 1] > 0.1


def test_target_kl_ends_the_update(learner, rollouts, tables):
    config = PPOConfig(epochs=50, minibatches=1, learning_rate=0.01, target_kl=0.01)
    metrics = ppo(learner(learning_rate=0.01), rollouts, *tables, config, seed=0)
    assert metrics.steps < 50 and metrics.approx_kl_final > 0.01


def test_the_same_seed_gives_the_same_weights_and_another_does_not(learner, rollouts, tables):
    def weights(seed):
        trained = learner()
        ppo(trained, rollouts, *tables, PPOConfig(epochs=2, minibatches=3), seed=seed)
        return torch.cat([p.flatten() for p in trained.actor.module.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_optimizer_state_survives_being_saved(learner, rollouts, tables):
    trained, fresh = learner(), learner()
    ppo(trained, rollouts, *tables, PPOConfig(epochs=2, minibatches=3), seed=0)
    tensors = {name: tensor.clone() for name, tensor in
               state_tensors(trained.optimizers["actor"], trained.actor.module).items()}
    load_state_tensors(fresh.optimizers["actor"], fresh.actor.module, dict(tensors))
    again = state_tensors(fresh.optimizers["actor"], fresh.actor.module)
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    with pytest.raises(KeyError):
        load_state_tensors(fresh.optimizers["actor"], fresh.actor.module, tensors | {"extra.step": torch.zeros(())})


def test_an_infinite_advantage_stops_the_update_with_its_row(learner, rollouts, tables):
    values, advantages = tables
    flat = advantages.advantages.values.copy()
    flat[rollouts.response_tokens.offsets[4]] = np.inf
    broken = replace(advantages, advantages=rollouts.logprobs.with_values(flat))
    with pytest.raises(NonFiniteError, match=r"the loss is (inf|-inf|nan) in row 4"):
        ppo(learner(), rollouts, values, broken, PPOConfig(epochs=1, minibatches=1), seed=0)


def test_misaligned_values_are_refused(learner, rollouts, tables):
    from schemas.errors import TableError
    values, advantages = tables
    wrong = Values(row_id=values.row_id + 1, values=values.values, bootstrap=values.bootstrap)
    with pytest.raises(TableError, match="row_id"):
        ppo(learner(), rollouts, wrong, advantages, PPOConfig(), seed=0)
