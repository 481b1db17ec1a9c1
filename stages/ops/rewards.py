"""Where a response's score comes from: a reward model, a function, or a server; and how components make one score."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import httpx
import numpy as np

from schemas.errors import RewardError, RewardServerError
from schemas.language import RewardConfig
from schemas.tables import Rollouts
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel, sequence_scores
from stages.ops.texts import Texts

MAX_REPLY = 2**20  # bytes of a server's reply
MAX_REPLY_PER_RESPONSE = 1024
Scorer = Callable[[Rollouts | Texts], np.ndarray]
"""B responses to (B,) scores."""

UserFunction = Callable[[list[str], list[str]], Sequence[float]]
"""(prompts, responses) to scores, one a response."""


def model_scorer(model: LanguageModel) -> Scorer:
    """Scores prompt and response by a sequence-classification model, which reads its last token that is not padding."""

    def score(rollouts: Rollouts | Texts) -> np.ndarray:
        pairs = zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)
        return sequence_scores(model, [np.concatenate(pair).tolist() for pair in pairs], "reward")

    return score


def function_scorer(name: str, function: UserFunction) -> Scorer:
    """Scores by a user's function of (prompts, responses)."""

    def score(rollouts: Rollouts | Texts) -> np.ndarray:
        try:
            values = function(list(rollouts.prompt), list(rollouts.response))
        except Exception as error:  # whatever a user's function does
            raise RewardError(f"reward {name}: the function raised {type(error).__name__}: {error}") from error
        return _as_scores(name, values, len(rollouts))

    return score


def server_scorer(url: str, timeout: float = 60.0, *, token: str | None = None) -> Scorer:
    """Scores by POST of `{"prompts": […], "responses": […]}`; the answer is `{"scores": […]}`.

    `token`: a bearer token of this server. Redirects are not followed, so that it reaches no other.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def score(rollouts: Rollouts | Texts) -> np.ndarray:
        body = {"prompts": list(rollouts.prompt), "responses": list(rollouts.response)}
        with httpx.Client(transport=httpx.HTTPTransport(retries=2), timeout=timeout, headers=headers) as client:
            try:
                answer = json.loads(_reply(client, url, body, MAX_REPLY + MAX_REPLY_PER_RESPONSE * len(rollouts)))
            except httpx.HTTPError as error:
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                raise (RewardError if refused else RewardServerError)(f"reward server {url}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise RewardError(f"reward server {url}: {error}") from error
        if not isinstance(answer, dict) or "scores" not in answer:
            raise RewardError(f"reward server {url}: expected an object with 'scores', found {str(answer)[:80]}")
        return _as_scores(url, answer["scores"], len(rollouts))

    return score


def _reply(client: httpx.Client, url: str, body: dict[str, list[str]], limit: int) -> bytes:
    """The reply's bytes. Raises `RewardError` once there are more than `limit`."""
    reply = bytearray()
    with client.stream("POST", url, json=body) as response:
        if response.is_redirect:
            where = response.headers.get("location")
            raise RewardError(f"reward server {url}: redirects to {where}, which is not followed; name it in the config")
        response.raise_for_status()
        for chunk in response.iter_bytes():
            reply += chunk
            if len(reply) > limit:
                raise RewardError(f"reward server {url}: the reply is longer than {limit} bytes, for "
                                  f"{len(body['responses'])} scores; is this the right server?")
    return bytes(reply)


def _as_scores(source: str, values: Sequence[float], rows: int) -> np.ndarray:
    """(B,) float32. Raises `RewardError` unless there are B numbers."""
    try:
        scores = np.array(values, np.float32)  # a copy: the function may use its own again
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {source}: expected {rows} numbers, found {str(values)[:80]}") from error
    if scores.shape != (rows,):
        raise RewardError(f"reward {source}: expected {rows} numbers, one a response, found shape {scores.shape}")
    return scores


def score_components(scorers: Mapping[str, Scorer], rollouts: Rollouts | Texts) -> dict[str, np.ndarray]:
    """Name → (B,) scores, each finite. Raises `NonFiniteError` with the rows, or `RewardError`."""
    components = {name: scorer(rollouts) for name, scorer in scorers.items()}
    for name, values in components.items():
        require_finite(f"reward component {name!r}", values, rollouts.row_id)
    return components


def weighted_sum(components: Mapping[str, np.ndarray], config: RewardConfig, bias: float) -> np.ndarray:
    """Σ_k weight_k·component_k − bias: (B,) float32."""
    total = sum(config.components[name].weight * values.astype(np.float64) for name, values in components.items())
    with np.errstate(over="ignore"):  # an infinite score is refused later
        return (total - bias).astype(np.float32)


def overlong_penalty(lengths: np.ndarray, max_new_tokens: int, buffer: int) -> np.ndarray:
    """0 up to `buffer` tokens before the limit, then in proportion to 1 at the limit: (B,).

    Source: Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476, equation 13, with its sign turned.
    """
    return np.clip((lengths - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)
