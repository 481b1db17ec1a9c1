"""Sampling responses with a key-value cache, one uniform per (row, step), finished rows leaving the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from schemas.language import RolloutConfig
from schemas.tables import Ragged, Rollouts
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel
from stages.ops.progress import progress_bar
from stages.ops.prompts import response_texts, tokenize
from stages.ops.sequences import by_length, pad_left, positions

COMPACT_BELOW = 0.75  # the batch is cut to its unfinished rows when less than this fraction of it is left


class Sampler(Protocol):
    """What gives responses: a language model in this process, or another engine."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""

    @property
    def chat_template(self) -> bool:
        """Whether prompts are put into it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a response."""

    def sample(
        self, prompts: list[np.ndarray], config: RolloutConfig, *, seed: int, progress: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """B prompts of token ids to B rows of response tokens and B rows of their logprobs."""


@dataclass(frozen=True)
class ModelSampler:
    """A language model in this process."""

    model: LanguageModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @property
    def chat_template(self) -> bool:
        return self.model.chat_template

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.model.eos_ids

    def sample(
        self, prompts: list[np.ndarray], config: RolloutConfig, *, seed: int, progress: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Prompts of like length are generated together."""
        lengths, size = np.array([len(row) for row in prompts]), self.model.generation_batch_size
        order = np.argsort(-lengths, kind="stable")
        apart = [order] if self.model.abilities.pads else by_length(lengths[order], order)
        groups = [some[i : i + size] for some in apart for i in range(0, len(some), size)]
        tokens: list = [None] * len(prompts)
        logprobs: list = [None] * len(prompts)
        with progress_bar(total=len(prompts), desc=progress) as bar:
            for group in groups:
                uniforms = row_uniforms(seed, group, config.max_new_tokens)
                sampled = sample(self.model, [prompts[i] for i in group], uniforms, config.temperature,
                                 precision=config.precision, on_finished=bar.update)
                for i, row_tokens, row_logprobs in zip(group, *sampled, strict=True):
                    tokens[i], logprobs[i] = row_tokens, row_logprobs
        return tokens, logprobs


def respond(
    sampler: Sampler, prompts: Sequence[str], prompt_id: np.ndarray, config: RolloutConfig, *, seed: int, progress: str
) -> Rollouts:
    """One response to each of B prompts. Raises `NonFiniteError` with the rows."""
    prompt_tokens = tokenize(sampler.tokenizer, list(prompts), sampler.chat_template)
    tokens, logprobs = sampler.sample(prompt_tokens, config, seed=seed, progress=progress)
    rollouts = Rollouts(
        row_id=np.arange(len(prompts)), prompt_id=prompt_id, prompt=tuple(prompts),
        response=tuple(response_texts(sampler.tokenizer, prompt_tokens, tokens)),
        prompt_tokens=Ragged.from_rows(prompt_tokens, np.int32), response_tokens=Ragged.from_rows(tokens, np.int32),
        logprobs=Ragged.from_rows(logprobs, np.float32),
        finish_reason=tuple("eos" if row[-1] in sampler.eos_ids else "length" for row in tokens),
    )
    require_finite("the actor's logprob", rollouts.logprobs, rollouts.row_id)
    return rollouts


def row_uniforms(seed: int, rows: np.ndarray, steps: int) -> np.ndarray:
    """(b, steps) float64 in [0, 1): row r's come from a counter-based generator keyed by (seed, r) alone."""
    keys = [np.array([seed, row], np.uint64) for row in rows]
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(steps) for key in keys])


def sample_tokens(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: (b, V) logprobs and (b,) uniforms in [0, 1) to (b,) token ids.

    Token k is taken where F(k − 1) ≤ u·F(V − 1) < F(k), F the cumulative distribution summed in float64.
    """
    cdf = logprobs.double().exp_().cumsum_(-1)
    threshold = (uniforms.to(cdf) * cdf[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp(max=logprobs.shape[-1] - 1)


@dataclass
class _Batch:
    """Responses that are being generated: the rows still unfinished, and the cache that holds their past."""

    rows: np.ndarray  # (b,) positions in the caller's list
    token: Tensor  # (b, T) the prompts; then (b,) the last token, or (b, T) all tokens where there is no cache
    mask: Tensor  # (b, T) over the tokens so far
    cache: DynamicCache | None
    begun: bool = False  # whether the prompts were read

    def append(self, token: Tensor) -> None:
        """(b,): the tokens that were sampled."""
        self.token = torch.cat([self.token, token[:, None]], 1) if self.cache is None else token

    def keep(self, kept: Tensor) -> None:
        """Only these rows, by position in the batch."""
        self.rows = self.rows[kept.cpu().numpy()]
        self.token, self.mask = self.token[kept], self.mask[kept]
        if self.cache is not None:
            self.cache.batch_select_indices(kept)


@torch.inference_mode()
def sample(
    model: LanguageModel, prompts: list[np.ndarray], uniforms: np.ndarray, temperature: float, *,
    precision: str = "float32", on_finished: Callable[[int], object] = lambda rows: None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Response tokens and their logprobs, a pair of (R,) arrays to a prompt.

    `prompts`: b rows of token ids; `uniforms`: (b, most response tokens). A response ends with the first EOS, which
    it includes, or at the limit. `on_finished` is called with the number of rows that ended at each step.
    """
    device = model.device.torch
    ids, mask = (torch.from_numpy(x).to(device) for x in pad_left(prompts, model.pad_id))
    b, steps = uniforms.shape
    draws = torch.from_numpy(uniforms).to(device)
    eos = torch.tensor(sorted(model.eos_ids), device=device)
    tokens = torch.zeros(b, steps, dtype=torch.int64, device=device)
    logprobs = torch.zeros(b, steps, device=device)
    lengths = np.full(b, steps)
    batch = _Batch(np.arange(b), ids, mask, DynamicCache(config=model.module.config) if model.abilities.caches else None)
    open_rows = torch.ones(b, dtype=torch.bool, device=device)  # of the batch, not of the caller's list
    for step in range(steps):
        distribution = _next_logprobs(model, batch, temperature, precision)
        token = sample_tokens(distribution, draws[batch.rows, step])
        tokens[batch.rows, step] = token
        logprobs[batch.rows, step] = distribution.gather(-1, token[:, None]).squeeze(-1)
        batch.append(token)
        ended = open_rows & torch.isin(token, eos)
        lengths[batch.rows[ended.cpu().numpy()]] = step + 1
        open_rows &= ~ended
        on_finished(int(ended.sum()))
        if not open_rows.any():
            break
        if (model.abilities.trims or batch.cache is None) and open_rows.float().mean() < COMPACT_BELOW:
            batch.keep(open_rows.nonzero().squeeze(-1))
            open_rows = open_rows[open_rows]
    on_finished(int(open_rows.sum()))
    return _cut(tokens.cpu().numpy(), lengths), _cut(logprobs.cpu().numpy(), lengths)


def _next_logprobs(model: LanguageModel, batch: _Batch, temperature: float, precision: str) -> Tensor:
    """(b, V) logprobs of the next token; the cache, where there is one, then holds all that the mask covers."""
    ids = batch.token if batch.token.dim() == 2 else batch.token[:, None]
    if batch.begun:
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], 1)
    batch.begun = True
    with model.computing(precision):
        out = model.module(
            input_ids=ids, attention_mask=batch.mask, position_ids=positions(batch.mask)[:, -ids.shape[1] :],
            past_key_values=batch.cache, use_cache=batch.cache is not None, logits_to_keep=1)
    return (out.logits[:, -1].float() / temperature).log_softmax(-1)


def _cut(padded: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]
