"""log π of response tokens, and the policy's entropy there, with the output head on as many positions at once as fit.

A distribution over V tokens at each of b·R positions is what a language model needs most memory for, several times over in
the backward pass: 4,096 positions of 152,000 tokens are 2.5 GB. Beyond `MAX_LOGITS` the head runs on some columns of the
responses after others, and in the backward pass once more on each (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from schemas.tables import Ragged, Rollouts
from stages.ops.device import bound_to_cores, release_large_blocks
from stages.ops.distribution import Distribution
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel, tracked_batches
from stages.ops.learner import Entropy
from stages.ops.output_head import logits_of
from stages.ops.sequences import Batch

MAX_LOGITS = 2**25  # b·R·V at once: 128 MB in float32, of which a backward pass holds four or five


def token_logprobs(
    model: LanguageModel, batch: Batch, distribution: Distribution, entropy: Entropy = "none"
) -> tuple[Tensor, Tensor | None]:
    """log π(token) of the n response tokens, and H there if asked for: (n,) each, nats."""
    ids = batch.response_ids
    columns = max(1, MAX_LOGITS // (len(ids) * model.module.config.get_text_config().vocab_size))
    if columns >= ids.shape[1] or not model.abilities.splits:
        parts = [_measured(model.response_logits(batch), ids, 0, distribution, entropy)]
    else:
        release_large_blocks()
        hidden = model.hidden(batch)[:, batch.prompt_width - 1 : -1]
        parts = [checkpoint(_of_columns, model, hidden[:, i : i + columns], ids[:, i : i + columns], i, distribution,
        entropy, use_reentrant=False, preserve_rng_state=False) for i in range(0, ids.shape[1], columns)]
    logprobs, spread = zip(*parts, strict=True)
    return batch.flat(torch.cat(logprobs, 1)), None if entropy == "none" else batch.flat(torch.cat(spread, 1))


def _of_columns(
    model: LanguageModel, hidden: Tensor, ids: Tensor, first: int, distribution: Distribution, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    with model.computing():
        logits = logits_of(model.module, hidden)
    return _measured(logits, ids, first, distribution, entropy)


def _measured(
    logits: Tensor, ids: Tensor, first: int, distribution: Distribution, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    """(b, R) each, of (b, R, V) logits of the response's tokens from `first` on."""
    logprobs = distribution.logprobs(logits, first)
    spread = None
    if entropy != "none":
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            spread = entropy_of(logprobs)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), spread


def entropy_of(logprobs: Tensor) -> Tensor:
    """H = −Σ_v p_v log p_v (Shannon 1948): (…, V) to (…), nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


@bound_to_cores()
@torch.inference_mode()
def score_tokens(model: LanguageModel, rollouts: Rollouts, distribution: Distribution, progress: str) -> Ragged:
    """log π(token) of every sampled token under `model`, nats, float32, 0 of others. Raises `NonFiniteError` with the
    rows."""
    flat = np.zeros(len(rollouts.logprobs.values), np.float32)
    for batch in tracked_batches(rollouts, model, progress):
        flat[batch.token_index] = token_logprobs(model, batch, distribution)[0].cpu().numpy()
    logprobs = rollouts.logprobs.with_values(flat)
    require_finite("the reference's logprob", logprobs, rollouts.row_id)
    return logprobs
