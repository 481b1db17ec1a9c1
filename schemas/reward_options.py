"""The settings of built-in rewards: what a component of the reward may name as its source, and its `options`."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from schemas.settings import Settings


class Builtin(Settings):
    """Base of all."""

    @property
    def column(self) -> str | None:
        """Of the prompts, that it reads; none if it reads none."""
        return None


class Sentiment(Builtin):
    """How positive the response is, −1 to 1: VADER's compound score (Hutto & Gilbert 2014), in English."""


class Length(Builtin):
    """The response's length; with a target −|length − target| / target, 0 at best."""

    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted; tokens with EOS."""
    target: PositiveInt | None = None
    """The length that is wanted; null: the longer the better."""


class Regex(Builtin):
    """1 where the pattern is found in the response, else 0."""

    pattern: str
    """Python's regular expression; (?s) lets a dot be a newline, ^ and $ are the response's beginning and end."""
    whole: bool = False
    """Whether it has to match the whole response."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern


class ExactMatch(Builtin):
    """1 where the response is the answer, else 0."""

    answer: str = "answer"
    """The column of the prompts that holds it: a text or a number, or a list of those that are right."""
    extract: str | None = None
    """A regular expression whose first group in the response is compared, of several matches the last; null: all of it."""
    ignore_case: bool = False
    """Whether capitals are the same as small letters. Blanks around a text are never compared."""

    @property
    def column(self) -> str:
        return self.answer

    @field_validator("extract")
    @classmethod
    def _has_a_group(cls, extract: str | None) -> str | None:
        try:
            if extract is not None and re.compile(extract).groups < 1:
                raise ValueError("has no group; put what is compared into (…)")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return extract


class Numeric(Builtin):
    """1 where the response's last number, fraction or formula equals the answer, else 0 (Hugging Face's math-verify)."""

    answer: str = "answer"
    """The column of the prompts that holds it: a number or a text; of a text what follows the last ####, if there is one."""

    @property
    def column(self) -> str:
        return self.answer


class Repetition(Builtin):
    """−(1 − different n-grams / n-grams) of the response's words: 0 where none comes twice (Yeo et al. 2025)."""

    n: PositiveInt = 3
    """Words of an n-gram."""


class JSONValid(Builtin):
    """1 where the response is JSON, perhaps in a fenced block of code, and fits the schema, else 0."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """A JSON schema; null: any JSON."""

    @model_validator(mode="after")
    def _is_a_schema(self) -> Self:
        if self.schema_ is not None:
            from jsonschema import validators
            from jsonschema.exceptions import SchemaError

            try:
                validators.validator_for(self.schema_).check_schema(self.schema_)
            except SchemaError as error:
                raise ValueError(f"schema: no JSON schema: {error.message}") from None
        return self


class Similarity(Builtin):
    """Cosine of the embeddings of response and answer, −1 to 1: means of an encoder's last hidden states over the tokens."""

    model: str = Field(min_length=1)
    """The encoder: a folder relative to the config, or a name on the hub (`org/name`, `org/name@revision`)."""
    answer: str = "answer"
    """The column of the prompts that holds the text to compare with."""

    @property
    def column(self) -> str:
        return self.answer


BUILTINS: dict[str, type[Builtin]] = {
    "sentiment": Sentiment, "length": Length, "regex": Regex, "exact_match": ExactMatch, "numeric": Numeric,
    "repetition": Repetition, "json": JSONValid, "similarity": Similarity,
}
"""Name → its options."""
EXTRA = {"sentiment": "vaderSentiment", "numeric": "math_verify"}
"""Name → the package that it needs, of the extra `rewards`."""
