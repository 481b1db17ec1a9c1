"""Evaluation of a control task: episodes with the policy's most likely actions, and a film of one."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
import torch

from schemas.metrics import ControlEvaluateMetrics
from schemas.tables import Returns
from stages.ops.episodes import Environments
from stages.ops.finite import require_finite
from stages.ops.moments import sample_std
from stages.ops.networks import Actor, ToEnvironment
from stages.ops.progress import progress_bar


@torch.inference_mode()
def control_evaluate(actor: Actor, environments: Environments, *, max_steps: int) -> Returns:
    """One episode in each of N environments that play `once`, cut after `max_steps`.

    Raises `EnvironmentFailure`, and `NonFiniteError` with the episodes.
    """
    environments.begin()
    seeds, playing = environments.seeds(), np.ones(len(environments), bool)
    returns, lengths, terminated = np.zeros(len(playing)), np.zeros(len(playing), np.int64), np.zeros(len(playing), bool)
    with progress_bar(total=len(playing), desc="evaluate") as bar:
        for _ in range(max_steps):
            actions = _act(actor, environments.observations)
            require_finite("the actor's most likely action", actions.sum(1), np.arange(len(playing)))
            _, rewards, terminal, truncated = environments.step(actions)
            returns[playing] += rewards[playing]
            lengths += playing
            terminated |= playing & terminal
            over = playing & (terminal | truncated)
            playing &= ~over
            bar.update(int(over.sum()))
            if not playing.any():
                break
    return Returns(row_id=np.arange(len(seeds)), seed=np.array(seeds), episode_return=returns, length=lengths,
                   terminated=terminated)


def film(actor: Actor, environment: gymnasium.Env, *, seed: int, max_steps: int) -> Iterator[np.ndarray]:
    """The frames, (height, width, 3) uint8, of the episode with that seed, the first before any action."""
    observation, _ = environment.reset(seed=seed)
    yield environment.render()
    to_environment = ToEnvironment(actor.spaces)
    for _ in range(max_steps):
        actions = to_environment(_act(actor, np.asarray(observation, np.float32)[None]))
        observation, _, terminated, truncated, _ = environment.step(actions[0])
        yield environment.render()
        if terminated or truncated:
            return


@torch.inference_mode()
def _act(actor: Actor, observations: np.ndarray) -> np.ndarray:
    return actor.most_likely(actor.inputs(observations)).cpu().numpy()


def metrics(returns: Returns) -> ControlEvaluateMetrics:
    """Mean and spread."""
    x = returns.episode_return
    return ControlEvaluateMetrics(
        episode_return=x.mean(), episode_return_std=sample_std(x), episode_return_min=x.min(),
        episode_return_max=x.max(), episode_length=returns.length.mean())
