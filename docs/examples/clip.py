"""The worked example of the page on PPO: an action that had probability 0.4 when it was sampled, raised to 0.5 and 0.6.

    python docs/examples/clip.py

The loss is the one that Baton trains with (stages/ops/losses.py); the gradient is autograd's.
"""

import torch

from stages.ops.losses import policy_loss

SAMPLED = 0.4
NOW = (0.4, 0.5, 0.6)
CLIP_RANGE = 0.2


def row(probability: float, advantage: float) -> str:
    """Ratio, clipped ratio, loss, and the loss's gradient by the log probability, of one action."""
    logprob = torch.tensor([probability]).log().requires_grad_()
    log_ratio = logprob - torch.tensor([SAMPLED]).log()
    ratio = log_ratio.exp().item()
    clipped = min(max(ratio, 1 - CLIP_RANGE), 1 + CLIP_RANGE)
    loss = policy_loss(log_ratio, torch.tensor([advantage]), CLIP_RANGE, CLIP_RANGE).loss
    loss.sum().backward()
    grad = logprob.grad.item() + 0.0  # no -0.00
    numbers = f"{ratio:7.2f} {clipped:8.2f} {loss.item():+7.2f} {grad:+9.2f}"
    return f"{probability:11.1f} {advantage:+10.1f} {numbers}"


print("probability  advantage   ratio  clipped    loss  gradient")
for advantage in (+1.0, -1.0):
    for probability in NOW:
        print(row(probability, advantage))
