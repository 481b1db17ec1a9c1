"""A run for notebooks and scripts: tables, SQL over them, and numbers of iterations."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from flows.runs.run import Run, open_run
from flows.store.store import existing_store
from flows.views.run_tables import parts, views
from flows.views.sql import Database
from schemas.errors import ConfigError


@dataclass(frozen=True)
class RunView:
    """What a run has written; nothing here writes."""

    run: Run
    database: Database

    @classmethod
    def open(cls, store: str, name: str) -> RunView:
        """Raises `ConfigError` saying which runs there are."""
        run = open_run(existing_store(store), name)
        return cls(run, Database([run]))

    @property
    def iterations(self) -> list[int]:
        """Those that are there."""
        return self.run.iterations()

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """DuckDB's answer, computed when it is read: `.df()`, `.pl()`, `.to_arrow_table()`, `.fetchall()`."""
        return self.database.sql(query)

    def table(self, name: str, iteration: int) -> pa.Table:
        """A table as its file has it, mapped into memory. Raises `ConfigError` saying what there is instead."""
        kinds = views(self.run.config.kind)
        if name not in kinds:
            raise ConfigError(f"run {self.run.name!r} has no table {name!r}; it has {', '.join(kinds)}")
        part = next(parts(self.run, name, [self.run.state(iteration)]), None)
        if part is None:
            there = [part.iteration for part in parts(self.run, name, self.run.states())]
            has = f"it has it of {len(there)}, {there[0]} to {there[-1]}" if there else "it has it of none"
            raise ConfigError(f"run {self.run.name!r} has no {name} of iteration {iteration}; {has}")
        return pq.read_table(part.path, memory_map=True)
