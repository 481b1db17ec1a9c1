"""The one seam between `ppo` and what it trains: what minibatches are drawn from, predictions, and an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from schemas.tables import Rollouts, Trajectories
from stages.ops.texts import Texts

Entropy = Literal["none", "value", "gradient"]
"""Whether the policy's entropy is computed, and whether it has a gradient."""


class MicroBatch(Protocol):
    """As many units as fit through the models at once."""

    token_index: np.ndarray  # (m,) int64, positions of their tokens in the tables' flat columns


class Units(Protocol):
    """What minibatches are drawn from: whole responses, or single steps."""

    lengths: np.ndarray  # (U,) int64, sampled tokens of each
    of_token: np.ndarray  # (n,) int64, which unit each token of the tables' flat columns belongs to

    def micro_batches(self, which: np.ndarray) -> Sequence[MicroBatch]:
        """Those units, cut to what fits."""


@dataclass(frozen=True)
class Prediction:
    """What policy and critic say of the m tokens of a micro-batch, with gradients; None where it was not computed."""

    logprobs: Tensor | None = None  # (m,) log π(token), nats
    entropy: Tensor | None = None  # (m,) nats
    values: Tensor | None = None  # (m,) V(s_t)


class Learner(Protocol):
    """A policy, its critic if there is one, and their optimizers."""

    @property
    def device(self) -> torch.device:
        """Where predictions are."""

    def units(self, rollouts: Rollouts | Trajectories | Texts) -> Units:
        """What those rows are to it."""

    def predict(
        self, batch: MicroBatch, *, policy: bool = True, critic: bool = True, entropy: Entropy = "none"
    ) -> Prediction:
        """What the current policy and the critic, if there is one, say of tokens that were sampled earlier."""

    def log_likelihood(self, batch: MicroBatch) -> Tensor:
        """(m,) log π(token) of texts rather than samples, at temperature 1, with gradients."""

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        """Applies the accumulated gradients and forgets them; the norm of each network's that had some, before clipping."""
