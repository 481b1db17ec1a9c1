"""Commands that read the tables of a store: `baton sql`, `baton inspect`."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from flows.cli.command import Answer, command, open_existing, open_shown, write_text
from flows.views.columns import NUMBERS
from flows.views.visible import visible
from schemas.errors import ConfigError

if TYPE_CHECKING:
    import duckdb

    from flows.runs.run import Run
    from flows.views.inspection import Response
    from flows.views.sql import Database

log = logging.getLogger("baton")
T = TypeVar("T")
ROWS_SHOWN, ROWS_DOWN, COLUMN_WIDTH, CHARACTERS_SHOWN = 40, 5, 14, 200


@command
@click.argument("arguments", nargs=-1, metavar='[RUN] ["SELECT …"]')
@click.option("--csv", "as_csv", is_flag=True, help="All rows as CSV on stdout.")
@click.option("--parquet", metavar="FILE", help="All rows into that file.")
def sql(arguments: tuple[str, ...], as_csv: bool, parquet: str | None, root: str) -> Answer:
    """Ask a run's tables, or those of all runs. In DuckDB's SQL, over a view a table; without a query, which there are."""
    from flows.views.sql import catalog

    run, query = _parted(arguments)
    if query is None:
        if run is not None:
            open_existing(root, run)
        return Answer(catalog, lambda console: console.print(_catalog(catalog())))
    return _answer(_explained(_database(root, run).sql)(query), as_csv, parquet)


def _parted(arguments: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Run and query; one argument with a blank in it is a query. Raises `ConfigError`."""
    if len(arguments) > 2:
        raise ConfigError("sql: expected a run and a query; put the query in quotes, as in baton sql reviews \"SELECT …\"")
    if len(arguments) == 1 and " " in arguments[0].strip():
        return None, arguments[0]
    run, query = (*arguments, None, None)[:2]
    return run, query


def _database(root: str, run: str | None) -> Database:
    from flows.runs.run import open_run, run_names
    from flows.store.store import existing_store
    from flows.views.sql import Database

    if run is not None:
        return Database([open_shown(root, run)])
    store = existing_store(root)
    return Database([open_run(store, name) for name in run_names(store)])


def _answer(found: duckdb.DuckDBPyRelation | None, as_csv: bool, parquet: str | None) -> Answer:
    if found is None:
        return Answer([], lambda console: console.print("done"))
    if parquet is not None:
        _explained(found.write_parquet)(parquet)
        import pyarrow.parquet as pq

        rows = pq.read_metadata(parquet).num_rows
        return Answer({"rows": rows, "file": parquet},
                      lambda console: console.print(f"{rows:,} rows in {parquet}", highlight=False, soft_wrap=True))
    all_rows = _explained(lambda: list(_rows(found)))
    if as_csv:
        return Answer(all_rows, lambda console: _explained(_write_csv)(_names(found), _rows(found)))
    few = found.limit(ROWS_SHOWN + 1)
    return Answer(all_rows, lambda console: _print(console, found, _explained(lambda: list(_rows(few)))()))


def _explained(function: Callable[..., T]) -> Callable[..., T]:
    """The function, with DuckDB's errors, some of which come when rows are read, as a line."""
    import duckdb

    from flows.views.sql import explained

    def call(*given: Any) -> T:
        try:
            return function(*given)
        except duckdb.Error as error:
            raise explained(error) from None

    return call


def _rows(found: duckdb.DuckDBPyRelation) -> Iterator[dict[str, Any]]:
    names = _names(found)
    for batch in found.to_arrow_reader():
        for row in zip(*(column.to_pylist(maps_as_pydicts="strict") for column in batch.columns), strict=True):
            yield dict(zip(names, map(_plain, row), strict=True))


def _names(found: duckdb.DuckDBPyRelation) -> list[str]:
    """Of its columns; of several that are called the same, which a join has, the later ones with a number."""
    names: list[str] = []
    for name in found.columns:
        same = sum(each == name for each in found.columns[: len(names)])
        names.append(f"{name}_{same}" if same else name)
    return names


def _plain(value: Any) -> Any:
    """As JSON has it; a number that is none is null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    number = getattr(value, "as_integer_ratio", None)  # a decimal, as sums of integers are
    return (int(value) if value == int(value) else float(value)) if number else str(value)


def _write_csv(columns: list[str], rows: Iterator[dict[str, Any]]) -> None:
    """Texts as they are, in quotes where they need them; lists and maps as JSON."""
    out = csv.writer(sys.stdout, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    first = list(islice(rows, 1))  # whose errors come before the header
    out.writerow(columns)
    for row in chain(first, rows):
        out.writerow(json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
                     for value in row.values())


def _print(console: Console, found: duckdb.DuckDBPyRelation, rows: list[dict[str, Any]]) -> None:
    """As a table, or a line a column where there are too many of them."""
    if len(found.columns) * COLUMN_WIDTH > console.width:
        rows, most = rows[: ROWS_DOWN + 1], ROWS_DOWN
        for number, row in enumerate(rows[:most], start=1):
            grid = Grid(title=f"row {number}", title_justify="left", show_header=False)
            for name, value in row.items():
                grid.add_row(Text(visible(name)), Text(_cell(value)))
            console.print(grid)
    else:
        most = ROWS_SHOWN
        console.print(_across(found, rows[:most]))
    if len(rows) > most:
        console.print(f"the first {most} rows; --csv, --json or --parquet FILE gives all", highlight=False)


def _across(found: duckdb.DuckDBPyRelation, rows: list[dict[str, Any]]) -> Grid:
    grid = Grid()
    for name, type_ in zip(_names(found), found.types, strict=True):
        grid.add_column(Text(visible(name)), justify="left" if str(type_) in ("VARCHAR", "BOOLEAN") else "right")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row.values()))
    return grid


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), CHARACTERS_SHOWN)


def _catalog(rows: list[dict[str, str]]) -> Grid:
    grid = Grid()
    for name in ("view", "column", "type", "what it is"):
        grid.add_column(name)
    before = None
    for row in rows:
        if before not in (None, row["view"]):
            grid.add_section()
        grid.add_row("" if row["view"] == before else row["view"], row["column"], row["type"], Text(row["doc"]))
        before = row["view"]
    return grid


# --- responses ---

PAGE_TOKENS, ELSEWHERE = 60_000, 24  # of a page, beyond which it would be slow to open; responses to a prompt


@command
@click.argument("run")
@click.option("--iteration", type=click.IntRange(min=1), help="Which; the last one by default.")
@click.option("--row", "rows", type=click.IntRange(min=0), multiple=True, help="One response, with the numbers of each of "
              "its tokens; may be repeated.")
@click.option("--colour", "column", type=click.Choice(NUMBERS), default="kl", show_default=True, help="What tokens are "
              "coloured by.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="As one HTML file that needs no network.")
@click.option("--compare", "other", metavar="RUN", help="Another run, whose responses to the same prompts are beside them; "
              "with --html.")
@click.option("--replay", is_flag=True, help="Make the update once more, for each token's ratio and clip in each epoch.")
def inspect(
    run: str, iteration: int | None, rows: tuple[int, ...], column: str, html: Path | None, other: str | None, replay: bool,
    root: str,
) -> Answer:
    """Look at RUN's responses, token by token. In the terminal, or as a page."""
    from flows.views.inspection import responses, with_columns

    what = open_shown(root, run)
    others = [open_shown(root, other)] if other else []
    iteration = iteration or max(what.iterations(), default=0)
    found = _explained(responses)(what, iteration, None if replay else rows or None)
    if replay:
        found = [each for each in with_columns(found, _of_epochs(what, iteration)) if not rows or each.row in rows]
    if html is not None:
        return _page(what, iteration, found, others, html)
    if others:
        raise ConfigError("--compare shows two runs on a page: add --html FILE")
    from flows.cli.inspector import Inspector, print_responses
    from flows.views.inspection import elsewhere

    def data() -> list[dict[str, Any]]:
        return [asdict(each) for each in found]

    title = f"{run}, iteration {iteration}"
    if rows or not sys.stdout.isatty():
        return Answer(data, lambda console: print_responses(console, found, column, tokens=bool(rows)))

    def of_prompt(prompt_id: int) -> list[dict[str, Any]]:
        return elsewhere([what], {prompt_id}, ELSEWHERE).get(prompt_id, [])

    return Answer(data, lambda console: Inspector(title, found, column, of_prompt).run())


def _of_epochs(run: Run, iteration: int) -> dict[str, np.ndarray]:
    """Columns of an update that is made once more: how far each token's ratio is from 1, and whether it was clipped."""
    from flows.replay import replay

    epochs, same = replay(run, iteration)
    if not same:
        log.warning("the update gave other bytes than the run has: its ratios are those of this machine")
    found = {}
    for number, epoch in enumerate(epochs, start=1):
        found[f"ratio − 1, epoch {number}"] = epoch.ratio - 1
        found[f"clipped, epoch {number}"] = np.where(np.isnan(epoch.ratio), np.nan, epoch.clipped)
    return found


def _page(run: Run, iteration: int, found: list[Response], others: list[Run], file: Path) -> Answer:
    from flows.views.html_page import page
    from flows.views.inspection import beside, elsewhere

    sizes = list(accumulate(each.length for each in found))
    kept = found[: max(1, bisect_right(sizes, PAGE_TOKENS))]
    prompts = {each.prompt_id for each in kept}
    data = {"run": run.name, "iteration": iteration, "columns": list(kept[0].numbers),
            "beside": [{"run": other.name, "responses": [asdict(each) for each in beside(other, iteration, prompts)]}
                       for other in others],
            "responses": [asdict(each) for each in kept], "left_out": len(found) - len(kept),
            "elsewhere": elsewhere([run, *others], prompts, ELSEWHERE)}
    text = page("inspect.html", "inspect.js", data)
    write_text(file, text)
    size, all_of_them = len(text.encode()), f"{len(kept)} responses"
    said = all_of_them if len(kept) == len(found) else f"the first {len(kept)} of {len(found)} responses"
    return Answer({"file": str(file), "bytes": size, "responses": len(kept), "left_out": len(found) - len(kept)},
                  lambda console: console.print(f"{file}: iteration {iteration} of {run.name}, {said}, {size:,} bytes; open "
                                                "it in a browser", highlight=False, soft_wrap=True))
