"""What looking at a large run takes: SQL over ten million tokens, the report of a thousand iterations.

`make bench ONLY="sql report"`; `python tests/benchmarks/view_speed.py STORE` leaves the run `tiny` of a thousand iterations
in a store, for `make pages RUN=tiny STORE=…`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rows import Row

ROOT = Path(__file__).parents[2]
TOKENS, ITERATIONS, RESPONSES = 10_000_000, 1_000, 190
QUESTION = "SELECT iteration, position, avg(kl) FROM tokens GROUP BY ALL ORDER BY ALL"


def rows(rounds: int) -> list[Row]:
    return [
        Row("sql", "SQL: mean KL by position and iteration, 10 million tokens in 100 iterations: seconds", 2.0, "<=",
            lambda: sql(rounds)),
        Row("report", f"report of {ITERATIONS:,} iterations, {ITERATIONS * RESPONSES:,} responses: MB", 5.0, "<=", report),
    ]


def sql(rounds: int) -> tuple[float, str]:
    """Seconds of the question once the run is open, and of the whole command."""
    with TemporaryDirectory() as store:
        found = large_run(Path(store), iterations=100, tokens=TOKENS // 100)
        from flows.views import open_run

        view, asked, commands = open_run(store, "tiny"), [], []
        for _ in range(rounds):
            began = time.perf_counter()
            answer = view.sql(QUESTION).to_arrow_table()
            asked.append(time.perf_counter() - began)
            began = time.perf_counter()
            baton("sql", "tiny", QUESTION, "--store", store)
            commands.append(time.perf_counter() - began)
        ((count,),) = view.sql("SELECT count(*) FROM tokens").fetchall()
    if count < found or not len(answer):
        raise RuntimeError(f"{count} tokens where {found} and more were expected")
    return statistics.median(asked), f"{count:,} tokens; the command {statistics.median(commands):.1f} s"


def report() -> tuple[float, str]:
    """Megabytes, and the seconds that it takes to make."""
    with TemporaryDirectory() as scratch:
        large_run(Path(scratch, "store"), iterations=ITERATIONS, tokens=RESPONSES * 10)
        page, began = Path(scratch, "report.html"), time.perf_counter()
        baton("report", "tiny", "--store", Path(scratch, "store"), "--html", page, "--quiet")
        return page.stat().st_size / 1e6, f"made in {time.perf_counter() - began:.0f} s"


def baton(*arguments: object) -> None:
    """With a server of its own, where the tests' own example has named theirs."""
    own = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    subprocess.run([sys.executable, "-m", "flows.cli.main", *map(str, arguments)], check=True, cwd=ROOT, env=own,
                   stdout=subprocess.DEVNULL)


def large_run(store: Path, iterations: int, tokens: int) -> int:
    """The run `tiny`: one iteration of the tests' example, repeated to at least so many response tokens in each of so many
    iterations, with other numbers in each. How many response tokens it has."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_example

    from flows.runs.produce import StageOutput, produce
    from flows.runs.run import open_run
    from flows.store.store import Store
    from schemas.artifacts import call_of
    from schemas.stages import STAGES

    example = write_example(store / "example" / "tiny")
    baton("train", example, "--iterations", 1, "--store", store, "--quiet", "--set", "tracking.enabled=false")
    shutil.rmtree(store / "example")
    run, draw = open_run(Store(str(store)), "tiny"), np.random.default_rng(0)
    first = run.state(1)
    tables = {stage: run.store.table(ref, STAGES["language"][stage].table) for stage, ref in first.artifacts.items()
              if stage in ("rollout", "reference", "reward", "value", "gae")}
    copies = -(-tokens // len(tables["rollout"].response_tokens.values))
    tables = {stage: type(table).joined([table] * copies) for stage, table in tables.items()}
    calls = {stage: call_of(run.store.manifest(first.artifacts[stage]), run.store.absolute) for stage in tables}

    def commit(stage: str, iteration: int) -> object:
        fields = {name: getattr(calls[stage], name) for name in type(calls[stage]).model_fields}
        call = type(calls[stage])(**fields | {"seed": iteration, "iteration": iteration})

        def make(attempt: object) -> StageOutput:
            attempt.table(with_noise(stage, iteration))
            return StageOutput()
        return produce(run.store, call, make).ref

    def with_noise(stage: str, iteration: int) -> object:
        table = tables[stage]
        if stage != "gae":
            return table
        moved = table.kl.values + np.float32(iteration) * draw.random(len(table.kl.values), np.float32)
        return replace(table, kl=table.kl.with_values(moved))

    for iteration in range(2, iterations + 1):
        made = {stage: commit(stage, iteration) for stage in tables}
        metrics = {name: value + 0.1 * draw.normal() for name, value in first.metrics.items()}
        run.save(first.model_copy(update={"iteration": iteration, "artifacts": first.artifacts | made, "metrics": metrics}))
    return len(tables["rollout"].response_tokens.values) * (iterations - 1)


if __name__ == "__main__":
    large_run(Path(sys.argv[1]), ITERATIONS, RESPONSES * 10)
