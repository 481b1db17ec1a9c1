"""Running moments: of scores and discounted returns, and of observations step by step; and what is normalised by them."""

from __future__ import annotations

import numpy as np

from schemas.artifacts import Moments


def updated_moments(moments: Moments, values: np.ndarray) -> Moments:
    """Those of the values seen before and of (B,) `values` (Chan et al. 1979, the pairwise update)."""
    count, mean, variance = len(values), values.mean(dtype=np.float64), values.var(dtype=np.float64)
    total, shift = moments.count + count, mean - moments.mean
    spread = moments.std**2 * moments.count + variance * count + shift**2 * moments.count * count / total
    return Moments(count=total, mean=moments.mean + shift * count / total, std=float(np.sqrt(spread / total)))


class RunningMoments:
    """μ and σ² (÷ count) of D numbers, of those seen before and of each step's as it comes.

    n_t = n + N·t,   μ_t = c + S_t/n_t,   σ²_t = Q_t/n_t − (S_t/n_t)²,   S and Q sums of (x − c) and (x − c)², c near to them
    """

    def __init__(self, count: float, mean: np.ndarray, variance: np.ndarray) -> None:
        """`mean`, `variance`: (D,) float64, of what was seen before."""
        self.count, self.near = count, mean
        self.sums = np.stack([np.zeros_like(mean), variance * count])  # (2, D) of S and Q

    def see(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, N, D), N at each step, to (T, D) mean and (T, D) variance after each step, its own N included."""
        if not self.count:
            self.near = x[0, 0].astype(np.float64)
        if len(x) == 1:
            return self._see_one(x[0])
        away = x - self.near
        sums = np.stack([away.sum(1), (away * away).sum(1)], 1)  # (T, 2, D)
        sums[0] += self.sums
        sums = np.cumsum(sums, 0)
        counts = self.count + x.shape[1] * np.arange(1.0, len(x) + 1)[:, None]  # (T, 1)
        self.count, self.sums = float(counts[-1, 0]), sums[-1]
        shift = sums[:, 0] / counts
        return self.near + shift, np.maximum(sums[:, 1] / counts - shift * shift, 0.0)

    def _see_one(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, D), the same in fewer calls: it is a part of every step of an environment."""
        away = x - self.near
        self.sums = self.sums + (np.array([away[0], (away * away)[0]]) if len(x) == 1 else
                                 np.array([away.sum(0), (away * away).sum(0)]))
        self.count += len(x)
        shift, spread = self.sums / self.count
        return (self.near + shift)[None], np.maximum(spread - shift * shift, 0.0)[None]


def normalized(values: np.ndarray, moments: Moments, how: str) -> np.ndarray:
    """(B,) float64: as they are (`none`), divided by σ (`scale`), or less μ and divided by σ (`standardize`).

    Where σ is 0, as in a first batch of equal scores, nothing is divided. `scale` is trlX's `scale_reward: running`.
    """
    scores = values.astype(np.float64)
    if how == "none":
        return scores
    return (scores - (moments.mean if how == "standardize" else 0.0)) / (moments.std or 1.0)


def sample_std(x: np.ndarray) -> float:
    """Sample standard deviation (÷ n − 1), 0 of a single number."""
    return float(x.std(ddof=1)) if len(x) > 1 else 0.0
