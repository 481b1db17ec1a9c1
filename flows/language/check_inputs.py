"""What is checked of a language model's inputs before its run is made: every function and row, and that all fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flows.language.check_model import check_model, check_scorer
from flows.runs.functions import check_function
from flows.runs.inputs import COLUMNS, Rows, read_lines, setting_of
from schemas.errors import ConfigError
from schemas.language import LanguageConfig
from schemas.metrics import BroughtModelMetrics, BroughtScorerMetrics, Metrics
from stages.base_model import train_tokenizer
from stages.ops.prompts import render, require_fit, require_no_clock, tokenize
from stages.ops.reward_function import NAMES, asked


def check(config: LanguageConfig, files: dict[str, list[Path]]) -> dict[str, Metrics]:
    """What was found out about a model that is brought.

    Raises `ConfigError` naming the function, or file and lines, that cannot be used.
    """
    rows = {role: read_lines(paths[0], role) for role, paths in files.items() if role in COLUMNS}
    for role, source in config.functions.items():
        check_function(source, files[role], partial(_require_columns, _prompt_files(config, role, files)))
    tokenizer, context, found = _model(config, files, rows)
    template = config.base_model.chat_template
    tokenizer.split_special_tokens = not config.base_model.special_tokens_in_text
    if template and tokenizer.chat_template is None:
        raise ConfigError(f"base_model.chat_template: the tokenizer of {config.base_model.source} has no chat template; "
                          "set it to false")
    if template:
        render(tokenizer, "x", template)
        require_no_clock(tokenizer, "base_model.chat_template: false")
    scorers = _scorers(config, files, tokenizer, found["base_model"].embeddings if found else config.base_model.vocab_size)
    contexts = [context, scorers["critic"].max_tokens if "critic" in scorers else None]
    context = min((each for each in contexts if each is not None), default=None)
    for role, lines in rows.items():
        where = str(files[role][0])
        if role in ("prompts", "heldout_prompts"):
            texts = [row["prompt"] for row in lines]
            _require_fit(tokenizer, texts, template, context, config.rollout.max_new_tokens, where)
        else:
            for column in ("completion", "chosen", "rejected", "text"):
                texts = [row.get("prompt", "") + row[column] for row in lines if column in row]
                _require_fit(tokenizer, texts, template, context, 1, where)
    return found | scorers


def _prompt_files(config: LanguageConfig, role: str, files: dict[str, list[Path]]) -> dict[str, Path]:
    """The files whose prompts the function in that role is given."""
    roles = ["heldout_prompts"] if role == "judge" else ["prompts", "heldout_prompts"]
    if role != "judge" and config.reward.center_on_demonstrations:
        roles.append("demonstrations")
    return {role: files[role][0] for role in roles if role in files}


def _require_columns(prompt_files: dict[str, Path], function: Callable) -> None:
    """Raises `ConfigError` where it names what a file does not have, or takes for a text what is a column."""
    wanted = asked(function)
    texts = wanted.by_position if wanted.as_texts else ()
    for role, path in prompt_files.items():
        rows = Rows(path, role, imported=True)  # they are checked
        own = (*NAMES, *rows.columns)
        if named := [name for name in texts if name in rows.whole(0) and name not in own]:
            raise ConfigError(f"its parameters {' and '.join(texts)} are prompts and responses, by position, and "
                              f"{named[0]!r} is a column of data.{role} ({path}) too; name the response first, as in "
                              f"f(responses, {named[0]})")
        for name in wanted.columns:
            missing = next((row for row in range(len(rows)) if name not in rows.whole(row)), None)
            if missing is not None:
                there = ", ".join(column for column in rows.whole(missing))
                raise ConfigError(f"its parameter {name!r} is none of {', '.join(NAMES)}, and data.{role} has no such "
                                  f"column in line {missing + 1} ({path}; it has {there})")


def check_new(config: LanguageConfig, files: dict[str, list[Path]]) -> None:
    """Reward models and functions that a run did not have when it was made, beside the files that it has.

    Raises `ConfigError`.
    """
    for role, paths in files.items():
        if role in config.models:
            check_scorer(setting_of(role), paths[0].parent, config.reward.components[role.removeprefix("reward.")])
        elif role in config.functions:
            check_function(config.functions[role], paths, partial(_require_columns, _prompt_files(config, role, files)))


def _scorers(
    config: LanguageConfig, files: dict[str, list[Path]], tokenizer: PreTrainedTokenizerBase, embeddings: int
) -> dict[str, BroughtScorerMetrics]:
    """What was found out about reward models and a critic that are brought. Raises `ConfigError`."""
    found = {}
    for role in config.models:
        if role != "base_model":
            part = config.reward.components[role.removeprefix("reward.")] if role.startswith("reward.") else None
            setting = setting_of(role)
            theirs, found[role] = check_scorer(setting, files[role][0].parent, part)
            if part is None and (theirs.get_vocab() != tokenizer.get_vocab() or found[role].embeddings < embeddings):
                raise ConfigError(f"{setting}: its tokenizer is not the base model's, and a critic reads the actor's "
                                  "tokens; set value.start: actor")
    return found


def _model(
    config: LanguageConfig, files: dict[str, list[Path]], rows: dict[str, list[dict[str, str]]]
) -> tuple[PreTrainedTokenizerBase, int | None, dict[str, BroughtModelMetrics]]:
    """The base model's tokenizer; its context in tokens, none where it has no limit; and what was found out about it."""
    if config.base_model.source is None:
        texts = (row["prompt"] + row["completion"] for row in rows["demonstrations"])
        return train_tokenizer(texts, config.base_model), config.base_model.context_length, {}
    place = files["base_model"][0] if config.base_model.is_gguf else files["base_model"][0].parent
    brought = check_model(setting_of("base_model"), place, config.lora, config.base_model.precision,
                          config.execution.attention)
    return brought.tokenizer, brought.context, {"base_model": brought.metrics}


def _require_fit(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], template: bool, context: int | None, reserved: int, where: str
) -> None:
    if texts:
        tokens = tokenize(tokenizer, list(texts), template)
        require_fit([len(row) for row in tokens], context, reserved, where)
