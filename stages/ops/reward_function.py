"""A user's reward function is given what its parameters name.

Two texts, whatever they are called: `f(prompts, responses)`, B of each, by position. More is asked for by name, where the
response is among what has to be given:

| named | for all at once | for one response after another |
|---|---|---|
| the response | `responses` | `response` |
| the prompt | `prompts` | `prompt` |
| why it ended | `finish_reasons`: `eos`, `stop`, `length` | `finish_reason` |
| its tokens | `response_tokens`: B lists of ids, EOS included | `response_tokens`: a list |
| the conversation, the response its last turn | `messages`: B lists of {role, content} | `messages`: a list |
| any other name | that column of the prompt file, B values | the row's value |

A parameter that has a default is given something only behind a `*`. An `async` function is awaited, and its `prompt` and
`response` are one of each; those for one response run side by side.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from schemas.errors import ConfigError
from schemas.tables import Rollouts
from stages.ops.conversations import Message, as_turns, with_response
from stages.ops.texts import Texts

MANY = {"prompts": "prompt", "responses": "response", "finish_reasons": "finish_reason"}  # all at once → one
NAMES = (*MANY, *MANY.values(), "response_tokens", "messages")
OF_RESPONSES = frozenset({"responses", "response", "response_tokens", "messages"})
POLL = 0.2  # seconds between looks at what is awaited, so that a limit of time is heard
UserFunction = Callable[..., Any]


class Columns(Protocol):
    """The file that the prompts are of."""

    def of(self, rollouts: Rollouts | Texts, names: Sequence[str]) -> dict[str, list[Any]]:
        """B values of each of these columns, None where a row has none."""


@dataclass(frozen=True)
class Asked:
    """What a function is given."""

    by_position: tuple[str, ...]
    by_name: tuple[str, ...] = ()
    as_texts: bool = False
    """Whether it is prompts and responses, whatever the first two of its parameters are called."""

    @property
    def names(self) -> tuple[str, ...]:
        return *self.by_position, *self.by_name

    @property
    def one(self) -> bool:
        """Whether it is called once for each response."""
        return not self.as_texts and bool({*self.names} & {*MANY.values()})

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prompt file."""
        return () if self.as_texts else tuple(name for name in self.names if name not in NAMES)

    @property
    def reads_prompts(self) -> bool:
        """Whether it is given more of the prompts' rows than their texts."""
        return bool(self.columns) or (not self.as_texts and "messages" in self.names)


def asked(function: UserFunction) -> Asked:
    """By its signature alone. Raises `ConfigError` where it asks for all responses and for one."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some that are written in C
        parameters = []
    required = [p for p in parameters if p.default is p.empty]
    places = [p.name for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    if not {*places, *named} & OF_RESPONSES or (not named and _are_texts(places) and not _is_async(function, places)):
        return Asked(tuple(p.name for p in parameters[:2]), as_texts=True)
    named += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name in NAMES]
    names = [*places, *named]
    many, one = [name for name in names if name in MANY], [name for name in names if name in MANY.values()]
    if many and one:
        raise ConfigError(f"its parameters {many[0]!r} and {one[0]!r} are of all responses and of one; take either")
    return Asked(tuple(places), tuple(named))


def _are_texts(places: list[str]) -> bool:
    """Whether two parameters may be prompts and responses, in this order."""
    return len(places) == 2 and places[0] not in OF_RESPONSES and places[1] in ("responses", "response")


def _is_async(function: UserFunction, places: list[str]) -> bool:
    """Whether it is awaited, and for one response."""
    return places == ["prompt", "response"] and inspect.iscoroutinefunction(inspect.unwrap(function))


def called(function: UserFunction, rollouts: Rollouts | Texts, columns: Columns | None, wanted: Asked) -> Any:
    """What it gives for the B responses. Raises what it raises."""
    if wanted.as_texts:
        return _awaited([function(list(rollouts.prompt), list(rollouts.response))])[0]
    values = _values(rollouts, columns, wanted)
    rows = zip(*values, strict=True) if wanted.one else [values]
    count = len(wanted.by_position)
    given = _awaited([function(*row[:count], **dict(zip(wanted.by_name, row[count:], strict=True))) for row in rows])
    return given if wanted.one else given[0]


def _values(rollouts: Rollouts | Texts, columns: Columns | None, wanted: Asked) -> list[list[Any]]:
    """B values of each parameter."""
    reasons = getattr(rollouts, "finish_reason", ("eos",) * len(rollouts))  # a demonstration ends
    there = columns.of(rollouts, wanted.columns) if wanted.columns else {}
    if "messages" in wanted.names:
        there["messages"] = conversations(rollouts, columns)
    there["response_tokens"] = [row.tolist() for row in rollouts.response_tokens]
    for (many, one), texts in zip(MANY.items(), (rollouts.prompt, rollouts.response, reasons), strict=True):
        there[many] = there[one] = list(texts)
    return [there[name] for name in wanted.names]


def conversations(rollouts: Rollouts | Texts, columns: Columns | None) -> list[list[Message]]:
    """B conversations, the response the last turn of each; prompts that are texts are a user's turn."""
    turns = columns.of(rollouts, ["messages"])["messages"] if columns else [None] * len(rollouts)
    prompts = [prompt if turns is None else turns for turns, prompt in zip(turns, rollouts.prompt, strict=True)]
    if (said := getattr(rollouts, "turns", None)) is not None:
        return [[*as_turns(prompt), *json.loads(each)] for prompt, each in zip(prompts, said, strict=True)]
    return [with_response(prompt, response) for prompt, response in zip(prompts, rollouts.response, strict=True)]


# --- async ---

def _awaited(values: list[Any]) -> list[Any]:
    """Awaitables side by side, in one loop for all calls of this process: clients and limits that a user makes have one."""
    if not values or not inspect.isawaitable(values[0]):
        return values
    future = asyncio.run_coroutine_threadsafe(_together(values), _loop())
    try:
        while not wait([future], POLL).done:
            pass
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _together(values: list[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*values))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop
