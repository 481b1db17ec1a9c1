"""Prompts: their order, their tokens, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from schemas.errors import ConfigError
from schemas.tables import Ragged
from stages.ops.texts import Texts


def prompt_order(count: int, batch_size: int, *, seed: int, iteration: int) -> np.ndarray:
    """(batch_size,) prompt ids of an iteration ≥ 1: consecutive slices of one endless sequence of permutations.

    Every prompt is used once before any is used again. A pure function of its arguments.
    """
    places = np.arange((iteration - 1) * batch_size, iteration * batch_size)
    epochs = {epoch: _permutation(count, seed, epoch) for epoch in np.unique(places // count)}
    return np.array([epochs[place // count][place % count] for place in places])


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool) -> str:
    """The text a model continues: the prompt, or a user's turn with the assistant's begun.

    A leading BOS is left out, since tokenizers that want one add it.
    """
    if not chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], chat_template: bool) -> list[np.ndarray]:
    """Token ids of the rendered prompts, (P,) int32 each."""
    ids = tokenizer([render(tokenizer, prompt, chat_template) for prompt in prompts])["input_ids"]
    return [np.array(row, np.int32) for row in ids]


def demonstrations_as_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], chat_template: bool
) -> Texts:
    """`prompt` and `completion` of each row, tokenized together as `sft` does; EOS is added.

    The prompt is as many tokens as it has alone, and one at least, since the first token is predicted by none.
    """
    prompts = tokenize(tokenizer, [row["prompt"] for row in rows], chat_template)
    wholes = tokenizer([render(tokenizer, row["prompt"], chat_template) + row["completion"] for row in rows])["input_ids"]
    cuts = [max(1, len(prompt)) for prompt in prompts]
    return _texts([row["prompt"] for row in rows], [row["completion"] for row in rows],
                  [whole[:cut] for whole, cut in zip(wholes, cuts, strict=True)],
                  [[*whole[cut:], tokenizer.eos_token_id] for whole, cut in zip(wholes, cuts, strict=True)])


def pretraining_as_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> Texts:
    """`text` of each row: its first token the prompt, the rest and EOS the response."""
    ids = tokenizer([row["text"] for row in rows])["input_ids"]
    return _texts([""] * len(rows), [row["text"] for row in rows], [row[:1] for row in ids],
                  [[*row[1:], tokenizer.eos_token_id] for row in ids])


def _texts(prompts: list[str], responses: list[str], prompt_tokens: list, response_tokens: list) -> Texts:
    ragged = (Ragged.from_rows([np.asarray(row) for row in rows], np.int32) for rows in (prompt_tokens, response_tokens))
    return Texts(np.arange(len(prompts)), tuple(prompts), tuple(responses), *ragged)


def require_fit(lengths: Sequence[int], context: int, reserved: int, where: str) -> None:
    """Raises `ConfigError` saying which lines of a file, and how many, are empty or longer than context − reserved."""
    found, room = np.array(lengths), context - reserved
    if (empty := np.flatnonzero(found == 0)).size:
        raise ConfigError(f"{where}: line {empty[0] + 1} has no tokens; give every prompt some text")
    too_long = np.flatnonzero(found > room)
    if too_long.size:
        lines = ", ".join(str(i + 1) for i in too_long[:8]) + ("…" if too_long.size > 8 else "")
        raise ConfigError(
            f"{where}: {too_long.size} of {len(found)} rows are too long (line {lines}; the longest has {found.max()} "
            f"tokens): the model's context of {context} leaves {room} beside {reserved} for the response; shorten them"
            + (", or lower rollout.max_new_tokens" if reserved > 1 else ""))
