"""What `ppo` trains of a control task: an actor and a critic under one AdamW, their gradients clipped together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from schemas.settings import PPOConfig
from schemas.tables import Trajectories
from stages.ops.learner import Entropy, Prediction
from stages.ops.networks import Actor, Critic, Network, RunningInputs

ALIGNED = 16  # numbers of 4 bytes


@dataclass(frozen=True)
class Steps:
    """Units that are single steps."""

    token_index: np.ndarray  # (m,) int64, their positions in the batch
    inputs: Tensor  # (m, D) observations as the networks take them
    actions: Tensor  # (m, A)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.token_index), np.int64)

    @property
    def of_token(self) -> np.ndarray:
        return self.token_index

    def micro_batches(self, which: np.ndarray) -> list[Steps]:
        """All in one: networks are small."""
        at = torch.from_numpy(which).to(self.inputs.device)
        return [Steps(which, self.inputs.index_select(0, at), self.actions.index_select(0, at))]


class ControlLearner:
    """Minibatches are of single steps. As in Baselines, one norm is taken over both networks' gradients, and both are
    scaled down by it. Of `config` it takes what concerns the optimizer; the losses are `ppo`'s.
    """

    def __init__(self, actor: Actor, critic: Critic, config: PPOConfig) -> None:
        self.actor, self.critic, self.config = actor, critic, config
        self.networks: dict[str, Network] = {"actor": actor, "critic": critic}
        self.learning_rates = {"actor": config.learning_rate, "critic": config.critic_learning_rate or config.learning_rate}
        self.flat = {name: FlatParameters(network) for name, network in self.networks.items()}
        self._ran: set[str] = set()  # networks that predicted something since the last step

    @property
    def device(self) -> torch.device:
        return self.actor.device

    def units(self, rollouts: Trajectories) -> Steps:
        inputs, _ = RunningInputs(self.actor).of(rollouts.by_step("observations"))  # the critic's moments are the same
        inputs = inputs.swapaxes(0, 1).reshape(len(rollouts.actions.values), -1)
        actions = torch.tensor(rollouts.actions.values, device=self.device)
        return Steps(np.arange(len(inputs)), torch.tensor(inputs, device=self.device), actions)

    def predict(
        self, batch: Steps, *, policy: bool = True, critic: bool = True, entropy: Entropy = "none"
    ) -> Prediction:
        logprobs = spread = values = None
        if policy:
            logprobs, spread = self.actor.score(batch.inputs, batch.actions)
            self._ran.add("actor")
        if critic:
            values = self.critic(batch.inputs).squeeze(1)
            self._ran.add("critic")
        return Prediction(logprobs, spread, values)

    def log_likelihood(self, batch: Steps) -> Tensor:
        raise NotImplementedError("a control task has no texts; ControlConfig refuses ppo.ptx_coef")

    def step(self, learning_rate_factor: float) -> dict[str, float]:
        stepped = {name: flat for name, flat in self.flat.items() if name in self._ran}
        norms = {name: float(flat.gradient.norm()) for name, flat in stepped.items()}
        too_long = math.hypot(*norms.values()) / self.config.max_grad_norm
        for name, flat in stepped.items():
            if too_long > 1:
                flat.gradient /= too_long
            flat.step(self.learning_rates[name] * learning_rate_factor, self.config)
        self._ran.clear()
        return norms

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """`actor.exp_avg`, `.exp_avg_sq` and `.step`, and the critic's."""
        return {f"{name}.{key}": tensor for name, flat in self.flat.items() for key, tensor in flat.state.items()}

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse. Raises `ValueError` naming what does not fit."""
        own = self.optimizer_tensors()
        for name in sorted({*own, *tensors}):
            found, expected = (tuple(of[name].shape) if name in of else "nothing" for of in (tensors, own))
            if found != expected:
                raise ValueError(f"{name}: expected {expected}, found {found}")
            own[name].copy_(tensors[name])

    def observe(self, batch: Trajectories) -> None:
        """After an update: the batch's observations join the moments that the next policy normalises by."""
        for network in self.networks.values():
            network.observe(batch.by_step("observations"))


class FlatParameters:
    """A network's parameters, in their order, as views of one vector, their gradients as views of another; and AdamW of it.

    So the norm, its scaling and AdamW are a call each, where they would be several for every layer; torch's optimizers
    as objects take longer over these than the arithmetic does, and the first one made imports its compiler for seconds.

    Each parameter begins at a multiple of 64 bytes, as in memory of its own: a matrix product's last bits depend on where
    its factors lie, and a network that was loaded has to act as the one that was trained. What lies between stays 0.
    """

    def __init__(self, network: Network) -> None:
        parameters, size, places = list(network.parameters()), 0, []
        for p in parameters:
            places.append(slice(size, size + p.numel()))
            size = -(-places[-1].stop // ALIGNED) * ALIGNED
        device = network.device
        self.weights, self.gradient, exp_avg, exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": torch.zeros((), device=device)}
        for p, place in zip(parameters, places, strict=True):
            self.weights[place] = p.detach().reshape(-1)
            p.data, p.grad = self.weights[place].view_as(p), self.gradient[place].view_as(p)

    def step(self, learning_rate: float, config: PPOConfig) -> None:
        """AdamW, β (0.9, 0.999), with the gradient, which is then forgotten."""
        average, square, step = self.state.values()
        adamw([self.weights], [self.gradient], [average], [square], [], [step], lr=learning_rate, beta1=0.9, beta2=0.999,
              eps=config.adam_epsilon, weight_decay=config.weight_decay, amsgrad=False, maximize=False, fused=True)
        self.gradient.zero_()
