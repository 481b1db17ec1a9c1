"""log π of response tokens, and the policy's entropy there, with the output head on as many positions at once as fit.

A distribution over V tokens at each of n positions is what a language model needs most memory for, several times over in
the backward pass: 4,096 positions of 152,000 tokens are 2.5 GB. Beyond `MAX_LOGITS` the head runs on some positions after
others, and in the backward pass once more on each (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
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
from stages.ops.sequences import Batch

MAX_LOGITS = 2**25  # n·V at once: 128 MB in float32, of which a backward pass holds four or five


def token_logprobs(
    model: LanguageModel, batch: Batch, distribution: Distribution, entropy: Entropy = "none"
) -> tuple[Tensor, Tensor | None]:
    """log π(token) of the n sampled tokens, and H there if asked for: (n,) each, nats."""
    at_once = max(1, MAX_LOGITS // model.module.config.get_text_config().vocab_size)
    if at_once >= len(batch.tokens) or not model.abilities.splits:
        return _measured(model.logits(batch), batch.tokens, batch.steps, distribution, entropy)
    release_large_blocks()
    columns = (x.split(at_once) for x in (model.hidden(batch)[batch.predicted_at], batch.tokens, batch.steps))
    parts = [checkpoint(_of_some, model, *some, distribution, entropy, use_reentrant=False, preserve_rng_state=False)
             for some in zip(*columns, strict=True)]
    logprobs, spread = zip(*parts, strict=True)
    return torch.cat(logprobs), None if entropy == "none" else torch.cat(spread)


def _of_some(
    model: LanguageModel, hidden: Tensor, tokens: Tensor, steps: Tensor, distribution: Distribution, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    return _measured(model.logits_of(hidden), tokens, steps, distribution, entropy)


def _measured(
    logits: Tensor, tokens: Tensor, steps: Tensor, distribution: Distribution, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    """(n,) each, of (n, V) logits."""
    logprobs = distribution.logprobs(logits, steps)
    spread = None
    if entropy != "none":
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            spread = entropy_of(logprobs)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), spread


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
