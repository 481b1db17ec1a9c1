"""The one seam between `ppo` and what it trains: predictions for a minibatch, and an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from schemas.config import PPOConfig
from schemas.tables import Rollouts
from stages.ops.models import LanguageModel, batches, entropy, of_tokens, response_logprobs, state_values
from stages.ops.optim import adamw, clip_gradients
from stages.ops.sequences import Batch


class MicroBatch(Protocol):
    """As many rows as fit through the models at once."""

    rows: np.ndarray  # (b,) positions in the tables
    tokens: np.ndarray  # (n,) positions of their tokens in the tables' flat columns


@dataclass(frozen=True)
class Prediction:
    """What policy and critic say of the n tokens of a micro-batch, with gradients."""

    logprobs: Tensor  # (n,) log π(token), nats
    entropy: Tensor  # (n,) nats
    values: Tensor  # (n,) V(s_t)


class Learner(Protocol):
    """A policy, its critic and their optimizers."""

    def micro_batches(self, rollouts: Rollouts, rows: np.ndarray) -> Sequence[MicroBatch]:
        """The rows, cut to what fits."""

    def predict(self, batch: MicroBatch, *, entropy_gradient: bool) -> Prediction:
        """The current policy and critic on tokens that were sampled earlier."""

    def step(self) -> dict[str, float]:
        """Applies the accumulated gradients and forgets them; the norm of each network's, before clipping."""


class LanguageModelLearner:
    """An actor and a critic, each a language model with an AdamW of its own, fully fine-tuned.

    Of `config` it takes what concerns the optimizers; the losses are `ppo`'s.
    """

    def __init__(self, actor: LanguageModel, critic: LanguageModel, config: PPOConfig, temperature: float) -> None:
        self.actor, self.critic, self.temperature = actor, critic, temperature
        self.max_grad_norm = config.max_grad_norm
        self.optimizers = {
            "actor": adamw(actor.module, config.learning_rate, config),
            "critic": adamw(critic.module, config.critic_learning_rate, config),
        }

    def micro_batches(self, rollouts: Rollouts, rows: np.ndarray) -> list[Batch]:
        return batches(rollouts, rows, self.actor)

    def predict(self, batch: Batch, *, entropy_gradient: bool) -> Prediction:
        logprobs = response_logprobs(self.actor.module, batch, self.temperature)
        with torch.set_grad_enabled(entropy_gradient):
            spread = entropy(logprobs)
        values = state_values(self.critic.module, batch)[:, :-1]
        return Prediction(of_tokens(logprobs, batch), batch.flat(spread), batch.flat(values))

    def step(self) -> dict[str, float]:
        norms = {}
        for name, optimizer in self.optimizers.items():
            norms[name] = clip_gradients(optimizer, self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms
