"""What is checked of a language model's inputs before its run is made: every function and row, and that all fits."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial

from transformers import PreTrainedTokenizerBase

from flows.language.check_model import check_encoder, check_model, check_scorer
from flows.language.fitting import Fit
from flows.language.server_access import server_token
from flows.runs.functions import check_function
from flows.runs.inputs import Checked, Files, data_tables, setting_of
from flows.runs.rows import DataTable, Rows
from schemas.data import COLUMNS
from schemas.errors import ConfigError, installed_by
from schemas.language import LanguageConfig, RolloutConfig
from schemas.metrics import BroughtModelMetrics, BroughtScorerMetrics
from schemas.reward_options import EXTRA, Builtin
from stages.base_model import train_tokenizer
from stages.ops.builtin_rewards import unusable_answer
from stages.ops.distribution import distribution_of
from stages.ops.prompts import render, require_no_clock
from stages.ops.reward_function import NAMES, asked
from stages.ops.sampling import Stops

log = logging.getLogger("baton")


def check(config: LanguageConfig, files: Files) -> Checked:
    """What was found out about models that are brought, and the rows of the data, without those that are too long where they
    are dropped.

    Raises `ConfigError` naming the function, or file and row, that cannot be used.
    """
    data = data_tables(config, files)
    if (held_out := len(data["heldout_prompts"])) < config.execution.shards:
        raise ConfigError(f"execution.shards={config.execution.shards}: there are {held_out} held-out prompts to be "
                          "evaluated; take at most as many")
    for role, source in config.functions.items():
        check_function(source, files[role], partial(_require_columns, _prompts_of(config, role, data)))
    _check_parts(config, data)
    tokenizer, context, found = _model(config, files, data)
    template = config.base_model.chat_template
    tokenizer.split_special_tokens = not config.base_model.special_tokens_in_text
    if template:
        _require_template(config, tokenizer)
    embeddings = found["base_model"].embeddings if found else config.base_model.vocab_size
    _require_sampling(config.rollout, tokenizer, embeddings)
    scorers = _scorers(config, files, tokenizer, embeddings)
    contexts = [context, scorers["critic"].max_tokens if "critic" in scorers else None]
    context = min((each for each in contexts if each is not None), default=None)
    fitted = {role: Fit(tokenizer, template, context, config.reserved(role)).fitted(role, table, config.data.too_long)
              for role, table in data.items()}
    _say(fitted)
    return Checked(found | scorers, fitted)


def _require_sampling(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raises `ConfigError` naming a token that is none, a text that no response can end on, or that nothing may be
    sampled."""
    eos = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    distribution = distribution_of(config.model_dump(), tokenizer, eos)
    Stops.of(config, tokenizer, eos)
    if len({*distribution.suppressed, *distribution.ends}) >= embeddings:
        raise ConfigError(f"rollout.suppress_tokens: none of the model's {embeddings} tokens may be sampled"
                          f"{' before min_new_tokens' if distribution.ends else ''}; leave some")
    for text in config.stop:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        if (written := tokenizer.decode(ids)) != text:
            raise ConfigError(f"rollout.stop: the tokenizer writes {text!r} as {written!r}, so that no response would "
                              "end on it; name a text that it can write")


def _require_template(config: LanguageConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ConfigError` where the chat template cannot be used as the config says."""
    template = config.base_model.chat_template
    if tokenizer.chat_template is None:
        raise ConfigError(f"base_model.chat_template: the tokenizer of {config.base_model.source} has no chat template; "
                          "set it to false")
    render(tokenizer, "x", template)
    require_no_clock(tokenizer, "base_model.chat_template: false")
    for name in template if isinstance(template, dict) else ():
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ConfigError(f"base_model.chat_template: the template of {config.base_model.source} reads no {name!r}; "
                              "take it out")


def _say(data: Mapping[str, DataTable]) -> None:
    """How many rows are not as they were."""
    for role, table in data.items():
        said = ((table.ties, "ties were dropped"), (table.too_long, "rows that are too long were dropped"),
                (table.cut, "prompts that are too long lost their beginning"))
        for count, words in said:
            if count:
                log.warning("data.%s: %d %s, %d rows are left", role, count, words, len(table))


def _prompts_of(config: LanguageConfig, role: str, data: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows whose prompts the function in that role is given."""
    judges = role == "judge" or role.startswith("judges.")
    roles = ["heldout_prompts"] if judges else ["prompts", "heldout_prompts"]
    if role.startswith("reward.") and config.reward.center_on_demonstrations:
        roles.append("demonstrations")
    return {role: data[role] for role in roles if role in data}


def _require_columns(prompts: Mapping[str, Rows], function: Callable) -> None:
    """Raises `ConfigError` where it names what the data does not have, or takes for a text what is a column."""
    wanted = asked(function)
    texts = wanted.by_position if wanted.as_texts else ()
    for role, rows in prompts.items():
        own = (*NAMES, *COLUMNS[role])
        if named := [name for name in texts if name in rows.columns and name not in own]:
            raise ConfigError(f"its parameters {' and '.join(texts)} are prompts and responses, by position, and "
                              f"{named[0]!r} is a column of data.{role} too; name the response first, as in "
                              f"f(responses, {named[0]})")
        for name in wanted.columns:
            if (place := rows.lacks(name)) is not None:
                raise ConfigError(f"its parameter {name!r} is none of {', '.join(NAMES)}, and data.{role} has no such "
                                  f"column ({place}; there are {', '.join(rows.columns)})")


def _check_parts(config: LanguageConfig, data: Mapping[str, Rows]) -> None:
    """Servers may be asked, packages of built-in rewards are there, and so are the columns that they read.

    Raises `ConfigError` naming the component, and of a column where it is not, or holds something else.
    """
    for name, part in config.parts.items():
        prompts, where = _prompts_of(config, name, data), setting_of(name).removesuffix(".source")
        if part.kind == "server":
            server_token(part.source)
        for role, rows in prompts.items():
            for column in part.reads:
                if (place := rows.lacks(column)) is not None:
                    raise ConfigError(f"{where}: reads the column {column!r}, and data.{role} has no such column ({place}; "
                                      f"there are {', '.join(rows.columns)})")
        if part.kind == "builtin":
            if (package := EXTRA.get(part.source)) and importlib.util.find_spec(package) is None:
                raise ConfigError(f"{where}: {part.source} needs the package {package}: {installed_by('rewards')}")
            _require_answers(where, part.builtin, prompts)


def _require_answers(where: str, options: Builtin, prompts: Mapping[str, Rows]) -> None:
    """Raises `ConfigError` naming the first row whose answer cannot be compared with."""
    for role, rows in prompts.items() if options.column else ():
        for number, row in enumerate(rows):
            if (said := unusable_answer(options, row.get(options.column))) is not None:
                place = rows.places[number] if isinstance(rows, DataTable) else f"data.{role}, row {number + 1}"
                raise ConfigError(f"{where}: {place}: column {options.column!r}: {said}")


def check_new(config: LanguageConfig, files: Files, data: Mapping[str, Rows]) -> None:
    """Reward models and functions that a run did not have when it was made, beside the data that it has.

    Raises `ConfigError`.
    """
    _check_parts(config, data)
    for role, paths in files.items():
        if role in config.models:
            if config.parts[role].kind == "builtin":
                check_encoder(setting_of(role), paths[0].parent)
            else:
                check_scorer(setting_of(role), paths[0].parent, config.parts[role])
        elif role in config.functions:
            check_function(config.functions[role], paths, partial(_require_columns, _prompts_of(config, role, data)))


def _scorers(
    config: LanguageConfig, files: Files, tokenizer: PreTrainedTokenizerBase, embeddings: int
) -> dict[str, BroughtScorerMetrics]:
    """What was found out about reward models and a critic that are brought. Raises `ConfigError`."""
    found = {}
    for role in config.models:
        if role != "base_model":
            part = config.parts.get(role)
            setting = setting_of(role)
            if part and part.kind == "builtin":
                found[role] = check_encoder(setting, files[role][0].parent)
                continue
            theirs, found[role] = check_scorer(setting, files[role][0].parent, part)
            if part is None and (theirs.get_vocab() != tokenizer.get_vocab() or found[role].embeddings < embeddings):
                raise ConfigError(f"{setting}: its tokenizer is not the base model's, and a critic reads the actor's "
                                  "tokens; set value.start: actor")
    return found


def _model(
    config: LanguageConfig, files: Files, data: Mapping[str, Rows]
) -> tuple[PreTrainedTokenizerBase, int | None, dict[str, BroughtModelMetrics]]:
    """The base model's tokenizer; its context in tokens, none where it has no limit; and what was found out about it."""
    if config.base_model.source is None:
        texts = (row["prompt"] + row["completion"] for row in data["demonstrations"])
        return train_tokenizer(texts, config.base_model), config.base_model.context_length, {}
    place = files["base_model"][0] if config.base_model.is_gguf else files["base_model"][0].parent
    brought = check_model(setting_of("base_model"), place, config.lora, config.base_model.precision,
                          config.execution.attention, config.execution.fsdp)
    return brought.tokenizer, brought.context, {"base_model": brought.metrics}
