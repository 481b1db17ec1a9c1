"""The example of the page on continuous actions: a normal policy whose mean an update has moved.

    python docs/examples/gaussian.py

Log probability and entropy are those that Baton trains with (stages/ops/networks.py).
"""

import torch

from stages.ops.networks import gaussian

SIGMA = 0.1
SAMPLED = 0.0  # the mean when the action was drawn
MEANS = (0.0, 0.02)
ACTIONS = (0.05, -0.05)


def score(mean: float, action: float) -> tuple[float, float]:
    """log π(a) and the entropy, nats."""
    logprob, entropy = gaussian(torch.tensor([[mean]]), torch.tensor([SIGMA]).log(), torch.tensor([[action]]))
    return logprob.item(), entropy.item()


print("     μ      σ       a  density   log π  entropy   ratio")
for action in ACTIONS:
    for mean in MEANS:
        logprob, entropy = score(mean, action)
        numbers = torch.tensor([logprob, logprob - score(SAMPLED, action)[0]]).exp().tolist()
        print(f"{mean:6.2f} {SIGMA:6.2f} {action:+7.2f} {numbers[0]:8.2f} {logprob:+7.2f} {entropy:+8.2f} {numbers[1]:7.2f}")
