"""PPO's losses, a value per token; their mean over a minibatch is taken by whoever cuts it.

ratio = π(token)/π_old(token) = exp(log π − log π_old), the log-ratio clamped at ±20.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equations 7 and 9; value clipping after OpenAI
baselines (Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, detail 9).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log π − log π_old, clamped at ±20. Both (n,), nats."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_range_low: float, clip_range_high: float) -> Tensor:
    """−min(ratio·A, clip(ratio, 1 − ε_low, 1 + ε_high)·A): (n,)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range_low, 1 + clip_range_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> tuple[Tensor, Tensor]:
    """½·max((V − G)², (V_clip − G)²), V_clip = V_old + clip(V − V_old, ±ε): (n,), and where the clipped one won: (n,)."""
    unclipped = (values - returns) ** 2
    if clip_range is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped = (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def approx_kl(log_ratio: Tensor) -> Tensor:
    """KL(π_old‖π) of tokens sampled from π_old by k3 = (ratio − 1) − log ratio: (n,), nats."""
    return log_ratio.expm1() - log_ratio
