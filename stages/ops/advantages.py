"""Advantages of response tokens: GAE with a critic, or a comparison of whole responses without one; and whitening.

Row i is one episode of R_i steps; rewards r_t, values V_t. A termination and a cut both stop what is carried back.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from schemas.tables import Ragged

EPSILON = 1e-8  # added to a variance before its root is divided by
A = TypeVar("A", np.ndarray, Tensor)


def gae_advantages(
    rewards: Ragged, values: Ragged, bootstrap: np.ndarray, gamma: float, gae_lambda: float | np.ndarray
) -> Ragged:
    """δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}, A_R = 0: B rows of R steps, float64.

    `bootstrap`: (B,) V_R, 0 where the episode terminated; `gae_lambda`: one λ, or (B,) of them.
    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11, 12 and 16.
    """
    order = np.argsort(-rewards.lengths, kind="stable")  # so that rows with a step t from their end are the first ones
    ends, longer = rewards.offsets[1:][order], np.cumsum(np.bincount(rewards.lengths)[::-1])[::-1]
    value = values.values.astype(np.float64)
    next_value, filled = np.append(value, 0.0)[1:], rewards.lengths > 0
    next_value[rewards.offsets[1:][filled] - 1] = bootstrap[filled]
    delta = rewards.values + gamma * next_value - value
    out, decay = np.empty(len(delta)), gamma * np.broadcast_to(gae_lambda, len(order))[order]
    carried = np.zeros(len(order))
    for back, count in enumerate(longer[1:], start=1):
        t = ends[:count] - back
        out[t] = carried[:count] = delta[t] + decay[:count] * carried[:count]
    return rewards.with_values(out)


def rewards_to_go(rewards: Ragged, gamma: float) -> Ragged:
    """G_t = Σ_{s≥t} γ^{s−t}·r_s: GAE at V = 0 and λ = 1."""
    nothing = rewards.with_values(np.zeros(len(rewards.values)))
    return gae_advantages(rewards, nothing, np.zeros(len(rewards)), gamma, 1.0)


def length_adaptive_lambda(lengths: np.ndarray, alpha: float) -> np.ndarray:
    """λ = 1 − 1/(αR), at least 0: (B,) (Yue et al. 2025, VAPO, https://arxiv.org/abs/2504.05118, section 4.2)."""
    return np.maximum(0.0, 1 - 1 / (alpha * lengths))


def grpo_advantages(sums: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(S_i − mean of the group)/√(σ² + ε), σ² unbiased: (B,) (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

    `sums`: (B,), S_i = Σ_t r_t; `groups`: (B,), equal for responses to one prompt.
    """
    mean, count = _group_mean(sums, groups)
    variance = _group_mean((sums - mean) ** 2, groups)[0] * count / np.maximum(count - 1, 1)
    return (sums - mean) / np.sqrt(variance + EPSILON)


def rloo_advantages(sums: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """S_i − mean of the others of its group: (B,) (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, equation 8)."""
    mean, count = _group_mean(sums, groups)
    return (sums - mean) * count / np.maximum(count - 1, 1)


def centred(sums: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """S_i − mean of its group: (B,) (Hu et al. 2025, REINFORCE++ with baseline, https://arxiv.org/abs/2501.03262)."""
    return sums - _group_mean(sums, groups)[0]


def equal_groups(sums: np.ndarray, groups: np.ndarray) -> float:
    """Fraction of the groups whose responses all have one S_i."""
    _, index = np.unique(groups, return_inverse=True)
    low, high = np.full(index.max() + 1, np.inf), np.full(index.max() + 1, -np.inf)
    np.minimum.at(low, index, sums)
    np.maximum.at(high, index, sums)
    return float(np.mean(low == high))


def _group_mean(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) the mean of each row's group, and (B,) its size."""
    _, index = np.unique(groups, return_inverse=True)
    count = np.bincount(index)
    return (np.bincount(index, weights=values) / count)[index], count[index]


def whiten(values: A, *, shift: bool = True, unbiased: bool = True) -> A:
    """(x − mean)/√(variance + ε), the mean put back unless `shift`: (n,) to (n,); one value is only shifted.

    Over all response tokens of the batch at once, so that padding and minibatches play no part
    (Huang et al. 2024, https://arxiv.org/abs/2403.17031, details "reward whitening" and "advantage whitening").
    """
    mean = values.mean()
    white = values - mean
    if len(values) > 1:
        white = white / ((white * white).sum() / (len(values) - unbiased) + EPSILON) ** 0.5
    return white if shift else white + mean
