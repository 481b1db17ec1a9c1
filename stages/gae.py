"""GAE: KL, shaped rewards, advantages and returns per response token. No model, milliseconds.

r_t = −β·kl_t + [t = R−1]·score,  δ_t = r_t + γ·V_{t+1} − V_t,  A_t = δ_t + γλ·A_{t+1},  returns = A + V,
then A is whitened over the batch (Schulman et al. 2016, https://arxiv.org/abs/1506.02438; the KL reward after
Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, equation 2). A response cut at the length limit ends there,
V_R = 0, unless `bootstrap_truncated`. All in float64, written as float32.
"""

from __future__ import annotations

import numpy as np

from schemas.config import GAEConfig
from schemas.metrics import GAEMetrics
from schemas.tables import Advantages, Ragged, ReferenceLogprobs, Rewards, Rollouts, Values, require_aligned
from stages.ops.advantages import gae_advantages, whiten
from stages.ops.finite import require_finite
from stages.ops.kl import kl_estimate

VERSION = 1


def gae(
    rollouts: Rollouts, reference: ReferenceLogprobs, rewards: Rewards, values: Values, config: GAEConfig, *,
    kl_coef: float,
) -> Advantages:
    """`kl_coef`: β. Raises `TableError` if the tables' rows do not line up, `NonFiniteError` with the rows."""
    for table in (reference, rewards, values):
        require_aligned(rollouts, table)
    kl = kl_estimate(rollouts.logprobs.values, reference.logprobs.values, config.kl_estimator)
    shaped = rollouts.logprobs.with_values(shape_rewards(kl, rewards.score, rollouts.logprobs, kl_coef))
    cut = (np.array(rollouts.finish_reason) == "length") & config.bootstrap_truncated
    with np.errstate(invalid="ignore"):  # infinite values are refused below
        advantages = gae_advantages(shaped, values.values, np.where(cut, values.bootstrap, 0.0),
                                    config.gamma, config.gae_lambda)
    require_finite("the advantage", advantages, rollouts.row_id)
    return Advantages(
        row_id=rollouts.row_id, kl=_float32(shaped, kl), rewards=_float32(shaped, shaped.values),
        advantages=_float32(shaped, whiten(advantages.values) if config.whiten else advantages.values),
        returns=_float32(shaped, advantages.values + values.values.values))


def shape_rewards(kl: np.ndarray, score: np.ndarray, rows: Ragged, kl_coef: float) -> np.ndarray:
    """r_t = −β·kl_t, plus the score at each row's last token. `kl`: (n,); `score`: (B,); (n,) float64."""
    rewards = -kl_coef * kl
    rewards[rows.offsets[1:] - 1] += score
    return rewards


def _float32(rows: Ragged, values: np.ndarray) -> Ragged:
    return rows.with_values(values.astype(np.float32))


def metrics(advantages: Advantages, values: Values, *, kl_coef: float) -> GAEMetrics:
    """KL, reward, and moments of what the update is given."""
    returns, value = (x.values.astype(np.float64) for x in (advantages.returns, values.values))
    raw, variance = returns - value, returns.var()
    return GAEMetrics(
        kl=advantages.kl.sums().mean(), kl_per_token=advantages.kl.values.mean(dtype=np.float64), kl_coef=kl_coef,
        reward=advantages.rewards.sums().mean(), advantage_mean=raw.mean(), advantage_std=raw.std(),
        return_mean=returns.mean(), return_std=returns.std(),
        explained_variance=1 - (returns - value).var() / variance if variance > 0 else None)
