"""Sampling responses with a key-value cache, one uniform per (row, step), finished rows leaving the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from schemas.language import RolloutConfig
from schemas.tables import Ragged, Rollouts
from stages.ops.conversations import ChatTemplate, Message, Prompt, shown
from stages.ops.device import bound_to_cores
from stages.ops.distribution import Distribution, distribution_of, token_ids
from stages.ops.finite import require_finite
from stages.ops.key_value_cache import growing_cache
from stages.ops.language_model import LanguageModel
from stages.ops.progress import progress_bar
from stages.ops.prompts import response_texts, tokenize
from stages.ops.sequences import by_length, pad_left, positions
from stages.ops.turns import Partner

COMPACT_BELOW = 0.75  # the batch is cut to its unfinished rows when less than this fraction of it is left


class Sampled(NamedTuple):
    """B responses, or the next turns of B."""

    tokens: list[np.ndarray]  # (R,) int64 each
    logprobs: list[np.ndarray]  # (R,) float32 each
    reasons: list[str]  # why it ended: `eos`, `stop` or `length`


class Sampler(Protocol):
    """What gives responses: a language model in this process, or another engine."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""

    @property
    def chat_template(self) -> ChatTemplate:
        """Whether prompts are put into it, or what else it is given."""

    def sample(
        self, prompts: list[np.ndarray], config: RolloutConfig, *, seed: int, progress: str,
        rows: np.ndarray | None = None, begun: np.ndarray | None = None, greedy: bool = False,
    ) -> Sampled:
        """Responses to b prompts of token ids. `rows`: (b,) which of the batch they are, none for all; `begun`: (b,)
        tokens that were sampled of each before, in earlier turns, none for 0; `greedy`: of the likeliest tokens."""


@dataclass(frozen=True)
class ModelSampler:
    """A language model in this process."""

    model: LanguageModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        return self.model.chat_template

    def sample(
        self, prompts: list[np.ndarray], config: RolloutConfig, *, seed: int, progress: str,
        rows: np.ndarray | None = None, begun: np.ndarray | None = None, greedy: bool = False,
    ) -> Sampled:
        """Prompts of like length are generated together."""
        lengths, size = np.array([len(row) for row in prompts]), self.model.generation_batch_size
        rows = np.arange(len(prompts)) if rows is None else rows
        begun = np.zeros(len(prompts), np.int64) if begun is None else begun
        order = np.argsort(-lengths, kind="stable")
        apart = [order] if self.model.abilities.pads else by_length(lengths[order], order)
        groups = [some[i : i + size] for some in apart for i in range(0, len(some), size)]
        distribution = distribution_of(config.model_dump(), self.tokenizer, self.model.eos_ids)
        stops = Stops.of(config, self.tokenizer, self.model.eos_ids)
        found: list = [None] * len(prompts)
        with progress_bar(total=len(prompts), desc=progress) as bar:
            for group in groups:
                limits = config.max_new_tokens - begun[group]
                uniforms = np.zeros((len(group), config.max_new_tokens)) if greedy else row_uniforms(
                    seed, rows[group], config.max_new_tokens)
                for i, first in enumerate(begun[group]):  # those of its sampled tokens, in order
                    uniforms[i] = np.roll(uniforms[i], -first)
                sampled = sample(self.model, [prompts[i] for i in group], uniforms[:, : limits.max()], distribution, stops,
                                 limits=limits, precision=config.precision, greedy=greedy, on_finished=bar.update)
                for i, *each in zip(group, *sampled, strict=True):
                    found[i] = each
        return Sampled(*map(list, zip(*found, strict=True)))


def respond(
    sampler: Sampler, prompts: Sequence[Prompt], prompt_id: np.ndarray, config: RolloutConfig, *, seed: int, progress: str,
    partner: Partner | None = None, greedy: bool = False, first_row: int = 0,
) -> Rollouts:
    """One response to each of B prompts, of several turns if there is a partner. `first_row`: the id of the first.

    Raises `NonFiniteError` with the rows, and `RewardError` where the partner fails.
    """
    prompt_tokens, rows = tokenize(sampler.tokenizer, list(prompts), sampler.chat_template), np.arange(len(prompts))
    whole = [_Conversation() for _ in rows]
    open_rows, turn = rows, 1
    while True:
        heads = [np.concatenate([prompt_tokens[i], *whole[i].tokens]) for i in open_rows]
        begun = np.array([whole[i].sampled for i in open_rows])
        found = sampler.sample(heads, config, seed=seed, progress=progress, rows=first_row + open_rows, begun=begun,
                               greedy=greedy)
        texts = response_texts(sampler.tokenizer, heads, found.tokens)
        for i, text, *each in zip(open_rows, texts, *found, strict=True):
            whole[i].add(text, *each)
        turn += 1
        still = [i for i in open_rows if whole[i].reason != "length" and whole[i].sampled < config.max_new_tokens]
        if partner is None or turn > partner.max_turns or not still:
            break
        open_rows = _answered(sampler, partner, prompts, prompt_id, np.array(still), whole, first_row)
        if not len(open_rows):
            break
    tokens = [np.concatenate(each.tokens) for each in whole]
    rollouts = Rollouts(
        row_id=first_row + rows, prompt_id=prompt_id, prompt=tuple(map(shown, prompts)),
        response=tuple(response_texts(sampler.tokenizer, prompt_tokens, tokens)),
        prompt_tokens=Ragged.from_rows(prompt_tokens, np.int32), response_tokens=Ragged.from_rows(tokens, np.int32),
        logprobs=Ragged.from_rows([np.concatenate(each.logprobs) for each in whole], np.float32),
        finish_reason=tuple(each.reason for each in whole),
        sampled=partner and Ragged.from_rows([np.concatenate(each.mask) for each in whole], np.bool_),
        turns=partner and tuple(json.dumps(each.said, ensure_ascii=False) for each in whole))
    require_finite("the actor's logprob", rollouts.logprobs, rollouts.row_id)
    return rollouts


@dataclass
class _Conversation:
    """What follows one prompt, part by part: a turn of the model's, a reply, and so on."""

    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    mask: list[np.ndarray] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)
    reason: str = ""
    sampled: int = 0

    def add(self, text: str, tokens: np.ndarray, logprobs: np.ndarray, reason: str) -> None:
        """A turn that was sampled."""
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        self.mask.append(np.ones(len(tokens), bool))
        self.said.append({"role": "assistant", "content": text})
        self.reason, self.sampled = reason, self.sampled + len(tokens)

    def add_reply(self, reply: Message, tokens: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.logprobs.append(np.zeros(len(tokens), np.float32))
        self.mask.append(np.zeros(len(tokens), bool))
        self.said.append(reply)


def _answered(
    sampler: Sampler, partner: Partner, prompts: Sequence[Prompt], prompt_id: np.ndarray, rows: np.ndarray,
    whole: list[_Conversation], first_row: int,
) -> np.ndarray:
    """Adds the replies to these rows; those of them whose conversation goes on."""
    turns = Rollouts(
        row_id=first_row + rows, prompt_id=prompt_id[rows], prompt=tuple(shown(prompts[i]) for i in rows),
        response=tuple(whole[i].said[-1]["content"] for i in rows),
        prompt_tokens=Ragged.from_rows([np.empty(0)] * len(rows), np.int32),
        response_tokens=Ragged.from_rows([whole[i].tokens[-1] for i in rows], np.int32),
        logprobs=Ragged.from_rows([whole[i].logprobs[-1] for i in rows], np.float32),
        finish_reason=tuple(whole[i].reason for i in rows),
        turns=tuple(json.dumps(whole[i].said, ensure_ascii=False) for i in rows))
    replies = partner.replies(turns)
    for i, reply in zip(rows, replies, strict=True):
        if reply is not None:
            conversation = whole[i]
            conversation.add_reply(reply, partner.tokens(
                sampler.tokenizer, sampler.chat_template, prompts[i], conversation.said, reply,
                int(conversation.tokens[-1][-1]), first_row + int(i)))
    return np.array([i for i, reply in zip(rows, replies, strict=True) if reply is not None], int)


@dataclass(frozen=True)
class Stops:
    """What ends a response before the limit."""

    eos: frozenset[int]
    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    min_new_tokens: int = 0

    @classmethod
    def of(cls, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> Stops:
        """Raises `ConfigError` naming a token that is none."""
        return cls(eos, frozenset(token_ids(tokenizer, config.stop_tokens, "rollout.stop_tokens")), config.stop, tokenizer,
                   config.min_new_tokens)

    def reasons(self, tails: np.ndarray, length: int) -> list[str]:
        """The last `reach` tokens of b responses of that length → why each ends with its last: `eos`, `stop`, or nothing."""
        found = ["eos" if i in self.eos else "stop" if i in self.tokens else "" for i in tails[:, -1].tolist()]
        if self.texts and length >= self.min_new_tokens:
            now, before = (self.tokenizer.batch_decode(part, skip_special_tokens=False) for part in (tails, tails[:, :-1]))
            found = [reason or ("stop" if any(text in tail and text not in earlier for text in self.texts) else "")
                     for reason, tail, earlier in zip(found, now, before, strict=True)]
        return found

    @property
    def reach(self) -> int:
        """Tokens at the end that decide: those that a text may lie in, none of them shorter than a byte."""
        return max((len(text.encode()) + 4 for text in self.texts), default=1)


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
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())  # that is not impossible, where u·F is rounded up to F
    token = torch.minimum(torch.searchsorted(cdf, threshold, right=True), last)
    return token.squeeze(-1).clamp(max=logprobs.shape[-1] - 1)  # of NaN, which is refused later


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


@bound_to_cores()
@torch.inference_mode()
def sample(
    model: LanguageModel, prompts: list[np.ndarray], uniforms: np.ndarray, distribution: Distribution, stops: Stops, *,
    limits: np.ndarray | None = None, precision: str = "float32", greedy: bool = False,
    on_finished: Callable[[int], object] = lambda rows: None,
) -> Sampled:
    """`prompts`: b rows of token ids; `uniforms`: (b, most response tokens); `limits`: (b,) those of each row, if it is
    fewer.

    A response ends with what stops it, which it includes, or at its limit. `on_finished` is called with the number of rows
    that ended at each step.
    """
    device = model.device.torch
    apart = model.abilities.caches and not model.abilities.trims
    first, which = (np.arange(len(prompts)),) * 2 if apart else _distinct(prompts)
    ids, mask = (torch.from_numpy(x).to(device) for x in pad_left([prompts[i] for i in first], model.pad_id))
    b, steps = uniforms.shape
    draws = torch.from_numpy(uniforms).to(device)
    tokens = torch.zeros(b, steps, dtype=torch.int64, device=device)
    logprobs = torch.zeros(b, steps, device=device)
    limits = np.full(b, steps) if limits is None else limits
    lengths, reasons = limits.copy(), np.full(b, "length", object)
    batch = _Batch(first, ids, mask, growing_cache(model.module.config) if model.abilities.caches else None)
    open_rows = np.ones(b, bool)  # of the batch, not of the caller's list
    for step in range(steps):
        logits = _next_logits(model, batch, precision)
        if len(batch.rows) < len(which) and step == 0:  # each prompt was read once
            logits = logits[which]
            batch.keep(torch.from_numpy(which).to(device))
            batch.rows = np.arange(b)
        pi = distribution.logprobs(logits, step)
        token = pi.argmax(-1) if greedy else sample_tokens(pi, draws[batch.rows, step])
        tokens[batch.rows, step] = token
        logprobs[batch.rows, step] = pi.gather(-1, token[:, None]).squeeze(-1)
        batch.append(token)
        tails = tokens[batch.rows, max(0, step + 1 - stops.reach) : step + 1].cpu().numpy()
        stopped = np.array(stops.reasons(tails, step + 1), object)
        ended = open_rows & ((stopped != "") | (limits[batch.rows] == step + 1))
        lengths[batch.rows[ended]] = step + 1
        reasons[batch.rows[ended]] = np.where(stopped[ended] == "", "length", stopped[ended])
        open_rows &= ~ended
        on_finished(int(ended.sum()))
        if not open_rows.any():
            break
        if (model.abilities.trims or batch.cache is None) and open_rows.mean() < COMPACT_BELOW:
            batch.keep(torch.from_numpy(open_rows.nonzero()[0]).to(device))
            open_rows = open_rows[open_rows]
    return Sampled(_cut(tokens.cpu().numpy(), lengths), _cut(logprobs.cpu().numpy(), lengths), reasons.tolist())


def _distinct(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which of b prompts come for the first time, and where in that list each of them is: (d,) and (b,) int64."""
    place: dict[bytes, int] = {}
    which = np.array([place.setdefault(prompt.tobytes(), len(place)) for prompt in prompts])
    return np.unique(which, return_index=True)[1], which


def _next_logits(model: LanguageModel, batch: _Batch, precision: str) -> Tensor:
    """(b, V) logits of the next token; the cache, where there is one, then holds all that the mask covers."""
    ids = batch.token if batch.token.dim() == 2 else batch.token[:, None]
    if batch.begun:
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], 1)
    batch.begun = True
    with model.computing(precision):
        out = model.module(
            input_ids=ids, attention_mask=batch.mask, position_ids=positions(batch.mask)[:, -ids.shape[1] :],
            past_key_values=batch.cache, use_cache=batch.cache is not None, logits_to_keep=1)
    return out.logits[:, -1]


def _cut(padded: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]
