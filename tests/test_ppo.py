"""The update: ratio 1 at the start, gradients however a minibatch is cut, and what stops it."""

import copy
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import NonFiniteError
from schemas.language import RolloutConfig
from schemas.settings import PPOConfig
from schemas.tables import Advantages, Ragged, ReferenceLogprobs, Rollouts, Values
from stages.ops.distribution import Distribution
from stages.ops.language_learner import LanguageModelLearner, Responses
from stages.ops.optim import learning_rate_factor, load_state_tensors, state_tensors
from stages.ops.prompts import demonstrations_as_texts
from stages.ops.sampling import ModelSampler
from stages.ops.token_logprobs import entropy_of, score_tokens
from stages.ppo import KLLoss, ppo
from stages.rollout import rollout
from stages.value import value

TEMPERATURE = 0.8


@pytest.fixture
def learner(tiny_model, tiny_critic):
    def make(micro_batch_tokens=4096, **settings):
        config = PPOConfig(**{"epochs": 2, "minibatches": 3, "learning_rate": 1e-3, "critic_learning_rate": 1e-3} | settings)
        actor, critic = (replace(m, module=copy.deepcopy(m.module), micro_batch_tokens=micro_batch_tokens)
                         for m in (tiny_model, tiny_critic))
        return LanguageModelLearner(actor, critic, config, Distribution(TEMPERATURE))
    return make


@pytest.fixture
def tables(rollouts, tiny_critic):
    """Values of the critic, and advantages and returns drawn at random."""
    values, random = value(tiny_critic, rollouts), np.random.default_rng(3)
    draw = lambda: rollouts.logprobs.with_values(random.normal(size=len(rollouts.logprobs.values)).astype(np.float32))  # noqa: E731
    return values, Advantages(row_id=rollouts.row_id, kl=draw(), rewards=draw(), raw_advantages=draw(),
                              advantages=draw(), returns=draw())


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


EVERYTHING = dict(entropy_coef=0.01, dual_clip=3.0, value_coef=0.5, ptx_coef=0.3, ptx_batch_size=8,
                  recompute_old_logprobs=True, importance_cap=1.0001)


class Pieces(Responses):
    """Cuts every minibatch into so many micro-batches."""

    parts = 1

    def micro_batches(self, which):
        return [batch for part in np.array_split(which, self.parts) for batch in super(Pieces, self).micro_batches(part)]


class Cut(LanguageModelLearner):
    def units(self, rollouts):
        return Pieces(rollouts, self.actor)


@pytest.fixture
def eight(tiny_model, tiny_critic):
    """Eight rollouts, sampled in bfloat16, with everything an update can be given."""
    prompts = ["The soup", "The film The Salt Road", "A night at Villa Rosa", "My copy", "The choir at Saint Agnes", "Our",
               "The pancakes at the Blue Lamp", "The quartet"]
    config = RolloutConfig(max_new_tokens=12, temperature=TEMPERATURE, precision="bfloat16")
    rollouts = rollout(ModelSampler(tiny_model), prompts, np.arange(8), config, seed=2)
    random = np.random.default_rng(3)
    draw = lambda: rollouts.logprobs.with_values(random.normal(size=len(rollouts.logprobs.values)).astype(np.float32))  # noqa: E731
    advantages = Advantages(row_id=rollouts.row_id, kl=draw(), rewards=draw(), raw_advantages=draw(), advantages=draw(),
                            returns=draw())
    reference = ReferenceLogprobs(row_id=rollouts.row_id, logprobs=rollouts.logprobs.with_values(
        rollouts.logprobs.values + 0.3 * draw().values))
    texts = demonstrations_as_texts(tiny_model.tokenizer, [{"prompt": text, "completion": " was warm."} for text in prompts],
                                    chat_template=False)
    return rollouts, value(tiny_critic, rollouts), advantages, {"kl_loss": KLLoss(reference, 0.2, "k3"), "texts": texts}


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_1x8_2x4_and_8x1_micro_batches_give_one_gradient(learner, eight, aggregation, monkeypatch):
    """With every loss at work: policy, value, entropy, KL, texts, importance weights."""
    rollouts, values, advantages, more = eight
    config = PPOConfig(epochs=1, minibatches=1, max_grad_norm=1e9, loss_aggregation=aggregation, **EVERYTHING)

    def gradients(parts):
        made = learner()
        trained = Cut(made.actor, made.critic, config, Distribution(TEMPERATURE))
        monkeypatch.setattr(Pieces, "parts", parts)
        metrics = ppo(trained, rollouts, values, advantages, config, seed=0, **more)
        return metrics, [state["exp_avg"] for o in trained.optimizers.values() for state in o.state.values()]

    first, whole = gradients(1)
    assert first.importance_cap_fraction > 0 and first.ptx_loss > 0 and first.kl_loss > 0
    for parts in (2, 8):
        metrics, pieces = gradients(parts)
        for a, b in zip(whole, pieces, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(list(metrics.flat().values()), list(first.flat().values()), rtol=1e-4, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=6), st.integers(1, 80), st.randoms())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padding_and_sharding_change_nothing(tiny_model, tiny_critic, lengths, budget, random):
    """Logprobs and values of ragged rows, down to one token: alone, and with others in any order and any budget."""
    def made(order):
        draw = lambda row, n: np.random.default_rng([row, n]).integers(3, 320, n)  # noqa: E731
        ragged = lambda which: Ragged.from_rows([draw(i, lengths[i][which]) for i in order], np.int32)  # noqa: E731
        n = len(order)
        responses = ragged(1)
        return Rollouts(row_id=np.arange(n), prompt_id=np.arange(n), prompt=("",) * n, response=("",) * n,
                        prompt_tokens=ragged(0), response_tokens=responses, finish_reason=("eos",) * n,
                        logprobs=responses.with_values(np.zeros(len(responses.values), np.float32)))

    order = list(range(len(lengths)))
    random.shuffle(order)
    small = [replace(m, micro_batch_tokens=budget) for m in (tiny_model, tiny_critic)]
    together, theirs = score_tokens(small[0], made(order), Distribution(TEMPERATURE), "test"), value(small[1], made(order))
    for place, row in enumerate(order):
        alone = made([row])
        single = score_tokens(tiny_model, alone, Distribution(TEMPERATURE), "test")[0]
        np.testing.assert_allclose(together[place], single, atol=5e-6)
        np.testing.assert_allclose(theirs.values[place], value(tiny_critic, alone).values[0], atol=5e-6)


def test_the_mean_over_sequences(learner, rollouts, tables):
    """The gradient with loss_aggregation=sequence is the mean of those of updates on each response alone."""
    values, advantages = tables
    config = PPOConfig(epochs=1, minibatches=1, max_grad_norm=1e9, loss_aggregation="sequence")

    def gradient(rows):
        trained, table = learner(max_grad_norm=1e9), take(rollouts, rows)
        ppo(trained, table, take(values, rows), take(advantages, rows), config, seed=0)
        return torch.cat([state["exp_avg"].flatten() for o in trained.optimizers.values() for state in o.state.values()])

    single = torch.stack([gradient([row]) for row in range(len(rollouts))]).mean(0)
    torch.testing.assert_close(gradient(range(len(rollouts))), single, rtol=1e-3, atol=1e-6)


def take(table, rows):
    """Those rows of a table."""
    rows = np.array(rows)
    return table.only(rows, table.row_id[rows])


def test_a_critic_warm_up_leaves_the_actor_untouched(learner, rollouts, tables):
    trained = learner(entropy_coef=0.1)
    before = copy.deepcopy(trained.actor.module.state_dict())
    critic = copy.deepcopy(trained.critic.module.state_dict())
    config = PPOConfig(epochs=2, minibatches=3, entropy_coef=0.1, ptx_coef=1, target_kl=1e-9)
    metrics = ppo(trained, rollouts, *tables, config, seed=0, train_actor=False,
                  texts=demonstrations_as_texts(trained.actor.tokenizer, [{"prompt": "A", "completion": " b"}], False))
    assert all(torch.equal(before[k], v) for k, v in trained.actor.module.state_dict().items())
    assert not all(torch.equal(critic[k], v) for k, v in trained.critic.module.state_dict().items())
    assert not trained.optimizers["actor"].state
    assert metrics.steps == 6 and metrics.policy_loss is None and metrics.value_loss > 0


def test_without_a_critic_only_the_actor_is_trained(learner, rollouts, tables):
    made = learner()
    trained = LanguageModelLearner(made.actor, None, PPOConfig(), Distribution(TEMPERATURE))
    metrics = ppo(trained, rollouts, None, tables[1], PPOConfig(epochs=1, minibatches=1), seed=0)
    assert metrics.value_loss is None and metrics.grad_norm_critic is None and metrics.grad_norm_actor > 0
    assert list(trained.networks) == ["actor"]


def test_a_kl_loss_equals_a_loop_over_tokens(learner, rollouts, tables):
    """At the first step π is π_old, so the penalty is that of the stored logprobs; its gradient pulls to the reference."""
    random = np.random.default_rng(5)
    reference = ReferenceLogprobs(row_id=rollouts.row_id, logprobs=rollouts.logprobs.with_values(
        (rollouts.logprobs.values + random.normal(size=len(rollouts.logprobs.values)) / 3).astype(np.float32)))
    pairs = list(zip(rollouts.logprobs.values, reference.logprobs.values, strict=True))
    for estimator in ("k2", "k3"):
        metrics = ppo(learner(), rollouts, *tables, PPOConfig(epochs=1, minibatches=1), seed=0,
                      kl_loss=KLLoss(reference, 0.7, estimator))
        np.testing.assert_allclose(metrics.kl_loss, np.mean([oracles.kl(*pair, estimator) for pair in pairs]), rtol=1e-3)


def test_importance_weights_of_recomputed_logprobs(learner, rollouts, tables):
    """Rollouts whose stored logprobs are those of another policy: the ratio begins at 1 all the same, and tokens weigh
    min(π_old/π_rollout, C)."""
    values, advantages = tables
    moved = np.random.default_rng(1).normal(size=len(rollouts.logprobs.values)).astype(np.float32) / 2
    sampled = replace(rollouts, logprobs=rollouts.logprobs.with_values(rollouts.logprobs.values - moved))
    config = PPOConfig(epochs=1, minibatches=1, recompute_old_logprobs=True, importance_cap=1.2)
    metrics = ppo(learner(), sampled, values, advantages, config, seed=0)
    weights = np.exp(moved.astype(np.float64))
    assert abs(metrics.ratio_min - 1) < 1e-5 and abs(metrics.ratio_max - 1) < 1e-5
    np.testing.assert_allclose(
        [metrics.importance_weight, metrics.importance_weight_max, metrics.importance_cap_fraction],
        [np.minimum(weights, 1.2).mean(), weights.max(), (weights > 1.2).mean()], rtol=1e-4)
    np.testing.assert_allclose(metrics.policy_loss,
                               np.mean(-np.minimum(weights, 1.2) * advantages.advantages.values), rtol=1e-3)
    plain = ppo(learner(), sampled, values, advantages, PPOConfig(epochs=1, minibatches=1), seed=0)
    assert plain.ratio_max > 1.5 and plain.importance_weight is None


def test_texts_are_mixed_in_with_their_weight(learner, rollouts, tables, tiny_model):
    """With advantages 0, the actor's gradient is ptx_coef times that of the mean of −log π over the texts' tokens."""
    values, advantages = tables
    flat = advantages.advantages.with_values(np.zeros_like(advantages.advantages.values))
    texts = demonstrations_as_texts(tiny_model.tokenizer, [{"prompt": "The soup", "completion": " was warm."}], False)
    config = PPOConfig(epochs=1, minibatches=1, max_grad_norm=1e9, ptx_coef=0.25, ptx_batch_size=3)
    trained, naive = learner(max_grad_norm=1e9), learner()
    metrics = ppo(trained, rollouts, values, replace(advantages, advantages=flat), config, seed=0, texts=texts)
    ids = torch.tensor([*texts.prompt_tokens[0], *texts.response_tokens[0]])[None].long()
    start = len(texts.prompt_tokens[0])
    logprobs = naive.actor.module(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    loss = -logprobs.gather(1, ids[0, start:, None]).mean()
    (0.25 * loss).backward()
    np.testing.assert_allclose(metrics.ptx_loss, loss.item(), rtol=1e-4)
    for ours, theirs in zip(trained.actor.module.parameters(), naive.actor.module.parameters(), strict=True):
        found = trained.optimizers["actor"].state[ours]["exp_avg"] * 10
        torch.testing.assert_close(found, theirs.grad, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("settings, expected", [
    ({}, [1, 1, 1, 1]),
    ({"warmup_iterations": 2}, [1 / 3, 2 / 3, 1, 1]),
    ({"schedule": "linear", "schedule_iterations": 4}, [1, 0.75, 0.5, 0.25]),
    ({"schedule": "cosine", "schedule_iterations": 2}, [1, 0.5, 0, 0]),
    ({"schedule": "linear", "schedule_iterations": 4, "warmup_iterations": 1}, [0.5, 0.75, 0.5, 0.25])])
def test_learning_rate_schedules_by_hand(settings, expected):
    np.testing.assert_allclose([learning_rate_factor(i, PPOConfig(**settings)) for i in range(1, 5)], expected, atol=1e-12)


def test_the_schedule_scales_the_step(learner, rollouts, tables):
    """Adam's first step is as long as the learning rate: a quarter of it moves a quarter as far."""
    def moved(factor):
        trained = learner()
        before = [p.clone() for p in trained.actor.module.parameters()]
        ppo(trained, rollouts, *tables, PPOConfig(epochs=1, minibatches=1), seed=0, learning_rate_factor=factor)
        return torch.cat([(p - b).flatten() for p, b in zip(trained.actor.module.parameters(), before, strict=True)])

    torch.testing.assert_close(moved(0.25), moved(1.0) / 4, rtol=1e-2, atol=1e-7)


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
    assert metrics.clip_fraction == metrics.value_clip_fraction == 1
    taken = [(o - lp < 0) == (a > 0) for lp, o, a, *_ in tokens]  # moved the way its advantage wants
    np.testing.assert_allclose(metrics.clip_fraction_loss, np.mean(taken), atol=1e-6)
    np.testing.assert_allclose([metrics.ratio_min, metrics.ratio_max], [np.exp(-0.5), np.exp(0.5)], rtol=1e-4)
    log_ratios = np.array([lp - o for lp, o, *_ in tokens], np.float64)
    np.testing.assert_allclose([metrics.approx_kl, metrics.approx_kl_k1],
                               [np.mean(np.exp(log_ratios) - 1 - log_ratios), -log_ratios.mean()], rtol=1e-3, atol=1e-5)
    worse = [(o + np.clip(v - o, -0.25, 0.25) - g) ** 2 > (v - g) ** 2 for *_, v, o, g in tokens]
    np.testing.assert_allclose(metrics.value_clip_fraction_loss, np.mean(worse), atol=1e-6)


def test_all_losses_together_equal_a_loop_over_tokens(learner, rollouts, tables):
    """Gradients of actor and critic, with old logprobs and values moved so that every clip is at work: policy with an
    asymmetric and a dual clip, entropy bonus, KL penalty, weighted value loss; case by case, rows without padding."""
    values, advantages = tables
    random, n = np.random.default_rng(8), len(rollouts.logprobs.values)
    moved = lambda column, by: column.with_values((column.values + by * random.normal(size=n)).astype(np.float32))  # noqa: E731
    old, old_values, theirs = moved(rollouts.logprobs, 0.8), moved(values.values, 1.0), moved(rollouts.logprobs, 0.5)
    low, high, dual, near, c_v, c_h, beta = 0.1, 0.3, 1.4, 0.25, 0.4, 0.05, 0.7
    config = PPOConfig(epochs=1, minibatches=1, clip_range_low=low, clip_range_high=high, dual_clip=dual,
                       value_clip_range=near, value_coef=c_v, entropy_coef=c_h, max_grad_norm=1e9)
    trained, naive = learner(max_grad_norm=1e9), learner()
    metrics = ppo(trained, replace(rollouts, logprobs=old), replace(values, values=old_values), advantages, config, seed=0,
                  kl_loss=KLLoss(ReferenceLogprobs(row_id=rollouts.row_id, logprobs=theirs), beta, "k3"))
    total, entropies = 0.0, []
    for row in range(len(rollouts)):
        ids = torch.tensor(np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]])[None]).long()
        start = len(rollouts.prompt_tokens[row]) - 1
        policy = (naive.actor.module(input_ids=ids).logits[0, start:-1] / TEMPERATURE).softmax(-1)
        states = naive.critic.module.score(naive.critic.module.transformer(input_ids=ids).last_hidden_state)[0, start:-1, 0]
        for t, token in enumerate(rollouts.response_tokens[row]):
            p, a = policy[t, token], float(advantages.advantages[row][t])
            ratio, r = p / np.exp(old[row][t]), float(np.exp(theirs[row][t])) / p
            total = total - a * (ratio.clamp(max=1 + high) if a >= 0 else ratio.clamp(1 - low, dual))
            entropies.append(-sum(x * x.log() for x in policy[t]))
            v, o, g = states[t], float(old_values[row][t]), float(advantages.returns[row][t])
            squares = (v - g) ** 2, (o + (v - o).clamp(-near, near) - g) ** 2
            total = total + beta * (r - 1 - r.log()) - c_h * entropies[-1] + c_v * max(squares) / 2
    (total / n).backward()
    np.testing.assert_allclose(metrics.entropy, torch.stack(entropies).mean().item(), rtol=1e-4)
    assert 0 < metrics.dual_clip_fraction < metrics.clip_fraction_loss < metrics.clip_fraction < 1
    for name in ("actor", "critic"):
        pairs = zip(trained.networks[name].module.parameters(), naive.networks[name].module.parameters(), strict=True)
        for ours, wanted in pairs:
            found = trained.optimizers[name].state[ours]["exp_avg"] * 10
            torch.testing.assert_close(found, wanted.grad, rtol=5e-3, atol=5e-6)


def test_entropy_of_a_uniform_distribution_is_log_v():
    torch.testing.assert_close(entropy_of(torch.full((1, 1, 8), -np.log(8.0))), torch.full((1, 1), float(np.log(8.0))))


def test_each_network_has_its_learning_rate_and_its_gradient_its_limit(learner, rollouts, tables):
    """Adam's first step is as long as the learning rate wherever the gradient is far above ε; the first moment is a tenth
    of the clipped gradient."""
    settings = dict(learning_rate=1e-3, critic_learning_rate=3e-3, max_grad_norm=0.01, adam_epsilon=1e-12, weight_decay=0.0)
    trained = learner(**settings)
    before = {name: [p.clone() for p in model.module.parameters()] for name, model in trained.networks.items()}
    ppo(trained, rollouts, *tables, PPOConfig(epochs=1, minibatches=1, **settings), seed=0)
    for name, rate in (("actor", 1e-3), ("critic", 3e-3)):
        moves = [(p - b).abs().max() for p, b in zip(trained.networks[name].module.parameters(), before[name], strict=True)]
        assert abs(max(moves).item() / rate - 1) < 1e-2
        moments = torch.cat([state["exp_avg"].flatten() for state in trained.optimizers[name].state.values()])
        assert abs(moments.norm().item() / 0.001 - 1) < 1e-3
    for optimizer in learner(weight_decay=0.3, adam_epsilon=1e-7).optimizers.values():
        assert (optimizer.defaults["weight_decay"], optimizer.defaults["eps"]) == (0.3, 1e-7)


def test_the_update_raises_what_was_good_and_lowers_what_was_bad(learner, rollouts, tables):
    values, advantages = tables
    trained = learner()
    before = trained.actor
    ppo(trained, rollouts, values, advantages, PPOConfig(epochs=2, minibatches=3), seed=0)
    change = score_tokens(before, rollouts, Distribution(TEMPERATURE), "test").values - rollouts.logprobs.values
    assert np.corrcoef(change, advantages.advantages.values)[0, 1] > 0.1


def test_target_kl_ends_the_update(learner, rollouts, tables):
    """After the first minibatch above it: one step fewer, and it was not reached."""
    settings = dict(minibatches=1, learning_rate=0.01)
    stopped = ppo(learner(**settings), rollouts, *tables, PPOConfig(epochs=50, target_kl=0.01, **settings), seed=0)
    assert 1 < stopped.steps < 50 and stopped.approx_kl_final > 0.01
    before = ppo(learner(**settings), rollouts, *tables, PPOConfig(epochs=stopped.steps - 1, **settings), seed=0)
    assert before.approx_kl_final <= 0.01


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
