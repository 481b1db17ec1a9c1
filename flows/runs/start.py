"""From what a user wrote to a run that can begin: everything is checked here, before any model loads."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from flows.runs.inputs import check_inputs, import_files, load_function, read_config, read_lines, recipes_of
from flows.runs.run import Run, create_or_open, open_run, require_same, run_names
from flows.store.store import Store
from schemas.artifacts import check_name
from schemas.config import differences, parse_config
from schemas.control import ControlConfig
from schemas.errors import ConfigError
from schemas.language import LanguageConfig
from schemas.presets import merged
from schemas.settings import FREE, Overrides, RunConfig

Source = str | LanguageConfig | ControlConfig  # an example's folder, a YAML file, or what such a file holds


def start(
    source: Source, name: str | None, settings: Iterable[str], overrides: Overrides, root: str
) -> tuple[Run, Overrides]:
    """The run, made or opened, its inputs imported; and all that holds for this call only.

    `overrides`: what holds for this call instead of what the config says. Raises `ConfigError`, and then leaves no run
    behind.
    """
    config, folder = read_config(source, settings) if isinstance(source, str) else (source, Path.cwd())
    name = check_name(folder.resolve().name if name is None else name, "run name")
    store, files = Store(root), check_inputs(config, folder)
    recipes = recipes_of(files)
    inputs = {role: recipe.ref for role, recipe in recipes.items()}
    overrides = _of_this_call(config, overrides)
    check_device(overrides.execution.device)
    if name in run_names(store):
        require_same(open_run(store, name), config, inputs)
    elif isinstance(config, ControlConfig):
        check_environment(config, files)
    else:
        check_lengths(config, files)
    check_writable(store)
    import_files(store, config, files, recipes)
    create_or_open(store, name, config, inputs)
    return open_run(store, name, overrides.given()), overrides


def resume(name: str, settings: Iterable[str], overrides: Overrides, root: str) -> tuple[Run, Overrides]:
    """As `start`, for a run that is there, as it was made; settings may change what is not part of that."""
    store = Store(root)
    run, changed = open_run(store, name), open_run(store, name, settings=settings)
    if lines := differences(run.config.decides(), changed.config.decides()):
        raise ConfigError(f"--set: run {name!r} was made with another config ({'; '.join(lines)}); baton fork {name} --at I "
                          "--run NEW --set … makes one that goes on with yours")
    overrides = _of_this_call(changed.config, overrides)
    check_device(overrides.execution.device)
    check_writable(store)
    return open_run(store, name, overrides.given()), overrides


def requested(name: str, config: Source | None, overrides: Overrides, root: str | None) -> Run:
    """The run that a flow is asked for: made from `config` if there is one, else one that is there.

    `root`: where the store is; none: where BATON_STORE says. Raises `ConfigError`.
    """
    root = reachable(root)
    run, _ = resume(name, (), overrides, root) if config is None else start(config, name, (), overrides, root)
    return run


def reachable(root: str | None) -> str:
    """The store that a flow is to use. Raises `ConfigError` if it is not there.

    A folder has to be there already: a worker that has not mounted it would else begin a store of its own.
    """
    root = root or os.environ.get("BATON_STORE")
    host = socket.gethostname()
    if not root:
        raise ConfigError(f"no store: give the parameter store, or set BATON_STORE for the worker on {host}")
    if "://" not in root and not Path(root).is_dir():
        raise ConfigError(f"store {root}: no such folder on {host}, where the flow runs; mount it there, or make it if it "
                          "is to be a new store")
    return root


def _of_this_call(config: RunConfig, overrides: Overrides) -> Overrides:
    """All that holds for this call: what the config says, and over it what is overridden. Raises `ConfigError` if that does
    not fit the config."""
    said = {"iterations": config.iterations, **{section: getattr(config, section).model_dump(mode="json")
                                                for section in FREE}}
    overrides = Overrides.model_validate(merged(said, overrides.given()))
    parse_config(merged(config.model_dump(mode="json"), overrides.given()), "--iterations")
    return overrides


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
    from flows.control.environments import look_at

    function = load_function(config.environment.id, files["environment"][0]) if "environment" in files else None
    look_at(config.environment, function, config.execution.environment_timeout)


def check_lengths(config: LanguageConfig, files: dict[str, list[Path]]) -> None:
    """Raises `ConfigError` naming file and lines that do not fit into the model's context."""
    from flows.language.warm_models import context_length, load_tokenizer
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
