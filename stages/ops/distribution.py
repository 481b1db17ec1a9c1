"""π, the distribution that tokens are drawn from and scored by: in rollout, reference and update alike, so that the
ratio of an update's first step is 1.

π(v) ∝ exp(logit_v / temperature) over the tokens v that may come: all but those that are suppressed, and, in a response's
first `min_new_tokens` tokens, those that would end it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from schemas.errors import ConfigError

if TYPE_CHECKING:  # its import takes a second
    from transformers import PreTrainedTokenizerBase

NEVER = -1e30  # a logit: its exponential is 0, and so is 0 times it, which of −∞ it would not be
SETTINGS = ("temperature", "suppress_tokens", "stop_tokens", "min_new_tokens")
"""Settings of `rollout` that decide it."""


@dataclass(frozen=True)
class Distribution:
    """What π is, beside the model."""

    temperature: float = 1.0
    suppressed: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """Tokens that end a response."""
    min_new_tokens: int = 0

    def logprobs(self, logits: Tensor, steps: Tensor | int) -> Tensor:
        """(n, V) logits of tokens to (n, V) log π, nats; `steps`: which token of its response each is, from 0."""
        scaled = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        if self.suppressed:
            scaled = scaled.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), NEVER)
        if self.min_new_tokens and self.ends:
            ends = torch.tensor(self.ends, device=logits.device)
            early = torch.as_tensor(steps, device=logits.device).expand(len(logits)) < self.min_new_tokens
            scaled = scaled.index_copy(-1, ends, scaled[:, ends].masked_fill(early[:, None], NEVER))
        return scaled.log_softmax(-1)


def distribution_of(
    settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] | frozenset[int]
) -> Distribution:
    """`settings`: those of `rollout`, by name; `eos_ids`: the model's. Raises `ConfigError` naming a token that is none."""
    suppressed = token_ids(tokenizer, settings.get("suppress_tokens", ()), "rollout.suppress_tokens")
    least = settings.get("min_new_tokens", 0)
    stops = token_ids(tokenizer, settings.get("stop_tokens", ()), "rollout.stop_tokens")
    return Distribution(settings["temperature"], suppressed, tuple(sorted({*eos_ids, *stops})) if least else (), least)


def token_ids(tokenizer: PreTrainedTokenizerBase, named: Sequence[str | int], setting: str) -> tuple[int, ...]:
    """Ids of tokens by their ids or as they are written, in order. Raises `ConfigError`."""
    return tuple(sorted({_token_id(tokenizer, token, setting) for token in named}))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | int, setting: str) -> int:
    if isinstance(token, int):
        if not 0 <= token < len(tokenizer):
            raise ConfigError(f"{setting}: {token} is no token id; the tokenizer has 0 to {len(tokenizer) - 1}")
        return token
    if token in (vocabulary := tokenizer.get_vocab()):
        return vocabulary[token]
    ids = tokenizer(token, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.decode(ids) != token:
        pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise ConfigError(f"{setting}: {token!r} is not one token of the tokenizer, but {pieces or 'none'}; name each of "
                          "them, or take rollout.stop for a text")
    return ids[0]
