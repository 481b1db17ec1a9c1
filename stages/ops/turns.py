"""Conversations of several turns: a function of the user's answers each response, and the model goes on.

What it says is in the response's tokens, marked as not sampled: losses, KL and advantages are of the sampled ones alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from schemas.errors import ConfigError, RewardError
from schemas.tables import Rollouts
from stages.ops.conversations import ChatTemplate, Message, Prompt, as_turns
from stages.ops.guest import FOREVER, Patience, call_guest
from stages.ops.prompts import PLACEHOLDER, render, tokens_of_parts
from stages.ops.reward_function import Columns, UserFunction, asked, called


@dataclass(frozen=True)
class Partner:
    """Who answers: a user's function, given what its signature names, as a reward function is (reward_function.py); of
    `response`, `response_tokens` and `finish_reason` the last turn's."""

    name: str
    function: UserFunction
    max_turns: int
    max_reply_tokens: int
    patience: Patience = FOREVER
    columns: Columns | None = None

    def replies(self, turns: Rollouts) -> list[Message | None]:
        """A message for each of the B open conversations, none where it is over. Raises `RewardError`."""
        try:
            wanted = asked(self.function)
        except ConfigError as error:
            raise RewardError(f"rollout.turns {self.name}: {error}") from None
        given = call_guest(f"rollout.turns {self.name}: the function",
                           lambda: called(self.function, turns, self.columns, wanted), error=RewardError,
                           patience=self.patience)
        if not isinstance(given, (list, tuple)) or len(given) != len(turns):
            raise RewardError(f"rollout.turns {self.name}: expected {len(turns)} replies, one a conversation, found "
                              f"{str(given)[:80]}")
        return [self._message(reply, row) for reply, row in zip(given, turns.row_id, strict=True)]

    def _message(self, reply: object, row: int) -> Message | None:
        if reply is None:
            return None
        message = {"role": "user", "content": reply} if isinstance(reply, str) else reply
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RewardError(f"rollout.turns {self.name}: expected a text, a message {{role, content}}, or None to end the "
                              f"conversation, found {str(reply)[:60]!r} for row {row}")
        try:
            json.dumps(dict(message), ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:  # also half of a surrogate pair
            raise RewardError(f"rollout.turns {self.name}: the reply to row {row} cannot be kept as JSON: "
                              f"{' '.join(str(error).split())}") from None
        return dict(message)

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, prompt: Prompt, said: Sequence[Message],
        reply: Message, last: int, row: int,
    ) -> np.ndarray:
        """Tokens between the response and the next one: the reply, and what the template puts around it.

        `said`: the turns since the prompt, the response the last of them; `last`: its last token. Raises `RewardError`.
        """
        if template:
            ids = _templated(tokenizer, template, [*as_turns(prompt), *said], reply, last)
        else:
            ids = tokens_of_parts(tokenizer, [(reply["content"], tokenizer.split_special_tokens)])
        if len(ids) > self.max_reply_tokens:
            raise RewardError(f"rollout.turns {self.name}: the reply to row {row} has {len(ids)} tokens "
                              f"({reply['content'][:60]!r}…), and "
                              f"rollout.turns.max_reply_tokens={self.max_reply_tokens}; make replies shorter, or raise it")
        return np.array(ids, np.int32)


def _templated(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, turns: list[Message], reply: Message, last: int
) -> list[int]:
    """What the template writes after a response when a reply follows; that the response has ended itself comes once."""
    marks = [PLACEHOLDER.format("response"), PLACEHOLDER.format("reply")]
    marked = [*turns[:-1], {**turns[-1], "content": marks[0]}, {**reply, "content": marks[1]}]
    _, said, after = render(tokenizer, marked, template).rpartition(marks[0])
    before, found, rest = after.partition(marks[1])
    if not said:
        raise RewardError("rollout.turns: the chat template leaves out the assistant's turns; change its "
                          "chat_template.jinja")
    if not found:
        raise RewardError(f"rollout.turns: the chat template leaves out the {reply['role']}'s turn; give replies another "
                          "role")
    token = tokenizer.added_tokens_decoder.get(last)
    before = before.removeprefix(token.content) if token is not None and token.special else before
    return tokens_of_parts(tokenizer, [(before, False), (reply["content"], tokenizer.split_special_tokens), (rest, False)])
