"""From what a user asks for to a run that can begin: everything is checked here, once, before any model loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flows.runs.best import check_best
from flows.runs.functions import function_files
from flows.runs.inputs import (
    Checked,
    Files,
    import_files,
    input_files,
    is_model,
    model_files,
    older_recipe,
    pinned,
    read_config,
    recipes_of,
    setting_of,
    stored_rows,
)
from flows.runs.rows import Rows
from flows.runs.run import Run, changed, create, find_run, lease_key, open_run, require_same, with_threads
from flows.store.lease import working_on
from flows.store.store import Store
from schemas.artifacts import Recipe, RunRecord, check_name
from schemas.config import differences, parse_config
from schemas.control import ControlConfig
from schemas.data import COLUMNS
from schemas.errors import ConfigError
from schemas.language import LanguageConfig
from schemas.presets import merged
from schemas.records import now
from schemas.settings import FREE_SECTIONS, NO_OVERRIDES, ExecutionConfig, Overrides, RunConfig

Source = str | LanguageConfig | ControlConfig  # an example's folder, a YAML file, or what such a file holds
Check = Callable[[RunConfig, Files], Checked]
"""Reads all that a new run is made of."""
CheckNew = Callable[[RunConfig, Files, Mapping[str, Rows]], None]
"""Reads functions and models that a run was not made with, beside the data that it has."""


@dataclass(frozen=True)
class Request:
    """A requested run, made from `source` if there is one, and what overrides its config in this call."""

    store: str
    name: str | None = None
    """Left out: that of the config's folder."""
    source: Source | None = None
    """Left out for a run that is there."""
    settings: tuple[str, ...] = ()
    """`key=value` each: of the config of a new run; of a run that is there, what is not part of its identity."""
    overrides: Overrides = NO_OVERRIDES


def start(request: Request, check: Check) -> Run:
    """The run, made or opened, its inputs imported, with the settings that hold now.

    `check`: reads all that a new run is made of. Raises `ConfigError`, and then leaves no run behind.
    """
    store = Store(request.store)
    run, config = _resumed(store, request) if request.source is None else _made(store, request, check)
    run = changed(run, _overrides(config, request.overrides).values_set())
    check_device(run.config.execution)
    check_best(run.config)
    return run


def preview(request: Request, check: Check, scratch: Store) -> tuple[Run, bool]:
    """As `start`, with nothing written to the store; and whether the run is there.

    Of a run that is not, data and functions are imported into `scratch`, where its chain reads them; models are not.
    """
    store = Store(request.store)
    if request.source is None:
        run = open_run(store, request.name)
        return changed(run, request.overrides.values_set(), request.settings), True
    config, folder = request.source, Path.cwd()
    if isinstance(request.source, str):
        config, folder = read_config(request.source, request.settings)
    name, files = _name(request.name, folder), input_files(config, folder)
    recipes, run = recipes_of(config, files), find_run(store, name)
    overrides = _overrides(config, request.overrides)
    if run is not None:
        recipes |= _as_made(run, config, files, recipes)
        require_same(run, config, {role: recipe.ref for role, recipe in recipes.items()})
        return changed(run, overrides.values_set()), True
    check_device(overrides.execution)
    check_best(config)
    read = {role: recipe for role, recipe in recipes.items() if not is_model(files[role])}
    import_files(scratch, config.execution, files, read, check(config, files))
    config = with_threads(pinned(config, folder, files))
    record = RunRecord(name=name, config=config.model_dump(mode="json"), created=now(),
                       inputs={role: recipe.ref for role, recipe in recipes.items()})
    return changed(Run(scratch, record, config), overrides.values_set()), False


def _resumed(store: Store, request: Request) -> tuple[Run, RunConfig]:
    """A run that is there, and its config with the settings of the request."""
    run = open_run(store, request.name)
    config = changed(run, settings=request.settings).config
    if lines := differences(run.config.decides(), config.decides()):
        raise ConfigError(f"--set: run {run.name!r} was made with another config ({'; '.join(lines)}); baton fork "
                          f"{run.name} --at I --run NEW --set … makes one that goes on with yours")
    _require_writable(store)
    return run, config


def _made(store: Store, request: Request, check: Check) -> tuple[Run, RunConfig]:
    """The run of a config, made if it is not there, and that config."""
    config, folder = request.source, Path.cwd()
    if isinstance(request.source, str):
        config, folder = read_config(request.source, request.settings)
    name = _name(request.name, folder)
    files = input_files(config, folder)
    recipes = recipes_of(config, files)
    run = find_run(store, name)
    if run is not None:
        recipes |= _as_made(run, config, files, recipes)
        require_same(run, config, {role: recipe.ref for role, recipe in recipes.items()})
        _require_writable(store)
        if any(store.find(recipe.ref) is None for recipe in recipes.values()):  # it is not there any more
            import_files(store, config.execution, files, recipes, check(config, files))
        return run, config
    overrides = _overrides(config, request.overrides)
    check_device(overrides.execution)
    check_best(config)
    checked = check(config, files)
    _require_writable(store)
    return _create(store, name, pinned(config, folder, files), files, recipes, checked), config


def _as_made(run: Run, config: RunConfig, files: Files, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Recipes by which an older version imported data of that run, where that is what these files hold."""
    if not isinstance(config, LanguageConfig):
        return {}
    older = {role: older_recipe(role, files[role], recipes[role]) for role in config.data.roles if role in run.inputs}
    return {role: recipe for role, recipe in older.items() if recipe and recipe.ref == run.inputs[role]}


def _name(name: str | None, folder: Path) -> str:
    """The run's name, that of the config's folder by default. Raises `ConfigError`."""
    if name is not None:
        return check_name(name, "run name")
    try:
        return check_name(folder.resolve().name, "run name")
    except ConfigError as error:
        raise ConfigError(f"{error}; it is the folder's: --run chooses another") from None


def _create(
    store: Store, name: str, config: RunConfig, files: Files, recipes: dict[str, Recipe], checked: Checked
) -> Run:
    """The run with its inputs; its lease is held meanwhile, so that gc spares what no record names yet."""
    with working_on(store, lease_key(name), f"run {name!r}"):
        return create(store, name, config, import_files(store, config.execution, files, recipes, checked))


def with_new_inputs(run: Run, recorded: Run, check_new: CheckNew) -> Run:
    """The run with the functions and reward models imported that its settings name and those of `recorded` did not; they are
    looked for below this folder.

    Raises `ConfigError`, also where a setting names another preset, other data, another base model or environment: those
    belong to a run.
    """
    for section in ("preset", "data", "base_model", "environment"):
        if getattr(run.config, section, None) != getattr(recorded.config, section, None):
            raise ConfigError(f"--set {section}…: it belongs to the run as a whole; make another run with it")
    files = {role: function_files(source, Path.cwd()) for role, source in run.config.functions.items()
             if recorded.config.functions.get(role) != source}
    models = {role: source for role, source in run.config.models.items() if recorded.config.models.get(role) != source}
    start, was = (getattr(getattr(config, "value", None), "start", None) for config in (run.config, recorded.config))
    if start and was and start != was:
        raise ConfigError("--set value.start: it was decided before the first iteration; make another run with it")
    files |= {role: model_files(setting_of(role), source, Path.cwd()) for role, source in models.items()}
    if not files and all(getattr(run.config, section, None) == getattr(recorded.config, section, None)
                         for section in ("reward", "evaluate")):  # nothing is fetched for a check of nothing
        return run
    check_new(run.config, files, {role: stored_rows(run.store, ref) for role, ref in run.inputs.items() if role in COLUMNS})
    imported = import_files(run.store, run.config.execution, files, recipes_of(run.config, files), Checked())
    return replace(run, config=pinned(run.config, Path.cwd(), files),
                   record=run.record.model_copy(update={"inputs": run.inputs | imported}))


def _overrides(config: RunConfig, overrides: Overrides) -> Overrides:
    """All that holds for this call: the config's own settings, and over them the overrides. Raises `ConfigError` if those do
    not fit the config."""
    own = {section: getattr(config, section).model_dump(mode="json") for section in FREE_SECTIONS}
    together = Overrides.model_validate(merged({"iterations": config.iterations, **own}, overrides.values_set()))
    parse_config(merged(config.model_dump(mode="json"), together.values_set()), "--iterations")
    return together


def check_device(execution: ExecutionConfig) -> None:
    """Raises `ConfigError` if torch does not have the device here."""
    if execution.device == "cpu" or (execution.device == "auto" and execution.ranks == 1):
        return
    from stages.ops.device import Device

    device = Device(execution.device)
    if not device.available:
        raise ConfigError(f"execution.device: torch finds no {execution.device} here; set execution.device=cpu")
    if execution.ranks > device.count:
        raise ConfigError(f"execution.ranks={execution.ranks}: torch finds {device.count} GPUs here, one for each rank; "
                          "set it to at most as many, or execution.device=cpu")


def _require_writable(store: Store) -> None:
    """Raises `ConfigError` if the store cannot be made or written to."""
    try:
        store.files.probe()
    except OSError as error:
        raise ConfigError(f"--store {store.uri}: {error.strerror or error}: {error.filename or store.uri}") from None
