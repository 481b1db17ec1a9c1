"""KL, shaped rewards, advantages: against naive loops and numbers worked by hand, over ragged rows."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import NonFiniteError, TableError
from schemas.settings import GAEConfig, KLConfig
from schemas.tables import Ragged, ReferenceLogprobs, Rewards, Rollouts, Values
from stages.gae import gae, metrics
from stages.ops.advantages import (
    centred,
    equal_groups,
    gae_advantages,
    grpo_advantages,
    length_adaptive_lambda,
    rewards_to_go,
    rloo_advantages,
    whiten,
)
from stages.ops.kl import adapted_kl_coef, kl_estimate
from stages.ops.learning_signal import of_advantages, of_components, of_policy

NUMBERS = st.floats(-5, 5, width=32)
ROWS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=7), min_size=1, max_size=5)


def rows(data, i):
    return Ragged.from_rows([np.array([step[i] for step in row]) for row in data], np.float64)


@given(ROWS, st.floats(0.1, 1), st.floats(0, 1), NUMBERS)
def test_advantages_equal_the_sum_written_out(data, gamma, lam, bootstrap):
    ours = gae_advantages(rows(data, 0), rows(data, 1), np.full(len(data), bootstrap), gamma, lam)
    for row, found in zip(data, ours, strict=True):
        expected = oracles.gae([r for r, _ in row], [v for _, v in row], bootstrap, gamma, lam)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_advantages_by_hand():
    """γ = ½, λ = ½: δ = (1 + ½·4 − 2, 3 − 4) = (1, −1); A = (1 − ¼, −1)."""
    ours = gae_advantages(Ragged.from_rows([np.array([1.0, 3.0])], np.float64),
                          Ragged.from_rows([np.array([2.0, 4.0])], np.float64), np.zeros(1), 0.5, 0.5)
    assert ours.values.tolist() == [0.75, -1.0]


@given(ROWS, ROWS)
def test_one_batch_with_an_internal_end_equals_two_batches(first, second):
    def advantages(data):
        return gae_advantages(rows(data, 0), rows(data, 1), np.zeros(len(data)), 0.99, 0.95).values

    np.testing.assert_array_equal(advantages(first + second), np.concatenate([advantages(first), advantages(second)]))


@given(st.lists(NUMBERS, min_size=2, max_size=40).filter(lambda x: np.std(x) > 1e-2))
def test_whitened_values_have_mean_0_and_variance_1(values):
    white = whiten(np.array(values, np.float64))
    assert abs(white.mean()) < 1e-9
    assert abs(white.var(ddof=1) - 1) < 1e-3
    np.testing.assert_allclose(white, oracles.whiten(values), atol=1e-9)


@given(st.lists(NUMBERS, min_size=2, max_size=40).filter(lambda x: np.std(x) > 1e-2), st.booleans(), st.booleans())
def test_whitening_with_and_without_shift_biased_and_unbiased(values, shift, unbiased):
    ours = whiten(np.array(values, np.float64), shift=shift, unbiased=unbiased)
    np.testing.assert_allclose(ours, oracles.whiten(values, shift, unbiased), atol=1e-9)


def test_advantages_equal_torchrls():
    """Ragged rows, the last cut and bootstrapped, laid end to end with `done` flags (torchrl.objectives)."""
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    random, lengths = np.random.default_rng(0), [1, 5, 3, 1, 8]
    rewards, values = (Ragged.from_rows([random.normal(size=n) for n in lengths], np.float64) for _ in range(2))
    bootstrap = np.array([0, 0, 0, 0, 1.7])
    ends = np.cumsum(lengths) - 1
    after = np.append(values.values[1:], 0)
    after[ends] = bootstrap
    done, terminated = np.zeros(sum(lengths), bool), np.zeros(sum(lengths), bool)
    done[ends], terminated[ends[:-1]] = True, True
    column = lambda x: torch.from_numpy(np.asarray(x))[None, :, None]  # noqa: E731
    theirs, targets = generalized_advantage_estimate(
        0.97, 0.9, *(column(x) for x in (values.values, after, rewards.values, done, terminated)))
    ours = gae_advantages(rewards, values, bootstrap, 0.97, 0.9)
    np.testing.assert_allclose(ours.values, theirs.flatten(), atol=1e-6)  # its γ is float32
    np.testing.assert_allclose(ours.values + values.values, targets.flatten(), atol=1e-6)


@given(ROWS, st.floats(0.1, 1))
def test_rewards_to_go_by_summing(data, gamma):
    for row, found in zip(data, rewards_to_go(rows(data, 0), gamma), strict=True):
        expected = [sum(gamma ** (k - t) * row[k][0] for k in range(t, len(row))) for t in range(len(row))]
        np.testing.assert_allclose(found, expected, atol=1e-9)


COMPARED = st.lists(st.lists(NUMBERS, min_size=2, max_size=5), min_size=1, max_size=4)


@given(COMPARED, st.randoms(use_true_random=False))
def test_comparisons_within_a_prompt_one_response_at_a_time(data, random):
    """In whatever order the responses of several prompts lie."""
    pairs = [(r, group) for group, returns in enumerate(data) for r in returns]
    random.shuffle(pairs)
    returns, groups = (list(x) for x in zip(*pairs, strict=True))
    for name, ours in (("grpo", grpo_advantages), ("rloo", rloo_advantages), ("reinforce++-baseline", centred)):
        found = ours(np.array(returns, np.float64), np.array(groups) * 7)
        np.testing.assert_allclose(found, oracles.group_advantages(returns, groups, name), rtol=1e-6, atol=1e-6)
        for group in set(groups):
            assert abs(found[np.array(groups) == group].sum()) < 1e-3
    assert equal_groups(np.array(returns), np.array(groups)) == np.mean([len(set(returns)) == 1 for returns in data])


def test_comparisons_by_hand():
    """Responses 1, 2, 6 to one prompt: mean 3, σ √7; the others average 4, 3½, 1½."""
    returns, groups = np.array([1.0, 2.0, 6.0]), np.zeros(3)
    np.testing.assert_allclose(grpo_advantages(returns, groups), np.array([-2, -1, 3]) / math.sqrt(7), rtol=1e-6)
    np.testing.assert_allclose(rloo_advantages(returns, groups), [-3, -1.5, 4.5])
    np.testing.assert_allclose(centred(returns, groups), [-2, -1, 3])


def test_length_adaptive_lambda_by_hand():
    """α = 0.05: R = 100 gives 1 − 1/5; R = 20 gives 0, and nothing shorter less."""
    np.testing.assert_allclose(length_adaptive_lambda(np.array([100, 40, 20, 1]), 0.05), [0.8, 0.5, 0, 0])


@given(st.floats(-6, -0.01), st.floats(-6, -0.01), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimators_by_their_definition(logprob, reference, estimator):
    ours = kl_estimate(torch.tensor(reference - logprob, dtype=torch.float64), estimator).item()
    assert math.isclose(ours, oracles.kl(logprob, reference, estimator), rel_tol=1e-9, abs_tol=1e-9)


P, Q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()


def test_kl_estimators_in_expectation():
    """Over tokens drawn from π, k1 and k3 average to KL(π‖π_ref), by summing over the distribution itself."""
    exact = (P * (P / Q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((P * kl_estimate((Q / P).log(), estimator)).sum(), exact)


def test_gradients_of_kl_estimators_in_expectation():
    """As a loss on the policy's own samples: k1's gradient is 0, k2's that of KL(π‖π_ref), k3's that of KL(π_ref‖π)."""
    def gradient(loss):
        logits = P.log().clone().requires_grad_()
        return torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]

    def as_loss(estimator):
        return gradient(lambda logprobs: (P * kl_estimate(Q.log() - logprobs, estimator)).sum())

    torch.testing.assert_close(as_loss("k1"), torch.zeros(3).double())
    torch.testing.assert_close(as_loss("k2"), gradient(lambda lp: (lp.exp() * (lp - Q.log())).sum()))
    torch.testing.assert_close(as_loss("k3"), gradient(lambda lp: (Q * (Q.log() - lp)).sum()))


@pytest.mark.parametrize("kl, expected", [
    (6.6, 0.05 * (1 + 0.1 * 128 / 1000)), (6, 0.05), (3, 0.05 * (1 - 0.2 * 128 / 1000)),
    (60, 0.05 * (1 + 0.2 * 128 / 1000))])
def test_the_adaptive_coefficient_by_hand(kl, expected):
    """10% off the target moves β by 10% · 128/1000; further off than 20% counts as 20%."""
    assert math.isclose(adapted_kl_coef(0.05, kl, 128, KLConfig(target=6, horizon=1000)), expected)
    assert adapted_kl_coef(0.05, kl, 128, KLConfig()) == 0.05


def make(logprobs, reference, score, values, finish=None, bootstrap=None, prompt_id=None):
    lengths = [np.zeros(len(row), np.int32) for row in logprobs]
    ids = np.arange(len(logprobs))
    flat = lambda data: Ragged.from_rows([np.array(row) for row in data], np.float32)  # noqa: E731
    rollouts = Rollouts(row_id=ids, prompt_id=np.array(prompt_id or ids), prompt=("",) * len(ids), response=("",) * len(ids),
                        prompt_tokens=Ragged.from_rows(lengths, np.int32),
                        response_tokens=Ragged.from_rows(lengths, np.int32), logprobs=flat(logprobs),
                        finish_reason=finish or ("eos",) * len(ids))
    rewards = Rewards(row_id=ids, raw_score=np.float32(score), score=np.float32(score), components={"x": np.float32(score)})
    return (rollouts, ReferenceLogprobs(row_id=ids, logprobs=flat(reference)), rewards,
            Values(row_id=ids, values=flat(values), bootstrap=np.float32(bootstrap or [0] * len(ids))))


def test_the_stage_by_hand():
    """Two tokens, β = ½, γ = λ = 1, V = (1, 2): kl = (1, −1), r = (−½, ½ + 3), returns = (3, 3½), A = (2, 1½)."""
    tables = make([[-1, -2]], [[-2, -1]], [3], [[1, 2]])
    out = gae(*tables, GAEConfig(gae_lambda=1, whiten="none"), KLConfig(), kl_coef=0.5)
    assert out.kl.values.tolist() == [1, -1]
    assert out.rewards.values.tolist() == [-0.5, 3.5]
    assert out.advantages.values.tolist() == [2, 1.5]
    assert out.returns.values.tolist() == [3, 3.5]
    measured = metrics(out, tables[0], tables[3], GAEConfig(), kl_coef=0.5)
    assert (measured.kl, measured.kl_per_token, measured.reward) == (0, 0, 3)
    assert math.isclose(measured.explained_variance, 0)  # the errors vary as much as the returns


def test_the_discount_reaches_the_stage():
    """γ = ½, λ = 1, V = (1, 2), score 4: A = (½·4 − 1, 4 − 2), to go (2, 4)."""
    tables = make([[-1, -1]], [[-1, -1]], [4], [[1, 2]])
    for estimator, values, expected in (("gae", tables[3], [1, 2]), ("reinforce++", None, [2, 4])):
        config = GAEConfig(estimator=estimator, gamma=0.5, gae_lambda=1, whiten="none")
        assert gae(*tables[:3], values, config, KLConfig(), kl_coef=0).advantages.values.tolist() == expected


def test_moments_and_explained_variance_by_hand():
    """A = (2, 0, 1), returns (3, 1, 2), V = (1, 1, 1): the errors vary as the returns. With V = (2, 0, 2) they are
    (1, 1, 0), variance 2/9 of the returns' 2/3."""
    tables = make([[-1], [-1], [-1]], [[-1], [-1], [-1]], [3, 1, 2], [[1], [1], [1]])
    measured = metrics(gae(*tables, GAEConfig(), KLConfig(), kl_coef=0), tables[0], tables[3], GAEConfig(), kl_coef=0)
    np.testing.assert_allclose(
        [measured.advantage_mean, measured.advantage_std, measured.return_mean, measured.return_std,
         measured.explained_variance], [1, np.sqrt(2 / 3), 2, np.sqrt(2 / 3), 0], atol=1e-7)
    tables = make([[-1], [-1], [-1]], [[-1], [-1], [-1]], [3, 1, 2], [[2], [0], [2]])
    measured = metrics(gae(*tables, GAEConfig(), KLConfig(), kl_coef=0), tables[0], tables[3], GAEConfig(), kl_coef=0)
    np.testing.assert_allclose(measured.explained_variance, 1 - (2 / 9) / (2 / 3))


def test_kl_to_itself_is_0_and_whitening_covers_the_batch():
    logprobs = [[-1, -2, -0.5], [-3]]
    out = gae(*make(logprobs, logprobs, [1, -1], [[0, 0, 0], [0]]), GAEConfig(), KLConfig(), kl_coef=0.1)
    assert not out.kl.values.any()
    assert abs(out.advantages.values.mean()) < 1e-6 and abs(out.advantages.values.var(ddof=1) - 1) < 1e-5
    assert out.returns.values[-1] == -1  # before whitening


def test_a_cut_response_ends_unless_it_is_bootstrapped():
    tables = make([[-1], [-1]], [[-1], [-1]], [1, 1], [[0], [0]], finish=("length", "eos"), bootstrap=[10, 10])
    plain = gae(*tables, GAEConfig(whiten="none"), KLConfig(), kl_coef=0)
    carried = gae(*tables, GAEConfig(whiten="none", truncation="bootstrap"), KLConfig(), kl_coef=0)
    assert plain.advantages.values.tolist() == [1, 1]
    assert carried.advantages.values.tolist() == [11, 1]


def test_rewards_are_whitened_without_shift_before_anything_else():
    tables = make([[-1, -1], [-1]], [[-1, -2], [-1]], [3, 1], [[0, 0], [0]])
    out = gae(*tables, GAEConfig(whiten="none", whiten_rewards=True, whiten_unbiased=False), KLConfig(), kl_coef=0.5)
    np.testing.assert_allclose(out.rewards.values, oracles.whiten([0, 2.5, 1], shift=False, unbiased=False), rtol=1e-6)


def test_the_critic_has_a_lambda_of_its_own():
    """δ = (−1, 3): λ = 0 gives A = (−1, 3); λ_critic = 1 gives A = (2, 3), so returns (3, 3) = the reward to go."""
    tables = make([[-1, -1]], [[-1, -1]], [3], [[1, 0]])
    out = gae(*tables, GAEConfig(whiten="none", gae_lambda=0, critic_lambda=1), KLConfig(), kl_coef=0)
    assert out.advantages.values.tolist() == [-1, 3] and out.returns.values.tolist() == [3, 3]


def test_length_adaptive_lambda_in_the_stage():
    """α = 1: a response of one token has λ = 0, one of two tokens ½."""
    tables = make([[-1], [-1, -1]], [[-1], [-1, -1]], [1, 1], [[0], [0, 0]])
    out = gae(*tables, GAEConfig(whiten="none", length_adaptive_alpha=1), KLConfig(), kl_coef=0)
    assert out.advantages.values.tolist() == [1, 0.5, 1]


@pytest.mark.parametrize("estimator, expected", [
    ("grpo", [-0.7071, -0.7071, 0.7071]), ("rloo", [-3, -3, 3]), ("reinforce++-baseline", [-1.5, -1.5, 1.5]),
    ("reinforce++", [1, 0.5, 4])])
def test_estimators_without_a_critic_by_hand(estimator, expected):
    """Two responses to one prompt: r = (½, ½) and (4), so R = 1 and 4, with β = ½ and KL (−1, 1) and 0."""
    tables = make([[-2, -1], [-1]], [[-1, -2], [-1]], [1, 4], [[0, 0], [0]], prompt_id=[5, 5])[:3]
    out = gae(*tables, None, GAEConfig(estimator=estimator, whiten="none"), KLConfig(), kl_coef=0.5)
    np.testing.assert_allclose(out.advantages.values, expected, atol=1e-4)
    assert out.returns.values.tolist() == [1, 0.5, 4]
    measured = metrics(out, tables[0], None, GAEConfig(estimator=estimator), kl_coef=0.5, scores=np.array([1.0, 4.0]))
    assert measured.explained_variance is None and measured.equal_groups == (None if estimator == "reinforce++" else 0)


def test_a_kl_in_the_loss_is_not_in_the_reward_but_measured():
    tables = make([[-1, -2]], [[-2, -2]], [3], [[0, 0]])
    out = gae(*tables, GAEConfig(whiten="none"), KLConfig(placement="loss", estimator="k2"), kl_coef=0.5)
    assert out.rewards.values.tolist() == [0, 3] and out.kl.values.tolist() == [0.5, 0]


def test_misaligned_rows_and_infinite_values_are_refused():
    rollouts, reference, rewards, values = make([[-1, -1]], [[-1, -1]], [1], [[0, 0]])
    with pytest.raises(TableError):
        gae(rollouts, make([[-1]], [[-1]], [1], [[0]])[1], rewards, values, GAEConfig(), KLConfig(), kl_coef=0.1)
    bad = make([[-1, -1]], [[-1, -1]], [1], [[0, np.inf]])[3]
    with pytest.raises(NonFiniteError, match=r"the advantage is .* in row 0"):
        gae(rollouts, reference, rewards, bad, GAEConfig(), KLConfig(), kl_coef=0.1)


def test_groups_are_equal_by_their_scores():
    """With the KL in the reward the sums of equal scores differ, and so do the advantages: it is said."""
    tables = make([[-1], [-2], [-1], [-1]], [[-1], [-1], [-1], [-2]], [3, 3, 1, 2], [[0]] * 4, prompt_id=[0, 0, 1, 1])[:3]
    config, kl = GAEConfig(estimator="grpo"), KLConfig()
    out = gae(*tables, None, config, kl, kl_coef=0.5)
    assert (out.raw_advantages.values[:2] != 0).all()
    measured = metrics(out, tables[0], None, config, kl_coef=0.5, scores=tables[2].score)
    assert (measured.equal_groups, measured.kl_coef) == (0.5, 0.5)
    (line,) = of_advantages(out.raw_advantages.values, measured.equal_groups, config, kl)
    assert "in 50% of the groups all responses have one score" in line and "kl.placement: loss leaves them at 0" in line
    assert not list(of_advantages(out.raw_advantages.values, 0.5, config, KLConfig(placement="loss", estimator="k2")))
    assert list(of_advantages(np.zeros(4), 1.0, config, kl)) == [
        "all 4 advantages are 0: the update has nothing to learn from"]


def test_components_and_policies_without_signal():
    assert list(of_components({"a": np.ones(3), "b": np.array([1.0, 2, 1]), "c": np.ones(1)})) == [
        "the component 'a' is 1 for all 3 responses: it does not say which of them is better"]
    (line,) = of_policy(np.log(300) * 0.9995, 300)
    assert "its entropy of 5.701 nats is that of 300 equally likely tokens" in line
    assert not list(of_policy(5.0, 300)) and not list(of_policy(None, 300))


def test_an_empty_row_takes_nothing_from_its_neighbours():
    """Lengths 2, 0, 3: δ_t = r + γV_{t+1} − V_t by hand, λ = 0."""
    offsets = np.array([0, 2, 2, 5])
    rewards, values = Ragged(np.zeros(5), offsets), Ragged(np.array([1, 2, 3, 4, 5], np.float32), offsets)
    found = gae_advantages(rewards, values, np.array([7.0, 9.0, 11.0]), 1.0, 0.0)
    assert found.values.tolist() == [1, 5, 1, 1, 6]
