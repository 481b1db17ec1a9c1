"""Running moments of scores or of discounted returns, and what is normalised by them."""

from __future__ import annotations

import numpy as np

from schemas.artifacts import Moments


def updated_moments(moments: Moments, values: np.ndarray) -> Moments:
    """Those of the values seen before and of (B,) `values` (Chan et al. 1979, the pairwise update)."""
    count, mean, variance = len(values), values.mean(dtype=np.float64), values.var(dtype=np.float64)
    total, shift = moments.count + count, mean - moments.mean
    spread = moments.std**2 * moments.count + variance * count + shift**2 * moments.count * count / total
    return Moments(count=total, mean=moments.mean + shift * count / total, std=float(np.sqrt(spread / total)))


def normalized(values: np.ndarray, moments: Moments, how: str) -> np.ndarray:
    """(B,) float64: as they are (`none`), divided by σ (`scale`), or less μ and divided by σ (`standardize`).

    Where σ is 0, as in a first batch of equal scores, nothing is divided. `scale` is trlX's `scale_reward: running`.
    """
    scores = values.astype(np.float64)
    if how == "none":
        return scores
    return (scores - (moments.mean if how == "standardize" else 0.0)) / (moments.std or 1.0)
