"""Rollout: responses sampled from the actor, one or several to each prompt of the iteration.

token_t ~ π(· | prompt, tokens before t), π the softmax of logits / temperature, untruncated: top-k or top-p would
make the stored logprobs those of another distribution and break the ratio. One uniform per (row, step), keyed by
(seed, row), so that how rows are split does not decide what is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.language import RolloutConfig
from schemas.metrics import RolloutMetrics
from schemas.tables import Rollouts
from stages.ops.sampling import Sampler, respond


def rollout(
    sampler: Sampler, prompts: Sequence[str], prompt_id: np.ndarray, config: RolloutConfig, *, seed: int
) -> Rollouts:
    """`prompts`: B texts, one a response; `prompt_id`: (B,) their lines in the prompt file.

    Raises `NonFiniteError` with the rows.
    """
    return respond(sampler, prompts, prompt_id, config, seed=seed, progress="rollout")


def metrics(rollouts: Rollouts) -> RolloutMetrics:
    """Lengths, ends, mean logprob."""
    lengths = rollouts.response_tokens.lengths
    return RolloutMetrics(
        response_length=lengths.mean(), response_length_max=int(lengths.max()),
        eos_fraction=np.mean(np.array(rollouts.finish_reason) == "eos"),
        logprob=rollouts.logprobs.values.mean(dtype=np.float64),
    )
