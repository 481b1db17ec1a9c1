"""What a prompt is: a text, or the turns of a conversation, each `{role, content}` and whatever its chat template reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

ChatTemplate = bool | Mapping[str, Any]
"""Whether prompts are put into the tokenizer's chat template; or with which arguments, such as enable_thinking."""


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """What models are given of a row of data: its conversation, or else its text."""
    return row.get("messages") or row["prompt"]


def as_turns(prompt: Prompt) -> list[Message]:
    """A text is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def shown(prompt: Prompt) -> str:
    """A prompt for people, and for scorers that read texts: a conversation as `role: content`, blank lines between turns."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def with_response(prompt: Prompt, response: str) -> list[Message]:
    """The conversation, the response its last turn."""
    return [*as_turns(prompt), {"role": "assistant", "content": response}]


def roles(turns: Iterable[Message]) -> tuple[str, ...]:
    """Whose turn each is."""
    return tuple(turn["role"] for turn in turns)
