"""The one seam between `ppo` and what it trains: predictions for a minibatch, and an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from schemas.settings import PPOConfig
from schemas.tables import Rollouts
from stages.ops.models import LanguageModel, batches, entropy, of_tokens, response_logprobs, state_values
from stages.ops.optim import adamw, clip_gradients, has_gradients
from stages.ops.prompts import Texts
from stages.ops.sequences import Batch


class MicroBatch(Protocol):
    """As many rows as fit through the models at once."""

    rows: np.ndarray  # (b,) positions in the tables
    tokens: np.ndarray  # (n,) positions of their tokens in the tables' flat columns


@dataclass(frozen=True)
class Prediction:
    """What policy and critic say of the n tokens of a micro-batch, with gradients; None where it was not asked for."""

    logprobs: Tensor | None = None  # (n,) log π(token), nats
    entropy: Tensor | None = None  # (n,) nats
    values: Tensor | None = None  # (n,) V(s_t)

    @property
    def device(self) -> torch.device:
        return (self.values if self.logprobs is None else self.logprobs).device


class Learner(Protocol):
    """A policy, its critic if there is one, and their optimizers."""

    def micro_batches(self, rows_of: Rollouts | Texts, rows: np.ndarray) -> Sequence[MicroBatch]:
        """The rows, cut to what fits."""

    def predict(
        self, batch: MicroBatch, *, policy: bool = True, critic: bool = True, entropy_gradient: bool = False
    ) -> Prediction:
        """What the current policy and the critic, if there is one, say of tokens that were sampled earlier."""

    def log_likelihood(self, batch: MicroBatch) -> Tensor:
        """(n,) log π(token) of texts that nobody sampled, at temperature 1, with gradients."""

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        """Applies the accumulated gradients and forgets them; the norm of each network's that had some, before clipping."""


class LanguageModelLearner:
    """An actor and, for estimators with one, a critic: language models with an AdamW each, fully fine-tuned.

    Of `config` it takes what concerns the optimizers; the losses are `ppo`'s.
    """

    def __init__(
        self, actor: LanguageModel, critic: LanguageModel | None, config: PPOConfig, temperature: float
    ) -> None:
        self.actor, self.critic, self.temperature = actor, critic, temperature
        self.max_grad_norm = config.max_grad_norm
        self.learning_rates = {"actor": config.learning_rate, "critic": config.critic_learning_rate}
        self.optimizers = {name: adamw(model.module, self.learning_rates[name], config)
                           for name, model in self.networks.items()}

    @property
    def networks(self) -> dict[str, LanguageModel]:
        """`actor`, and `critic` if there is one."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})

    def micro_batches(self, rows_of: Rollouts | Texts, rows: np.ndarray) -> list[Batch]:
        return batches(rows_of, rows, self.actor)

    def predict(
        self, batch: Batch, *, policy: bool = True, critic: bool = True, entropy_gradient: bool = False
    ) -> Prediction:
        logprobs = spread = values = None
        if policy:
            distribution = response_logprobs(self.actor.module, batch, self.temperature)
            logprobs = of_tokens(distribution, batch)
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                spread = batch.flat(entropy(distribution))
        if critic and self.critic:
            values = batch.flat(state_values(self.critic.module, batch)[:, :-1])
        return Prediction(logprobs, spread, values)

    def log_likelihood(self, batch: Batch) -> Tensor:
        return of_tokens(response_logprobs(self.actor.module, batch, 1.0), batch)

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        norms = {}
        for name, optimizer in self.optimizers.items():
            if not has_gradients(optimizer):
                continue
            norms[name] = clip_gradients(optimizer, self.max_grad_norm)
            optimizer.param_groups[0]["lr"] = self.learning_rates[name] * learning_rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms
