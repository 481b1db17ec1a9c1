"""Prompts: their order, their tokens, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from schemas.errors import ConfigError
from schemas.tables import Ragged
from stages.ops.conversations import ChatTemplate, Message, Prompt, as_turns, prompt_of
from stages.ops.texts import Texts

PLACEHOLDER = "\ue000{}\ue001"  # of a turn's text; of the private use area: no template and no user writes it


def prompt_order(count: int, batch_size: int, *, seed: int, iteration: int) -> np.ndarray:
    """(batch_size,) prompt ids of an iteration ≥ 1: consecutive slices of one endless sequence of permutations.

    Every prompt is used once before any is used again. A pure function of its arguments.
    """
    places = np.arange((iteration - 1) * batch_size, iteration * batch_size)
    epochs = {epoch: _permutation(count, seed, epoch) for epoch in np.unique(places // count)}
    return np.array([epochs[place // count][place % count] for place in places])


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template: ChatTemplate) -> str:
    """The text a model continues: the prompt, or its turns in the template with the assistant's begun.

    A leading BOS is left out, since tokenizers that want one add it. Raises `ConfigError` with what the template says.
    """
    if not chat_template:
        if not isinstance(prompt, str):
            raise ConfigError("a prompt is a conversation, which needs a chat template: set base_model.chat_template: true")
        return prompt
    turns = as_turns(prompt)
    whose = "a user's turn" if len(turns) == 1 else f"a conversation ({', '.join(turn['role'] for turn in turns)})"
    text = rendered(
        tokenizer, turns, f"the tokenizer's chat template cannot render {whose}",
        "change the model's chat_template.jinja so that it takes that, or set base_model.chat_template: false",
        add_generation_prompt=True, **(chat_template if isinstance(chat_template, Mapping) else {}))
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and _added(tokenizer)[0] else text


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[Message], failure: str, way_on: str, **options: Any
) -> str:
    """The turns in the tokenizer's chat template. Raises `ConfigError` with what the template says."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # whatever a template does
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{failure}: {said}; {way_on}") from None


def require_no_clock(tokenizer: PreTrainedTokenizerBase, or_else: str) -> None:
    """Raises `ConfigError` if the chat template asks for the time: a text would be another one the next day.

    `or_else`: the setting that does without the template.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        raise ConfigError("the tokenizer's chat template calls strftime_now, so that a prompt would change with the day and "
                          "no stage could be run again to the same bytes: write a date in its place in the model's "
                          f"chat_template.jinja, or set {or_else}")


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS after it."""
    ids = tokenizer("a")["input_ids"]
    return (tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
            tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template: ChatTemplate,
    completions: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Token ids of the rendered prompts, each with its completion if there are some: (P,) int32.

    They end where the text ends, also with a tokenizer that puts EOS after each text.
    """
    heads = [render(tokenizer, prompt, chat_template) for prompt in prompts]
    ends = list(completions or [""] * len(heads))
    if not heads:
        return []
    as_text = tokenizer.split_special_tokens  # whether a special token that a user wrote is text
    texts = [head + end for head, end in zip(heads, ends, strict=True)]
    ids = tokenizer(texts, split_special_tokens=as_text and not chat_template)["input_ids"]
    if _added(tokenizer)[1]:
        ids = [row[:-1] for row in ids]
    if as_text and chat_template:
        special = special_tokens(tokenizer)
        ids = [_in_parts(tokenizer, as_turns(prompt), end, chat_template) if holds(special, as_turns(prompt), end) else row
               for row, prompt, end in zip(ids, prompts, ends, strict=True)]
    return [np.array(row, np.int32) for row in ids]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """As they are written."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def holds(special: Sequence[str], turns: Sequence[Message], end: str = "") -> bool:
    """Whether turns, or a completion, hold a special token as text."""
    texts = [*(turn["content"] for turn in turns), end]
    return any(token in text for token in special for text in texts)


def _in_parts(
    tokenizer: PreTrainedTokenizerBase, turns: list[Message], end: str, chat_template: ChatTemplate
) -> list[int]:
    """Tokens of turns in their template and of a completion, which hold special tokens as text: part by part."""
    parts = parts_of(turns, render(tokenizer, turns, chat_template), lambda marked: render(tokenizer, marked, chat_template))
    if parts is None:
        raise ConfigError(f"a prompt holds a special token, and the chat template changes its text ("
                          f"{turns[-1]['content'][:60]!r}): take the token out, or set base_model.special_tokens_in_text: "
                          "true")
    bos = [tokenizer.bos_token_id] if _added(tokenizer)[0] else []
    return [*bos, *tokens_of_parts(tokenizer, [*parts, (end, True)])]


def parts_of(
    turns: list[Message], whole: str, rendered: Callable[[list[Message]], str]
) -> list[tuple[str, bool]] | None:
    """The parts of a rendered text, and of each whether it is a turn's own; none where the template changes one.

    Where the turns' texts are is seen from other texts in their places.
    """
    marks = [PLACEHOLDER.format(i) for i in range(len(turns))]
    rest, parts, done = rendered([{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]), [], 0
    for turn, mark in zip(turns, marks, strict=True):
        before, found, rest = rest.partition(mark)
        done += len(before)
        text = next((text for text in (turn["content"], turn["content"].strip()) if whole.startswith(text, done)), None)
        if not found or text is None:
            return None
        parts += [(before, False), (text, True)]
        done += len(text)
    parts.append((rest, False))
    return parts if "".join(part for part, _ in parts) == whole else None


def tokens_of_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """Tokens of texts one after another; of each, whether special tokens that it holds are text."""
    return [i for part, as_text in parts
            for i in tokenizer(part, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]]


def completed(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[str], chat_template: ChatTemplate
) -> tuple[list[np.ndarray], list[int]]:
    """Prompt, completion and EOS of each row, tokenized together, (P + R,) int32; and P, where the completion begins.

    The prompt's tokens are those that it has alone too: one that spans its end and the completion's beginning is the
    completion's. `sft`, `ptx`, the demonstrations' mean and the reward model all read a row like this.
    """
    ends = [completion.removesuffix(tokenizer.eos_token) for completion in completions]  # EOS is added, once
    alone = tokenize(tokenizer, prompts, chat_template)
    wholes = tokenize(tokenizer, prompts, chat_template, ends)
    return [_with_eos(tokenizer, whole) for whole in wholes], list(map(_common, alone, wholes))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    both = min(len(one), len(other))
    different = np.flatnonzero(one[:both] != other[:both])
    return int(different[0]) if different.size else both


def _with_eos(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> np.ndarray:
    """Ended by EOS, once."""
    ends = ids.size > 0 and ids[-1] == tokenizer.eos_token_id
    return ids if ends else np.append(ids, np.int32(tokenizer.eos_token_id))


def demonstrations_as_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], chat_template: ChatTemplate
) -> Texts:
    """Prompt and `completion` of each row; the prompt has one token at least, since the first is predicted by none."""
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    wholes, cuts = completed(tokenizer, [prompt_of(row) for row in rows], completions, chat_template)
    return _texts(prompts, completions, wholes, [max(1, cut) for cut in cuts])


def pretraining_as_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> Texts:
    """`text` of each row: its first token the prompt, the rest and EOS the response."""
    texts = [row["text"] for row in rows]
    wholes = [_with_eos(tokenizer, ids) for ids in tokenize(tokenizer, texts, False)]
    return _texts([""] * len(rows), texts, wholes, [1] * len(rows))


def _texts(prompts: list[str], responses: list[str], wholes: list[np.ndarray], cuts: list[int]) -> Texts:
    ragged = (Ragged.from_rows(part, np.int32) for part in zip(*(
        (whole[:cut], whole[cut:]) for whole, cut in zip(wholes, cuts, strict=True)), strict=True))
    return Texts(np.arange(len(prompts)), tuple(prompts), tuple(responses), *ragged)


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *,
    special_tokens: bool = False,
) -> list[str]:
    """Text of each response: what follows the prompt's text in that of both, so that a blank between them is kept.

    `special_tokens`: whether they are part of it.
    """
    def decoded(rows: list[np.ndarray]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens)

    heads, both = decoded(list(prompts)), decoded([np.concatenate(pair) for pair in zip(prompts, responses, strict=True)])
    return [text[len(head):] if text.startswith(head) else decoded([response])[0]
            for text, head, response in zip(both, heads, responses, strict=True)]
