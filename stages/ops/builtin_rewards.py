"""Built-in rewards: numbers of one response, and of one column of its prompt; what each is stands at its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from schemas.errors import RewardError
from schemas.reward_options import (
    Builtin,
    ExactMatch,
    JSONValid,
    Length,
    Numeric,
    Regex,
    Repetition,
    Sentiment,
    Similarity,
)
from schemas.tables import Rollouts
from stages.ops.embeddings import cosine, embeddings
from stages.ops.guest import FOREVER, Patience, call_guest
from stages.ops.language_model import LanguageModel
from stages.ops.math_answers import verifier
from stages.ops.reward_function import Columns
from stages.ops.rewards import Scorer, as_scores
from stages.ops.texts import Texts

FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n\s*```\s*\Z", re.DOTALL)


def builtin_scorer(
    name: str, options: Builtin, patience: Patience = FOREVER, columns: Columns | None = None,
    encoder: LanguageModel | None = None,
) -> Scorer:
    """`columns`: where prompts' columns are, if it reads one; `encoder`: what `similarity` embeds texts with."""

    def scores(rollouts: Rollouts | Texts) -> np.ndarray:
        answers = columns.of(rollouts, [options.column])[options.column] if options.column else [None] * len(rollouts)
        for row, answer in zip(rollouts.row_id, answers, strict=True) if options.column else ():
            if (said := unusable_answer(options, answer)) is not None:
                raise RewardError(f"reward {name}: column {options.column!r} of the prompt of row {row}: {said}")
        if isinstance(options, Similarity):
            return cosine(embeddings(encoder, rollouts.response), embeddings(encoder, [str(answer) for answer in answers]))
        score, given = SCORES[type(options)], zip(rollouts.response, answers, rollouts.sampled_lengths, strict=True)
        values = call_guest(f"reward {name}: {type(options).__name__.lower()}",
                            lambda: [score(options, *each) for each in given], error=RewardError, patience=patience)
        return as_scores(f"reward {name}", values, rollouts)

    return scores


def unusable_answer(options: Builtin, answer: Any) -> str | None:
    """What is wrong with an answer that it is given; none if nothing is."""
    right = answer if isinstance(options, ExactMatch) and isinstance(answer, list) else [answer]
    if any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in right):
        return f"expected a number or a text, found {answer!r:.60}"
    if isinstance(options, Numeric) and verifier()(_after_mark(str(answer)), "") == "-":
        return f"expected a number or a formula, found {answer!r:.60}"
    return None


# --- each of them: options, response, answer, tokens of the response ---

def _sentiment(options: Sentiment, response: str, answer: Any, tokens: int) -> float:
    return _analyzer().polarity_scores(response)["compound"]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _length(options: Length, response: str, answer: Any, tokens: int) -> float:
    length = {"tokens": tokens, "words": len(response.split()), "characters": len(response)}[options.unit]
    return float(length) if options.target is None else -abs(length - options.target) / options.target


def _regex(options: Regex, response: str, answer: Any, tokens: int) -> float:
    found = re.fullmatch if options.whole else re.search
    return float(found(options.pattern, response) is not None)


def _exact_match(options: ExactMatch, response: str, answer: Any, tokens: int) -> float:
    if options.extract is not None:
        matches = [match[1] for match in re.finditer(options.extract, response) if match[1] is not None]
        if not matches:
            return 0.0
        response = matches[-1]

    def compared(text: Any) -> str:
        text = str(text).strip()
        return text.casefold() if options.ignore_case else text

    return float(compared(response) in [compared(one) for one in (answer if isinstance(answer, list) else [answer])])


def _numeric(options: Numeric, response: str, answer: Any, tokens: int) -> float:
    return float(verifier()(_after_mark(str(answer)), response) == "1")


def _after_mark(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def _repetition(options: Repetition, response: str, answer: Any, tokens: int) -> float:
    words = response.lower().split()
    ngrams = [tuple(words[i : i + options.n]) for i in range(len(words) - options.n + 1)]
    return -(1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def _json(options: JSONValid, response: str, answer: Any, tokens: int) -> float:
    fenced = FENCED.match(response)
    try:
        value = json.loads(fenced[1] if fenced else response, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return 0.0
    if options.schema_ is None:
        return 1.0
    from jsonschema import validators

    return float(validators.validator_for(options.schema_)(options.schema_).is_valid(value))


def _no_json(constant: str) -> None:
    """NaN and infinities, which Python would take."""
    raise ValueError(constant)


SCORES: dict[type[Builtin], Callable[..., float]] = {
    Sentiment: _sentiment, Length: _length, Regex: _regex, ExactMatch: _exact_match, Numeric: _numeric,
    Repetition: _repetition, JSONValid: _json,
}
