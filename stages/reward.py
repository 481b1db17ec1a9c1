"""Reward: one score per response.

score = Σ_k weight_k·component_k → clipped to ±clip → missing-EOS rule: `subtract` takes a penalty off responses
without EOS, `replace` puts −penalty in the place of their score (Huang et al. 2024, https://arxiv.org/abs/2403.17031).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from schemas.config import RewardConfig
from schemas.metrics import RewardMetrics
from schemas.tables import Rewards, Rollouts
from stages.ops.rewards import Scorer, combine, score_components

VERSION = 1


def reward(scorers: Mapping[str, Scorer], rollouts: Rollouts, config: RewardConfig) -> Rewards:
    """`scorers`: one for each of `config.components`. Raises `RewardError` and `NonFiniteError`."""
    components = score_components(scorers, rollouts)
    return Rewards(row_id=rollouts.row_id, score=combine(components, rollouts, config), components=components)


def metrics(rewards: Rewards) -> RewardMetrics:
    """Moments of the score, mean of each component."""
    score = rewards.score.astype(np.float64)
    return RewardMetrics(
        score=score.mean(), score_std=score.std(ddof=1) if len(score) > 1 else 0.0, score_min=score.min(),
        score_max=score.max(), component={name: x.mean(dtype=np.float64) for name, x in rewards.components.items()})
