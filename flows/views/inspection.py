"""The responses of an iteration, token by token, as people look at them: `baton inspect`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flows.runs.run import Run
from flows.views.columns import NUMBERS
from flows.views.run_tables import parts
from flows.views.sql import Database
from flows.views.thinning import thinned
from flows.views.visible import visible
from schemas.errors import ConfigError


@dataclass(frozen=True)
class Response:
    """One response with what is known of its tokens. All text is as `visible` gives it."""

    row: int
    prompt_id: int
    prompt: str
    response: str
    finish_reason: str
    length: int
    score: float | None
    raw_score: float | None
    kl: float | None
    raw_advantage: float | None
    components: dict[str, float]
    tokens: list[str]
    sampled: list[bool] | None
    numbers: dict[str, list[float | None]]
    """Column of `tokens` → (R,)."""


def responses(run: Run, iteration: int, rows: tuple[int, ...] | None = None) -> list[Response]:
    """Those of an iteration, in order of rows; `rows`: those alone.

    Raises `ConfigError` where there are none, saying what there is instead.
    """
    state = run.state(iteration)
    if run.config.kind != "language":
        raise ConfigError(f"inspect: run {run.name!r} is a control task, which has no responses; baton sql {run.name} "
                          "\"FROM steps\" shows its steps")
    if next(parts(run, "rollouts", [state]), None) is None:
        there = [part.iteration for part in parts(run, "rollouts", run.states())]
        has = f"{there[0]} to {there[-1]} have" if there else "no iteration has"
        raise ConfigError(f"inspect: iteration {iteration} of run {run.name!r} has no rollouts; {has}")
    database = Database([run], {run.name: [state]})
    found = database.sql("SELECT * FROM responses ORDER BY row_id").to_arrow_table().to_pylist(maps_as_pydicts="strict")
    if rows is not None and (unknown := set(rows) - {each["row_id"] for each in found}):
        raise ConfigError(f"inspect: iteration {iteration} of run {run.name!r} has no row {min(unknown)}; it has 0 to "
                          f"{len(found) - 1}")
    columns = ", ".join(f'"{name}"' for name in NUMBERS)
    tokens = database.sql(f"SELECT row_id, text, sampled, {columns} FROM tokens ORDER BY row_id, position").to_arrow_table()
    ends = np.searchsorted(tokens["row_id"].to_numpy(), np.arange(len(found) + 1))
    return [_response(each, tokens.slice(begin, end - begin))
            for each, begin, end in zip(found, ends[:-1], ends[1:], strict=True) if rows is None or each["row_id"] in rows]


def _response(found: dict[str, Any], tokens: Any) -> Response:
    sampled = tokens["sampled"].to_pylist()
    return Response(
        row=found["row_id"], prompt_id=found["prompt_id"], prompt=visible(found["prompt"], newlines=True),
        response=visible(found["response"], newlines=True), finish_reason=found["finish_reason"], length=found["length"],
        score=found["score"], raw_score=found["raw_score"], kl=found["kl"], raw_advantage=found["raw_advantage"],
        components=found["components"] or {}, tokens=[visible(text, newlines=True) for text in tokens["text"].to_pylist()],
        sampled=None if None in sampled else sampled, numbers={name: tokens[name].to_pylist() for name in NUMBERS})


def with_columns(found: list[Response], columns: dict[str, np.ndarray]) -> list[Response]:
    """With more numbers of each token: name → (n,), of all tokens of the iteration in order; NaN is none."""
    ends, more = np.cumsum([len(each.tokens) for each in found]), []
    for each, end in zip(found, ends, strict=True):
        own = {name: values[end - len(each.tokens) : end].tolist() for name, values in columns.items()}
        more.append({name: [None if x != x else x for x in values] for name, values in own.items()})
    return [replace(each, numbers=each.numbers | own) for each, own in zip(found, more, strict=True)]


def beside(other: Run, iteration: int, prompt_ids: set[int]) -> list[Response]:
    """Another run's responses to these prompts in that iteration; none if it has no such iteration."""
    if iteration not in other.iterations() or next(parts(other, "rollouts", [other.state(iteration)]), None) is None:
        return []
    return [each for each in responses(other, iteration) if each.prompt_id in prompt_ids]


def elsewhere(runs: list[Run], prompt_ids: set[int], most: int) -> dict[int, list[dict[str, Any]]]:
    """Responses to the same prompts in all iterations, by prompt id; of more than `most` to a prompt, every so many.

    Of the first run, and those that have its prompts.
    """
    runs = [run for run in runs if run.inputs.get("prompts") == runs[0].inputs.get("prompts")]
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if not prompt_ids:
        return found
    rows = Database(runs).sql("SELECT prompt_id, run, iteration, score, kl, response FROM responses WHERE prompt_id IN "
                              f"({', '.join(map(str, sorted(prompt_ids)))}) ORDER BY prompt_id, iteration, run, row_id")
    for batch in rows.to_arrow_reader():
        for row in batch.to_pylist():
            found[row["prompt_id"]].append(row)
    return {prompt: [row | {"response": visible(row["response"], 400)} for row in thinned(some, most)]
            for prompt, some in found.items()}
