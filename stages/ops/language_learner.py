"""What `ppo` trains of language models: an actor and a critic, an AdamW each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.settings import PPOConfig
from schemas.tables import Rollouts
from stages.ops import ranks
from stages.ops.distribution import Distribution
from stages.ops.language_model import LanguageModel, batches, state_values
from stages.ops.learner import Entropy, Prediction
from stages.ops.optim import adamw, clip_gradients, has_gradients, parameters_of
from stages.ops.sequences import Batch
from stages.ops.texts import Texts
from stages.ops.token_logprobs import token_logprobs


@dataclass(frozen=True)
class Responses:
    """Units that are whole responses, or texts."""

    rows: Rollouts | Texts
    model: LanguageModel  # whose budget of tokens they are cut by

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.sampled_lengths

    @property
    def of_token(self) -> np.ndarray:
        return self.rows.response_tokens.row_of_value

    def micro_batches(self, which: np.ndarray) -> list[Batch]:
        found, budget = batches(self.rows, which, self.model), self.model.micro_batch_tokens
        while len(found) < min(ranks.size(), len(which)) and budget > 1:  # each rank is to have some
            budget //= 2
            found = batches(self.rows, which, replace(self.model, micro_batch_tokens=budget))
        return found


class LanguageModelLearner:
    """An actor and, for estimators with one, a critic: language models with an AdamW each, fully fine-tuned.

    Of `config` it takes what concerns the optimizers; the losses are `ppo`'s.
    """

    def __init__(
        self, actor: LanguageModel, critic: LanguageModel | None, config: PPOConfig, distribution: Distribution
    ) -> None:
        self.actor, self.critic, self.config, self.distribution = actor, critic, config, distribution
        self.learning_rates = {"actor": config.learning_rate, "critic": config.critic_learning_rate or config.learning_rate}
        self.optimizers = {name: adamw(model.module, self.learning_rates[name], config)
                           for name, model in self.networks.items()}

    @property
    def networks(self) -> dict[str, LanguageModel]:
        """`actor`, and `critic` if there is one."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})

    def of_modules(self, modules: Mapping[str, PreTrainedModel]) -> LanguageModelLearner:
        """One like this of other modules, with optimizers that have stepped none."""
        networks = {name: replace(model, module=modules[name]) for name, model in self.networks.items()}
        return LanguageModelLearner(networks["actor"], networks.get("critic"), self.config, self.distribution)

    @property
    def device(self) -> torch.device:
        return self.actor.device.torch

    def units(self, rollouts: Rollouts | Texts) -> Responses:
        return Responses(rollouts, self.actor)

    def predict(
        self, batch: Batch, *, policy: bool = True, critic: bool = True, entropy: Entropy = "none"
    ) -> Prediction:
        logprobs = spread = values = None
        if policy:
            logprobs, spread = token_logprobs(self.actor, batch, self.distribution, entropy)
        if critic and self.critic:
            values, _ = state_values(self.critic, batch)
        return Prediction(logprobs, spread, values)

    def log_likelihood(self, batch: Batch) -> Tensor:
        return token_logprobs(self.actor, batch, Distribution())[0]

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        norms = {}
        for name, optimizer in self.optimizers.items():
            ranks.sum_gradients(parameters_of(optimizer))
            if not has_gradients(optimizer):
                continue
            norms[name] = clip_gradients(optimizer, self.config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[name] * learning_rate_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms
