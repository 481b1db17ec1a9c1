"""From what a user wrote to a run that can begin: everything is checked here, before any model loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows.inputs import check_inputs, import_files, load_function, read_config, read_lines, recipes_of
from flows.runs import Run, create_or_open, open_run, require_same, run_names
from flows.store import Store
from schemas.artifacts import check_name
from schemas.config import differences, parse_config
from schemas.control import ControlConfig
from schemas.errors import ConfigError
from schemas.language import LanguageConfig
from schemas.presets import merged
from schemas.settings import FREE, RunConfig


def start(
    source: str, name: str | None, settings: Iterable[str], iterations: int | None, root: str
) -> tuple[Run, dict[str, Any]]:
    """The run, made or opened, its inputs imported; and the settings that hold for this call only.

    `iterations`: how far to train in this call, instead of what the config says. Raises `ConfigError`, and then leaves
    no run behind.
    """
    config, folder = read_config(source, settings)
    name = check_name(folder.resolve().name if name is None else name, "run name")
    store, files = Store(root), check_inputs(config, folder)
    recipes = recipes_of(files)
    inputs = {role: recipe.ref for role, recipe in recipes.items()}
    check_device(config.execution.device)
    if name in run_names(store):
        require_same(open_run(store, name), config, inputs)
    elif isinstance(config, ControlConfig):
        check_environment(config, files)
    else:
        check_lengths(config, files)
    overrides = _of_this_call(config, iterations)
    check_writable(store)
    import_files(store, config, files, recipes)
    create_or_open(store, name, config, inputs)
    return open_run(store, name, overrides), overrides


def _of_this_call(config: RunConfig, iterations: int | None) -> dict[str, Any]:
    """The settings that hold for this call, whatever the run was made with. Raises `ConfigError` if they do not fit it."""
    overrides = {"iterations": iterations or config.iterations,
                 **{section: getattr(config, section).model_dump(mode="json") for section in FREE}}
    if overrides["execution"]["threads"] is None:
        del overrides["execution"]["threads"]  # as the run has them
    parse_config(merged(config.model_dump(mode="json"), overrides), "--iterations")
    return overrides


def resume(name: str, settings: Iterable[str], iterations: int | None, root: str) -> tuple[Run, dict[str, Any]]:
    """As `start`, for a run that is there, as it was made; settings may change what is not part of that."""
    store = Store(root)
    run, changed = open_run(store, name), open_run(store, name, settings=settings)
    if lines := differences(run.config.decides(), changed.config.decides()):
        raise ConfigError(f"--set: run {name!r} was made with another config ({'; '.join(lines)}); baton fork {name} --at I "
                          "--run NEW --set … makes one that goes on with yours")
    overrides = _of_this_call(changed.config, iterations)
    check_device(changed.config.execution.device)
    check_writable(store)
    return open_run(store, name, overrides), overrides


def check_writable(store: Store) -> None:
    """Raises `ConfigError` if the store cannot be made or written to."""
    try:
        store.files.probe()
    except OSError as error:
        raise ConfigError(f"--store {store.uri}: {error.strerror or error}: {error.filename or store.uri}") from None


def check_device(device: str) -> None:
    """Raises `ConfigError` if torch does not have it here."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"execution.device: torch finds no {device} here; set execution.device=cpu")


def check_environment(config: ControlConfig, files: dict[str, list[Path]]) -> None:
    """Raises `ConfigError` if the environment cannot be made, or is not one that a policy here can act in."""
    from flows.environments import look_at

    function = load_function(config.environment.id, files["environment"][0]) if "environment" in files else None
    look_at(config.environment, function, config.execution.environment_timeout)


def check_lengths(config: LanguageConfig, files: dict[str, list[Path]]) -> None:
    """Raises `ConfigError` naming file and lines that do not fit into the model's context."""
    from flows.models import context_length, load_tokenizer
    from stages.base_model import train_tokenizer
    from stages.ops.prompts import require_fit, tokenize

    if config.base_model.source is None:
        rows = read_lines(files["demonstrations"][0], "demonstrations")
        tokenizer = train_tokenizer((row["prompt"] + row["completion"] for row in rows), config.base_model)
        context = config.base_model.context_length
    else:
        place = files["base_model"][0].parent
        try:
            tokenizer, context = load_tokenizer(place), context_length(place)
        except Exception as error:  # transformers raises whatever a broken file leads to
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"base_model.source: {place} cannot be read as a model: {reason}") from None
    if config.base_model.chat_template and tokenizer.chat_template is None:
        raise ConfigError(f"base_model.chat_template: the tokenizer of {config.base_model.source} has no chat template; "
                          "set it to false")
    for role, paths in files.items():
        if role in ("prompts", "heldout_prompts"):
            prompts = [row["prompt"] for row in read_lines(paths[0], role)]
            tokens = tokenize(tokenizer, prompts, config.base_model.chat_template)
            require_fit([len(row) for row in tokens], context, config.rollout.max_new_tokens, str(paths[0]))
        elif role in ("demonstrations", "pairs", "heldout_pairs", "pretraining"):
            for column in ("completion", "chosen", "rejected", "text"):
                texts = [row.get("prompt", "") + row[column] for row in read_lines(paths[0], role) if column in row]
                tokens = tokenize(tokenizer, texts, config.base_model.chat_template) if texts else []
                require_fit([len(row) for row in tokens], context, 1, str(paths[0]))
