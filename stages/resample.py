"""Resample: groups whose responses all have one score are dropped, and other prompts sampled in their place.

Such a group says nothing of which response is better, and its advantages are 0 (Yu et al. 2025, DAPO,
https://arxiv.org/abs/2503.14476, section 3.2, dynamic sampling). A round samples as many prompts as are missing, over the
fraction that had spread so far, none of them prompts that the batch has had. Where the rounds do not suffice, the batch
is filled with the first that were dropped, so that its size stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from schemas.artifacts import derive_seed
from schemas.language import RolloutConfig
from schemas.metrics import ResampleMetrics
from schemas.tables import DroppedResponses, Rewards, Rollouts, TokenRewards
from stages.ops.conversations import Prompt
from stages.ops.sampling import Sampler, respond
from stages.ops.turns import Partner

Score = Callable[[Rollouts], tuple[Rewards, TokenRewards | None]]
LEAST_RATE = 1 / 8  # of groups with spread, that is reckoned with


class Resampled(NamedTuple):
    rollouts: Rollouts
    rewards: Rewards
    tokens: TokenRewards | None
    dropped: DroppedResponses
    rounds: int


class _Round(NamedTuple):
    """Some groups of responses, with their rewards."""

    rollouts: Rollouts
    rewards: Rewards
    tokens: TokenRewards | None
    number: int  # 1 for those of `rollout`


def resample(
    sampler: Sampler, prompts: Sequence[Prompt], first: tuple[Rollouts, Rewards, TokenRewards | None], score: Score,
    config: RolloutConfig, *, order: Callable[[int], np.ndarray], seed: int, partner: Partner | None = None,
) -> Resampled:
    """`first`: what `rollout` and `reward` gave; `score`: the latter; `order`: round ≥ 2 → prompt ids in the order that it
    takes them in.

    Raises as they do.
    """
    rounds, groups = [_Round(*first, 1)], config.batch_size // config.responses_per_prompt
    for number in range(2, config.resample_rounds + 2):
        spread = [has for each in rounds for has in _with_spread(each, config.responses_per_prompt)]
        missing = groups - sum(spread)
        used = {i for each in rounds for i in each.rollouts.prompt_id.tolist()}
        count = min(groups, ceil(missing / max(sum(spread) / len(spread), LEAST_RATE)))
        ids = [i for i in dict.fromkeys(order(number).tolist()) if i not in used][:count] if missing > 0 else []
        if not ids:
            break
        repeated = np.repeat(ids, config.responses_per_prompt)
        rollouts = respond(sampler, [prompts[int(i)] for i in repeated], repeated, config, partner=partner,
                           seed=derive_seed(seed, number, "resample"), progress=f"resample, round {number}")
        rounds.append(_Round(rollouts, *score(rollouts), number))
    return _chosen(rounds, groups, config.responses_per_prompt)


def _with_spread(each: _Round, k: int) -> list[bool]:
    """Of each group, k responses one after the other, whether they have several scores."""
    scores = each.rewards.score.reshape(-1, k)
    return (scores != scores[:, :1]).any(1).tolist()


def _chosen(rounds: list[_Round], groups: int, k: int) -> Resampled:
    """The first groups with spread, filled up with the first without."""
    rollouts, rewards = (table.joined([getattr(each, name) for each in rounds])
                         for name, table in (("rollouts", Rollouts), ("rewards", Rewards)))
    spread = np.array([has for each in rounds for has in _with_spread(each, k)])
    order = np.concatenate([np.flatnonzero(spread), np.flatnonzero(~spread)])
    kept, left = (np.sort(part) for part in (order[:groups], order[groups:]))
    rows, others = ((part[:, None] * k + np.arange(k)).reshape(-1) for part in (kept, left))
    row_id, tokens = np.arange(groups * k), None
    if rounds[0].tokens is not None:
        tokens = TokenRewards.joined([each.tokens for each in rounds]).only(rows, row_id)
    number = np.concatenate([np.full(len(each.rollouts), each.number) for each in rounds])
    dropped = DroppedResponses(
        row_id=np.arange(len(others)), round=number[others], prompt_id=rollouts.prompt_id[others],
        prompt=tuple(rollouts.prompt[i] for i in others), response=tuple(rollouts.response[i] for i in others),
        score=rewards.score[others])
    return Resampled(rollouts.only(rows, row_id), rewards.only(rows, row_id), tokens, dropped, len(rounds))


def metrics(resampled: Resampled, k: int) -> ResampleMetrics:
    """What it cost, and what it came to."""
    everything = len(resampled.rollouts) + len(resampled.dropped)
    flat = _with_spread(_Round(resampled.rollouts, resampled.rewards, None, 1), k).count(False)
    return ResampleMetrics(
        responses=everything, rounds=resampled.rounds, dropped_groups=len(resampled.dropped) // k, flat_groups=flat,
        score=resampled.rewards.score.mean(dtype=np.float64))
