"""Estimates of KL(π‖π_ref) from tokens sampled from π.

With l = log π_ref(token) − log π(token):  k1 = −l,  k2 = ½l²,  k3 = (e^l − 1) − l.
k1 is unbiased, k2 low in variance, k3 unbiased and never negative.
Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import numpy as np


def kl_estimate(logprobs: np.ndarray, reference_logprobs: np.ndarray, estimator: str) -> np.ndarray:
    """Nats a token, float64. Both (n,), nats; `estimator`: k1, k2 or k3."""
    log_ratio = reference_logprobs.astype(np.float64) - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return np.expm1(log_ratio) - log_ratio
    raise ValueError(f"KL estimator {estimator!r}: expected k1, k2 or k3")
