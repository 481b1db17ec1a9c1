"""Whether rows of data fit into a model's context beside the response, and what becomes of those that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from flows.runs.rows import DataTable, Row, table_of
from flows.runs.sources import SourceRow
from schemas.errors import ConfigError
from stages.ops.conversations import ChatTemplate, Prompt, as_turns, prompt_of, roles, shown
from stages.ops.prompts import PLACEHOLDER, render, special_tokens, tokenize

ENDS = {"demonstrations": ("completion",), "pairs": ("chosen", "rejected"), "heldout_pairs": ("chosen", "rejected"),
        "pretraining": ("text",)}
"""Role → columns that follow a prompt, or are texts themselves."""
SLACK = 16  # tokens that a tokenizer may add to a text: BOS, EOS, a leading blank
SHOWN = 8  # places in a message
MANY = 512  # rows that are tokenized together


@dataclass(frozen=True)
class Fit:
    """Reads the rows of a role as the model will."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    context: int | None
    """The most tokens; none where there is no limit."""
    reserved: int
    """Of them for the response."""

    def fitted(self, role: str, table: DataTable, too_long: Literal["refuse", "drop", "cut"]) -> DataTable:
        """The rows that fit. Raises `ConfigError` naming those that are empty, or too long where that is refused."""
        self._require_rendered(table)
        lengths = self.lengths(role, table)
        if (empty := np.flatnonzero(lengths == 0)).size:
            raise ConfigError(f"{table.places[empty[0]]} has no tokens; give every prompt some text")
        if self.context is None or not (long := lengths > self.room).any():
            return table
        if too_long == "refuse":
            raise ConfigError(self._refusal(role, table, lengths))
        if too_long == "cut":
            table, cut = self._cut(role, table, long)
            long = self.lengths(role, table) > self.room
            table = replace(table, cut=int(np.sum(cut & ~long)))
        if long.all():
            raise ConfigError(f"data.{role}: all {len(table)} rows are too long: {self._why}")
        return replace(table.only(~long), too_long=int(long.sum()))

    @property
    def room(self) -> int:
        return self.context - self.reserved

    @property
    def _why(self) -> str:
        return f"the model's context of {self.context} leaves {self.room} beside {self.reserved} for the response"

    def _refusal(self, role: str, table: DataTable, lengths: np.ndarray) -> str:
        long = np.flatnonzero(lengths > self.room)
        file = str(table.places[0]).rpartition(", ")[0]
        places = ", ".join(str(table.places[i]).removeprefix(f"{file}, ") for i in long[:SHOWN])
        return (f"{file}: {long.size} of {len(table)} rows are too long ({places}{', …' if long.size > SHOWN else ''}; the "
                f"longest has {lengths.max()} tokens): {self._why}; shorten them, set data.too_long: drop (or cut)"
                + (", or lower rollout.max_new_tokens" if role in ("prompts", "heldout_prompts") else ""))

    # --- tokens ---

    def lengths(self, role: str, table: DataTable) -> np.ndarray:
        """(N,) tokens of each row's longest text; of those that fit for certain, by their bytes, 1."""
        bound = _Bound(self.tokenizer, self.template)
        found, group = np.ones(len(table), np.int64), []
        for i, row in enumerate(table):
            texts = [(prompt, end) for prompt, end in _texts(role, row)
                     if self.context is None or not 0 < bound(prompt, end) <= self.room]
            if any(self.context is not None or not (shown(prompt) + end).strip() for prompt, end in texts):
                group.append((i, texts))
            if len(group) == MANY:
                self._count(table, group, found)
                group = []
        self._count(table, group, found)
        return found

    def _count(self, table: DataTable, group: Sequence[tuple[int, list[tuple[Prompt, str]]]], found: np.ndarray) -> None:
        owners = [i for i, texts in group for _ in texts]
        prompts, ends = zip(*(text for _, texts in group for text in texts), strict=True) if owners else ((), ())
        longest: dict[int, int] = {}
        for i, tokens in zip(owners, self._tokens(table, owners, prompts, ends), strict=True):
            longest[i] = max(longest.get(i, 0), len(tokens))
        for i, length in longest.items():
            found[i] = length

    def _tokens(
        self, table: DataTable, owners: Sequence[int], prompts: Sequence[Prompt], ends: Sequence[str]
    ) -> list[np.ndarray]:
        """Of each text. Raises `ConfigError` naming the row of the one that cannot be read."""
        try:
            return tokenize(self.tokenizer, prompts, self.template, ends)
        except ConfigError:
            for i, prompt, end in zip(owners, prompts, ends, strict=True):
                try:
                    tokenize(self.tokenizer, [prompt], self.template, [end])
                except ConfigError as error:
                    raise ConfigError(f"{table.places[i]}: {error}") from None
            raise

    # --- cutting ---

    def _cut(self, role: str, table: DataTable, long: np.ndarray) -> tuple[DataTable, np.ndarray]:
        """The table with the prompts that are too long cut to fit, where that can be; (N,) bool: which."""
        cut = np.zeros(len(table), bool)

        def rows() -> Iterator[SourceRow]:
            for i, row in enumerate(table):
                if long[i] and "prompt" in row and (shorter := self._shorter(role, row)) is not None:
                    cut[i], row = True, shorter
                yield SourceRow(table.places[i], row)

        return replace(table_of(rows()), ties=table.ties, lacking=table.lacking), cut

    def _shorter(self, role: str, row: Row) -> Row | None:
        """The row with the end of its prompt, or the last turns of its conversation; none if not even those fit."""
        if "messages" in row:
            return self._fewer_turns(role, row)
        low, high = 1, len(row["prompt"])  # characters that are cut off
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(role, row | {"prompt": row["prompt"][middle:]}) else (middle + 1, high)
        return row | {"prompt": row["prompt"][low:]} if low < len(row["prompt"]) else None

    def _fewer_turns(self, role: str, row: Row) -> Row | None:
        first = [turn for turn in row["messages"][:1] if turn["role"] == "system"]
        rest = row["messages"][len(first) :]
        for begin, turn in enumerate(rest):
            if begin and turn["role"] == "user":
                turns = [*first, *rest[begin:]]
                shorter = row | {"prompt": shown(turns), "messages": turns}
                if self._fits(role, shorter):
                    return shorter
        return None

    def _fits(self, role: str, row: Row) -> bool:
        prompts, ends = zip(*_texts(role, row), strict=True)
        return max(map(len, tokenize(self.tokenizer, prompts, self.template, ends))) <= self.room

    # --- the template ---

    def _require_rendered(self, table: DataTable) -> None:
        """Each kind of conversation is tried once. Raises `ConfigError` naming the row that the template does not take."""
        if "messages" not in table.columns:
            return
        known = set()
        for place, row in zip(table.places, table, strict=True):
            turns = as_turns(prompt_of(row))
            kind = tuple((turn["role"], *sorted(turn)) for turn in turns)
            if kind in known:
                continue
            known.add(kind)
            marks = [PLACEHOLDER.format(i) for i in range(len(turns))]
            marked = [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
            try:
                render(self.tokenizer, turns, self.template)
                text = render(self.tokenizer, marked, self.template)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
            for turn, mark in zip(turns, marks, strict=True):
                if turn["role"] != "assistant" and mark not in text:
                    raise ConfigError(f"{place}: the tokenizer's chat template leaves out the {turn['role']}'s turn (of "
                                      f"{', '.join(roles(turns))}): name another role, or change its chat_template.jinja")


def _texts(role: str, row: Row) -> list[tuple[Prompt, str]]:
    """What a model reads of a row: each prompt with what follows it."""
    prompt = prompt_of(row) if "prompt" in row else ""
    return [(prompt, row[name]) for name in ENDS.get(role, ())] or [(prompt, "")]


class _Bound:
    """The most tokens that a text can have: none is shorter than a byte of the normalised text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._known, self._normalizer = backend is not None, getattr(backend, "normalizer", None)
        self._around = self._between = 0
        self._special = special_tokens(tokenizer) if template and tokenizer.split_special_tokens else []
        if template and self._known:
            self._around, self._between = self._of_template(tokenizer, template)

    def _of_template(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[int, int]:
        """Bytes that a template puts around a turn, and for each further turn."""
        turn: dict[str, Any] = {"role": "user", "content": "x"}
        try:
            one = len(render(tokenizer, [turn], template).encode())
            more = len(render(tokenizer, [turn, turn | {"role": "assistant"}, turn], template).encode())
        except ConfigError:
            self._known = False
            return 0, 0
        return one, max(0, more - one)

    def __call__(self, prompt: Prompt, end: str) -> int:
        """0 where it cannot be told."""
        if not self._known:
            return 0
        turns = as_turns(prompt)
        if any(turn.keys() - {"role", "content"} for turn in turns):
            return 0
        text = "".join(turn["content"] for turn in turns) + end
        if any(token in text for token in self._special):  # it may be in a place that the template changes
            return 0
        normalized = self._normalizer.normalize_str(text) if self._normalizer else text
        if not normalized.strip():
            return 0
        return len(normalized.encode()) + self._around + self._between * (len(turns) - 1) + SLACK
