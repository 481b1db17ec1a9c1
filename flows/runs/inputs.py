"""What a user brings: files, models and functions; found, read, and imported into the store by their content."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flows.runs.functions import function_files
from flows.runs.produce import StageOutput, write
from flows.store.store import Attempt, Store, sha256_file
from schemas.artifacts import ArtifactRef, Recipe
from schemas.config import apply_settings, parse_config
from schemas.errors import ConfigError
from schemas.language import LanguageConfig, is_gguf
from schemas.metrics import Metrics
from schemas.settings import ExecutionConfig, RunConfig

COLUMNS = {
    "prompts": ("prompt",), "heldout_prompts": ("prompt",), "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"), "heldout_pairs": ("prompt", "chosen", "rejected"),
    "pretraining": ("text",),
}
ADAPTER = "adapter_config.json"
GGUF = "model.gguf"  # as it is imported, whatever it was called
OTHERS = {"value.start": ", nor reward_model or actor,"}  # what else a setting may be
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
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8; save it as that (of UTF-16: iconv -f UTF-16 -t UTF-8 makes it)") from None
    except Exception as error:  # YAML, and whatever its tags make of a value
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        apply_settings(data, settings)
    return parse_config(data, str(file)), file.parent


# --- JSON lines ---

class Rows(Sequence[dict[str, str]]):
    """The rows of a JSON-lines file, parsed one by one as they are asked for; the file itself is only searched for newlines.

    Raises `ConfigError` naming file, line and column.
    """

    def __init__(self, path: Path, role: str, *, imported: bool = False) -> None:
        """`imported`: whether it was checked when it was brought, perhaps by an older version that let more in."""
        if not path.is_file():
            raise ConfigError(f"data.{role}: {_no_file(path)}")
        self.path, self.columns, self.imported = path, COLUMNS[role], imported
        self.data = path.read_bytes().removeprefix(codecs.BOM_UTF8).rstrip()
        if (other := _other_format(self.data, path)) is not None:
            raise ConfigError(f"data.{role}: {path} {other}")
        newlines = np.flatnonzero(np.frombuffer(self.data, np.uint8) == ord("\n"))  # U+2028 may stand in text
        self.begins, self.ends = np.append(0, newlines + 1), np.append(newlines, len(self.data))
        if not self.data:
            raise ConfigError(f"data.{role}: {path} is empty; expected a line of JSON with {_keys(self.columns)} per row")

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, row: int | slice) -> dict[str, str] | list[dict[str, str]]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return _row(self.data[self.begins[row] : self.ends[row]], f"{self.path}, line {row + 1}", self.columns,
                    None if self.imported else _no_key_twice)


    def whole(self, row: int) -> dict[str, Any]:
        """With all its columns, whatever JSON they hold."""
        return json.loads(self.data[self.begins[row] : self.ends[row]])


def read_lines(path: Path, role: str) -> list[dict[str, str]]:
    """All rows of a JSON-lines file. Raises `ConfigError` naming file, line and column."""
    return list(Rows(path, role))


def _no_file(path: Path) -> str:
    """What may be meant by a path at which there is no file."""
    if path.is_dir():
        return f"{path} is a folder; name a file of JSON lines in it"
    on_hub = "; of a data set on the hub: datasets.load_dataset(…).to_json(file) makes one"
    return f"no such file: {path}{'' if path.suffix else on_hub}"


def _other_format(data: bytes, path: Path) -> str | None:
    """What a file is that holds no JSON lines, and how to make some of it; none if that cannot be told."""
    if data.startswith(b"PAR1"):
        return (f"is Parquet; expected JSON lines: datasets.Dataset.from_parquet({str(path)!r}).to_json(file) makes them")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16; expected UTF-8: iconv -f UTF-16 -t UTF-8 makes it"
    if data.startswith(b"\x1f\x8b"):
        return "is compressed; expected JSON lines: gunzip it"
    if data.startswith(b"["):
        return f"is one JSON array; expected JSON lines: jq -c '.[]' {shlex.quote(str(path))} makes them"
    return None


def _row(line: bytes, where: str, columns: tuple[str, ...], pairs: Callable | None = None) -> dict[str, str]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with {_keys(columns)}, found {line.decode()[:40]}")
    for column in columns:
        if not isinstance(row.get(column), str):
            found = f"found {row[column]!r:.40}" if column in row else f"found only {_keys(row) or 'nothing'}"
            raise ConfigError(f"{where}: column {column!r}: expected text, {found}{_mapping(row, columns)}")
        if (half := re.search("[\ud800-\udfff]", row[column])) is not None:
            raise ConfigError(f"{where}: column {column!r}: \\u{ord(half[0]):04x} at character {half.start() + 1} is half "
                              "of a surrogate pair, which is no text; write the other half beside it, or take it out")
    return {column: row[column] for column in columns}


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice; leave one")
    return row


def _mapping(row: dict[str, object], columns: tuple[str, ...]) -> str:
    """How to make the columns of those that are there, in a way that can be pasted and changed."""
    if not (missing := [column for column in columns if not isinstance(row.get(column), str)]) or not row:
        return ""
    others = [name for name in row if name not in columns] or list(row)
    sources = {column: column for column in columns} | dict(zip(missing, others + others[-1:] * len(missing), strict=False))
    parts = [f"{json.dumps(column)}: .{json.dumps(source)}{_inside(row.get(source))}" for column, source in sources.items()]
    return f"; jq -c '{{{', '.join(parts)}}}' FILE > NEW.jsonl makes a file of other columns, if these are what is meant"


def _inside(value: object) -> str:
    """Where in a list of messages its text is."""
    return "[0].content" if isinstance(value, list) else ""


def _keys(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in columns)


def stored_rows(store: Store, ref: ArtifactRef) -> Rows:
    """The rows of an imported file."""
    role = ref.stage.removeprefix("input.")
    return Rows(store.file(ref, f"{role}.jsonl"), role, imported=True)


# --- import ---

def input_files(config: RunConfig, folder: Path) -> dict[str, list[Path]]:
    """Role → files of everything the config names; that they are there, not what is in them. Raises `ConfigError`."""
    files = {role: function_files(source, folder) for role, source in config.functions.items()}
    if not isinstance(config, LanguageConfig):
        return files
    for role in COLUMNS:
        if (name := getattr(config.data, role)) is not None:
            if not (folder / name).is_file():
                raise ConfigError(f"data.{role}: {_no_file(folder / name)}")
            files[role] = [folder / name]
    return files | {role: model_files(setting_of(role), source, folder) for role, source in config.models.items()}


def pinned(config: RunConfig, folder: Path, files: dict[str, list[Path]]) -> RunConfig:
    """The config, those of its models whose files these are named with the commit that the hub gave: `org/name@commit`."""
    values, models = config.model_dump(mode="json"), {role: config.models[role] for role in config.models if role in files}
    for role, source in models.items():
        commits = [place.name for place in files[role][0].parents if place.parent.name == "snapshots"]
        if commits and not (folder / source).exists():
            _name_model(values, role, f"{source.partition('@')[0]}@{commits[0]}")
    return parse_config(values, "the config with its models' commits") if models else config


def _name_model(values: dict[str, Any], role: str, source: str) -> None:
    """Puts the model's source into the dumped config."""
    if role.startswith("reward."):
        values["reward"]["components"][role.removeprefix("reward.")]["source"] = source
    else:
        section, key = setting_of(role).split(".")
        values[section][key] = source


def setting_of(role: str) -> str:
    """The setting that names the model in that role, for messages."""
    if role.startswith("reward."):
        return f"reward.components.{role.removeprefix('reward.')}.source"
    return {"base_model": "base_model.source", "critic": "value.start"}[role]


def model_files(setting: str, source: str, folder: Path) -> list[Path]:
    """Config, tokenizer and safetensors of a model's folder, or of a model on the hub; of a GGUF file itself.

    Raises `ConfigError` naming the setting.
    """
    place = folder / source
    if is_gguf(source):
        return [_gguf(setting, source, place)]
    if not place.is_dir():
        place = _download(setting, source, place, [*MODEL_FILES, ADAPTER])
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
    snapshot = _download(setting, f"{repository}@{revision}" if revision else repository, place, [file])
    if not (snapshot / file).is_file():
        raise ConfigError(f"{setting}: {repository} on the hub has no file {file}")
    return snapshot / file


def _download(setting: str, source: str, place: Path, patterns: Sequence[str]) -> Path:
    """The snapshot of a model on the hub, `org/name` or `org/name@revision`; those files of it. Raises `ConfigError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{setting}: {source!r} is no folder ({place}){OTHERS.get(setting, '')} and the hub gave: {reason}"
                          ) from None


def recipes_of(files: dict[str, list[Path]]) -> dict[str, Recipe]:
    """Role → recipe of every input; reads all their bytes, so that it is done once."""
    return {role: _recipe(role, paths) for role, paths in files.items()}


def _recipe(role: str, paths: list[Path]) -> Recipe:
    """The recipe of an input: its identity is that of its content, and of its file name where that matters."""
    kind = role if role in (*COLUMNS, "base_model") else "scorer" if _is_model(paths) else "function"
    content = {_inner(role, path, paths): sha256_file(path) for path in paths}
    return Recipe(stage=f"input.{kind}", version=1, config={"sha256": content}, inputs={})


def _inner(role: str, path: Path, paths: list[Path]) -> str:
    """The name of an imported file: `prompts.jsonl`, `model/config.json`, or as it lies beside a function's own."""
    if role in COLUMNS:
        return f"{role}.jsonl"
    if is_gguf(paths[0].name):
        return GGUF
    return f"model/{path.name}" if _is_model(paths) else path.relative_to(paths[0].parent).as_posix()


def _is_model(paths: list[Path]) -> bool:
    return any(path.name == "config.json" for path in paths)


def import_files(
    store: Store, execution: ExecutionConfig, files: dict[str, list[Path]], recipes: dict[str, Recipe],
    found: Mapping[str, Metrics] | None = None,
) -> dict[str, ArtifactRef]:
    """Commits every input that is not in the store yet, with what was found out about it; role → artifact."""
    for role, recipe in recipes.items():
        if store.find(recipe.ref) is None:
            output = StageOutput((found or {}).get(role))
            _, manifest = write(store, recipe, execution,
                                lambda attempt, role=role, output=output: _copy(role, files[role], attempt, output))
            store.commit(manifest)
    return {role: recipe.ref for role, recipe in recipes.items()}


def _copy(role: str, paths: list[Path], attempt: Attempt, output: StageOutput) -> StageOutput:
    for path in paths:
        shutil.copyfile(path, attempt.path(_inner(role, path, paths)))
    return output

