"""Every Parquet table, once: columns, types, units and the rules their lengths obey.

Letters: B rows, P prompt tokens of a row, R response tokens of a row (EOS counted where it was sampled), or in control
tasks the R steps of a row. Rows are ragged: no padding, no masks. Tables of one iteration are narrow and join on `row_id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa

from schemas.errors import TableError


@dataclass(frozen=True, eq=False)
class Ragged:
    """B rows of unequal length, flat: row i is `values[offsets[i]:offsets[i + 1]]`, of numbers or of vectors."""

    values: np.ndarray  # (sum of lengths,) or (sum of lengths, D)
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


FLAGS = pa.list_(pa.field("item", pa.bool_(), nullable=False))
TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
FLOATS = pa.list_(pa.field("item", pa.float32(), nullable=False))
VECTOR = FLOATS  # a row's one vector: (B, D) in memory
VECTORS = pa.list_(pa.field("item", VECTOR, nullable=False))
NAMED = pa.map_(pa.string(), pa.float32())
NAMED_TEXTS = pa.map_(pa.string(), pa.string())


def column(type_: pa.DataType, doc: str, length: str = "", *, optional: bool = False) -> np.ndarray:
    """A column's Parquet type, what it holds (which is in the file: other words are other bytes), and the letter of its row
    length if it is ragged; an `optional` one is left out of tables that have none of it."""
    metadata = {"type": type_, "doc": doc, "length": length, "optional": optional}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


@dataclass(frozen=True, eq=False)
class Table:
    """Base of all tables. In memory: (B,) or (B, D) arrays, `Ragged`, tuples of str, or one of these per name."""

    file: ClassVar[str]

    def __post_init__(self) -> None:
        self._check_lengths()
        for f in self._filled():
            _make_read_only(getattr(self, f.name))

    def __len__(self) -> int:
        return len(self.row_id)

    @classmethod
    @cache
    def schema(cls, optional: frozenset[str] = frozenset()) -> pa.Schema:
        """The Parquet schema, with those of the optional columns; each field has its `doc` and `length` as metadata."""
        return pa.schema([
            pa.field(f.name, f.metadata["type"], nullable=False,
                     metadata={key: f.metadata[key] for key in ("doc", "length")})
            for f in fields(cls) if f.name in optional or not f.metadata["optional"]
        ])

    @classmethod
    def optional(cls) -> tuple[Field, ...]:
        """The columns that only some tables of the kind have."""
        return tuple(f for f in fields(cls) if f.metadata["optional"])

    def _filled(self) -> list[Field]:
        """The columns that it has."""
        return [f for f in fields(self) if getattr(self, f.name) is not None]

    def to_arrow(self) -> pa.Table:
        """The table as it is written."""
        schema = self.schema(frozenset(f.name for f in self._filled() if f.metadata["optional"]))
        return pa.Table.from_arrays([_to_arrow(getattr(self, f.name), f.type) for f in schema], schema=schema)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Self:
        """Raises `TableError`, naming the column, if names, types, nulls or lengths are not as declared."""
        schema = cls.check_schema(table.schema)
        for name in table.column_names:
            if table[name].null_count:
                raise TableError(f"column {name!r}: {table[name].null_count} nulls, expected none")
        return cls(**{f.name: _from_arrow(f, table[f.name].combine_chunks()) for f in schema})

    @classmethod
    def check_schema(cls, found: pa.Schema) -> pa.Schema:
        """The schema that it has. Raises `TableError` naming the first column that differs."""
        expected = cls.schema(frozenset(f.name for f in cls.optional()) & frozenset(found.names))
        if found.names != expected.names:
            raise TableError(f"columns: expected {expected.names}, found {found.names}")
        for want, have in zip(expected, found, strict=True):
            if want.type != have.type:
                raise TableError(f"column {want.name!r}: expected {want.type}, found {have.type}")
        return expected

    def only(self, rows: np.ndarray, row_id: np.ndarray) -> Self:
        """Those of its rows, (b,) positions, with these ids."""
        return replace(self, **{f.name: _taken(getattr(self, f.name), rows) for f in self._filled()} | {"row_id": row_id})

    def part(self, rows: slice) -> Self:
        """These rows, with the ids that they have; itself where they are all."""
        if (rows.start, rows.stop) == (0, len(self)):
            return self
        kept = np.arange(rows.start, rows.stop)
        return self.only(kept, self.row_id[kept])

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """All rows of all of them, one after the other, numbered anew."""
        columns = {f.name: _joined([getattr(table, f.name) for table in tables]) for f in tables[0]._filled()}
        return cls(**columns | {"row_id": np.arange(sum(map(len, tables)))})

    def sampled_alone(self, sampled: Ragged) -> Self:
        """Without what it holds of tokens that were not sampled; `sampled`: of bool, R a row."""
        offsets = np.append(0, np.cumsum(sampled.sums())).astype(np.int64)
        return replace(self, **{f.name: Ragged(getattr(self, f.name).values[sampled.values], offsets)
                                for f in self._filled() if f.metadata["length"] == "R"})

    def _check_lengths(self) -> None:
        """All columns have B rows; ragged columns that share a letter have equal lengths row by row."""
        seen: dict[str, tuple[str, Ragged]] = {}
        for f in self._filled():
            value, letter = getattr(self, f.name), f.metadata["length"]
            for rows in value.values() if isinstance(value, dict) else (value,):
                if len(rows) != len(self):
                    raise TableError(f"column {f.name!r}: expected {len(self)} rows, found {len(rows)}")
            if letter:
                first, other = seen.setdefault(letter, (f.name, value))
                _require_same_lengths(self.row_id, first, other, f.name, value)


def _make_read_only(column: np.ndarray | Ragged | tuple[str, ...] | dict[str, np.ndarray | tuple[str, ...]]) -> None:
    """Several stages are given one table while it is in memory; none may change what another reads."""
    if isinstance(column, Ragged):
        column.values.flags.writeable = column.offsets.flags.writeable = False
    elif isinstance(column, np.ndarray):
        column.flags.writeable = False
    elif isinstance(column, dict):
        for values in column.values():
            _make_read_only(values)


def _taken(column: np.ndarray | Ragged | tuple[str, ...] | dict[str, np.ndarray | tuple[str, ...]], rows: np.ndarray):
    """Those rows of a column."""
    if isinstance(column, Ragged):
        return Ragged.from_rows([column[i] for i in rows], column.values.dtype)
    if isinstance(column, dict):
        return {name: _taken(values, rows) for name, values in column.items()}
    return column[rows] if isinstance(column, np.ndarray) else tuple(column[i] for i in rows)


def _joined(columns: Sequence[np.ndarray | Ragged | tuple[str, ...] | dict[str, np.ndarray | tuple[str, ...]]]):
    """One column of several."""
    first = columns[0]
    if isinstance(first, Ragged):
        return Ragged.from_rows([row for column in columns for row in column], first.values.dtype)
    if isinstance(first, dict):
        return {name: _joined([column[name] for column in columns]) for name in first}
    if isinstance(first, np.ndarray):
        return np.concatenate(columns)
    return tuple(value for column in columns for value in column)


def _to_arrow(value, type_: pa.DataType) -> pa.Array:
    if isinstance(value, Ragged):
        return _list(value.offsets, _to_arrow(value.values, type_.value_type), type_)
    if isinstance(value, dict):
        names, size = sorted(value), len(value)
        rows = len(next(iter(value.values()))) if value else 0
        items = [item for row in zip(*(value[name] for name in names), strict=True) for item in row]
        return pa.MapArray.from_arrays(pa.array(np.arange(rows + 1) * size, pa.int32()),
                                       pa.array(names * rows, pa.string()), pa.array(items, type_.item_type))
    if getattr(value, "ndim", 1) == 2:
        rows, size = value.shape
        return _list(np.arange(rows + 1) * size, pa.array(value.reshape(-1), type_.value_type), type_)
    return pa.array(value, type_)


def _list(offsets: np.ndarray, items: pa.Array, type_: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, type=type_)


def _from_arrow(field_: pa.Field, array: pa.Array):
    if pa.types.is_map(array.type):
        names = sorted(set(array.keys.to_pylist()))
        rows = [dict(row) for row in array.to_pylist()]
        if any(len(row) != len(names) for row in rows):
            raise TableError(f"column {field_.name!r}: expected {names} in every row")
        columns = {name: tuple(row[name] for row in rows) for name in names}
        texts = pa.types.is_string(array.type.item_type)
        return columns if texts else {name: np.array(values, np.float32) for name, values in columns.items()}
    if pa.types.is_list(array.type):
        if not field_.metadata[b"length"]:
            return _vectors(field_.name, array)
        offsets, items = array.offsets.to_numpy().astype(np.int64), array.flatten()
        nested = pa.types.is_list(items.type)
        return Ragged(_vectors(field_.name, items) if nested else items.to_numpy(zero_copy_only=False), offsets - offsets[0])
    if pa.types.is_string(array.type):
        return tuple(array.to_pylist())
    return array.to_numpy(zero_copy_only=False)


def _vectors(name: str, array: pa.Array) -> np.ndarray:
    """(n, D) of n lists. Raises `TableError` unless all have one length D."""
    sizes = np.diff(array.offsets.to_numpy())
    if len(sizes) and (sizes != sizes[0]).any():
        raise TableError(f"column {name!r}: vectors of {sizes.min()} to {sizes.max()} numbers, expected one length")
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(sizes), sizes[0] if len(sizes) else 0)


def _require_same_lengths(row_id: np.ndarray, first: str, a: Ragged, second: str, b: Ragged) -> None:
    wrong = np.flatnonzero(a.lengths != b.lengths)
    if wrong.size:
        row = wrong[0]
        raise TableError(f"column {second!r}, row {row_id[row]}: {b.lengths[row]} values, "
                         f"but {first!r} has {a.lengths[row]}")


def require_aligned(rollouts: Rollouts | Trajectories, other: Table) -> None:
    """Raises `TableError` unless `other` has the rows of `rollouts`, in order, and R values in each ragged row."""
    name = type(other).__name__
    if not np.array_equal(rollouts.row_id, other.row_id):
        raise TableError(f"{name}.row_id does not match the rollouts: expected {len(rollouts)} rows "
                         f"{_ends(rollouts.row_id)}, found {len(other)} {_ends(other.row_id)}")
    for f in other._filled():
        if f.metadata["length"] == "R":
            _require_same_lengths(rollouts.row_id, f"{type(rollouts).__name__}.logprobs", rollouts.logprobs,
                                  f"{name}.{f.name}", getattr(other, f.name))


def _ends(row_id: np.ndarray) -> str:
    return f"({row_id[0]}…{row_id[-1]})" if len(row_id) else "(none)"


ROW_ID_DOC = "0…B−1; joins the tables of one iteration"


@dataclass(frozen=True, eq=False)
class Rollouts(Table):
    """Written by `rollout`: one row per response. A finish reason is also `stop`, at a stop text or token."""

    file: ClassVar[str] = "rollouts.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    prompt_id: np.ndarray = column(pa.int64(), "line of the prompt file, from 0")
    prompt: tuple[str, ...] = column(pa.string(), "the prompt as it stands in the file")
    response: tuple[str, ...] = column(pa.string(), "the response decoded, special tokens left out")
    prompt_tokens: Ragged = column(TOKENS, "token ids given to the actor, chat template applied", "P")
    response_tokens: Ragged = column(TOKENS, "token ids sampled, EOS included where it was sampled", "R")
    logprobs: Ragged = column(FLOATS, "nats: log π_old(token) of the temperature-scaled logits", "R")
    finish_reason: tuple[str, ...] = column(pa.string(), "`eos`, or `length` where the limit cut the response")
    sampled: Ragged | None = column(
        FLAGS, "several turns: whether the token was sampled, rather than part of a reply, where logprobs are 0", "R",
        optional=True)
    turns: tuple[str, ...] | None = column(
        pa.string(), "several turns: JSON of the messages since the prompt, {role, content} each", optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (empty := np.flatnonzero(self.response_tokens.lengths == 0)).size:
            raise TableError(f"column 'response_tokens', row {self.row_id[empty[0]]}: empty, expected a token at least")
        if unknown := set(self.finish_reason) - {"eos", "stop", "length"}:
            raise TableError(f"column 'finish_reason': expected 'eos', 'stop' or 'length', found {sorted(unknown)[0]!r}")

    @property
    def terminated(self) -> np.ndarray:
        """(B,) bool: the response ended by itself."""
        return np.array(self.finish_reason) != "length"

    @property
    def sampled_lengths(self) -> np.ndarray:
        """(B,) int64: the tokens of each response that were sampled."""
        return self.response_tokens.lengths if self.sampled is None else self.sampled.sums().astype(np.int64)

    @property
    def truncated(self) -> np.ndarray:
        """(B,) bool: the limit cut it."""
        return np.array(self.finish_reason) == "length"


@dataclass(frozen=True, eq=False)
class Trajectories(Table):
    """Written by `rollout` of a control task: one row for each piece of an episode that the batch holds.

    It is rewards and values in one: what `gae` is given as rollouts, rewards and values alike. A row that is neither
    terminated nor truncated goes on in the next iteration's batch. All that N environments did is in the order of
    environments, then of time.
    """

    file: ClassVar[str] = "trajectories.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    environment: np.ndarray = column(pa.int64(), "0…N−1: which of the environments that are stepped side by side")
    episode: np.ndarray = column(pa.int64(), "0, 1, …: which episode of that environment")
    seed: np.ndarray = column(pa.int64(), "that the environment was reset with at the episode's start")
    start: np.ndarray = column(pa.int64(), "steps of the episode that earlier batches hold")
    observations: Ragged = column(VECTORS, "o_t: D numbers, as the environment gave them", "R")
    actions: Ragged = column(VECTORS, "a_t as sampled: A numbers, not clipped to a Box's bounds, or A choices from 0", "R")
    logprobs: Ragged = column(FLOATS, "nats: log π_old(a_t | o_t), a density for a Box", "R")
    values: Ragged = column(FLOATS, "V(o_t), the critic's", "R")
    raw_rewards: Ragged = column(FLOATS, "as the environment gave them", "R")
    discounted_returns: Ragged = column(FLOATS, "Σ_{s≤t} γ^(t−s)·raw_reward_s since the reset; its σ may scale rewards", "R")
    rewards: Ragged = column(FLOATS, "what PPO is rewarded with: raw_rewards scaled and clipped, if set", "R")
    terminated: np.ndarray = column(pa.bool_(), "whether the episode ended with this row, so that nothing follows")
    truncated: np.ndarray = column(pa.bool_(), "whether a time limit cut the episode after this row")
    final_observation: np.ndarray = column(VECTOR, "o_R, after the row's last action and before any reset")
    bootstrap: np.ndarray = column(pa.float32(), "V(o_R), the critic's; used where the row is not over")
    episode_return: np.ndarray = column(pa.float64(), "Σ of raw rewards from the episode's reset to the row's end")

    sampled: ClassVar[None] = None
    """Every step's action was."""

    def of_steps(self, rows: Ragged, tokens: TokenRewards | None = None) -> np.ndarray:
        """(n,) float64: the reward of each step."""
        return self.rewards.values.astype(np.float64)

    def by_step(self, name: str) -> np.ndarray:
        """(T, N, …) of a ragged column: a step of all environments after the other."""
        values, count = getattr(self, name).values, int(self.environment.max()) + 1
        return values.reshape(count, len(values) // count, *values.shape[1:]).swapaxes(0, 1)

    @property
    def ended(self) -> np.ndarray:
        """(B,) bool: the episode is over."""
        return self.terminated | self.truncated


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

    def of_steps(self, rows: Ragged, tokens: TokenRewards | None = None) -> np.ndarray:
        """(n,) float64, of B `rows`: what the tokens are rewarded with, and at the last one what the score has beyond it."""
        rewards = np.zeros(len(rows.values)) if tokens is None else tokens.rewards.values.astype(np.float64)
        rewards[rows.offsets[1:] - 1] += self.score if tokens is None else self.score - tokens.rewards.sums()
        return rewards


@dataclass(frozen=True, eq=False)
class TokenRewards(Table):
    """Written by `reward` beside the rewards where functions reward each token."""

    file: ClassVar[str] = "token_rewards.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    rewards: Ragged = column(FLOATS, "Σ of the components that reward tokens, weighted: paid at the token", "R")


@dataclass(frozen=True, eq=False)
class DroppedResponses(Table):
    """Written by `resample` beside the rollouts: the groups that are not in the batch, and of which round they are."""

    file: ClassVar[str] = "dropped.parquet"
    row_id: np.ndarray = column(pa.int64(), "0…; of the dropped responses")
    round: np.ndarray = column(pa.int64(), "1: sampled by `rollout`; 2…: by `resample`")
    prompt_id: np.ndarray = column(pa.int64(), "line of the prompt file, from 0")
    prompt: tuple[str, ...] = column(pa.string(), "the prompt as it stands in the file")
    response: tuple[str, ...] = column(pa.string(), "the response decoded, special tokens left out")
    score: np.ndarray = column(pa.float32(), "what PPO would have been rewarded with")


@dataclass(frozen=True, eq=False)
class ScoredTexts(Table):
    """Written by `reward` beside the rewards where reward models are brought: what each of them was given."""

    file: ClassVar[str] = "scored_texts.parquet"
    row_id: np.ndarray = column(pa.int64(), ROW_ID_DOC)
    texts: dict[str, tuple[str, ...]] = column(NAMED_TEXTS, "prompt and response in the component's own template, uncut")


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
    rewards: Ragged = column(FLOATS, "r_t = −β·kl_t (0 if KL is in the loss) + the reward of the step; whitened if set", "R")
    raw_advantages: Ragged = column(FLOATS, "A_t before whitening", "R")
    advantages: Ragged = column(FLOATS, "A_t, whitened if the config says so: what the policy is updated with", "R")
    returns: Ragged = column(FLOATS, "what the critic is fitted to, A_t + V_t; without a critic the reward to go", "R")


@dataclass(frozen=True, eq=False)
class Samples(Table):
    """Written by `evaluate`: one row per sample of a held-out prompt. Of several samples `row_id` is 0…B−1, and `prompt_id`
    the line; wins are over the baseline's samples, the mean of several."""

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
    prompt_id: np.ndarray | None = column(pa.int64(), "line of the held-out prompts, where there are several samples of one",
                                          optional=True)
    greedy: np.ndarray | None = column(
        pa.bool_(), "whether it is of the likeliest tokens, rather than sampled", optional=True)
    judges: dict[str, np.ndarray] | None = column(NAMED, "what each judge gave, where there are several", optional=True)

    @property
    def prompt_ids(self) -> np.ndarray:
        """(B,) int64: line of the held-out prompts."""
        return self.row_id if self.prompt_id is None else self.prompt_id

    @property
    def is_greedy(self) -> np.ndarray:
        """(B,) bool."""
        return np.zeros(len(self), bool) if self.greedy is None else self.greedy


@dataclass(frozen=True, eq=False)
class Returns(Table):
    """Written by `evaluate` of a control task: one row an episode, played with the policy's most likely actions."""

    file: ClassVar[str] = "returns.parquet"
    row_id: np.ndarray = column(pa.int64(), "0…N−1: the episode")
    seed: np.ndarray = column(pa.int64(), "that the environment was reset with")
    episode_return: np.ndarray = column(pa.float64(), "Σ of raw rewards, undiscounted")
    length: np.ndarray = column(pa.int64(), "steps of the episode")
    terminated: np.ndarray = column(pa.bool_(), "whether it ended by itself, rather than at a time limit")


EPISODE_FILM = "episode.gif"  # beside the returns, where the environment renders

TABLES = {table.file: table for table in Table.__subclasses__()}
