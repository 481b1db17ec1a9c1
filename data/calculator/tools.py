"""A calculator that answers a turn which ends in [a*b], and the reward."""

from __future__ import annotations

import re


def calculate(messages: list[list[dict[str, str]]]) -> list[str | None]:
    """What a conversation's last turn asks for, such as [12*34]; none, which ends it, if it asks for nothing."""
    return [_answer(turns[-1]["content"]) for turns in messages]


def _answer(text: str) -> str | None:
    asked = re.search(r"\[(\d{1,4})\*(\d{1,4})\]$", text)
    return f"{int(asked[1]) * int(asked[2])};" if asked else None


def right(messages: list[list[dict[str, str]]], answer: list[int]) -> list[float]:
    """1 where the last turn is the answer."""
    return [float(turns[-1]["content"].strip() == str(a)) for turns, a in zip(messages, answer, strict=True)]


def called(messages: list[list[dict[str, str]]]) -> list[float]:
    """1 where the calculator was asked for what it can do."""
    return [float(any(_answer(turn["content"]) for turn in turns if turn["role"] == "assistant")) for turns in messages]
