"""SQL over runs, by DuckDB: a view a table, and some that are made of several.

Each view has `run`, `iteration` and `identity`, that of its artifact. What a query does not name is not read: its tables'
files are neither looked for nor opened, and of `tokens` only the tables are joined whose columns it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import duckdb
import pyarrow as pa

from flows.runs.run import Run
from flows.views.columns import STEPS, TOKENS
from flows.views.run_tables import ALL_VIEWS, INPUTS, Part, gae_settings, input_file, parts, views
from flows.views.token_texts import TokenTexts
from flows.views.visible import visible
from schemas.artifacts import TrainState
from schemas.errors import ConfigError
from schemas.stages import STAGES

KEYS = ("run", "iteration", "identity")
FILE_KEYS = pa.schema([("filename", pa.string()), ("run", pa.string()), ("iteration", pa.int64()), ("identity", pa.string()),
                       ("gamma", pa.float64()), ("bootstraps", pa.bool_())])
UNNESTED = {"tokens": (TOKENS, "rollouts", ("row_id", "prompt_id")),
            "steps": (STEPS, "trajectories", ("row_id", "environment", "episode"))}
RECORDS: dict[str, pa.Schema] = {
    "runs": pa.schema([
        ("run", pa.string()), ("kind", pa.string()), ("iterations", pa.int64()), ("created", pa.string()),
        ("parent", pa.string()), ("config", pa.string())]),
    "iterations": pa.schema([
        ("run", pa.string()), ("iteration", pa.int64()), ("seconds", pa.float64()), ("kl_coef", pa.float64())]),
    "metrics": pa.schema([
        ("run", pa.string()), ("iteration", pa.int64()), ("stage", pa.string()), ("metric", pa.string()),
        ("value", pa.float64())]),
    "artifacts": pa.schema([
        ("run", pa.string()), ("iteration", pa.int64()), ("stage", pa.string()), ("identity", pa.string()),
        ("seconds", pa.float64()), ("bytes", pa.int64()), ("tokens", pa.int64()), ("created", pa.string())]),
}
RESPONSES = """
    SELECT rollouts.run, rollouts.iteration, rollouts.identity, row_id, prompt_id, prompt, response, finish_reason,
        coalesce(list_sum(list_transform(sampled, lambda s: s::BIGINT)), len(response_tokens))::BIGINT AS length,
        rewards.raw_score, rewards.score, rewards.components, list_sum(advantages.kl) AS kl,
        list_sum(advantages.rewards) AS reward, list_sum(advantages.raw_advantages) / length AS raw_advantage
    FROM rollouts LEFT JOIN rewards USING (run, iteration, row_id) LEFT JOIN advantages USING (run, iteration, row_id)"""
NAMES = (*ALL_VIEWS, *UNNESTED, "responses", *RECORDS, *INPUTS)


@dataclass(frozen=True)
class Database:
    """Runs of a store as views. Raises `ConfigError` for a query that cannot be answered."""

    runs: Sequence[Run]
    _states: dict[str, list[TrainState]] = field(default_factory=dict)
    _paths: dict[tuple[str, str], str] = field(default_factory=dict)

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """The answer, which is computed when it is read: `.df()`, `.pl()`, `.to_arrow_table()`, `.fetchall()`.

        Raises `ConfigError` saying what there is instead of what it names, and `StoreError` where a table is damaged.
        """
        try:
            return self._answer(query, _words(query))
        except duckdb.BinderException:
            if _words(query) is None:
                raise
            return self._answer(query, None)  # a column that is named in another way than by its word

    def _answer(self, query: str, words: frozenset[str] | None) -> duckdb.DuckDBPyRelation:
        connection = duckdb.connect()
        connection.execute("SET enable_progress_bar = false")
        connection.create_function("token_text", self._token_texts, ["VARCHAR", "INTEGER"], "VARCHAR", type="arrow")
        named = set(re.findall(r"\w+", query.lower()))
        _Views(connection, self, words).make(name for name in NAMES if name in named)
        return connection.sql(query)

    def path(self, part: Part) -> str:
        """Where its file is, checked once."""
        key = str(part.ref), part.file
        if key not in self._paths:
            self._paths[key] = str(part.path)
        return self._paths[key]

    def states(self, run: Run) -> list[TrainState]:
        """All of a run, read once."""
        if run.name not in self._states:
            self._states[run.name] = run.states()
        return self._states[run.name]

    @cached_property
    def _token_texts(self) -> Callable[..., pa.Array]:
        return TokenTexts({run.name: run for run in self.runs})


def _words(query: str) -> frozenset[str] | None:
    """Words that may be columns, none where any column may be meant."""
    text = re.sub(r"count\s*\(\s*\*\s*\)", "", query.lower())
    if re.search(r"\*|\bcolumns\b|\bdescribe\b|\bsummarize\b|(^|\()\s*(from|table)\b", text):
        return None
    return frozenset(re.findall(r"\w+", text))


@dataclass
class _Views:
    """What makes views in a connection, each once, those that it is made of before it."""

    connection: duckdb.DuckDBPyConnection
    database: Database
    words: frozenset[str] | None
    made: set[str] = field(default_factory=set)

    def make(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.made:
                continue
            self.made.add(name)
            if name in UNNESTED:
                self._unnested(name)
            elif name == "responses":
                self.make(("rollouts", "rewards", "advantages"))
                self._view(name, RESPONSES)
            elif name in RECORDS:
                self._table(name, RECORDS[name], list(getattr(self, f"_{name}")()))
            elif name in INPUTS:
                self._input(name)
            else:
                self._of_files(name)

    def _view(self, name: str, query: str) -> None:
        self.connection.execute(f'CREATE TEMP VIEW "{name}" AS {query}')

    def _table(self, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
        self.connection.register(name, pa.Table.from_pylist(rows, schema))

    # --- tables of stages ---

    def _of_files(self, name: str) -> None:
        """A view over all files of a table; a table without rows where there are none."""
        found = [part for run in self.database.runs if name in views(run.config.kind)
                 for part in parts(run, name, self.database.states(run))]
        self._table(f"files of {name}", FILE_KEYS, [self._key(name, part) for part in found])
        if not found:
            optional = frozenset(f.name for f in ALL_VIEWS[name].optional())
            keys = pa.schema([(key, FILE_KEYS.field(key).type) for key in KEYS])
            self.connection.register(name, pa.schema([*keys, *ALL_VIEWS[name].schema(optional)]).empty_table())
            return
        paths = ", ".join(map(_quoted, dict.fromkeys(map(self.database.path, found))))  # runs may share some
        alike = all(part.columns == found[0].columns for part in found)
        lacking = [column for column in ALL_VIEWS[name].optional() if not any(column.name in part.columns for part in found)]
        more = "".join(f', NULL::{_duckdb_type(column.metadata["type"])} AS "{column.name}"' for column in lacking)
        self._view(name, f"""
            SELECT keys.run, keys.iteration, keys.identity, rows.* EXCLUDE (filename){more}
            FROM read_parquet([{paths}], filename = true, union_by_name = {str(not alike).lower()}) AS rows
            JOIN "files of {name}" AS keys USING (filename)""")

    def _key(self, name: str, part: Part) -> dict[str, Any]:
        more = gae_settings(part.manifest) if name == "advantages" else {}
        return {"filename": self.database.path(part), "run": part.run.name, "iteration": part.iteration,
                "identity": part.ref.identity, **more}

    def _input(self, role: str) -> None:
        """Imported rows, by prompt id where they are prompts."""
        line = _line(role)
        queries = [f"SELECT {_quoted(run.name)} AS run, row_number() OVER () - 1 AS {line}, "
                   f"COLUMNS(lambda c: c NOT IN ('run', '{line}')) FROM {_quoted(str(path))}"
                   for run in self.database.runs if (path := input_file(run, role)) is not None]
        self._view(role, " UNION ALL BY NAME ".join(queries) or f"SELECT ''::VARCHAR AS run, 0::BIGINT AS {line} LIMIT 0")

    # --- a row a token, a row a step ---

    def _unnested(self, name: str) -> None:
        """Of the tables alone that have a column which is asked for; all of them have the same rows."""
        columns, first, ids = UNNESTED[name]
        asked = [column for column in columns if self.words is None or column in self.words]
        tables = {columns[column][0] for column in asked}
        if "delta" in asked:
            tables |= {"advantages", "values"} if name == "tokens" else {"advantages"}
        order = [first, *(table for table in ("reference", "values", "advantages") if table in tables)]
        self.make(order)
        lists = {column: f'"{columns[column][0]}"."{columns[column][1]}"' for column in asked if columns[column][1]}
        if "delta" in asked:
            lists["delta"] = self._deltas(name)
        joins = " ".join(f'LEFT JOIN "{table}" USING (run, iteration, row_id)' for table in order[1:])
        if "delta" in asked:
            joins += ' LEFT JOIN "files of advantages" AS settings USING (run, iteration)'
        unnested = "".join(f', unnest({values}) AS "{column}"' for column, values in lists.items())
        of_turns = name == "tokens"  # whose replies are no samples, and have no numbers
        keys = ", ".join(f"{first}.{one}" for one in (*KEYS, *ids))
        sampled = ", unnest(rollouts.sampled) AS _sampled" if of_turns else ""
        inner = (f'SELECT {keys}, generate_subscripts({first}.logprobs, 1) - 1 AS position{unnested}{sampled} '
                 f'FROM {first} {joins}')
        others = {column: f'if(_sampled IS FALSE, NULL, "{column}")' for column in asked
                  if of_turns and column not in ("token", "text", "sampled", "delta")}
        others |= {"text": "token_text(run, text)"} if "text" in asked else {}
        replaced = ", ".join(f'{how} AS "{column}"' for column, how in others.items())
        changed = (" EXCLUDE (_sampled)" if of_turns else "") + (f" REPLACE ({replaced})" if replaced else "")
        self._view(name, f"SELECT *{changed} FROM ({inner})")

    @staticmethod
    def _deltas(name: str) -> str:
        """δ of a row's steps, a list: of its rewards, its values, and V after the last one, which counts where it is
        bootstrapped."""
        if name == "steps":
            values, rewards = "trajectories.values", "advantages.rewards"
            last = ("if(trajectories.terminated OR (trajectories.truncated AND NOT settings.bootstraps), 0, "
                    "trajectories.bootstrap)")
            sampled = "NULL"
        else:
            values, rewards, sampled = '"values"."values"', "advantages.rewards", "rollouts.sampled"
            last = "if(rollouts.finish_reason = 'length' AND settings.bootstraps, \"values\".bootstrap, 0)"
        alone = f"list_where({values}, coalesce({sampled}, list_transform({values}, lambda v: true)))"
        follow = f"list_append(list_slice({alone}, 2, -1), {last})"
        # the k-th sampled token is followed by the (k + 1)-th
        place = f"len(list_filter(list_slice({sampled}, 1, i), lambda s: s))"
        return (f"list_transform(range(1, len({values}) + 1), lambda i: if({sampled} IS NULL, "
                f"{rewards}[i]::DOUBLE + settings.gamma * if(i = len({values}), {last}, {values}[i + 1]) - {values}[i], "
                f"if({sampled}[i], {rewards}[i]::DOUBLE + settings.gamma * ({follow})[{place}] - {values}[i], NULL)))")

    # --- records ---

    def _each(self) -> Iterator[tuple[Run, TrainState]]:
        for run in self.database.runs:
            for state in self.database.states(run):
                yield run, state

    def _runs(self) -> Iterator[dict[str, Any]]:
        for run in self.database.runs:
            yield {"run": run.name, "kind": run.config.kind, "iterations": max(0, len(self.database.states(run)) - 1),
                   "created": run.record.created, "parent": run.record.parent,
                   "config": run.config.model_dump_json(exclude={"execution", "tracking"})}

    def _iterations(self) -> Iterator[dict[str, Any]]:
        for run, state in self._each():
            yield {"run": run.name, "iteration": state.iteration, "seconds": state.seconds, "kl_coef": state.kl_coef}

    def _metrics(self) -> Iterator[dict[str, Any]]:
        for run, state in self._each():
            for key, value in state.metrics.items():
                stage, _, metric = key.partition("/")
                yield {"run": run.name, "iteration": state.iteration, "stage": stage, "metric": metric, "value": value}

    def _artifacts(self) -> Iterator[dict[str, Any]]:
        for run, state in self._each():
            for stage in STAGES[run.config.kind]:
                if stage in state.artifacts:
                    made = run.store.manifest(state.artifacts[stage])
                    yield {"run": run.name, "iteration": state.iteration, "stage": stage, "identity": made.identity,
                           "seconds": made.seconds, "bytes": made.bytes, "tokens": made.tokens, "created": made.created}


def explained(error: duckdb.Error) -> ConfigError:
    """A query's error as a line, with what there is instead."""
    text = visible(" ".join(str(error).split()))
    if isinstance(error, duckdb.CatalogException) and "Table" in text:
        text += f"; there are {', '.join(NAMES)}"
    return ConfigError(f"sql: {text}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _duckdb_type(type_: pa.DataType) -> str:
    """In DuckDB's words."""
    return str(duckdb.from_arrow(pa.schema([("x", type_)]).empty_table()).types[0])


# --- what there is ---

def catalog() -> list[dict[str, str]]:
    """A row a column of every view: its view, name, type and what it holds; imported data has the columns it came with."""
    with duckdb.connect() as connection:
        connection.create_function("token_text", TokenTexts({}), ["VARCHAR", "INTEGER"], "VARCHAR", type="arrow")
        _Views(connection, Database(()), None).make(name for name in NAMES if name not in INPUTS)
        found = []
        for name in NAMES:
            if name in INPUTS:
                doc = f"the imported rows of `data.{name}`, by run and {_line(name)}, all columns that they came with"
                found.append({"view": name, "column": "…", "type": "", "doc": doc})
                continue
            docs = _docs(name)
            answer = connection.sql(f'FROM "{name}"')
            found += [{"view": name, "column": column, "type": str(type_), "doc": docs.get(column, "")}
                      for column, type_ in zip(answer.columns, answer.types, strict=True)]
        return found


def _docs(view: str) -> dict[str, str]:
    """Column → what it holds."""
    keys = {"run": "its name", "iteration": "0 what was prepared, then 1, 2, …", "identity": "of the artifact",
            "position": "0…R−1", "row_id": "joins the tables of one iteration"}
    if view in UNNESTED:
        columns, first, _ = UNNESTED[view]
        return keys | _docs(first) | {name: doc for name, (_, _, doc) in columns.items()}
    if view == "responses":
        own = {"length": "tokens that were sampled", "kl": "nats: Σ over its tokens", "reward": "Σ over its tokens",
               "raw_advantage": "the mean over its tokens"}
        return keys | _docs("rollouts") | _docs("rewards") | own
    if view in RECORDS:
        return keys | {"value": "a number", "config": "JSON", "bytes": "bytes written", "seconds": "wall time, in seconds",
                       "tokens": "that its models processed", "created": "UTC", "kl_coef": "β of the next iteration",
                       "parent": "run@iteration that it was forked from", "kind": "`language` or `control`",
                       "iterations": "how many there are, after what was prepared", "stage": "that made or measured it",
                       "metric": "its name, without the stage"}
    return keys | {f.name: f.metadata["doc"] for f in fields(ALL_VIEWS[view])}


def _line(role: str) -> str:
    return "prompt_id" if "prompts" in role else "row_id"
