"""What can be read off a store; nothing here writes.

    from flows.views import open_run

    run = open_run("data/store", "reviews")
    run.sql("SELECT iteration, avg(kl) FROM tokens GROUP BY ALL").df()   # or .pl(), .to_arrow_table(), .fetchall()
    run.table("rollouts", 3)                                             # pyarrow, its file mapped into memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.views.run_view import RunView


def open_run(store: str, name: str) -> RunView:
    """A run of the store, a folder or s3://bucket/prefix, to read. Raises `ConfigError` saying which there are."""
    from flows.views.run_view import RunView  # DuckDB is imported where it is used

    return RunView.open(store, name)
