"""Reference: log π_ref of every sampled token, of the distribution that they were drawn from, under the frozen starting
actor."""

from __future__ import annotations

import numpy as np

from schemas.metrics import ReferenceMetrics
from schemas.tables import ReferenceLogprobs, Rollouts
from stages.ops.distribution import Distribution
from stages.ops.language_model import LanguageModel
from stages.ops.token_logprobs import score_tokens


def reference(model: LanguageModel, rollouts: Rollouts, distribution: Distribution) -> ReferenceLogprobs:
    """Raises `NonFiniteError` with the rows."""
    return ReferenceLogprobs(row_id=rollouts.row_id, logprobs=score_tokens(model, rollouts, distribution, "reference"))


def metrics(reference: ReferenceLogprobs, rollouts: Rollouts) -> ReferenceMetrics:
    """Mean logprob of the sampled tokens."""
    scored = reference if rollouts.sampled is None else reference.sampled_alone(rollouts.sampled)
    return ReferenceMetrics(logprob=scored.logprobs.values.mean(dtype=np.float64))
