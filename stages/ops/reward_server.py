"""Scores by a reward server: POST of `{"prompts": […], "responses": […]}`, and of columns of the prompts by their names.

The answer is `{"scores": […]}`, `{"rewards": […]}` or a bare list, one number a response.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import numpy as np

from schemas.errors import RewardError
from schemas.tables import Rollouts
from stages.ops.progress import pause
from stages.ops.reward_function import Columns
from stages.ops.rewards import as_scores
from stages.ops.texts import Texts

log = logging.getLogger("baton")
T = TypeVar("T")
V = TypeVar("V")
MAX_REPLY = 2**20  # bytes
MAX_REPLY_PER_RESPONSE = 1024
TRIED_AGAIN = (429, 500, 502, 503, 504)
WAITS = (2, 10, 30)  # seconds before it is asked again, where it does not say itself; the last from then on
MAX_WAIT = 300
JSON = {"Content-Type": "application/json"}
SHOWN = 200  # characters of a reply in an error
HINTS = {401: "set BATON_REWARD_TOKEN=host=token", 403: "check the token in BATON_REWARD_TOKEN",
         404: "check the path in the address", 413: "fewer responses at once: execution.server_batch_size"}


@dataclass(frozen=True)
class RewardServer:
    """A server, asked for the scores of all responses, so many at once, in so many requests side by side.

    `token`: a bearer token of this server. Redirects are not followed, so that it reaches no other.
    """

    url: str
    token: str | None = None
    timeout: float = 60.0
    tries: int = 4
    batch_size: int | None = None
    concurrency: int = 1
    sends: tuple[str, ...] = ()
    """Columns of the prompts."""
    columns: Columns | None = None

    def __call__(self, rollouts: Rollouts | Texts) -> np.ndarray:
        """(B,) float32. Raises `RewardError` and `NonFiniteError`."""
        body = {"prompts": list(rollouts.prompt), "responses": list(rollouts.response)}
        if self.sends:
            body |= self.columns.of(rollouts, self.sends)
        size = self.batch_size or len(rollouts)
        parts = [{name: values[i : i + size] for name, values in body.items()} for i in range(0, len(rollouts), size)]
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with httpx.Client(timeout=self.timeout, headers=headers) as client:
            answers = _side_by_side(lambda part: self._scores(client, part), parts, self.concurrency)
        return as_scores(f"reward server {self.url}", [score for answer in answers for score in answer], rollouts)

    def _scores(self, client: httpx.Client, body: dict[str, list[Any]]) -> list[Any]:
        """One answer for each of these responses. Raises `RewardError`."""
        count = len(body["responses"])
        reply = self._asked(client, body, MAX_REPLY + MAX_REPLY_PER_RESPONSE * count)
        try:
            answer = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its reply is not JSON ({error}): {_shown(reply)}") from None
        if isinstance(answer, Mapping):
            answer = answer.get("scores", answer.get("rewards"))
        if not isinstance(answer, list):
            raise self._error(f"expected {{\"scores\": […]}}, {{\"rewards\": […]}} or a list, found {_shown(reply)}")
        if len(answer) != count:
            raise self._error(f"expected {count} numbers, one a response, found {len(answer)}: {_shown(reply)}")
        return answer

    def _asked(self, client: httpx.Client, body: dict[str, list[Any]], limit: int) -> bytes:
        """The reply, asked for again where that may help."""
        for attempt in range(1, self.tries + 1):
            try:
                status, answered, reply = self._ask(client, body, limit)
                reason = f"answered {status}{_hint(status)}: {_shown(reply)}"
                wait = _wait(answered.get("retry-after"), attempt)
            except httpx.HTTPError as error:
                status, wait = None, _wait(None, attempt)
                reason = self._unreachable(error)
            if status is not None and 200 <= status < 300:
                return reply
            if (status is not None and status not in TRIED_AGAIN) or attempt == self.tries:
                break
            log.warning("reward server %s: %s; it is asked again in %.0f s", self.url, reason, wait)
            pause(wait, f"reward server {self.url}")
        tried = f" (asked {attempt} times; execution.server_tries)" if attempt > 1 else ""
        raise self._error(reason + tried)

    def _ask(self, client: httpx.Client, body: dict[str, list[Any]], limit: int) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and the reply's bytes. Raises `RewardError` once there are more than `limit`."""
        reply = bytearray()
        with client.stream("POST", self.url, content=json.dumps(body, default=str), headers=JSON) as response:
            if response.is_redirect:
                raise self._error(f"redirects to {response.headers.get('location')}, which is not followed; name it in the "
                                  "config")
            for chunk in response.iter_bytes():
                reply += chunk
                if len(reply) > limit:
                    raise self._error(f"the reply is longer than {limit} bytes, for {len(body['responses'])} scores; is "
                                      "this the right server?")
        return response.status_code, response.headers, bytes(reply)

    def _unreachable(self, error: httpx.HTTPError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"has not answered for {self.timeout:g} s (execution.server_timeout)"
        return f"{error or type(error).__name__}"

    def _error(self, reason: str) -> RewardError:
        return RewardError(f"reward server {self.url}: {reason}")


def _side_by_side(ask: Callable[[T], V], parts: Sequence[T], at_once: int) -> list[V]:
    """What it gives for each, so many at once; none is begun after one that failed. Raises what the first of them raises."""
    if at_once == 1 or len(parts) == 1:
        return [ask(part) for part in parts]
    with ThreadPoolExecutor(at_once, thread_name_prefix="reward server") as pool:
        asked = [pool.submit(copy_context().run, ask, part) for part in parts]
        try:
            return [future.result() for future in asked]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _hint(status: int) -> str:
    return f" ({HINTS[status]})" if status in HINTS else ""


def _shown(reply: bytes) -> str:
    """The beginning of a reply, for people."""
    text = " ".join(reply[: 4 * SHOWN].decode("utf-8", "replace").split())
    return f"{text[:SHOWN]}…" if len(text) > SHOWN else text or "nothing"


def _wait(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next try: as the server asks, in seconds or by a date, else growing."""
    wait = float(WAITS[min(attempt, len(WAITS)) - 1])
    if retry_after is not None:
        with contextlib.suppress(TypeError, ValueError):  # a header that says nothing
            wait = float(retry_after) if retry_after.strip().isdigit() else (
                parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    return min(max(wait, 0.0), MAX_WAIT)
