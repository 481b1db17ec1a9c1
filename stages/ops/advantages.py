"""Token-level advantages: GAE and whitening.

Row i is one episode of R_i steps. δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}; V_{R} is the row's
`bootstrap` (0 where the episode terminated) and A_R = 0: both a termination and a cut stop the λ-carry.
Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11, 12 and 16.
"""

from __future__ import annotations

import numpy as np

from schemas.tables import Ragged


def gae_advantages(rewards: Ragged, values: Ragged, bootstrap: np.ndarray, gamma: float, gae_lambda: float) -> Ragged:
    """A_t of every step, float64. `rewards`, `values`: B rows of R steps; `bootstrap`: (B,) V after the last step."""
    lengths, offsets = rewards.lengths, rewards.offsets[:-1]
    out = np.zeros(len(rewards.values))
    next_value, next_advantage = bootstrap.astype(np.float64), np.zeros(len(rewards))
    for back in range(1, int(lengths.max(initial=0)) + 1):
        rows = np.flatnonzero(lengths >= back)
        t = offsets[rows] + lengths[rows] - back
        value = values.values[t].astype(np.float64)
        delta = rewards.values[t] + gamma * next_value[rows] - value
        next_advantage[rows] = out[t] = delta + gamma * gae_lambda * next_advantage[rows]
        next_value[rows] = value
    return rewards.with_values(out)


def whiten(values: np.ndarray) -> np.ndarray:
    """(n,) to (n,): mean 0 and unbiased variance 1, with ε = 1e-8 added to the variance; one value becomes 0.

    Over all response tokens of the batch at once, so that padding and minibatches play no part
    (Huang et al. 2024, https://arxiv.org/abs/2403.17031, detail "advantage whitening").
    """
    centred = values - values.mean()
    return centred / np.sqrt(centred.var(ddof=1) + 1e-8) if len(values) > 1 else centred
