"""GAE as a dial: the advantages of one response of four tokens, for three values of λ.

    python docs/examples/dial.py

A reward of 1 comes after the last token, and a critic begins to see it coming. The advantages are those that Baton trains
with (stages/ops/advantages.py).
"""

import numpy as np

from schemas.tables import Ragged
from stages.ops.advantages import gae_advantages

REWARDS = np.array([0.0, 0.0, 0.0, 1.0])
VALUES = np.array([0.2, 0.4, 0.3, 0.8])


def line(name: str, numbers: np.ndarray) -> str:
    return f"{name:<9}" + "".join(f"{number:+7.2f}" for number in numbers)


def response(numbers: np.ndarray) -> Ragged:
    """A batch of one."""
    return Ragged.from_rows([numbers], np.float64)


print(f"{'token':<9}" + "".join(f"{token:>7}" for token in range(1, 5)))
print(line("reward", REWARDS))
print(line("value", VALUES))
for gae_lambda in (0.0, 0.95, 1.0):
    advantages = gae_advantages(response(REWARDS), response(VALUES), np.zeros(1), gamma=1.0, gae_lambda=gae_lambda)
    print(line(f"λ = {gae_lambda:.2f}", advantages.values))
