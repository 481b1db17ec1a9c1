"""Rows of data as they are imported: one Parquet file a role, read by need; and JSON lines, as older versions imported them.

A column whose values Arrow would change, such as objects with unequal keys, is kept as JSON text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.runs.sources import SourceRow
from schemas.data import HeldoutConfig
from schemas.errors import ConfigError

GROUP = 512  # rows that are read together
WARM_GROUPS = 64
AS_JSON = {b"baton": b"json"}  # of a field whose texts are JSON
Row = dict[str, Any]


class Rows(Protocol):
    """The rows of a role, whatever file they are in."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row:
        """With all its columns."""

    def __iter__(self) -> Iterator[Row]: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that some row has."""

    def lacks(self, column: str) -> str | None:
        """Where the first row is that has no such column, none where all have it."""


# --- Parquet ---

class ParquetRows(Sequence[Row]):
    """The rows of an imported file; a group of them is read when one of it is asked for, and that one alone is parsed."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self._begins = np.cumsum([0, *(self._file.metadata.row_group(i).num_rows
                                       for i in range(self._file.metadata.num_row_groups))])
        self._group = lru_cache(WARM_GROUPS)(self._file.read_row_group)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, row: int) -> Row:
        row = range(len(self))[row]
        group = int(np.searchsorted(self._begins, row, side="right")) - 1
        return rows_of(self._group(group).slice(row - int(self._begins[group]), 1))[0]

    def __iter__(self) -> Iterator[Row]:
        for group in range(self._file.metadata.num_row_groups):
            yield from rows_of(self._file.read_row_group(group))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._file.schema_arrow.names)

    def lacks(self, column: str) -> str | None:
        return None if column in self.columns else "row 1"


def rows_of(table: pa.Table) -> list[Row]:
    """As Python's values; nulls are left out, since a row that lacks a column has one there."""
    as_json = {field.name for field in table.schema if (field.metadata or {}).items() >= AS_JSON.items()}
    return [{name: json.loads(value) if name in as_json else value for name, value in row.items() if value is not None}
            for row in table.to_pylist()]


# --- JSON lines, of older versions ---

class JSONLines(Sequence[Row]):
    """The rows of a file that an older version has imported, parsed one by one as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes().removeprefix(codecs.BOM_UTF8).rstrip()
        newlines = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n"))  # U+2028 may stand in text
        self._begins, self._ends = np.append(0, newlines + 1), np.append(newlines, len(self._data))

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self for name in row))

    def __getitem__(self, row: int) -> Row:
        row = range(len(self))[row]
        return json.loads(self._data[self._begins[row] : self._ends[row]])

    def lacks(self, column: str) -> str | None:
        return next((f"line {number}" for number, row in enumerate(self, 1) if column not in row), None)


# --- a role's rows before they are imported ---

@dataclass(frozen=True)
class DataTable:
    """All rows of a role, and where each of them came from."""

    table: pa.Table
    places: np.ndarray  # (N,) object: `p.jsonl, line 3`
    lacking: Mapping[str, Set[str]] = field(default_factory=dict)
    """Column → places of the rows that lack it, perhaps of more than are left; a null that is written out is there."""
    ties: int = 0
    """Pairs that were dropped, since neither response was preferred."""
    too_long: int = 0
    """Rows that were dropped, since they were too long."""
    cut: int = 0
    """Prompts that were cut."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), GROUP):
            yield from rows_of(self.table.slice(begin, GROUP))

    def __getitem__(self, row: int) -> Row:
        return rows_of(self.table.slice(row, 1))[0]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.table.column_names)

    def lacks(self, column: str) -> str | None:
        if column not in self.columns:
            return self.places[0]
        lacking = self.lacking.get(column, frozenset())
        return next((place for place in self.places if place in lacking), None) if lacking else None

    def only(self, kept: np.ndarray) -> DataTable:
        """(N,) bool: those rows."""
        return replace(self, table=self.table.filter(pa.array(kept)), places=self.places[kept])

    def write(self, path: Path) -> None:
        pq.write_table(self.table, path, row_group_size=GROUP)


def table_of(rows: Iterable[SourceRow]) -> DataTable:
    """All of them, in memory as columns."""
    parts, places, group = [], [], []
    lacking: dict[str, set[str]] = {}  # every column's
    for where, row in rows:
        for name in lacking.keys() - row.keys():
            lacking[name].add(where)
        lacking |= {name: set(places) for name in row.keys() - lacking.keys()}
        places.append(where)
        group.append(row)
        if len(group) == GROUP:
            parts.append(_columns(group, places[-GROUP:]))
            group = []
    parts.append(_columns(group, places[len(places) - len(group) :]))
    names = list(dict.fromkeys(name for part in parts for name in part))
    sizes = [GROUP] * (len(parts) - 1) + [len(group)]
    found = {name: _joined([part.get(name) or Column(pa.nulls(size)) for part, size in zip(parts, sizes, strict=True)])
             for name in names}
    fields = [pa.field(name, column.array.type, metadata=AS_JSON if column.as_json else None)
              for name, column in found.items()]
    return DataTable(pa.table([column.array for column in found.values()], schema=pa.schema(fields)),
                     np.array(places, object), lacking)


@dataclass(frozen=True)
class Column:
    """A column of some rows."""

    array: pa.Array | pa.ChunkedArray
    as_json: bool = False


def _columns(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> dict[str, Column]:
    """Name → values, a null where a row has none. Raises `ConfigError` naming a row that holds no text."""
    names, found = dict.fromkeys(name for row in rows for name in row), {}
    for name in names:
        try:
            found[name] = _column([row.get(name) for row in rows])
        except UnicodeEncodeError as error:
            place = next(place for place, row in zip(places, rows, strict=True) if _no_text(row.get(name)))
            raise ConfigError(f"{place}: column {name!r}: {error.object[error.start]!a} at character {error.start + 1} "
                              "is half of a surrogate pair, which is no text; take it out") from None
    return found


def _no_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _column(values: list[Any]) -> Column:
    """As Arrow's own type if that gives the same values back, else as JSON."""
    try:
        array = pa.array(values)
        if (_flat(array.type) or not pa.types.is_nested(array.type)) and _same(array.to_pylist(), values):
            return Column(array)
    except (pa.ArrowException, OverflowError):
        pass
    return _as_json(values)


def _same(found: Any, value: Any) -> bool:
    """Whether it is the value to its type: 12 is not 12.0."""
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value) and all(map(_same, found, value))
    return type(found) is type(value) and (found == value or found != found)


def _flat(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) and not pa.types.is_nested(type_.value_type)


def _as_json(values: list[Any]) -> Column:
    return Column(pa.array([None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                            for value in values], pa.string()), as_json=True)


def _joined(parts: list[Column]) -> Column:
    """One column; as JSON if its parts are of several types."""
    types = {part.array.type for part in parts if not pa.types.is_null(part.array.type)}
    if len(types) > 1 or len({part.as_json for part in parts if not pa.types.is_null(part.array.type)}) > 1:
        parts = [part if part.as_json else _as_json(part.array.to_pylist()) for part in parts]
        types = {pa.string()}
    type_ = next(iter(types), pa.string())
    as_json = any(part.as_json for part in parts)
    return Column(pa.chunked_array([part.array.cast(type_) for part in parts], type_), as_json)


def held_out(table: DataTable, config: HeldoutConfig, role: str) -> tuple[DataTable, DataTable]:
    """What is left, and what is cut off: the rows of the prompts that come first in an order by the seed.

    Whether a prompt is cut off does not depend on the order of rows. Raises `ConfigError` where nothing would be left.
    """
    keys = np.array([_place(text, config.seed) for text in table.table["prompt"].to_pylist()])
    order = np.argsort(keys, kind="stable")
    last = keys[order[min(config.rows, len(order)) - 1]] if len(order) else ""
    kept = keys > last
    if not kept.any():
        raise ConfigError(f"data.heldout: rows={config.rows} would leave nothing of the {len(table)} rows of data.{role}; "
                          "lower it, or name a held-out file")
    return table.only(kept), table.only(~kept)


def without(table: DataTable, other: DataTable, role: str) -> DataTable:
    """The rows whose prompts are not among the other's. Raises `ConfigError` where none is left."""
    known = set(other.table["prompt"].to_pylist())
    kept = np.array([prompt not in known for prompt in table.table["prompt"].to_pylist()])
    if not kept.any():
        raise ConfigError(f"data.heldout: the prompts of all {len(table)} rows of data.{role} are held out; lower its "
                          "rows, or name a held-out file")
    return table.only(kept)


def _place(prompt: str, seed: int) -> str:
    """A prompt's place in the seed's order."""
    return hashlib.sha256(f"{seed}\n{prompt}".encode()).hexdigest()
