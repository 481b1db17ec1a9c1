"""What `ppo` trains of a control task: an actor and a critic under one AdamW, their gradients clipped together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from schemas.settings import PPOConfig
from schemas.tables import Trajectories
from stages.ops.learner import Prediction
from stages.ops.optim import load_state_tensors, state_tensors
from stages.ops.policies import Actor, Critic, Network

ALIGNED = 16  # numbers of 4 bytes


@dataclass(frozen=True)
class Steps:
    """Steps of a batch, in any order."""

    tokens: np.ndarray  # (m,) int64, their places in the batch
    observations: Tensor  # (m, D)
    actions: Tensor  # (m, A)


class ControlLearner:
    """Minibatches are of single steps. As in Baselines, one norm is taken over both networks' gradients, and both are
    scaled down by it. Of `config` it takes what concerns the optimizer; the losses are `ppo`'s.

    Each network's parameters lie in one vector, and so do its gradients: AdamW, the norm and the scaling are a call or
    two for each, where they would be several for each layer.
    """

    def __init__(self, actor: Actor, critic: Critic, config: PPOConfig) -> None:
        self.actor, self.critic, self.max_grad_norm = actor, critic, config.max_grad_norm
        self.networks: dict[str, Network] = {"actor": actor, "critic": critic}
        self.learning_rates = {"actor": config.learning_rate, "critic": config.critic_learning_rate or config.learning_rate}
        self.vectors = {name: _as_one_vector(network) for name, network in self.networks.items()}
        self.gradients = {name: vector.grad for name, vector in self.vectors.items()}
        self.optimizer = AdamW([{"params": [vector]} for vector in self.vectors.values()], eps=config.adam_epsilon,
                               weight_decay=config.weight_decay, fused=True)
        self._ran: set[str] = set()  # networks that predicted something since the last step

    @property
    def device(self) -> torch.device:
        return self.actor.device

    def unit_lengths(self, rollouts: Trajectories) -> np.ndarray:
        """Of single steps: 1 each."""
        return np.ones(len(rollouts.logprobs.values), np.int64)

    def micro_batches(self, rollouts: Trajectories, units: np.ndarray) -> list[Steps]:
        """All in one: networks are small."""
        return [Steps(units, *(self.actor.tensor(column.values[units])
                               for column in (rollouts.observations, rollouts.actions)))]

    def predict(
        self, batch: Steps, *, policy: bool = True, critic: bool = True, entropy_gradient: bool = False
    ) -> Prediction:
        logprobs = entropy = values = None
        if policy:
            logprobs, entropy = self.actor.score(batch.observations, batch.actions)
            self._ran.add("actor")
        if critic:
            values = self.critic(batch.observations).squeeze(1)
            self._ran.add("critic")
        return Prediction(logprobs, entropy, values)

    def log_likelihood(self, batch: Steps) -> Tensor:
        raise NotImplementedError("a control task has no texts; ControlConfig refuses ppo.ptx_coef")

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        norms = {name: float(self.gradients[name].norm()) for name in self.networks if name in self._ran}
        too_long = math.hypot(*norms.values()) / self.max_grad_norm
        for (name, vector), group in zip(self.vectors.items(), self.optimizer.param_groups, strict=True):
            group["lr"] = self.learning_rates[name] * learning_rate_factor
            vector.grad = self.gradients[name] if name in norms else None  # AdamW leaves alone what has none
            if name in norms and too_long > 1:
                vector.grad /= too_long
        self.optimizer.step()
        for name in norms:
            self.gradients[name].zero_()
        self._ran.clear()
        return norms

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """`actor.exp_avg`, `.exp_avg_sq` and `.step`, and the critic's; each one vector, see `_as_one_vector`."""
        return state_tensors(self.optimizer, nn.ParameterDict(self.vectors))

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse. Raises `KeyError` or `ValueError` naming what does not fit."""
        for name, vector in self.vectors.items():
            if (size := tensors.get(f"{name}.exp_avg", vector).numel()) != vector.numel():
                raise ValueError(f"{name}.exp_avg has {size} numbers, the {name} {vector.numel()}")
        load_state_tensors(self.optimizer, nn.ParameterDict(self.vectors), tensors)

    def observe(self, batch: Trajectories) -> None:
        """After an update: the batch's observations join the moments that the next policy normalises by."""
        for network in self.networks.values():
            network.observe(batch.observations.values)


def _as_one_vector(network: Network) -> nn.Parameter:
    """The network's parameters as views of one vector, in their order, and their gradients as views of its gradient.

    Each begins at a multiple of 64 bytes, as in memory of its own: a matrix product's last bits depend on where its
    factors lie, and a network that was loaded has to act as the one that was trained. What lies between stays 0.
    """
    parameters, offset, places = list(network.parameters()), 0, []
    for p in parameters:
        places.append(slice(offset, offset + p.numel()))
        offset = -(-places[-1].stop // ALIGNED) * ALIGNED
    device = parameters[0].device
    vector = nn.Parameter(torch.zeros(offset, device=device))
    vector.grad = torch.zeros(offset, device=device)
    for p, place in zip(parameters, places, strict=True):
        vector.data[place] = p.detach().reshape(-1)
        p.data, p.grad = vector.data[place].view_as(p), vector.grad[place].view_as(p)
    return vector
