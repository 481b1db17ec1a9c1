"""Scores of responses by a reward model or a function (reward_server.py: by a server), and how components make one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from schemas.errors import ConfigError, NonFiniteError, RewardError
from schemas.reward_settings import RewardConfig
from schemas.tables import Ragged, Rollouts
from stages.ops.advantages import grpo_advantages, whiten
from stages.ops.finite import require_finite
from stages.ops.guest import FOREVER, Patience, call_guest
from stages.ops.language_model import LanguageModel, sequence_scores
from stages.ops.prompts import response_texts
from stages.ops.reward_function import Columns, UserFunction, asked, called
from stages.ops.texts import Texts

Scores = np.ndarray | Ragged
"""(B,) float32, one a response; or one for each of its R tokens."""

Scorer = Callable[[Rollouts | Texts], Scores]
"""B responses to their scores."""


def model_scorer(model: LanguageModel) -> Scorer:
    """Scores prompt and response by a sequence-classification model, which reads its last token that is not padding."""

    def score(rollouts: Rollouts | Texts) -> np.ndarray:
        pairs = zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)
        return sequence_scores(model, [np.concatenate(pair).tolist() for pair in pairs], "reward")

    return score


def function_scorer(
    name: str, function: UserFunction, patience: Patience = FOREVER, columns: Columns | None = None
) -> Scorer:
    """Scores by a user's function, which gives one number a response, or a list for each: one a token."""

    def score(rollouts: Rollouts | Texts) -> Scores:
        try:
            wanted = asked(function)
        except ConfigError as error:
            raise RewardError(f"reward {name}: {error}") from None
        if wanted.columns and columns is None:
            raise RewardError(f"reward {name}: its parameter {wanted.columns[0]!r} is a column of a prompt file, and this "
                              "call reads none")
        values = call_guest(f"reward {name}: the function", lambda: _at_hand(called(function, rollouts, columns, wanted)),
                            error=RewardError, patience=patience)
        return as_scores(f"reward {name}", values, rollouts)

    return score


def _at_hand(values: object) -> object:
    """What a function gives, computed: an iterator would run the user's code later."""
    return list(values) if isinstance(values, Iterator) else values


def seeing_special_tokens(scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """The scorer, given responses with their special tokens, EOS too."""

    def score(rollouts: Rollouts | Texts) -> np.ndarray:
        whole = response_texts(tokenizer, list(rollouts.prompt_tokens), list(rollouts.response_tokens), special_tokens=True)
        return scorer(replace(rollouts, response=tuple(whole)))

    return score


def as_scores(source: str, values: object, rollouts: Rollouts | Texts) -> Scores:
    """What a function or server gave: numbers, one a response or one a token; tensors count as numbers.

    Raises `RewardError`, and `NonFiniteError` naming row and prompt.
    """
    rows = len(rollouts)
    if torch.is_tensor(values) or isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (list, tuple)) and len(values) == rows and _are_rows(values):
        return _of_tokens(source, values, rollouts)
    try:
        found = [value.item() if hasattr(value, "item") else value for value in values]
        if any(isinstance(value, (str, bytes)) for value in found):
            raise TypeError("text")
        numbers = np.array([float("nan") if value is None else value for value in found], np.float64)  # a copy
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardError(f"{source}: expected {rows} numbers, found {str(values)[:80]}") from error
    if numbers.shape != (rows,):
        raise RewardError(f"{source}: expected {rows} numbers, one a response, found shape {numbers.shape}")
    with np.errstate(over="ignore"):
        scores = numbers.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        row = bad[0]
        more = f" and {bad.size - 1} more" if bad.size > 1 else ""
        raise NonFiniteError(f"{source}: gave {found[row]!r} for the response in row {rollouts.row_id[row]}{more}, to the "
                             f"prompt {rollouts.prompt[row][:60]!r}; expected a finite number below 3.4e38")
    return scores


def _are_rows(values: Sequence[object]) -> bool:
    """Whether each is a list, or an array or tensor of one dimension; arrays of one number alone are scores of responses."""
    lists = [isinstance(value, (list, tuple)) for value in values]
    return all(is_list or getattr(value, "ndim", 0) == 1 for is_list, value in zip(lists, values, strict=True)) and any(
        is_list or len(value) != 1 for is_list, value in zip(lists, values, strict=True))


def _as_float(number: object) -> float:
    if not isinstance(number, Real):
        raise TypeError
    return float(number)


def _of_tokens(source: str, values: Sequence[Sequence[float]], rollouts: Rollouts | Texts) -> Ragged:
    """A list for each response, of as many numbers as it has tokens."""
    found = []
    for row, (value, tokens) in enumerate(zip(values, rollouts.response_tokens.lengths, strict=True)):
        where = f"the response in row {rollouts.row_id[row]}, {rollouts.response[row][:60]!r}"
        numbers = value.tolist() if hasattr(value, "tolist") else list(value)
        if len(numbers) != tokens:
            raise RewardError(f"{source}: gave {len(numbers)} numbers for the {tokens} tokens of {where}; expected one for "
                              "each, EOS included, or one for the response")
        numbers = [number.item() if hasattr(number, "item") else number for number in numbers]
        try:
            found.append(np.array([_as_float(number) for number in numbers]))
        except (TypeError, OverflowError):
            raise RewardError(f"{source}: expected numbers for the tokens of {where}, found {str(numbers)[:80]}") from None
    with np.errstate(over="ignore"):
        scores = Ragged.from_rows(found, np.float32)
    require_finite(f"{source}: a token's reward", scores, rollouts.row_id)
    return scores


def of_responses(scores: Scores) -> np.ndarray:
    """(B,) float32: of tokens, their sum."""
    with np.errstate(over="ignore"):
        return scores.sums().astype(np.float32) if isinstance(scores, Ragged) else scores


def of_tokens(scores: Mapping[str, Scores], config: RewardConfig) -> Ragged | None:
    """Σ_k weight_k·reward_k of the components that reward tokens; none where none does. Raises `RewardError`."""
    found = {name: values for name, values in scores.items() if isinstance(values, Ragged)}
    if not found:
        return None
    for setting in ("normalize", "normalize_components"):
        if (how := getattr(config, setting)) != "none":
            raise RewardError(f"reward {next(iter(found))}: it rewards each token, and reward.{setting}={how} changes whole "
                              "scores; set it to none")
    total = sum(config.components[name].weight * values.values.astype(np.float64) for name, values in found.items())
    return next(iter(found.values())).with_values(total.astype(np.float32))


def given_scores(scorers: Mapping[str, Scorer], rollouts: Rollouts | Texts) -> dict[str, Scores]:
    """Name → scores, each finite. Raises `NonFiniteError` with the rows, or `RewardError`."""
    given = {name: scorer(rollouts) for name, scorer in scorers.items()}
    for name, values in given.items():
        require_finite(f"reward component {name!r}", of_responses(values), rollouts.row_id)
    return given


def score_components(scorers: Mapping[str, Scorer], rollouts: Rollouts | Texts) -> dict[str, np.ndarray]:
    """Name → (B,) scores of the responses, as `given_scores`."""
    return {name: of_responses(values) for name, values in given_scores(scorers, rollouts).items()}


def weighted_sum(components: Mapping[str, np.ndarray], config: RewardConfig, bias: float) -> np.ndarray:
    """Σ_k weight_k·component_k − bias: (B,) float32."""
    total = sum(config.components[name].weight * values.astype(np.float64) for name, values in components.items())
    with np.errstate(over="ignore"):  # an infinite score is refused later
        return (total - bias).astype(np.float32)


def normalized_components(
    components: Mapping[str, np.ndarray], groups: np.ndarray, how: Literal["batch", "group"]
) -> dict[str, np.ndarray]:
    """Name → (B,) float64 of mean 0 and variance 1 over the batch, or over each group, the responses to one prompt.

    Source: Liu et al. 2026, GDPO, https://arxiv.org/abs/2601.05242. A component that does not vary is 0.
    """
    if how == "group":
        return {name: grpo_advantages(values.astype(np.float64), groups) for name, values in components.items()}
    return {name: whiten(values.astype(np.float64)) for name, values in components.items()}


def overlong_penalty(lengths: np.ndarray, max_new_tokens: int, buffer: int) -> np.ndarray:
    """0 up to `buffer` tokens before the limit, then in proportion to 1 at the limit: (B,).

    Source: Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476, equation 13, with its sign turned.
    """
    return np.clip((lengths - (max_new_tokens - buffer)) / buffer, 0.0, 1.0)
