"""Rollout: responses sampled from the actor, one or several to each prompt of the iteration.

token_t ~ π(· | prompt, tokens before t), π the softmax of logits / temperature (stages/ops/distribution.py), untruncated:
top-k or top-p would make the stored logprobs those of another distribution and break the ratio. One uniform per (row,
step), keyed by (seed, row), so that how rows are split does not decide what is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from schemas.language import RolloutConfig
from schemas.metrics import RolloutMetrics
from schemas.tables import Rollouts
from stages.ops.conversations import Prompt
from stages.ops.sampling import Sampler, respond
from stages.ops.turns import Partner


def rollout(
    sampler: Sampler, prompts: Sequence[Prompt], prompt_id: np.ndarray, config: RolloutConfig, *, seed: int,
    partner: Partner | None = None, first_row: int = 0,
) -> Rollouts:
    """`prompts`: B, one a response; `prompt_id`: (B,) their rows in the file.

    `partner`: who answers responses of several turns; `first_row`: of the batch, where they are a part of it. Raises
    `NonFiniteError` with the rows, and `RewardError`.
    """
    return respond(sampler, prompts, prompt_id, config, seed=seed, progress="rollout", partner=partner,
                   first_row=first_row)


def metrics(rollouts: Rollouts) -> RolloutMetrics:
    """Lengths, ends, mean logprob."""
    lengths, logprobs = rollouts.sampled_lengths, rollouts.logprobs.values
    turns = rollouts.turns and [sum(turn["role"] == "assistant" for turn in json.loads(said)) for said in rollouts.turns]
    return RolloutMetrics(
        response_length=lengths.mean(), response_length_max=int(lengths.max()), eos_fraction=rollouts.terminated.mean(),
        logprob=(logprobs if rollouts.sampled is None else logprobs[rollouts.sampled.values]).mean(dtype=np.float64),
        turns=turns and float(np.mean(turns)))
