"""PPO's losses, a value per token; their mean over a minibatch is taken where it is cut.

ratio = π(token)/π_old(token) = exp(log π − log π_old), the log-ratio clamped at ±20.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equations 7 and 9; value clipping after OpenAI
baselines (Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, detail 9).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


class Clipped(NamedTuple):
    """A loss and where its clip was at work: (n,) each."""

    loss: Tensor
    outside: Tensor  # bool: beyond the clip range
    taken: Tensor  # bool: the loss is the clipped one, which gives no gradient
    bounded: Tensor | None = None  # bool: the loss is the bound of the dual clip


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log π − log π_old, clamped at ±20. Both (n,), nats."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_range_low: float, clip_range_high: float, dual_clip: float | None = None
) -> Clipped:
    """−min(ratio·A, clip(ratio, 1 − ε_low, 1 + ε_high)·A), at most −c·A where A < 0: (n,).

    The bound c of `dual_clip`: Ye et al. 2020, https://arxiv.org/abs/1912.09729, equation 7.
    """
    ratio = log_ratio.exp()
    inside = ratio.detach().clamp(1 - clip_range_low, 1 + clip_range_high)
    plain, clipped = ratio * -advantages, inside * -advantages
    outside, taken = inside != ratio, clipped > plain  # only outside are they not equal, and there a clip gives no gradient
    loss = torch.where(taken, clipped, plain)
    if dual_clip is None:
        return Clipped(loss, outside, taken)
    bounded = (advantages < 0) & (loss > -dual_clip * advantages)
    return Clipped(torch.where(bounded, -dual_clip * advantages, loss), outside, taken | bounded, bounded)


def a2c_loss(logprobs: Tensor, advantages: Tensor) -> Clipped:
    """−log π·A, nothing clipped: (m,) (Mnih et al. 2016, https://arxiv.org/abs/1602.01783, section 4).

    Where the policy is still the one that sampled, its gradient is that of PPO's loss (Huang et al. 2022,
    https://arxiv.org/abs/2205.09123).
    """
    nowhere = torch.zeros_like(advantages, dtype=torch.bool)
    return Clipped(-logprobs * advantages, nowhere, nowhere)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Clipped:
    """½·max((V − G)², (V_clip − G)²), V_clip = V_old + clip(V − V_old, ±ε): (n,)."""
    plain = (values - returns) ** 2
    if clip_range is None:
        nowhere = torch.zeros_like(plain, dtype=torch.bool)
        return Clipped(0.5 * plain, nowhere, nowhere)
    move = values.detach() - old_values
    clipped = (old_values + move.clamp(-clip_range, clip_range) - returns) ** 2
    outside = move.abs() > clip_range
    taken = outside & (clipped > plain)
    return Clipped(0.5 * torch.where(taken, clipped, plain), outside, taken)
