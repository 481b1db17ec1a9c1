"""GAE: KL, shaped rewards, advantages and returns per response token or step. No model, milliseconds.

r_t = −β·kl_t + reward_t, where a response has its score at its last token (Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593, equation 2), but for what functions pay its tokens, and an episode its own rewards; then
by `estimator`:

gae                   A_t = Σ_l (γλ)^l·δ_{t+l},  δ_t = r_t + γ·V_{t+1} − V_t,  returns = A + V
reinforce++           A_t = G_t, the reward to go
grpo                  A_t = (S − mean)/σ   of S = Σ_t r_t over the responses to one prompt, the same for all tokens
rloo                  A_t = S − mean of the others
reinforce++-baseline  A_t = S − mean

and A is whitened over the batch, by default for all but grpo and rloo. V_R is 0 where a row terminated, and by `truncation`
where a limit cut it; where only the batch cut it, V_R is the critic's. All in float64, written as float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from schemas.metrics import GAEMetrics
from schemas.settings import GAEConfig, KLConfig
from schemas.tables import (
    Advantages,
    Ragged,
    ReferenceLogprobs,
    Rewards,
    Rollouts,
    TokenRewards,
    Trajectories,
    Values,
    require_aligned,
)
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
from stages.ops.finite import require_finite
from stages.ops.kl import kl_estimate


def gae(
    rollouts: Rollouts | Trajectories, reference: ReferenceLogprobs | None, rewards: Rewards | Trajectories,
    values: Values | Trajectories | None, config: GAEConfig, kl: KLConfig, *, kl_coef: float,
    token_rewards: TokenRewards | None = None,
) -> Advantages:
    """`reference`: none for a KL of 0; `values`: only for the estimator `gae`; `kl_coef`: β, which is in r_t if
    `kl.placement` is `reward`; `token_rewards`: the part of the rewards that is paid before the last token, if any is.

    Raises `TableError` if the tables' rows do not line up, `NonFiniteError` with the rows.
    """
    for table in (reference, rewards, token_rewards, values if config.has_critic else None):
        if table is not None:
            require_aligned(rollouts, table)
    if rollouts.sampled is not None:
        return _of_sampled(rollouts, reference, rewards, values, config, kl, kl_coef, token_rewards)
    divergence = _kl(rollouts, reference, kl.estimator)
    charged = kl_coef if kl.placement == "reward" else 0.0
    steps = rewards.of_steps(rollouts.logprobs, token_rewards)
    shaped = rollouts.logprobs.with_values(steps - charged * divergence)
    if config.whiten_rewards:
        shaped = shaped.with_values(whiten(shaped.values, shift=False, unbiased=config.whiten_unbiased))
    with np.errstate(invalid="ignore"):  # infinite values are refused below
        advantages, returns = _estimate(rollouts, shaped, values, config)
    require_finite("the advantage", advantages, rollouts.row_id)
    white = whiten(advantages.values, unbiased=config.whiten_unbiased) if config.whitens else advantages.values
    return Advantages(
        row_id=rollouts.row_id, kl=_float32(shaped, divergence), rewards=_float32(shaped, shaped.values),
        raw_advantages=_float32(shaped, advantages.values), advantages=_float32(shaped, white),
        returns=_float32(shaped, returns.values))


def _of_sampled(
    rollouts: Rollouts, reference: ReferenceLogprobs | None, rewards: Rewards, values: Values | None, config: GAEConfig,
    kl: KLConfig, kl_coef: float, token_rewards: TokenRewards | None,
) -> Advantages:
    """Of responses of several turns: what others said is between two steps, and everything is 0 there."""
    sampled = rollouts.sampled
    alone = [table and table.sampled_alone(sampled) for table in (reference, values, token_rewards)]
    steps = gae(replace(rollouts.sampled_alone(sampled), sampled=None), alone[0], rewards, alone[1], config, kl,
    kl_coef=kl_coef, token_rewards=alone[2])
    columns = {}
    for name in ("kl", "rewards", "raw_advantages", "advantages", "returns"):
        columns[name] = sampled.with_values(np.zeros(len(sampled.values), np.float32))
        columns[name].values[sampled.values] = getattr(steps, name).values
    return Advantages(row_id=rollouts.row_id, **columns)


def mean_kl(advantages: Advantages) -> float:
    """KL estimate to the reference, nats a response, mean over the batch."""
    return float(advantages.kl.sums().mean())


def _kl(rollouts: Rollouts | Trajectories, reference: ReferenceLogprobs | None, estimator: str) -> np.ndarray:
    """(n,) float64, nats a token."""
    if reference is None:
        return np.zeros(len(rollouts.logprobs.values))
    log_ratio = reference.logprobs.values.astype(np.float64) - rollouts.logprobs.values
    return kl_estimate(torch.from_numpy(log_ratio), estimator).numpy()


def _estimate(
    rollouts: Rollouts | Trajectories, rewards: Ragged, values: Values | Trajectories | None, config: GAEConfig
) -> tuple[Ragged, Ragged]:
    """Advantages before whitening, and returns."""
    if config.has_critic:
        return _with_critic(rollouts, rewards, values, config)
    to_go = rewards_to_go(rewards, config.gamma)
    if config.estimator == "reinforce++":
        return to_go, to_go
    compare = {"grpo": grpo_advantages, "rloo": rloo_advantages, "reinforce++-baseline": centred}[config.estimator]
    of_response = compare(rewards.sums(), rollouts.prompt_id)
    return rewards.with_values(of_response[rewards.row_of_value]), to_go


def _with_critic(
    rollouts: Rollouts | Trajectories, rewards: Ragged, values: Values | Trajectories, config: GAEConfig
) -> tuple[Ragged, Ragged]:
    """The actor's advantages by its λ, the critic's returns by its own."""
    over = rollouts.terminated | (rollouts.truncated & (config.truncation == "terminal"))
    bootstrap, gae_lambda = np.where(over, 0.0, values.bootstrap), config.gae_lambda
    if config.length_adaptive_alpha is not None:
        gae_lambda = length_adaptive_lambda(rewards.lengths, config.length_adaptive_alpha)
    advantages = critics = gae_advantages(rewards, values.values, bootstrap, config.gamma, gae_lambda)
    if config.critic_lambda is not None:
        critics = gae_advantages(rewards, values.values, bootstrap, config.gamma, config.critic_lambda)
    return advantages, rewards.with_values(critics.values + values.values.values)


def _float32(rows: Ragged, values: np.ndarray) -> Ragged:
    return rows.with_values(values.astype(np.float32))


def metrics(
    advantages: Advantages, rollouts: Rollouts | Trajectories, values: Values | Trajectories | None, config: GAEConfig, *,
    kl_coef: float | None, scores: np.ndarray | None = None,
) -> GAEMetrics:
    """KL, reward, and moments of what the update is given.

    `kl_coef`: none where there is no reference; `scores`: (B,) of the responses, where they are compared.
    """
    if rollouts.sampled is not None:
        advantages, values = (table and table.sampled_alone(rollouts.sampled) for table in (advantages, values))
    raw, returns = (x.values.astype(np.float64) for x in (advantages.raw_advantages, advantages.returns))
    errors, variance = returns - values.values.values if values else None, returns.var()
    measured = kl_coef is not None
    return GAEMetrics(
        kl=mean_kl(advantages) if measured else None,
        kl_per_token=advantages.kl.values.mean(dtype=np.float64) if measured else None, kl_coef=kl_coef,
        reward=advantages.rewards.sums().mean(), advantage_mean=raw.mean(), advantage_std=raw.std(),
        return_mean=returns.mean(), return_std=returns.std(),
        explained_variance=1 - errors.var() / variance if values and variance > 0 else None,
        equal_groups=equal_groups(scores, rollouts.prompt_id) if config.compares_responses else None)
