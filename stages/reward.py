"""Reward: one score per response, and where a function rewards tokens, which part of it is theirs.

raw_score = Σ_k weight_k·component_k − bias, and from it
score = normalised by the running moments, or the sum of normalised components → clipped to ±clip → missing-EOS rule → less
the overlong penalty.

The missing-EOS rule: `subtract` takes a penalty off responses without EOS, `replace` puts −penalty in the place of their
score (Huang et al. 2024, https://arxiv.org/abs/2403.17031). The moments are those of all raw scores so far with this
batch's, and are handed to the next iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from schemas.artifacts import Moments
from schemas.metrics import RewardMetrics
from schemas.reward_settings import RewardConfig
from schemas.tables import Rewards, Rollouts, ScoredTexts, TokenRewards
from stages.ops.brought_scorer import BroughtScorer
from stages.ops.finite import require_finite
from stages.ops.moments import normalized, sample_std, updated_moments
from stages.ops.rewards import (
    Scorer,
    given_scores,
    normalized_components,
    of_responses,
    of_tokens,
    overlong_penalty,
    weighted_sum,
)


def reward(
    scorers: Mapping[str, Scorer], rollouts: Rollouts, config: RewardConfig, *, bias: float, moments: Moments,
    max_new_tokens: int,
) -> tuple[Rewards, TokenRewards | None]:
    """`scorers`: one for each of `config.components`; `moments`: before this batch; `max_new_tokens`: of the rollouts.

    Raises `RewardError` and `NonFiniteError`.
    """
    given = given_scores(scorers, rollouts)
    components, tokens = {name: of_responses(values) for name, values in given.items()}, of_tokens(given, config)
    rewards = of_components(components, rollouts, config, bias=bias, moments=moments, max_new_tokens=max_new_tokens)
    return rewards, tokens and TokenRewards(row_id=rollouts.row_id, rewards=tokens)


def of_components(
    components: Mapping[str, np.ndarray], rollouts: Rollouts, config: RewardConfig, *, bias: float, moments: Moments,
    max_new_tokens: int,
) -> Rewards:
    """`components`: (B,) each, as their sources gave them. Raises `NonFiniteError`."""
    raw = weighted_sum(components, config, bias)
    require_finite("the score", raw, rollouts.row_id)
    score = normalized(raw, updated_moments(moments, raw), config.normalize)
    if config.normalize_components != "none":
        equalized = normalized_components(components, rollouts.prompt_id, config.normalize_components)
        score = weighted_sum(equalized, config, bias=0.0).astype(np.float64)
    return Rewards(row_id=rollouts.row_id, raw_score=raw, components=dict(components),
                   score=penalized(score, rollouts, config, max_new_tokens).astype(np.float32))


def texts(scorers: Mapping[str, Scorer], rollouts: Rollouts) -> ScoredTexts | None:
    """What reward models that are brought were given; none where there are none."""
    found = {name: scorer.read(rollouts).texts for name, scorer in scorers.items() if isinstance(scorer, BroughtScorer)}
    return ScoredTexts(row_id=rollouts.row_id, texts=found) if found else None


def penalized(score: np.ndarray, rollouts: Rollouts, config: RewardConfig, max_new_tokens: int) -> np.ndarray:
    """(B,) scores after the clip, the missing-EOS rule and the overlong penalty."""
    if config.clip is not None:
        score = np.clip(score, -config.clip, config.clip)
    missing = ~rollouts.terminated
    if config.missing_eos == "subtract":
        score = score - config.missing_eos_penalty * missing
    if config.missing_eos == "replace":
        score = np.where(missing, -config.missing_eos_penalty, score)
    if config.overlong_buffer is not None:
        over = overlong_penalty(rollouts.sampled_lengths, max_new_tokens, config.overlong_buffer)
        score = score - config.overlong_penalty * over
    return score


def metrics(
    rewards: Rewards, config: RewardConfig, moments: Moments, cut: Mapping[str, int] | None = None
) -> RewardMetrics:
    """Moments of the score, mean of each component, and the running moments with this batch's; `cut`: texts of each that
    were too long."""
    score, running = rewards.score.astype(np.float64), updated_moments(moments, rewards.raw_score)
    kept = config.normalize != "none"
    return RewardMetrics(
        score=score.mean(), score_std=sample_std(score), score_min=score.min(),
        score_max=score.max(), raw_score=rewards.raw_score.mean(dtype=np.float64),
        component={name: x.mean(dtype=np.float64) for name, x in rewards.components.items()},
        cut=dict(cut or {}), running_count=running.count if kept else None, running_mean=running.mean if kept else None,
        running_std=running.std if kept else None)
