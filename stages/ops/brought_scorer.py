"""A reward model that is brought: it reads prompt and response as text, in its own template and tokens.

The score is its one label for the whole text, at its last token where it is causal. A text longer than it takes is cut at
the side that the config says, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from schemas.errors import ConfigError
from schemas.language import ComponentConfig
from schemas.tables import Rollouts
from stages.ops.language_model import LanguageModel, context_length, sequence_scores
from stages.ops.prompts import rendered, require_no_clock, special_tokens, tokens_of_parts
from stages.ops.texts import Texts

LONGEST = 10**9  # what tokenizers say that know no limit
MARKS = ("\ue000prompt\ue001", "\ue000response\ue001")  # of the private use area: no template and no user writes them


@dataclass(frozen=True)
class ReadTexts:
    """B texts as a reward model reads them."""

    texts: tuple[str, ...]  # before they are cut
    tokens: list[list[int]]
    cut: int  # how many were longer than it takes


class BroughtScorer:
    """A `Scorer`."""

    def __init__(self, model: LanguageModel, part: ComponentConfig) -> None:
        self.model, self.part = model, part
        self._last: tuple[Rollouts | Texts, ReadTexts] | None = None

    def __call__(self, rollouts: Rollouts | Texts) -> np.ndarray:
        """(B,) float32."""
        return sequence_scores(self.model, self.read(rollouts).tokens, "reward")

    @property
    def cut(self) -> int:
        """How many of the texts that were read last were longer than it takes."""
        return self._last[1].cut if self._last else 0

    def read(self, rollouts: Rollouts | Texts) -> ReadTexts:
        """The texts of prompts and responses. Raises `ConfigError` where its template cannot render one."""
        if self._last is None or self._last[0] is not rollouts:
            self._last = rollouts, self._read(rollouts)
        return self._last[1]

    def _read(self, rollouts: Rollouts | Texts) -> ReadTexts:
        tokenizer, part = self.model.tokenizer, self.part
        pairs = list(zip(rollouts.prompt, rollouts.response, strict=True))
        texts = tuple(scored_text(tokenizer, *pair, part.chat_template) for pair in pairs)
        most = most_tokens(self.model.module.config, tokenizer, part.max_tokens)
        rows = _tokens(tokenizer, pairs, texts, part.chat_template)
        long = [i for i, row in enumerate(rows) if most is not None and len(row) > most]
        for i in long:
            rows[i] = self._shortened(texts[i], rows[i], most)
        return ReadTexts(texts, rows, len(long))

    def _shortened(self, text: str, row: list[int], most: int) -> list[int]:
        """Cut to so many tokens; those that a tokenizer puts around each text, such as BERT's, stay."""
        tokenizer, side = self.model.tokenizer, self.part.truncation
        if _templated(tokenizer, self.part.chat_template):
            return row[-most:] if side == "left" else row[:most]
        before, tokenizer.truncation_side = tokenizer.truncation_side, side
        try:
            return tokenizer(text, split_special_tokens=True, truncation=True, max_length=most)["input_ids"]
        finally:
            tokenizer.truncation_side = before


def scored_text(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, chat_template: bool | None) -> str:
    """The response right after the prompt; or both as turns of the template, by default where the tokenizer has one.

    Raises `ConfigError` with what the template says.
    """
    if not _templated(tokenizer, chat_template):
        return prompt + response
    require_no_clock(tokenizer, "chat_template: false")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return rendered(tokenizer, turns, "its chat template cannot render a user's and an assistant's turn",
                    "set chat_template: false, or change its chat_template.jinja")


def most_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int | None:
    """The most tokens of a text: what is asked for, or what model and tokenizer take; none where they know no limit.

    Raises `ConfigError` where the model takes fewer than are asked for.
    """
    context = context_length(config)
    if asked is None:
        return min((limit for limit in (context, tokenizer.model_max_length) if limit and limit < LONGEST), default=None)
    if context is not None and asked > context:
        raise ConfigError(f"max_tokens={asked}: it takes {context}; lower it, or leave it out")
    return asked


def _templated(tokenizer: PreTrainedTokenizerBase, chat_template: bool | None) -> bool:
    return tokenizer.chat_template is not None if chat_template is None else chat_template


def _tokens(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], texts: Sequence[str], chat_template: bool | None
) -> list[list[int]]:
    """Of each text. A special token that prompt or response holds as text stays text, so that none can end its own turn."""
    if not _templated(tokenizer, chat_template):
        return tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    rows, special = tokenizer(list(texts), add_special_tokens=False)["input_ids"], special_tokens(tokenizer)
    return [_in_parts(tokenizer, *pair, text) if any(token in part for token in special for part in pair) else row
            for row, pair, text in zip(rows, pairs, texts, strict=True)]


def _in_parts(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, text: str) -> list[int]:
    """Where prompt and response are in the template is seen from other texts in their places."""
    marked = scored_text(tokenizer, *MARKS, True)
    before, _, rest = marked.partition(MARKS[0])
    between, found, after = rest.partition(MARKS[1])
    written = ((a, b) for a in (prompt, prompt.strip()) for b in (response, response.strip()))
    parts = next(((a, b) for a, b in written if found and before + a + between + b + after == text), None)
    if parts is None:
        raise ConfigError(f"a text holds a special token, and the chat template changes it ({response[:60]!r}): set "
                          "chat_template: false")
    return tokens_of_parts(tokenizer, (
        (before, False), (parts[0], True), (between, False), (parts[1], True), (after, False)))
