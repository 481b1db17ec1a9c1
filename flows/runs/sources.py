"""The rows of a source of data as they are there: files of JSON lines, JSON, CSV, TSV, Parquet or Arrow, perhaps compressed,
folders that `datasets` reads, and data sets on the hub. What they mean here is in layouts.py."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from flows.runs.hub import download
from schemas.data import SourceConfig
from schemas.errors import ConfigError

DATA_FILES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
HUB_FILES = ("README.md", *(f"*{data}{end}" for data in DATA_FILES for end in ("", *COMPRESSED)))
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
NEEDS = {"zstd": "zstandard"}  # the package that Python needs for it
BATCH = 1024  # rows of a columnar file that are read at once


class SourceRow(NamedTuple):
    """One row, and where it is, for messages: `p.jsonl, line 3`."""

    where: str
    values: dict[str, Any]


def source_files(role: str, config: SourceConfig, folder: Path) -> list[Path]:
    """All files of a source, whose bytes it is; the folder that holds a data set's are `datasets`' comes first.

    Raises `ConfigError`.
    """
    place = folder / config.source
    if place.is_file():
        return [place]
    if not place.is_dir():
        if _data_suffix(place) or place.suffix in COMPRESSED or config.source.startswith((".", "/", "~")):
            raise ConfigError(f"data.{role}: no such file: {place}")
        place = download(f"data.{role}", config.source, place, HUB_FILES, kind="dataset")
    found = sorted(path for path in place.rglob("*") if path.is_file() and not _hidden(path.relative_to(place)))
    if not any(_data_suffix(path) for path in found):
        raise ConfigError(f"data.{role}: {place} holds no file of data ({', '.join(DATA_FILES)})")
    return [place, *found]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _data_suffix(path: Path) -> bool:
    return bool({*path.suffixes} & {*DATA_FILES})


def source_rows(role: str, config: SourceConfig, files: Sequence[Path]) -> Iterator[SourceRow]:
    """Every row. Raises `ConfigError` naming file and row where one cannot be read."""
    if files[0].is_dir():
        return _folder_rows(role, config, files[0])
    if config.subset is not None or config.split != "train":
        raise ConfigError(f"data.{role}: {files[0]} is one file, and has no subset or split; remove the setting")
    return _file_rows(f"data.{role}", files[0])


# --- files ---

def _file_rows(setting: str, path: Path) -> Iterator[SourceRow]:
    with path.open("rb") as file:
        begin = file.read(8)
    compressed = next((name for magic, name in MAGIC.items() if begin.startswith(magic)), None)
    if begin.startswith(b"PAR1"):
        return _checked(setting, path, lambda: _parquet(path))
    if begin.startswith(b"ARROW1") or path.suffix == ".arrow":
        return _checked(setting, path, lambda: _arrow(path))
    suffixes = {*path.suffixes}
    if compressed == "zip":
        data, suffixes = _unzipped(setting, path)
    else:
        data = _decompressed(setting, path, compressed) if compressed else path.read_bytes()
    if data.startswith(b"PAR1"):
        return _checked(setting, path, lambda: _parquet(io.BytesIO(data)))
    if suffixes & {".csv", ".tsv"}:
        return _checked(setting, path, lambda: _csv(data, "\t" if ".tsv" in suffixes else ","))
    return text_rows(setting, path, data)


def _decompressed(setting: str, path: Path, compression: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression=compression) as file:
            return file.read()
    except Exception as error:  # of the decompressor's own kinds
        missing = isinstance(error, (ImportError, ValueError)) and compression in NEEDS
        way_on = f"pip install {NEEDS[compression]}, or unpack it" if missing else "is it whole?"
        raise ConfigError(f"{setting}: {path} cannot be unpacked ({compression}): {_words(error)}; {way_on}") from None


def _unzipped(setting: str, path: Path) -> tuple[bytes, set[str]]:
    """The one file that is in it, and its suffixes."""
    try:
        with zipfile.ZipFile(path) as packed:
            names = [name for name in packed.namelist() if not name.endswith("/")]
            if len(names) != 1:
                raise ConfigError(f"{setting}: {path} holds {len(names)} files, expected one; unpack it, and name a folder")
            return packed.read(names[0]), {*Path(names[0]).suffixes}
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ConfigError(f"{setting}: {path} cannot be unpacked (zip): {_words(error)}; is it whole?") from None


def _checked(setting: str, path: Path, read: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[SourceRow]:
    """Rows of a columnar file, with their numbers; what its reader raises, as an error of the file."""
    try:
        for number, values in enumerate(read(), 1):
            yield SourceRow(f"{path}, row {number}", values)
    except (pa.ArrowException, csv.Error, OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {_words(error)}") from None


def _parquet(file: Path | io.BytesIO) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(BATCH):
        yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        yield from (row for batch in (_batches(pa.ipc.open_file(file)) if is_file else pa.ipc.open_stream(file))
                    for row in batch.to_pylist())


def _batches(reader: pa.ipc.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    return map(reader.get_batch, range(reader.num_record_batches))


def _csv(data: bytes, delimiter: str) -> Iterator[dict[str, Any]]:
    """Every value as its text: 007 is not 7."""
    csv.field_size_limit(max(len(data), csv.field_size_limit()))
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    names = next(rows, [])
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    for row in rows:
        if row and len(row) != len(names):
            raise ValueError(f"line {rows.line_num} has {len(row)} fields, expected {len(names)}")
        if row:
            yield dict(zip(names, row, strict=True))


# --- JSON ---

def text_rows(setting: str, path: Path, data: bytes) -> Iterator[SourceRow]:
    """The rows of JSON lines, or of a JSON array of objects."""
    data = data.removeprefix(codecs.BOM_UTF8).rstrip()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{setting}: {path} is UTF-16; expected UTF-8: iconv -f UTF-16 -t UTF-8 makes it")
    if not data:
        raise ConfigError(f"{setting}: {path} is empty; expected a row a line, as JSON")
    if data.startswith(b"["):
        rows = _parsed(str(path), data)
        if not all(isinstance(row, dict) for row in rows):
            number = next(i for i, row in enumerate(rows, 1) if not isinstance(row, dict))
            raise ConfigError(f"{path}, row {number}: expected an object, found {str(rows[number - 1])[:40]}")
        yield from (SourceRow(f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(io.BytesIO(data), 1):  # split at b"\n" alone: U+2028 may stand in text
        where = f"{path}, line {number}"
        row = _parsed(where, line)
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object, found {line.decode()[:40]}")
        yield SourceRow(where, row)


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice; leave one")
    return row


# --- folders ---

def _folder_rows(role: str, config: SourceConfig, place: Path) -> Iterator[SourceRow]:
    """Rows of a data set that `datasets` has saved, or of a folder of files, by its rules for splits."""
    import datasets
    from datasets.exceptions import DatasetsError

    saved = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
    name = f"{config.source}{f'/{config.subset}' if config.subset else ''}, {config.split}"
    try:
        if saved:
            found = datasets.load_from_disk(str(place))
            if isinstance(found, datasets.DatasetDict):
                if config.split not in found:
                    raise ConfigError(f"data.{role}: {place} has no split {config.split!r}; it has {', '.join(found)}")
                found = found[config.split]
        else:
            found = datasets.load_dataset(str(place), name=config.subset, split=config.split, streaming=True)
        number = 0
        for batch in found.with_format("arrow").iter(BATCH):
            for values in batch.to_pylist():
                number += 1
                yield SourceRow(f"{name}, row {number}", values)
    except (DatasetsError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"data.{role}: {place} cannot be read: {_words(error)}") from None


def _words(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
