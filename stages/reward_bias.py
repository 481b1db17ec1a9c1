"""Reward bias: what the demonstrations score, so that `reward` can take their mean off (Stiennon et al. 2020).

bias = mean over the demonstrations of Σ_k weight_k·component_k. From then on a score of 0 is as good as a demonstration
(https://arxiv.org/abs/2009.01325, section 3.4: "the reference summaries achieve a mean score of 0").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from schemas.metrics import RewardBiasMetrics
from schemas.reward_settings import RewardConfig
from schemas.tables import Rewards
from stages.ops.finite import require_finite
from stages.ops.moments import sample_std
from stages.ops.rewards import Scorer, score_components, weighted_sum
from stages.ops.texts import Texts


def reward_bias(scorers: Mapping[str, Scorer], demonstrations: Texts, config: RewardConfig) -> Rewards:
    """Raises `RewardError` and `NonFiniteError`."""
    components = score_components(scorers, demonstrations)
    score = weighted_sum(components, config, bias=0.0)
    require_finite("the score", score, demonstrations.row_id)
    return Rewards(row_id=demonstrations.row_id, raw_score=score, score=score, components=components)


def metrics(rewards: Rewards) -> RewardBiasMetrics:
    """The bias, and how the scores spread around it."""
    score = rewards.raw_score.astype(np.float64)
    return RewardBiasMetrics(bias=score.mean(), bias_std=sample_std(score))
