"""Prompts: their order, their tokens, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from schemas.errors import ConfigError
from schemas.tables import Ragged
from stages.ops.texts import Texts

PLACEHOLDER = "\ue000prompt\ue001"  # of the private use area: no template and no user writes it


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

    A leading BOS is left out, since tokenizers that want one add it. Raises `ConfigError` with what the template says.
    """
    if not chat_template:
        return prompt
    text = rendered(
        tokenizer, [{"role": "user", "content": prompt}], "the tokenizer's chat template cannot render a user's turn",
        "a prompt is one user turn: change the model's chat_template.jinja so that it takes that, or set "
        "base_model.chat_template: false", add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and _added(tokenizer)[0] else text


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], failure: str, way_on: str, **options: bool
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
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat_template: bool, completions: Sequence[str] | None = None
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
        ids = [_in_parts(tokenizer, prompt, end) if any(token in prompt + end for token in special) else row
               for row, prompt, end in zip(ids, prompts, ends, strict=True)]
    return [np.array(row, np.int32) for row in ids]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """As they are written."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _in_parts(tokenizer: PreTrainedTokenizerBase, prompt: str, end: str) -> list[int]:
    """Tokens of a prompt in its template and of a completion, which hold special tokens as text: part by part.

    Where the prompt is in the template is seen from another text in its place.
    """
    before, found, after = render(tokenizer, PLACEHOLDER, True).partition(PLACEHOLDER)
    whole = render(tokenizer, prompt, True)
    written = next((text for text in (prompt, prompt.strip()) if before + text + after == whole), None)
    if not found or written is None:
        raise ConfigError(f"a prompt holds a special token, and the chat template changes its text ({prompt[:60]!r}): take "
                          "the token out, or set base_model.special_tokens_in_text: true")
    parts = ((before, False), (written, True), (after, False), (end, True))
    return [*([tokenizer.bos_token_id] if _added(tokenizer)[0] else []), *tokens_of_parts(tokenizer, parts)]


def tokens_of_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """Tokens of texts one after another; of each, whether special tokens that it holds are text."""
    return [i for part, as_text in parts
            for i in tokenizer(part, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]]


def completed(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str], chat_template: bool
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
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]], chat_template: bool
) -> Texts:
    """`prompt` and `completion` of each row; the prompt has one token at least, since the first is predicted by none."""
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    wholes, cuts = completed(tokenizer, prompts, completions, chat_template)
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


def require_fit(lengths: Sequence[int], context: int | None, reserved: int, where: str) -> None:
    """Raises `ConfigError` saying which lines of a file, and how many, are empty or longer than context − reserved."""
    found = np.array(lengths)
    if (empty := np.flatnonzero(found == 0)).size:
        raise ConfigError(f"{where}: line {empty[0] + 1} has no tokens; give every prompt some text")
    if context is None:
        return
    room = context - reserved
    too_long = np.flatnonzero(found > room)
    if too_long.size:
        lines = ", ".join(str(i + 1) for i in too_long[:8]) + ("…" if too_long.size > 8 else "")
        raise ConfigError(
            f"{where}: {too_long.size} of {len(found)} rows are too long (line {lines}; the longest has {found.max()} "
            f"tokens): the model's context of {context} leaves {room} beside {reserved} for the response; shorten them"
            + (", or lower rollout.max_new_tokens" if reserved > 1 else ""))
