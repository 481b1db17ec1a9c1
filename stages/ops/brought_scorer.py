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
from schemas.reward_settings import ComponentConfig
from schemas.tables import Rollouts
from stages.ops.conversations import Message, roles, shown
from stages.ops.language_model import LanguageModel, context_length, sequence_scores
from stages.ops.prompts import holds, parts_of, rendered, require_no_clock, special_tokens, tokens_of_parts
from stages.ops.reward_function import Columns, conversations
from stages.ops.texts import Texts

LONGEST = 10**9  # what tokenizers say that know no limit


@dataclass(frozen=True)
class ReadTexts:
    """B texts as a reward model reads them."""

    texts: tuple[str, ...]  # before they are cut
    tokens: list[list[int]]
    cut: int  # how many were longer than it takes


class BroughtScorer:
    """A `Scorer`."""

    def __init__(self, model: LanguageModel, part: ComponentConfig, columns: Columns | None = None) -> None:
        """`columns`: where the conversations of prompts are; none where they are texts."""
        self.model, self.part, self.columns = model, part, columns
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
        turns = conversations(rollouts, self.columns)
        texts = tuple(scored_text(tokenizer, each, part.chat_template) for each in turns)
        most = most_tokens(self.model.module.config, tokenizer, part.max_tokens)
        rows = _tokens(tokenizer, turns, texts, part.chat_template)
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


def scored_text(tokenizer: PreTrainedTokenizerBase, turns: list[Message], chat_template: bool | None) -> str:
    """The response, the last turn, right after the prompt; or all in the template, by default where the tokenizer has one.

    Raises `ConfigError` with what the template says.
    """
    if not _templated(tokenizer, chat_template):
        *prompt, response = turns
        return (prompt[0]["content"] if len(prompt) == 1 else shown(prompt)) + response["content"]
    require_no_clock(tokenizer, "chat_template: false")
    whose = "a user's and an assistant's turn" if len(turns) == 2 else f"a conversation ({', '.join(roles(turns))})"
    return rendered(tokenizer, turns, f"its chat template cannot render {whose}",
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
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[Message]], texts: Sequence[str], chat_template: bool | None
) -> list[list[int]]:
    """Of each text. A special token that prompt or response holds as text stays text, so that none can end its own turn."""
    if not _templated(tokenizer, chat_template):
        return tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    rows, special = tokenizer(list(texts), add_special_tokens=False)["input_ids"], special_tokens(tokenizer)
    return [_in_parts(tokenizer, turns, text) if holds(special, turns) else row
            for row, turns, text in zip(rows, prompts, texts, strict=True)]


def _in_parts(tokenizer: PreTrainedTokenizerBase, turns: list[Message], text: str) -> list[int]:
    parts = parts_of(turns, text, lambda marked: scored_text(tokenizer, marked, True))
    if parts is None:
        raise ConfigError(f"a text holds a special token, and the chat template changes it ({turns[-1]['content'][:60]!r}): "
                          "set chat_template: false")
    return tokens_of_parts(tokenizer, parts)
