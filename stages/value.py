"""Value: the critic's V(s_t) where each response token is predicted, and V after the last one."""

from __future__ import annotations

import numpy as np
import torch

from schemas.metrics import ValueMetrics
from schemas.tables import Rollouts, Values
from stages.ops.device import bound_to_cores
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel, state_values, tracked_batches


@bound_to_cores()
@torch.inference_mode()
def value(critic: LanguageModel, rollouts: Rollouts) -> Values:
    """Raises `NonFiniteError` with the rows."""
    flat, bootstrap = np.zeros(len(rollouts.logprobs.values), np.float32), np.empty(len(rollouts), np.float32)
    for batch in tracked_batches(rollouts, critic, "value"):
        of_tokens, last = state_values(critic, batch)
        flat[batch.token_index], bootstrap[batch.rows] = of_tokens.cpu().numpy(), last.cpu().numpy()
    values = rollouts.logprobs.with_values(flat)
    require_finite("the critic's value", values, rollouts.row_id)
    require_finite("the critic's value after the last token", bootstrap, rollouts.row_id)
    return Values(row_id=rollouts.row_id, values=values, bootstrap=bootstrap)


def metrics(values: Values, rollouts: Rollouts) -> ValueMetrics:
    """Mean and spread over the sampled tokens."""
    values = values if rollouts.sampled is None else values.sampled_alone(rollouts.sampled)
    flat = values.values.values.astype(np.float64)
    return ValueMetrics(value=flat.mean(), value_std=flat.std())
