"""Actor and critic of a control task: fully connected networks, and the distributions of their actions.

Letters: n states, D numbers of an observation, A numbers of an action.

    x = clip((o − μ)/√(σ² + ε), ±c)  if observations are normalised,    h = tanh(W·x + b) …,    outputs = W·h + b
    Box:       a ~ N(outputs, diag σ²), log σ a parameter or, if state_dependent_std, the other half of the outputs
    Discrete:  a ~ softmax(outputs), by the largest of outputs + Gumbel noise; one softmax for each choice
    masked:    the outputs of actions that are forbidden are −10³⁰, so that their probability is 0
    pictures:  x = o/255 through convolutions of 3 × 3 with stride 2 and ReLU, then the layers

An action is stored and scored as it was sampled. Only the environment is given it clipped to the bounds of a Box: a
clipped action's density is not that of the Gaussian (Huang et al. 2022, 9 details for continuous action domains).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from schemas.control import PolicyConfig, Spaces
from stages.ops.moments import RunningMoments

EPSILON = 1e-8
LOG_STD_RANGE = (-20.0, 2.0)  # of a state-dependent log σ, as in Haarnoja et al. 2018
NEVER = -1e30  # an output: its exponential is 0, and so is 0 times it
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Network(nn.Module):
    """Layers of tanh or ReLU over observations that are normalised by moments of its own, if the config says so."""

    def __init__(self, spaces: Spaces, config: PolicyConfig, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.spaces, self.config = spaces, config
        self.activation = torch.tanh if config.activation == "tanh" else torch.relu
        self.pixels = Pixels(spaces.image, config.channels) if spaces.image else None
        sizes = (self.pixels.size if self.pixels else spaces.seen_size, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], outputs)
        if config.normalize_observations:
            self.register_buffer("observation_count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("observation_mean", torch.zeros(spaces.observation_size, dtype=torch.float64))
            self.register_buffer("observation_variance", torch.ones(spaces.observation_size, dtype=torch.float64))

    def inputs(self, observations: np.ndarray) -> Tensor:
        """(n, D) observations as `forward` takes them: normalised, if the config says so, by moments that stay as they are.

        Always a copy in torch's own memory: the last bits of a product depend on how its factors are aligned.
        """
        if self.config.normalize_observations:  # in NumPy, since calls of torch take several times as long on one state
            mean, variance = self.observation_mean.cpu().numpy(), self.observation_variance.cpu().numpy()
            observations = self.normalize(observations, mean, variance)
        return torch.tensor(observations, device=self.device)

    def normalize(self, observations: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """clip((o − μ)/√(σ² + ε), ±c), float32, of the observations' shape."""
        x, limit = (observations - mean) * (1 / np.sqrt(variance + EPSILON)), self.config.clip_observations
        x = np.minimum(np.maximum(x, -limit), limit).astype(np.float32)
        if self.spaces.masked:
            x[..., self.spaces.seen_size :] = observations[..., self.spaces.seen_size :]
        return x

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, D) to (n, outputs)."""
        x = inputs[:, : self.spaces.seen_size] if self.spaces.masked else inputs
        x = self.pixels(x) if self.pixels else x
        for layer in self.layers:
            x = self.activation(functional.linear(x, layer.weight, layer.bias))
        return functional.linear(x, self.head.weight, self.head.bias)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def observe(self, observations: np.ndarray) -> None:
        """Adds (T, N, D) observations, a step after the other, to the moments."""
        if self.config.normalize_observations:
            seen = RunningInputs(self)
            mean, variance = seen.moments.see(observations)
            self.observation_mean.copy_(torch.from_numpy(mean[-1]))
            self.observation_variance.copy_(torch.from_numpy(variance[-1]))
            self.observation_count.fill_(seen.moments.count)


class Pixels(nn.Module):
    """A picture's features: convolutions of 3 × 3 with stride 2, over numbers up to 255."""

    def __init__(self, image: tuple[int, ...], channels: tuple[int, ...]) -> None:
        super().__init__()
        self.image = image
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise((image[2], *channels)))
        height, width = image[:2]
        for _ in channels:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.size = height * width * (channels[-1] if channels else image[2])

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to (n, size)."""
        height, width, channels, first = self.image
        shape = (channels, height, width) if first else (height, width, channels)
        x = x.reshape(-1, *shape) / 255
        x = x if first else x.permute(0, 3, 1, 2)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.flatten(1)


class RunningInputs:
    """Observations as the networks take them while they are gathered: normalised, if the config says so, by the moments of
    all seen so far, the step's own included, as Gymnasium's NormalizeObservation does."""

    def __init__(self, network: Network) -> None:
        self.network, self.moments = network, None
        if network.config.normalize_observations:
            self.moments = RunningMoments(float(network.observation_count), network.observation_mean.cpu().numpy().copy(),
                                          network.observation_variance.cpu().numpy().copy())

    def of(self, observations: np.ndarray, reached: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """(T, N, D) float32, and of `reached`, what each step led to, by the same moments."""
        if self.moments is None:
            return observations, reached
        mean, variance = (moment[:, None] for moment in self.moments.see(observations))
        return tuple(None if x is None else self.network.normalize(x, mean, variance) for x in (observations, reached))


class Critic(Network):
    """V(o): one output."""

    def __init__(self, spaces: Spaces, config: PolicyConfig) -> None:
        super().__init__(spaces, config, config.hidden if config.critic_hidden is None else config.critic_hidden, 1)


class Actor(Network):
    """π(a | o)."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if not self.spaces.masked:
            return outputs
        return outputs.masked_fill(inputs[:, self.spaces.seen_size :] == 0, NEVER)

    def __init__(self, spaces: Spaces, config: PolicyConfig) -> None:
        box, size = spaces.kind == "box", spaces.action_size
        super().__init__(spaces, config, config.hidden,
                         size * (1 + config.state_dependent_std) if box else sum(spaces.choices))
        if box and not config.state_dependent_std:
            self.log_std = nn.Parameter(torch.full((size,), config.log_std_init))

    def noise(self, generator: np.random.Generator, steps: int) -> np.ndarray:
        """What `sample` adds, float32: (steps, A) normal for a Box, of σ where that is one for all states and else of 1;
        (steps, Σ choices) Gumbel for choices."""
        if self.spaces.kind != "box":
            return generator.gumbel(size=(steps, sum(self.spaces.choices))).astype(np.float32)
        normal = generator.standard_normal((steps, self.spaces.action_size), np.float32)
        return normal if self.config.state_dependent_std else normal * self.log_std.detach().exp().cpu().numpy()

    def sample(self, inputs: Tensor, noise: Tensor) -> Tensor:
        """(n, A) float32: actions drawn with that noise."""
        outputs = self(inputs)
        if self.spaces.kind == "box":
            if not self.config.state_dependent_std:
                return outputs + noise
            mean, log_std = self._gaussian(outputs)
            return mean + log_std.exp() * noise
        return self._largest(outputs + noise)

    def most_likely(self, inputs: Tensor) -> Tensor:
        """(n, A) float32: the mean of a Gaussian, the likeliest choices."""
        outputs = self(inputs)
        return self._gaussian(outputs)[0] if self.spaces.kind == "box" else self._largest(outputs)

    def score(self, inputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log π(a | o) and (n,) entropy, both in nats, of (n, A) actions."""
        outputs = self(inputs)
        if self.spaces.kind == "box":
            return gaussian(*self._gaussian(outputs), actions)
        parts = zip(outputs.split(self.spaces.choices, 1), actions.long().split(1, 1), strict=True)
        logprobs, entropies = zip(*(categorical(logits, choice) for logits, choice in parts), strict=True)
        return sum(logprobs[1:], logprobs[0]), sum(entropies[1:], entropies[0])

    def _gaussian(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """(n, A) mean, and log σ: (A,) or (n, A)."""
        if not self.config.state_dependent_std:
            return outputs, self.log_std
        mean, log_std = outputs.chunk(2, 1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def _largest(self, outputs: Tensor) -> Tensor:
        if len(self.spaces.choices) == 1:
            return outputs.argmax(1, keepdim=True).float()
        return torch.stack([part.argmax(1) for part in outputs.split(self.spaces.choices, 1)], 1).float()


def gaussian(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log N(a; μ, σ) = Σ_A −½((a − μ)/σ)² − log σ − ½log 2π and H = Σ_A ½ + ½log 2π + log σ: (n,) each, nats."""
    z = (actions - mean) * (-log_std).exp()
    size = mean.shape[1]
    spread = log_std.sum(-1) + size * HALF_LOG_2PI
    return -0.5 * (z * z).sum(1) - spread, (spread + 0.5 * size).expand(len(mean))


def categorical(logits: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[choice] and H = −Σ p log p: (n,) each, nats. `logits`: (n, k); `choice`: (n, 1) int64."""
    logprobs = logits.log_softmax(1)
    return logprobs.gather(1, choice).squeeze(1), -(logprobs.exp() * logprobs).sum(1)


class ToEnvironment:
    """(n, A) actions as the environment takes them: clipped to the Box, or whole numbers from its own start."""

    def __init__(self, spaces: Spaces) -> None:
        self.box, self.scalar, self.start = spaces.kind == "box", spaces.scalar, np.array(spaces.start, np.int64)
        self.low, self.high = (np.array([none if bound is None else bound for bound in bounds], spaces.dtype)
                               for none, bounds in ((-np.inf, spaces.low), (np.inf, spaces.high)))

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        if self.box:
            return np.minimum(np.maximum(actions.astype(self.low.dtype, copy=False), self.low), self.high)
        choices = actions.astype(np.int64) + self.start
        return choices[:, 0] if self.scalar else choices
