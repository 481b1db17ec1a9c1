"""A new, untrained policy: actor and critic of a control task.

Weights are orthogonal with gain √2 in hidden layers, 0.01 at the actor's outputs and 1 at the critic's; biases are 0
(Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, detail 2).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from schemas.control import PolicyConfig, Spaces
from schemas.metrics import PolicyMetrics
from stages.ops.networks import Actor, Critic, Network


def policy(spaces: Spaces, config: PolicyConfig, *, seed: int) -> tuple[Actor, Critic]:
    """Actor and critic for an environment of these spaces."""
    actor, critic = Actor(spaces, config), Critic(spaces, config)
    generator = torch.Generator().manual_seed(seed)
    for network, gain in ((actor, 0.01), (critic, 1.0)):
        _initialise(network, gain, generator)
    if spaces.kind == "box" and config.state_dependent_std:
        nn.init.constant_(actor.head.bias[spaces.action_size :], config.log_std_init)
    return actor, critic


def _initialise(network: Network, gain: float, generator: torch.Generator) -> None:
    for layer in (*(network.pixels.layers if network.pixels else ()), *network.layers, network.head):
        nn.init.orthogonal_(layer.weight, gain if layer is network.head else math.sqrt(2), generator=generator)
        nn.init.zeros_(layer.bias)


def metrics(actor: Actor, critic: Critic) -> PolicyMetrics:
    """Sizes."""
    sizes = [sum(p.numel() for p in network.parameters()) for network in (actor, critic)]
    return PolicyMetrics(actor_parameters=sizes[0], critic_parameters=sizes[1])
