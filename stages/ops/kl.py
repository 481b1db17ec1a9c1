"""KL(π‖π_ref) estimated from tokens sampled from π, and the coefficient that steers it.

With l = log π_ref(token) − log π(token):  k1 = −l,  k2 = ½l²,  k3 = (e^l − 1) − l.
As a reward: k1 and k3 are unbiased, k2 and k3 never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html).
As a loss: on the policy's own samples k2 has the gradient of KL(π‖π_ref), k3 that of KL(π_ref‖π), and k1 one
that is 0 on average (Tang & Munos 2025, https://arxiv.org/abs/2506.09477).
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.settings import KLConfig


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Nats a token. `log_ratio`: l, log of the other policy over the one that sampled, any shape; k1, k2 or k3."""
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"KL estimator {estimator!r}: expected k1, k2 or k3")


def adapted_kl_coef(kl_coef: float, kl: float, responses: int, config: KLConfig) -> float:
    """β for the next iteration: β·(1 + clip(KL/target − 1, ±0.2)·B/horizon), or β itself without a target.

    `kl`: nats a response, mean over the B `responses` of this iteration (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2; B/horizon in the place of their K_β as in their code).
    """
    if config.target is None:
        return kl_coef
    error = min(max(kl / config.target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / config.horizon)
