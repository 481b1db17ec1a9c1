"""Rollout of a control task: T steps of N environments with the actor, in one on-policy batch.

a_t ~ π(· | o_t), one noise vector per (environment, step) from Philox keyed by (seed, environment). The policy is that of
the iteration's start throughout, so that logprobs and values are computed once, for the whole batch. A row is a piece of an
episode: it ends where the episode does or where the batch does.

Observations, if normalised: by the moments of all seen so far, the step's own included. Rewards, if scaled: r/σ, σ that of
all discounted returns Σ γ^(steps ago)·r so far, the step's own included; then clipped (as Gymnasium's wrappers do; Engstrom
et al. 2020, https://arxiv.org/abs/2005.12729, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from schemas.artifacts import Moments
from schemas.control import ControlRewardConfig, ControlRolloutConfig
from schemas.metrics import ControlRolloutMetrics
from schemas.tables import Ragged, Trajectories
from stages.ops.episodes import Environments, episode_seed
from stages.ops.finite import require_finite
from stages.ops.moments import RunningMoments, updated_moments
from stages.ops.networks import Actor, Critic, RunningInputs, ToEnvironment
from stages.ops.progress import progress_bar

EPSILON = 1e-8

@torch.inference_mode()
def control_rollout(
    actor: Actor, critic: Critic, environments: Environments, config: ControlRolloutConfig, reward: ControlRewardConfig, *,
    gamma: float, moments: Moments, seed: int,
) -> Trajectories:
    """Steps the environments, which stay where they are for the next batch.

    `moments`: of discounted returns before this batch. Raises `EnvironmentFailure`, and `NonFiniteError` with the rows.
    """
    began = environments.episode
    steps = _play(actor, environments, config.num_steps, seed)
    batch = _rows(steps, began, actor, critic, environments, reward, gamma, moments)
    for what, column in (("the actor's logprob", batch.logprobs), ("the critic's value", batch.values),
                         ("the critic's value of the final observation", batch.bootstrap)):
        require_finite(what, column, batch.row_id)
    environments.keep(batch)
    return batch


@dataclass(frozen=True)
class _Steps:
    """What T steps of N environments gave: (N, T, …) each."""

    observations: np.ndarray  # (N, T, D) what was acted on
    actions: np.ndarray  # (N, T, A)
    reached: np.ndarray  # (N, T, D) what the action led to, before any reset
    rewards: np.ndarray  # (N, T)
    terminated: np.ndarray  # (N, T) bool
    truncated: np.ndarray  # (N, T) bool


def _play(actor: Actor, environments: Environments, steps: int, seed: int) -> _Steps:
    count, spaces = len(environments), actor.spaces
    generators = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(count)]
    noise = torch.tensor(np.stack([actor.noise(generator, steps) for generator in generators], 1), device=actor.device)
    observations, reached = (np.empty((steps, count, spaces.observation_size), np.float32) for _ in range(2))
    actions = np.empty((steps, count, spaces.action_size), np.float32)
    rewards = np.empty((steps, count), np.float32)
    terminated, truncated = (np.empty((steps, count), bool) for _ in range(2))
    running = RunningInputs(actor)
    for t in progress_bar(range(steps), "rollout"):
        observations[t] = environments.observations
        inputs = torch.tensor(running.of(observations[t : t + 1])[0][0], device=actor.device)
        actions[t] = actor.sample(inputs, noise[t]).cpu().numpy()
        reached[t], rewards[t], terminated[t], truncated[t] = environments.step(actions[t])
    return _Steps(*(a.swapaxes(0, 1) for a in (observations, actions, reached, rewards, terminated, truncated)))


def _rows(
    steps: _Steps, began: np.ndarray, actor: Actor, critic: Critic, environments: Environments, reward: ControlRewardConfig,
    gamma: float, moments: Moments,
) -> Trajectories:
    """The steps cut into pieces of episodes. `began`: (N,) which episodes those were that the batch began in."""
    ended = steps.terminated | steps.truncated  # (N, T)
    last = ended.copy()
    last[:, -1] = True
    ends = np.flatnonzero(last)  # (B,) of the N·T steps
    offsets = np.concatenate([[0], ends + 1])
    environment = ends // ended.shape[1]
    episode = (began[:, None] + np.cumsum(ended, 1) - ended).reshape(-1)[ends]
    taken_up = np.diff(environment, prepend=-1) > 0  # the row goes on with what the batch before has left
    start, episode_return, carried = (of_environment[environment] * taken_up for of_environment in (
        environments.start, environments.episode_return, environments.discounted_return))

    observations, actions, raw = (Ragged(column.reshape(-1, *column.shape[2:]), offsets)
                                  for column in (steps.observations, steps.actions, steps.rewards))
    discounted = raw.with_values(discounted_returns(raw, carried, gamma))
    final = steps.reached.reshape(observations.values.shape)[ends]
    inputs = (x.swapaxes(0, 1).reshape(observations.values.shape) for x in RunningInputs(actor).of(
        steps.observations.swapaxes(0, 1), steps.reached.swapaxes(0, 1)))
    inputs, after = (torch.tensor(x, device=actor.device) for x in inputs)
    logprobs, _ = actor.score(inputs, torch.tensor(actions.values, device=actor.device))
    values, bootstrap = (critic(x).squeeze(1).cpu().numpy() for x in (inputs, after[ends]))
    seeds = [episode_seed(environments.seed, int(i), int(k)) for i, k in zip(environment, episode, strict=True)]
    return Trajectories(
        row_id=np.arange(len(ends)), environment=environment, episode=episode, seed=np.array(seeds), start=start,
        observations=observations, actions=actions, logprobs=raw.with_values(logprobs.cpu().numpy()),
        values=raw.with_values(values), raw_rewards=raw, discounted_returns=discounted,
        rewards=raw.with_values(_scaled(raw, discounted, len(began), reward, moments)),
        terminated=steps.terminated.reshape(-1)[ends], truncated=steps.truncated.reshape(-1)[ends],
        final_observation=final, bootstrap=bootstrap, episode_return=episode_return + raw.sums())


def discounted_returns(rewards: Ragged, carried: np.ndarray, gamma: float) -> np.ndarray:
    """(n,) float32: d_t = γ·d_{t−1} + r_t within each row, which begins with what was `carried` into it, (B,)."""
    rows = [list(accumulate(row.tolist(), lambda d, r: gamma * d + r, initial=before))[1:]
            for row, before in zip(rewards, carried.tolist(), strict=True)]
    return np.concatenate(rows).astype(np.float32)


def _scaled(
    raw: Ragged, discounted: Ragged, environments: int, config: ControlRewardConfig, moments: Moments
) -> np.ndarray:
    """(N·T,) float32, as the steps lie: raw/σ_t, clipped; where σ_t is nearly 0, at a first step, nothing is divided."""
    rewards = raw.values.astype(np.float64)
    if config.normalize == "scale":
        running = RunningMoments(moments.count, np.array([moments.mean]), np.array([moments.std**2]))
        _, variance = running.see(discounted.values.reshape(environments, -1).T[:, :, None])  # (T, 1)
        variance = np.tile(variance[:, 0], environments)
        rewards = rewards / np.sqrt(np.where(variance > EPSILON, variance, 1.0))
    return (rewards if config.clip is None else rewards.clip(-config.clip, config.clip)).astype(np.float32)


def metrics(batch: Trajectories, actor: Actor, reward: ControlRewardConfig, moments: Moments) -> ControlRolloutMetrics:
    """Returns of the episodes that ended, and moments of what the policy did. `moments`: before this batch."""
    ended, values, running = batch.ended, batch.values.values.astype(np.float64), {}
    if ended.any():
        lengths = batch.start + batch.logprobs.lengths
        running |= {"episode_return": batch.episode_return[ended].mean(), "episode_length": lengths[ended].mean()}
    if actor.spaces.kind == "box":
        sampled = batch.actions.values
        taken = ToEnvironment(actor.spaces)(sampled)
        running["action_clip_fraction"] = (taken != sampled.astype(taken.dtype)).mean()
    if reward.normalize == "scale":
        after = updated_moments(moments, batch.discounted_returns.values)
        running |= {f"running_{name}": value for name, value in after}
    return ControlRolloutMetrics(
        episodes=int(ended.sum()), steps=len(values), raw_reward=batch.raw_rewards.values.mean(dtype=np.float64),
        logprob=batch.logprobs.values.mean(dtype=np.float64), value=values.mean(), value_std=values.std(), **running)
