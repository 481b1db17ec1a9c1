"""From the rows of a source, in whatever columns it has, to the rows that stages read.

| role | columns |
|---|---|
| prompts | `prompt`: a text |
| demonstrations | `prompt`, `completion` |
| pairs | `prompt`, `chosen`, `rejected` |
| pretraining | `text` |

A prompt that is more than one user's turn has its turns in `messages` too. All other columns come along.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from flows.runs.sources import SourceRow
from schemas.data import COLUMNS, PAIRS, SourceConfig, TurnsConfig
from schemas.errors import ConfigError
from stages.ops.conversations import shown

Message = dict[str, Any]
Row = dict[str, Any]
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
            "function_call": "assistant", "observation": "tool", "function_response": "tool"}
CONVERSATION = "a list of messages, {role, content} each"
PROMPT, PAIR = ("prompt", "messages"), ("prompt", "messages", "chosen", "rejected", "response", "score")
USED = {"prompts": PROMPT, "heldout_prompts": PROMPT, "demonstrations": (*PROMPT, "completion"), "pairs": PAIR,
        "heldout_pairs": PAIR, "pretraining": ("text",)}
"""Role → columns that rows are made from; the others come along."""


@dataclass
class Layout:
    """How the rows of one role are read."""

    role: str
    config: SourceConfig
    chat: bool
    """Whether prompts are put into a chat template, so that they may be conversations."""
    ties: list[str] = field(default_factory=list)
    """Where pairs were that say nothing."""

    def rows(self, source: Iterable[SourceRow]) -> Iterator[SourceRow]:
        """The rows with this role's columns. Raises `ConfigError` naming row and column."""
        mapped = self._with_unequal_ids((where, self._mapped(where, row)) for where, row in source)
        if self.role in PAIRS and self._rated:
            mapped = self._pairs_of_rated(mapped)
        make: Callable = {"prompts": self._prompt, "heldout_prompts": self._prompt, "demonstrations": self._demonstration,
                          "pairs": self._pair, "heldout_pairs": self._pair, "pretraining": self._text}[self.role]
        used = USED[self.role]
        for where, row in mapped:
            if (made := make(where, row)) is not None:
                yield SourceRow(where, made | {name: value for name, value in row.items() if name not in used})
        if self.ties and self.config.ties == "refuse":
            raise ConfigError(f"data.{self.role}: {len(self.ties)} pairs are ties ({', '.join(self.ties[:8])}"
                              f"{'…' if len(self.ties) > 8 else ''}): their responses are equal, or have equal scores, so "
                              f"that neither is preferred; take them out, or set data.{self.role}.ties: drop")

    # --- columns ---

    def _with_unequal_ids(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows. Raises `ConfigError` naming two with one id."""
        ids: dict[str, str] = {}
        for where, row in rows:
            if (key := row.get("id")) is not None and (first := ids.setdefault(repr(key), where)) != where:
                raise ConfigError(f"{where}: has the id {key!r}, which {first} has too; make them unique, or leave the "
                                  f"column out: data.{self.role}.columns: {{id: null}}")
            yield where, row

    def _mapped(self, where: str, row: Row) -> Row:
        """The row in our names."""
        columns = self.config.columns
        taken = {name for theirs in columns.values() for name in _names(theirs)} | {
            name for name, theirs in columns.items() if theirs is None}
        out = {name: value for name, value in row.items() if name not in taken and name not in columns}
        for ours, theirs in columns.items():
            if theirs is not None:
                out[ours] = self._value(where, row, ours, theirs)
        return out

    def _value(self, where: str, row: Row, ours: str, theirs: str | tuple[str, ...] | Mapping[str, float]) -> Any:
        if isinstance(theirs, str):
            return self._at(where, row, ours, theirs)
        found = {name: self._at(where, row, ours, name) for name in theirs}
        if isinstance(theirs, Mapping):
            return sum(weight * self._number(where, name, found[name]) for name, weight in theirs.items())
        for name, value in found.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{where}: column {name!r}: expected text to be joined to {ours!r}, found {value!r:.40}")
        return "\n\n".join(value for value in found.values() if value)

    def _at(self, where: str, row: Row, ours: str, path: str) -> Any:
        """What lies at that name, or at that path of names."""
        if path in row:
            return row[path]
        value: Any = row
        for name in path.split("."):
            there = value if isinstance(value, Mapping) else {}
            if name not in there:
                raise ConfigError(f"{where}: has no column {path!r}, which data.{self.role}.columns names for {ours!r}; "
                                  f"there are {', '.join(there) or 'none in it'}")
            value = there[name]
        return value

    def _number(self, where: str, name: str, value: Any) -> float:
        if isinstance(value, str):  # of CSV
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{where}: column {name!r}: expected a number as score, found {value!r:.40}")
        return float(value)

    # --- each role ---

    def _prompt(self, where: str, row: Row) -> Row:
        value = row.get("prompt", row.get("messages"))
        column = "prompt" if "prompt" in row or "messages" not in row else "messages"
        turns = self._turns(where, column, value, row)
        if isinstance(turns, str):
            return {"prompt": self._before_response(turns)} if self.config.turns else {"prompt": turns}
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return self._of_turns(where, turns)

    def _demonstration(self, where: str, row: Row) -> Row:
        if "completion" not in row and "messages" in row:
            turns = self._turns(where, "messages", row["messages"], row)
            if isinstance(turns, str):
                prompt = self._before_response(turns)
                return {"prompt": prompt, "completion": turns[len(prompt) :]}
        else:
            turns = self._turns(where, "prompt", row.get("prompt"), row)
            completion = self._turns(where, "completion", row.get("completion"), row, whole=False)
            if isinstance(turns, str) and isinstance(completion, str):
                return {"prompt": turns, "completion": completion}
            turns = [*_as_turns(turns, "user"), *_as_turns(completion, "assistant")]
        return self._of_turns(where, turns[:-1]) | {"completion": self._answer(where, turns)}

    def _pair(self, where: str, row: Row) -> Row | None:
        chosen, rejected = (self._turns(where, name, row.get(name), row, whole=False) for name in ("chosen", "rejected"))
        if isinstance(chosen, str) and isinstance(rejected, str):
            pair = self._pair_of_texts(where, row, chosen, rejected)
        else:
            pair = self._pair_of_turns(where, row, _as_turns(chosen, "assistant"), _as_turns(rejected, "assistant"))
        if pair["chosen"] == pair["rejected"]:
            self.ties.append(where)
            return None
        return pair

    def _pair_of_texts(self, where: str, row: Row, chosen: str, rejected: str) -> Row:
        if "prompt" not in row and self.config.turns:
            both = _common(chosen, rejected)
            if self.config.turns.assistant not in both:
                raise ConfigError(f"{where}: chosen and rejected have no assistant's turn in common "
                                  f"({self.config.turns.assistant!r}, data.{self.role}.turns.assistant)")
            prompt = self._before_response(both)
            return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
        turns = self._turns(where, "prompt", row.get("prompt"), row)
        made = {"prompt": turns} if isinstance(turns, str) else self._of_turns(where, turns)
        return made | {"chosen": chosen, "rejected": rejected}

    def _pair_of_turns(self, where: str, row: Row, chosen: list[Message], rejected: list[Message]) -> Row:
        both = 0
        while both < min(len(chosen), len(rejected)) - 1 and chosen[both] == rejected[both]:
            both += 1
        turns = chosen[:both]
        if not turns and "prompt" in row:
            turns = _as_turns(self._turns(where, "prompt", row["prompt"], row), "user")
        for name, rest in (("chosen", chosen[both:]), ("rejected", rejected[both:])):
            if len(rest) != 1 or rest[0]["role"] != "assistant":
                roles = ", ".join(turn["role"] for turn in rest)
                raise ConfigError(f"{where}: column {name!r}: expected one assistant's turn after what chosen and rejected "
                                  f"have in common, found {roles or 'none'}")
        return self._of_turns(where, self._with_system(turns)) | {
            "chosen": self._answer(where, chosen), "rejected": self._answer(where, rejected)}

    def _text(self, where: str, row: Row) -> Row:
        return {"text": self._plain(where, "text", row.get("text"), row)}

    @property
    def _rated(self) -> bool:
        return "score" in self.config.columns or "response" in self.config.columns

    def _pairs_of_rated(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Of the responses to each prompt every two with other scores, the higher one chosen."""
        groups: dict[str, list[tuple[str, Row]]] = {}
        for where, row in rows:
            for name in ("prompt", "response", "score"):
                if name not in row:
                    raise ConfigError(f"{where}: pairs of rated responses need prompt, response and score, and there is no "
                                      f"{name!r}; name it in data.{self.role}.columns: {{{name}: …}}")
            groups.setdefault(repr(row["prompt"]), []).append((where, row))
        for group in groups.values():
            for (where, one), (_, other) in combinations(group, 2):
                a, b = (self._number(where, "score", row["score"]) for row in (one, other))
                if a == b:
                    self.ties.append(where)
                    continue
                chosen, rejected = (one, other) if a > b else (other, one)
                yield where, {**chosen, "chosen": chosen["response"], "rejected": rejected["response"]}

    # --- texts and conversations ---

    def _turns(self, where: str, column: str, value: Any, row: Row, *, whole: bool = True) -> str | list[Message]:
        """A text, or the turns of a conversation. `whole`: it is one from its beginning, rather than what follows."""
        if not isinstance(value, list):
            text = self._plain(where, column, value, row)
            if self.config.turns and self.chat and any(
                    mark in text for mark in (self.config.turns.user, self.config.turns.assistant)):
                turns = parsed_turns(text, self.config.turns)
                return self._with_system(turns) if whole else turns
            if whole and self.config.system:
                return self._with_system([{"role": "user", "content": text}])
            return text
        if not value:
            raise ConfigError(f"{where}: column {column!r}: expected {CONVERSATION}, found none")
        turns = [self._message(f"{where}: column {column!r}, message {i}", message) for i, message in enumerate(value, 1)]
        return self._with_system(turns) if whole else turns

    def _message(self, where: str, message: Any) -> Message:
        if not isinstance(message, Mapping):
            raise ConfigError(f"{where}: expected {{role, content}}, found {message!r:.40}")
        found = {name: value for name, value in message.items() if value is not None}  # Arrow fills in what is not there
        if isinstance(found.get("from"), str) and "role" not in found:
            found["role"], found["content"] = SHAREGPT.get(found["from"], found.pop("from")), found.pop("value", None)
            found.pop("from", None)
        if not isinstance(found.get("role"), str):
            raise ConfigError(f"{where}: expected a role, such as user, and a content, found "
                              f"{', '.join(found) or 'nothing'}")
        content = found.get("content")
        if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            found["content"] = "".join(part.get("text") or "" for part in content)
        elif content is None and ("tool_calls" in found or found["role"] == "assistant"):
            found["content"] = ""
        elif not isinstance(content, str):
            raise ConfigError(f"{where}: content: expected text, found {content!r:.40}")
        _require_text(f"{where}: content", found["content"])
        return found

    def _with_system(self, turns: list[Message]) -> list[Message]:
        has_one = turns and turns[0]["role"] == "system"
        return turns if has_one or self.config.system is None else [
            {"role": "system", "content": self.config.system}, *turns]

    def _of_turns(self, where: str, turns: list[Message]) -> Row:
        """A prompt of these turns: its text, and the turns where they are more than a user's one."""
        if not any(turn["role"] == "user" for turn in turns):
            raise ConfigError(f"{where}: the conversation has no user's turn; found "
                              f"{', '.join(turn['role'] for turn in turns) or 'no turn'}")
        if turns[-1]["role"] == "assistant":
            raise ConfigError(f"{where}: an assistant's turn follows an assistant's turn; join them")
        if len(turns) == 1 and turns[0].keys() == {"role", "content"}:
            return {"prompt": turns[0]["content"]}
        if not self.chat:
            raise ConfigError(f"{where}: the prompt is a conversation of {len(turns)} turns, which a chat template puts "
                              "into text; set base_model.chat_template: true")
        return {"prompt": shown(turns), "messages": turns}

    def _answer(self, where: str, turns: list[Message]) -> str:
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
            found = f"{turns[-1]['role']}'s" if turns and turns[-1]["role"] != "assistant" else "one without a text"
            raise ConfigError(f"{where}: expected an assistant's turn at the end, which is learned from, found {found}")
        return turns[-1]["content"]

    def _before_response(self, text: str) -> str:
        """A transcript to where its last assistant's turn begins; all of it, if there is none."""
        before, mark, _ = text.rpartition(self.config.turns.assistant)
        return before + mark if mark else text

    def _plain(self, where: str, column: str, value: Any, row: Row) -> str:
        if not isinstance(value, str):
            found = f"found {value!r:.40}" if column in row else f"found only {_quoted(row) or 'nothing'}"
            raise ConfigError(f"{where}: column {column!r}: expected text, {found}{self._way_on(column, row)}")
        return _require_text(f"{where}: column {column!r}", value)

    def _way_on(self, column: str, row: Row) -> str:
        """A mapping of columns that may be what is meant, in a way that can be pasted and changed."""
        others = [name for name, value in row.items() if name not in COLUMNS[self.role] and isinstance(value, (str, list))]
        if column in row or not others:
            return ""
        return f"; data.{self.role}.columns: {{{column}: {others[0]}}} reads another, if that is what is meant"


# --- transcripts ---

def parsed_turns(text: str, marks: TurnsConfig) -> list[Message]:
    """A transcript's turns, their texts without blanks around them."""
    roles = {marks.user: "user", marks.assistant: "assistant"} | ({marks.system: "system"} if marks.system else {})
    parts = re.split("(" + "|".join(re.escape(mark) for mark in roles) + ")", text)
    turns = [{"role": "system", "content": parts[0].strip()}] if parts[0].strip() else []
    for mark, content in zip(parts[1::2], parts[2::2], strict=True):
        turns.append({"role": roles[mark], "content": content.strip()})
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def _as_turns(value: str | list[Message], role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _common(one: str, other: str) -> str:
    """With what both begin."""
    size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]


def _require_text(where: str, text: str) -> str:
    if (half := re.search("[\ud800-\udfff]", text)) is not None:
        raise ConfigError(f"{where}: \\u{ord(half[0]):04x} at character {half.start() + 1} is half of a surrogate pair, "
                          "which is no text; write the other half beside it, or take it out")
    return text


def _names(theirs: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if theirs is None else (theirs,) if isinstance(theirs, str) else tuple(theirs)


def _quoted(row: Row) -> str:
    return ", ".join(repr(name) for name in row)
