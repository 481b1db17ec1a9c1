"""What a user brings: files, models and functions; found, read, and imported into the store by their content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flows.runs.functions import function_files
from flows.runs.hub import commit_of, download
from flows.runs.layouts import Layout
from flows.runs.produce import StageOutput, write
from flows.runs.rows import DataTable, JSONLines, ParquetRows, Rows, held_out, table_of, without
from flows.runs.sources import source_files, source_rows
from flows.store.attempt import Attempt
from flows.store.digests import sha256_file
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, Recipe
from schemas.config import apply_settings, parse_config
from schemas.data import COLUMNS, PARTS
from schemas.errors import ConfigError
from schemas.language import LanguageConfig, is_gguf
from schemas.metrics import DataMetrics, Metrics
from schemas.reward_settings import with_model
from schemas.settings import ExecutionConfig, RunConfig

Files = dict[str, list[Path]]  # by role
OLDER = 1  # version of the recipe by which data was imported as the JSON lines that it was
PARTS_OF = {"reward": "reward.components", "judges": "evaluate.judges"}  # where components are, by the prefix of their role
ADAPTER = "adapter_config.json"
GGUF = "model.gguf"  # as it is imported, whatever it was called
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
               "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Checked:
    """What was read and found out where all that a new run is made of was checked."""

    found: Mapping[str, Metrics] = field(default_factory=dict)
    """Role → of a model that is brought."""
    data: Mapping[str, DataTable] = field(default_factory=dict)
    """Role → its rows."""


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
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8; save it as that (of UTF-16: iconv -f UTF-16 -t UTF-8 makes it)") from None
    except Exception as error:  # YAML, and whatever its tags make of a value
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        apply_settings(data, settings)
    return parse_config(data, str(file)), file.parent


# --- data ---

def stored_rows(store: Store, ref: ArtifactRef) -> Rows:
    """The rows of an imported source."""
    role = ref.stage.removeprefix("input.")
    if store.manifest(ref).recipe.version == OLDER:
        return JSONLines(store.file(ref, f"{role}.jsonl"))
    return ParquetRows(store.file(ref, f"{role}.parquet"))


def data_tables(config: LanguageConfig, files: Mapping[str, Sequence[Path]]) -> dict[str, DataTable]:
    """Role → its rows, read from these files. Raises `ConfigError` naming file, row and column."""
    data, found = config.data, {}
    for role in data.roles:
        if not data.cuts_off(role):
            source = data.source(role)
            layout = Layout(role, source, bool(config.base_model.chat_template))
            table = table_of(layout.rows(source_rows(role, source, files[role])))
            if not len(table):
                raise ConfigError(f"data.{role}: {files[role][0]} has no rows" + (
                    f" but {len(layout.ties)} ties" if layout.ties else ""))
            found[role] = replace(table, ties=len(layout.ties))
    for role, whole in PARTS.items():
        if data.cuts_off(role):
            found[whole], found[role] = held_out(found[whole], data.heldout, whole)
    if data.shares_prompts:
        found["demonstrations"] = without(found["demonstrations"], found["heldout_prompts"], "demonstrations")
    return found


# --- import ---

def input_files(config: RunConfig, folder: Path) -> Files:
    """Role → files of everything the config names; that they are there, not what is in them. Raises `ConfigError`."""
    files = {role: function_files(source, folder) for role, source in config.functions.items()}
    if not isinstance(config, LanguageConfig):
        return files
    files |= {role: source_files(role, config.data.source(role), folder) for role in config.data.roles}
    return files | {role: model_files(setting_of(role), source, folder) for role, source in config.models.items()}


def pinned(config: RunConfig, folder: Path, files: Files) -> RunConfig:
    """The config, those of its models and data sets whose files these are named with the hub's commit: `org/name@commit`."""
    values, sources = config.model_dump(mode="json"), dict(config.models)
    if isinstance(config, LanguageConfig):
        sources |= {role: config.data.source(role).source for role in config.data.roles}
    named = {role: source for role, source in sources.items() if role in files and not (folder / source).exists()}
    for role, source in named.items():
        if commit := commit_of(files[role][0]):
            _name_source(values, role, f"{source.partition('@')[0]}@{commit}")
    return parse_config(values, "the config with the hub's commits") if named else config


def _name_source(values: dict[str, Any], role: str, source: str) -> None:
    """Puts the source of a model, or of data, into the dumped config."""
    if role in COLUMNS:
        there = values["data"].get(role)
        if there is not None:  # else it is cut off from another
            values["data"][role] = source if isinstance(there, str) else there | {"source": source}
    elif "." in role:
        kind, name = role.split(".", 1)
        section, key = PARTS_OF[kind].split(".")
        values[section][key][name] = with_model(values[section][key][name], source)
    else:
        section, key = setting_of(role).split(".")
        values[section][key] = source


def setting_of(role: str) -> str:
    """The setting that names the model in that role, for messages."""
    if "." in role:
        kind, name = role.split(".", 1)
        return f"{PARTS_OF[kind]}.{name}.source"
    return {"base_model": "base_model.source", "critic": "value.start"}[role]


def model_files(setting: str, source: str, folder: Path) -> list[Path]:
    """Config, tokenizer and safetensors of a model's folder, or of a model on the hub; of a GGUF file itself.

    Raises `ConfigError` naming the setting.
    """
    place = folder / source
    if is_gguf(source):
        return [_gguf(setting, source, place)]
    if not place.is_dir():
        place = download(setting, source, place, [*MODEL_FILES, ADAPTER])
    _require_no_adapter(setting, place)
    files = sorted({path for pattern in MODEL_FILES for path in place.glob(pattern)})
    for needed in ("config.json", "*.safetensors", "tokenizer*"):
        if not any(path.match(needed) for path in files):
            raise ConfigError(f"{setting}: {place} has no {needed}; expected a Hugging Face folder with safetensors weights "
                              "(pickled weights are not read)")
    for file in ("config.json", "tokenizer_config.json"):
        if (place / file).is_file() and b'"auto_map"' in (place / file).read_bytes():
            raise ConfigError(f"{setting}: {place / file} names code to be run (auto_map), which is never run here; take a "
                              "model that transformers has itself, and leave auto_map out")
    return files


def _require_no_adapter(setting: str, place: Path) -> None:
    """Raises `ConfigError` with the call that merges it, also where weights lie beside it."""
    file = place / ADAPTER
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = "its base"
    beside = bool(list(place.glob("model*.safetensors")))
    raise ConfigError(
        f"{setting}: {place} holds an adapter{'' if beside else f' of {base}'} ({ADAPTER}), which is not read: "
        f"merge it first, PeftModel.from_pretrained(base, {str(place)!r}).merge_and_unload().save_pretrained(folder), with "
        f"the tokenizer beside it{f'; or remove {ADAPTER} if the weights beside it are what is meant' if beside else ''}")


def _gguf(setting: str, source: str, place: Path) -> Path:
    """The GGUF file, here or on the hub. Raises `ConfigError`, also where the setting cannot be one."""
    if setting != setting_of("base_model"):
        raise ConfigError(f"{setting}: {source} is GGUF, which holds no classifier; name a folder with one that "
                          "AutoModelForSequenceClassification has saved, or its name on the hub")
    if place.is_file():
        return place
    name, _, revision = source.partition("@")
    parts = name.split("/", 2)
    if len(parts) < 3 or source.startswith((".", "/", "~")):
        raise ConfigError(f"{setting}: no such file: {place} (on the hub: org/name/file.gguf)")
    repository, file = "/".join(parts[:2]), parts[2]
    snapshot = download(setting, f"{repository}@{revision}" if revision else repository, place, [file])
    if not (snapshot / file).is_file():
        raise ConfigError(f"{setting}: {repository} on the hub has no file {file}")
    return snapshot / file


def recipes_of(config: RunConfig, files: Files) -> dict[str, Recipe]:
    """Role → recipe of every input; reads all their bytes, so that it is done once."""
    digest = cache(sha256_file)  # roles may share a source
    recipes = {role: _recipe(role, paths, digest) for role, paths in files.items() if role not in COLUMNS}
    return recipes | {role: _data_recipe(config, role, paths, recipes, digest)
                      for role, paths in files.items() if role in COLUMNS}


def _recipe(role: str, paths: Sequence[Path], digest: Callable[[Path], str]) -> Recipe:
    """The recipe of a model or function: its identity is that of its content, and of its file name where that matters."""
    kind = "base_model" if role == "base_model" else "scorer" if is_model(paths) else "function"
    return Recipe(stage=f"input.{kind}", version=1, config={"sha256": {
        _inner(path, paths): digest(path) for path in paths}}, inputs={})


def _data_recipe(
    config: LanguageConfig, role: str, paths: Sequence[Path], models: Mapping[str, Recipe], digest: Callable[[Path], str]
) -> Recipe:
    """The recipe of a role's rows: the content of their source, and all that decides how it is read."""
    place, *files = paths if len(paths) > 1 else (paths[0].parent, paths[0])
    names = ["source" + "".join(paths[0].suffixes)] if len(paths) == 1 else [
        path.relative_to(place).as_posix() for path in files]
    settings = {"sha256": dict(zip(names, map(digest, files), strict=True)), "reading": config.data.reading(role),
                "conversations": bool(config.base_model.chat_template)}
    if config.data.too_long != "refuse":
        read_by = {role: models[role].ref.identity for role in ("base_model", "critic") if role in models}
        settings["fit"] = {"too_long": config.data.too_long, "reserved": config.reserved(role),
                           "special_tokens_in_text": config.base_model.special_tokens_in_text,
                           "chat_template": config.base_model.chat_template, **read_by}
    return Recipe(stage=f"input.{role}", version=OLDER + 1, config=settings, inputs={})


def older_recipe(role: str, paths: Sequence[Path], recipe: Recipe) -> Recipe | None:
    """The recipe of a file of JSON lines as older versions imported it, from that of now; none if they could not."""
    if len(paths) > 1 or recipe.config["reading"]:
        return None
    (content,) = recipe.config["sha256"].values()
    return Recipe(stage=f"input.{role}", version=OLDER, config={"sha256": {f"{role}.jsonl": content}}, inputs={})


def _inner(path: Path, paths: Sequence[Path]) -> str:
    """The name of an imported file: `model/config.json`, or as it lies beside a function's own."""
    if is_gguf(paths[0].name):
        return GGUF
    return f"model/{path.name}" if is_model(paths) else path.relative_to(paths[0].parent).as_posix()


def is_model(paths: Sequence[Path]) -> bool:
    """Whether these files are a model's."""
    return any(path.name == "config.json" or is_gguf(path.name) for path in paths)


def import_files(
    store: Store, execution: ExecutionConfig, files: Files, recipes: Mapping[str, Recipe], checked: Checked
) -> dict[str, ArtifactRef]:
    """Commits every input that is not in the store yet, with what was found out about it; role → artifact."""
    for role, recipe in recipes.items():
        if store.find(recipe.ref) is None:
            def produce(attempt: Attempt, role: str = role, recipe: Recipe = recipe) -> StageOutput:
                if recipe.version > OLDER:
                    checked.data[role].write(attempt.path(f"{role}.parquet"))
                    return StageOutput(_data_metrics(checked.data[role]))
                for path in files[role]:
                    inner = f"{role}.jsonl" if role in COLUMNS else _inner(path, files[role])
                    shutil.copyfile(path, attempt.path(inner))
                return StageOutput(checked.found.get(role))

            store.commit(write(store, recipe, execution, produce))
    return {role: recipe.ref for role, recipe in recipes.items()}


def _data_metrics(table: DataTable) -> DataMetrics:
    return DataMetrics(rows=len(table), ties=table.ties, too_long=table.too_long, cut=table.cut)
