"""Text that a model has produced, for places where it must not act: what would is written as its escape."""

from __future__ import annotations

import unicodedata

ACTS = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: control characters, format characters such as marks of direction, surrogates, and unassigned ones."""
KEPT = frozenset("\u200c\u200d")
"""Format characters that scripts and emoji need between letters."""


def visible(text: str, most: int | None = None, *, newlines: bool = False) -> str:
    """The text with what acts on a terminal or a page as `\\x1b`, `\\u202e`; `most`: characters, cut in the middle of a long
    one; `newlines`: whether these stay."""
    if most is not None and len(text) > most:
        left = (most - 1) // 2
        text = f"{text[: most - 1 - left]}…{text[len(text) - left :]}"
    return "".join(_shown(character, newlines) for character in text)


def _shown(character: str, newlines: bool) -> str:
    if character in KEPT or (newlines and character == "\n") or unicodedata.category(character) not in ACTS:
        return character
    escaped = character.encode("unicode_escape").decode()
    return escaped if escaped != character else f"\\u{ord(character):04x}"
