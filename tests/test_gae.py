"""KL, shaped rewards, advantages: against naive loops and numbers worked by hand, over ragged rows."""

import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import GAEConfig
from schemas.errors import NonFiniteError, TableError
from schemas.tables import Ragged, ReferenceLogprobs, Rewards, Rollouts, Values
from stages.gae import gae, metrics
from stages.ops.advantages import gae_advantages, whiten
from stages.ops.kl import kl_estimate

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


@given(st.floats(-6, -0.01), st.floats(-6, -0.01), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimators_by_their_definition(logprob, reference, estimator):
    ours = kl_estimate(np.array([logprob]), np.array([reference]), estimator)[0]
    assert math.isclose(ours, oracles.kl(logprob, reference, estimator), rel_tol=1e-9, abs_tol=1e-9)


def test_kl_estimators_in_expectation():
    """Over tokens drawn from π, k1 and k3 average to KL(π‖π_ref), by summing over the distribution itself."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = (p * np.log(p / q)).sum()
    for estimator in ("k1", "k3"):
        assert math.isclose((p * kl_estimate(np.log(p), np.log(q), estimator)).sum(), exact, rel_tol=1e-12)


def make(logprobs, reference, score, values, finish=None, bootstrap=None):
    lengths = [np.zeros(len(row), np.int32) for row in logprobs]
    ids = np.arange(len(logprobs))
    flat = lambda data: Ragged.from_rows([np.array(row) for row in data], np.float32)  # noqa: E731
    rollouts = Rollouts(row_id=ids, prompt_id=ids, prompt=("",) * len(ids), response=("",) * len(ids),
                        prompt_tokens=Ragged.from_rows(lengths, np.int32),
                        response_tokens=Ragged.from_rows(lengths, np.int32), logprobs=flat(logprobs),
                        finish_reason=finish or ("eos",) * len(ids))
    rewards = Rewards(row_id=ids, score=np.float32(score), components={"x": np.float32(score)})
    return (rollouts, ReferenceLogprobs(row_id=ids, logprobs=flat(reference)), rewards,
            Values(row_id=ids, values=flat(values), bootstrap=np.float32(bootstrap or [0] * len(ids))))


def test_the_stage_by_hand():
    """Two tokens, β = ½, γ = λ = 1, V = (1, 2): kl = (1, −1), r = (−½, ½ + 3), returns = (3, 3½), A = (2, 1½)."""
    tables = make([[-1, -2]], [[-2, -1]], [3], [[1, 2]])
    out = gae(*tables, GAEConfig(gae_lambda=1, whiten=False), kl_coef=0.5)
    assert out.kl.values.tolist() == [1, -1]
    assert out.rewards.values.tolist() == [-0.5, 3.5]
    assert out.advantages.values.tolist() == [2, 1.5]
    assert out.returns.values.tolist() == [3, 3.5]
    measured = metrics(out, tables[3], kl_coef=0.5)
    assert (measured.kl, measured.kl_per_token, measured.reward) == (0, 0, 3)
    assert math.isclose(measured.explained_variance, 0)  # the errors vary as much as the returns


def test_kl_to_itself_is_0_and_whitening_covers_the_batch():
    logprobs = [[-1, -2, -0.5], [-3]]
    out = gae(*make(logprobs, logprobs, [1, -1], [[0, 0, 0], [0]]), GAEConfig(), kl_coef=0.1)
    assert not out.kl.values.any()
    assert abs(out.advantages.values.mean()) < 1e-6 and abs(out.advantages.values.var(ddof=1) - 1) < 1e-5
    assert out.returns.values[-1] == -1  # before whitening


def test_a_cut_response_ends_unless_it_is_bootstrapped():
    tables = make([[-1], [-1]], [[-1], [-1]], [1, 1], [[0], [0]], finish=("length", "eos"), bootstrap=[10, 10])
    plain = gae(*tables, GAEConfig(whiten=False), kl_coef=0)
    carried = gae(*tables, GAEConfig(whiten=False, bootstrap_truncated=True), kl_coef=0)
    assert plain.advantages.values.tolist() == [1, 1]
    assert carried.advantages.values.tolist() == [11, 1]


def test_misaligned_rows_and_infinite_values_are_refused():
    rollouts, reference, rewards, values = make([[-1, -1]], [[-1, -1]], [1], [[0, 0]])
    with pytest.raises(TableError):
        gae(rollouts, make([[-1]], [[-1]], [1], [[0]])[1], rewards, values, GAEConfig(), kl_coef=0.1)
    bad = make([[-1, -1]], [[-1, -1]], [1], [[0, np.inf]])[3]
    with pytest.raises(NonFiniteError, match=r"the advantage is .* in row 0"):
        gae(rollouts, reference, rewards, bad, GAEConfig(), kl_coef=0.1)
