"""Every Parquet table, once: columns, types, units and the rules their lengths obey.

Letters: B rows, P prompt tokens of a row, R response tokens of a row (EOS counted where it was sampled).
Rows are ragged: no padding, no masks. Tables of one iteration are narrow and join on `row_id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa

from schemas.errors import TableError


@dataclass(frozen=True, eq=False)
class Ragged:
    """B rows of unequal length, flat: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray  # (sum of lengths,)
    offsets: np.ndarray  # (B + 1,) int64

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray], dtype: np.dtype | type) -> Ragged:
        """B arrays, each (length of the row,)."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate(rows) if rows else np.empty(0)
        return cls(values.astype(dtype, copy=False), offsets)

    def with_values(self, values: np.ndarray) -> Ragged:
        """The same rows, other values: (sum of lengths,)."""
        return Ragged(values, self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64."""
        return np.diff(self.offsets)

    @property
    def row_of_value(self) -> np.ndarray:
        """(sum of lengths,) int64: which row each flat value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def sums(self) -> np.ndarray:
        """(B,) float64: the sum of each row; 0 for an empty row."""
        return np.bincount(self.row_of_value, weights=self.values, minlength=len(self))


TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
FLOATS = pa.list_(pa.field("item", pa.float32(), nullable=False))
NAMED = pa.map_(pa.string(), pa.float32())


def column(type_: pa.DataType, doc: str, length: str = "") -> np.ndarray:
    """A column's Parquet type, what it holds, and the letter of its row length if it is ragged."""
    return field(metadata={"type": type_, "doc": doc, "length": length})


@dataclass(frozen=True, eq=False)
class Table:
    """Base of all tables. In memory: (B,) arrays, `Ragged`, tuples of str, or one (B,) array per name."""

    file: ClassVar[str]

    def __post_init__(self) -> None:
        self._check_lengths()

    def __len__(self) -> int:
        return len(self.row_id)

    @classmethod
    @cache
    def schema(cls) -> pa.Schema:
        """The Parquet schema; each field carries its `doc` and `length` as metadata."""
        return pa.schema([
            pa.field(f.name, f.metadata["type"], nullable=False,
                     metadata={key: f.metadata[key] for key in ("doc", "length")})
            for f in fields(cls)
        ])

    def to_arrow(self) -> pa.Table:
        """The table as it is written."""
        columns = [_to_arrow(getattr(self, f.name), f.type) for f in self.schema()]
        return pa.Table.from_arrays(columns, schema=self.schema())

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Self:
        """Raises `TableError`, naming the column, if names, types, nulls or lengths are not as declared."""
        cls.check_schema(table.schema)
        for name in table.column_names:
            if table[name].null_count:
                raise TableError(f"column {name!r}: {table[name].null_count} nulls, expected none")
        return cls(**{f.name: _from_arrow(table[f.name].combine_chunks()) for f in cls.schema()})

    @classmethod
    def check_schema(cls, found: pa.Schema) -> None:
        """Raises `TableError` naming the first column that differs."""
        expected = cls.schema()
        if found.names != expected.names:
            raise TableError(f"columns: expected {expected.names}, found {found.names}")
        for want, have in zip(expected, found, strict=True):
            if want.type != have.type:
                raise TableError(f"column {want.name!r}: expected {want.type}, found {have.type}")

    def _check_lengths(self) -> None:
        """All columns have B rows; ragged columns that share a letter have equal lengths row by row."""
        seen: dict[str, tuple[str, Ragged]] = {}
        for f in fields(self):
            value, letter = getattr(self, f.name), f.metadata["length"]
            for rows in value.values() if isinstance(value, dict) else (value,):
                if len(rows) != len(self):
                    raise TableError(f"column {f.name!r}: expected {len(self)} rows, found {len(rows)}")
            if letter:
                first, other = seen.setdefault(letter, (f.name, value))
                _require_same_lengths(self.row_id, first, other, f.name, value)


def _to_arrow(value, type_: pa.DataType) -> pa.Array:
    if isinstance(value, Ragged):
        return pa.ListArray.from_arrays(pa.array(value.offsets, pa.int32()),
                                        pa.array(value.values, type_.value_type), type=type_)
    if isinstance(value, dict):
        names, size = sorted(value), len(value)
        rows = len(next(iter(value.values()))) if value else 0
        items = np.stack([value[name] for name in names], 1).reshape(-1) if value else np.empty(0)
        return pa.MapArray.from_arrays(pa.array(np.arange(rows + 1) * size, pa.int32()),
                                       pa.array(names * rows, pa.string()), pa.array(items, pa.float32()))
    return pa.array(value, type_)


def _from_arrow(array: pa.Array):
    if pa.types.is_map(array.type):
        names = sorted(set(array.keys.to_pylist()))
        rows = [dict(row) for row in array.to_pylist()]
        if any(len(row) != len(names) for row in rows):
            raise TableError(f"a map column: expected {names} in every row")
        return {name: np.array([row[name] for row in rows], np.float32) for name in names}
    if pa.types.is_list(array.type):
        offsets = array.offsets.to_numpy().astype(np.int64)
        return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])
    if pa.types.is_string(array.type):
        return tuple(array.to_pylist())
    return array.to_numpy(zero_copy_only=False)


def _require_same_lengths(row_id: np.ndarray, first: str, a: Ragged, second: str, b: Ragged) -> None:
    wrong = np.flatnonzero(a.lengths != b.lengths)
    if wrong.size:
        row = wrong[0]
        raise TableError(f"column {second!r}, row {row_id[row]}: {b.lengths[row]} values, "
                         f"but {first!r} has {a.lengths[row]}")


def require_aligned(rollouts: Rollouts, other: Table) -> None:
    """Raises `TableError` unless `other` has the rows of `rollouts`, in order, and R values in each ragged row."""
    name = type(other).__name__
    if not np.array_equal(rollouts.row_id, other.row_id):
        raise TableError(f"{name}.row_id does not match the rollouts: expected {len(rollouts)} rows "
                         f"{_ends(rollouts.row_id)}, found {len(other)} {_ends(other.row_id)}")
    for f in fields(other):
        if f.metadata["length"] == "R":
            _require_same_lengths(rollouts.row_id, "Rollouts.response_tokens", rollouts.response_tokens,
                                  f"{name}.{f.name}", getattr(other, f.name))


def _ends(row_id: np.ndarray) -> str:
    return f"({row_id[0]}…{row_id[-1]})" if len(row_id) else "(none)"


ROW_ID_DOC = "0…B−1; joins the tables of one iteration"


@dataclass(frozen=True, eq=False)
class Rollouts(Table):
    """Written by `rollout`: one row per response."""

    file: ClassVar[str] = "rollouts.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    prompt_id: np.ndarray = column(pa.int64(), "line of the prompt file, from 0")
    prompt: tuple[str, ...] = column(pa.string(), "the prompt as it stands in the file")
    response: tuple[str, ...] = column(pa.string(), "the response decoded, special tokens left out")
    prompt_tokens: Ragged = column(TOKENS, "token ids given to the actor, chat template applied", "P")
    response_tokens: Ragged = column(TOKENS, "token ids sampled, EOS included where it was sampled", "R")
    logprobs: Ragged = column(FLOATS, "nats: log π_old(token) of the temperature-scaled logits", "R")
    finish_reason: tuple[str, ...] = column(pa.string(), "`eos`, or `length` where the limit cut the response")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (empty := np.flatnonzero(self.response_tokens.lengths == 0)).size:
            raise TableError(f"column 'response_tokens', row {self.row_id[empty[0]]}: empty, expected a token at least")
        if unknown := set(self.finish_reason) - {"eos", "length"}:
            raise TableError(f"column 'finish_reason': expected 'eos' or 'length', found {sorted(unknown)[0]!r}")


@dataclass(frozen=True, eq=False)
class ReferenceLogprobs(Table):
    """Written by `reference`."""

    file: ClassVar[str] = "reference.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    logprobs: Ragged = column(FLOATS, "nats: log π_ref(token) of the temperature-scaled logits", "R")


@dataclass(frozen=True, eq=False)
class Rewards(Table):
    """Written by `reward`."""

    file: ClassVar[str] = "rewards.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    raw_score: np.ndarray = column(pa.float32(), "weighted sum of the components, less the demonstrations' mean if centred")
    score: np.ndarray = column(pa.float32(), "what PPO is rewarded with: raw_score normalised, clipped, penalised")
    components: dict[str, np.ndarray] = column(NAMED, "each component as its source gave it, before its weight")


@dataclass(frozen=True, eq=False)
class Values(Table):
    """Written by `value`."""

    file: ClassVar[str] = "values.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    values: Ragged = column(FLOATS, "V(s_t), read where response token t is predicted", "R")
    bootstrap: np.ndarray = column(pa.float32(), "V after the last response token; used where a response was cut")


@dataclass(frozen=True, eq=False)
class Advantages(Table):
    """Written by `gae`."""

    file: ClassVar[str] = "advantages.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    kl: Ragged = column(FLOATS, "nats: the KL estimate of the token, against the reference", "R")
    rewards: Ragged = column(FLOATS, "r_t = −β·kl_t (0 if KL is in the loss) + score at the last; whitened if set", "R")
    raw_advantages: Ragged = column(FLOATS, "A_t before whitening", "R")
    advantages: Ragged = column(FLOATS, "A_t, whitened if the config says so: what the policy is updated with", "R")
    returns: Ragged = column(FLOATS, "what the critic is fitted to, A_t + V_t; without a critic the reward to go", "R")


@dataclass(frozen=True, eq=False)
class Samples(Table):
    """Written by `evaluate`: one row per held-out prompt."""

    file: ClassVar[str] = "samples.parquet"
    row_id: np.ndarray = column(pa.int64(), "line of the held-out prompt file, from 0")
    prompt: tuple[str, ...] = column(pa.string(), "the prompt as it stands in the file")
    response: tuple[str, ...] = column(pa.string(), "the response decoded, special tokens left out")
    response_length: np.ndarray = column(pa.int64(), "R, EOS included")
    finish_reason: tuple[str, ...] = column(pa.string(), "`eos` or `length`")
    score: np.ndarray = column(pa.float32(), "the reward's raw_score")
    gold: np.ndarray = column(pa.float32(), "the judge's score, never trained on; the reward where no judge is set")
    kl: np.ndarray = column(pa.float32(), "nats a response: Σ_t log π(token) − log π_ref(token)")
    win: np.ndarray = column(pa.float32(), "1, ½ or 0: gold above, equal to or below the starting actor's sample")


TABLES = {table.file: table for table in (Rollouts, ReferenceLogprobs, Rewards, Values, Advantages, Samples)}
