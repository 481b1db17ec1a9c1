"""What a user brings: files, models and functions; checked, and imported into the store by their content."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.runs.produce import Made, write
from flows.store.store import Attempt, Store, sha256_file
from schemas.artifacts import ArtifactRef, Recipe
from schemas.config import parse_config
from schemas.control import ControlConfig
from schemas.errors import ConfigError
from schemas.settings import RunConfig

if TYPE_CHECKING:
    from flows.runs.run import Run

COLUMNS = {
    "prompts": ("prompt",), "heldout_prompts": ("prompt",), "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"), "heldout_pairs": ("prompt", "chosen", "rejected"),
    "pretraining": ("text",),
}
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
               "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


# --- the config file ---

def read_config(source: str, settings: Iterable[str] = ()) -> tuple[RunConfig, Path]:
    """The config of an example's folder or a YAML file, `a.b=value` settings applied; and its folder.

    Raises `ConfigError`.
    """
    path = Path(source)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        what = "the folder has no config.yaml" if path.is_dir() else "no such folder or file"
        raise ConfigError(f"{source}: {what}; name an example's folder or a YAML file, for example data/reviews")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        apply_settings(data, settings)
    return parse_config(data, str(file)), file.parent


def apply_settings(data: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Puts each `a.b=value` into the nested mapping. Raises `ConfigError` on one that is not of that form."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        *sections, last = key.split(".")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting}: expected key=value, for example ppo.learning_rate=1e-5")
        place = data
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"--set {setting}: {section} is a value, not a section")
        place[last] = _value(value)
    return data


def _value(text: str) -> Any:
    """A setting's value: YAML, and numbers such as 1e-5, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):
        return text


# --- JSON lines ---

def read_lines(path: Path, role: str) -> list[dict[str, str]]:
    """The rows of a JSON-lines file. Raises `ConfigError` naming file, line and column."""
    if not path.is_file():
        raise ConfigError(f"data.{role}: no such file: {path}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")  # not splitlines: U+2028 may stand in text
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.{role}: {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    rows = [_row(line, f"{path}, line {number}", COLUMNS[role]) for number, line in enumerate(lines, 1) if lines != [""]]
    if not rows:
        raise ConfigError(f"data.{role}: {path} is empty; expected a line of JSON with {_keys(COLUMNS[role])} per row")
    return rows


def _row(line: str, where: str, columns: tuple[str, ...]) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with {_keys(columns)}, found {line[:40]}")
    for column in columns:
        if not isinstance(row.get(column), str):
            found = f"found {row[column]!r:.40}" if column in row else f"found only {_keys(row) or 'nothing'}"
            raise ConfigError(f"{where}: column {column!r}: expected text, {found}")
    return {column: row[column] for column in columns}


def _keys(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in columns)


def stored_lines(run: Run, role: str) -> list[dict[str, str]]:
    """The rows of an imported file."""
    return read_lines(run.store.file(run.inputs[role], f"{role}.jsonl"), role)


# --- functions ---

def function_file(source: str, folder: Path) -> Path:
    """The Python file of `file.py:function` (below `folder`) or `package.module:function`. Raises `ConfigError`."""
    place, colon, name = source.rpartition(":")
    if not place or not colon or not name.isidentifier():
        raise ConfigError(f"function {source!r}: expected file.py:function or package.module:function")
    if place.endswith(".py"):
        path = folder / place
        if not path.is_file():
            raise ConfigError(f"function {source!r}: no such file: {path}")
        return path
    try:
        return Path(inspect.getsourcefile(importlib.import_module(place)))
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is run
        raise ConfigError(f"function {source!r}: {place} cannot be imported: {error}") from None


def load_function(source: str, file: Path) -> Callable:
    """The function, from `file` or from its installed package, which must have the same source. Raises `ConfigError`."""
    place, _, name = source.rpartition(":")
    if not place.endswith(".py") and sha256_file(function_file(source, file.parent)) != sha256_file(file):
        raise ConfigError(f"function {source!r}: the installed file is not the one the run was made with; install that "
                          "version, or make another run")
    module = _module_of(file, source) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"function {source!r}: {place} has no function {name!r}")
    return function


def check_function(source: str, folder: Path) -> Path:
    """The function's file, after it was loaded alone, as it will be from the store. Raises `ConfigError`."""
    file = function_file(source, folder)
    with tempfile.TemporaryDirectory() as alone:
        load_function(source, Path(shutil.copy(file, alone)))
    return file


def _module_of(file: Path, source: str):
    """The file as a module, under a name made from its content, so that a process can hold several versions."""
    name = f"baton_user_{sha256_file(file)[:16]}"
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever a user's file does when it is run
            del sys.modules[name]
            raise ConfigError(f"function {source!r}: {file} cannot be run: {type(error).__name__}: {error}") from None
    return module


def functions_of(config: RunConfig) -> dict[str, str]:
    """Role → source of every function that the config names."""
    if isinstance(config, ControlConfig):
        source = config.environment.id
        return {"environment": source} if source.rpartition(":")[0].endswith(".py") else {}
    named = {f"reward.{name}": part.source for name, part in config.reward.components.items()
             if part.source != "reward_model" and not part.source.startswith(("http://", "https://"))}
    return named | ({"judge": config.evaluate.judge} if config.evaluate.judge else {})


def stored_function(run: Run, role: str, source: str) -> Callable:
    """The user's function: of a file, from its copy in the store; of a package, as it is installed."""
    (entry,) = run.store.manifest(run.inputs[role]).files
    return load_function(source, run.store.file(run.inputs[role], entry.path))


# --- import ---

def check_inputs(config: RunConfig, folder: Path) -> dict[str, list[Path]]:
    """Role → files of everything the config names, all of it read and checked. Raises `ConfigError`."""
    files = {role: [check_function(source, folder)] for role, source in functions_of(config).items()}
    if isinstance(config, ControlConfig):
        return files
    for role in COLUMNS:
        if (name := getattr(config.data, role)) is not None:
            read_lines(folder / name, role)
            files[role] = [folder / name]
    if config.base_model.source is not None:
        files["base_model"] = model_files(config.base_model.source, folder)
    return files


def model_files(source: str, folder: Path) -> list[Path]:
    """Config, tokenizer and safetensors of a model's folder, or of a model on the hub. Raises `ConfigError`."""
    place = folder / source
    if not place.is_dir():
        place = _download(source, place)
    files = sorted({path for pattern in MODEL_FILES for path in place.glob(pattern)})
    for needed in ("config.json", "*.safetensors", "tokenizer*"):
        if not any(path.match(needed) for path in files):
            raise ConfigError(f"base_model.source: {place} has no {needed}; expected a Hugging Face folder with "
                              "safetensors weights (pickled weights are not read)")
    for file in ("config.json", "tokenizer_config.json"):
        if (place / file).is_file() and b'"auto_map"' in (place / file).read_bytes():
            raise ConfigError(f"base_model.source: {place / file} names code to be run (auto_map), which is never run here; "
                              "take a model that transformers has itself, and leave auto_map out")
    return files


def _download(source: str, place: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(MODEL_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"base_model.source: {source!r} is no folder ({place}) and the hub gave: {reason}") from None


def recipes_of(files: dict[str, list[Path]]) -> dict[str, Recipe]:
    """Role → recipe of every input; reads all their bytes, so that it is done once."""
    return {role: _recipe(role, paths) for role, paths in files.items()}


def _recipe(role: str, paths: list[Path]) -> Recipe:
    """The recipe of an input: its identity is that of its content, and of its file name where that matters."""
    kind = "function" if role in ("judge", "environment") or role.startswith("reward.") else role
    content = {_inner(role, path): sha256_file(path) for path in paths}
    return Recipe(stage=f"input.{kind}", version=1, config={"sha256": content}, inputs={})


def _inner(role: str, path: Path) -> str:
    """The name of an imported file: `prompts.jsonl`, `model/config.json`, or a function's own file name."""
    return f"{role}.jsonl" if role in COLUMNS else f"model/{path.name}" if role == "base_model" else path.name


def import_files(
    store: Store, config: RunConfig, files: dict[str, list[Path]], recipes: dict[str, Recipe]
) -> dict[str, ArtifactRef]:
    """Commits every input that is not in the store yet; role → artifact."""
    for role, recipe in recipes.items():
        if store.find(recipe.ref) is None:
            _, manifest = write(store, config, recipe, lambda attempt, role=role: _copy(role, files[role], attempt))
            store.commit(manifest)
    return {role: recipe.ref for role, recipe in recipes.items()}


def _copy(role: str, paths: list[Path], attempt: Attempt) -> Made:
    for path in paths:
        shutil.copyfile(path, attempt.path(_inner(role, path)))
    return Made()

