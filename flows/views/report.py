"""`baton report`: a run, or two beside each other, as one page: what is wrong, curves, samples, what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flows.runs.run import Run
from flows.views.charts import Chart, charts
from flows.views.doctor import Examination, examine
from flows.views.html_page import page
from flows.views.lacking import lacking
from flows.views.sql import Database
from flows.views.visible import visible
from schemas.artifacts import TrainState
from schemas.config import differences
from schemas.errors import ConfigError

SHOWN, CHARACTERS, TEXT = 12, 400, 2_500_000
"""Samples of an iteration, characters of a text, and of all samples on a page."""
EXTREMES = 6  # samples that are best, worst, most changed


def report(run: Run, other: Run | None = None, found: Examination | None = None) -> str:
    """The page. `found`: of the run, if it was examined. Raises `ConfigError` where nothing is prepared yet."""
    runs = [run, *([other] if other else [])]
    states = [each.states() for each in runs]
    for each, some in zip(runs, states, strict=True):
        if not some:
            raise ConfigError(f"run {each.name!r} is not prepared yet; baton train --run {each.name} goes on")
        if not any(each.store.find(ref) for state in some for ref in state.artifacts.values()):
            raise ConfigError(f"run {each.name!r}: none of its artifacts is in the store; baton verify {each.name} lists "
                              "them")
    samples, kept = _samples(run, states[0])
    curves = [asdict(chart) for chart in charts(runs, states)]
    data = {"runs": [each.name for each in runs], "charts": curves, "samples": samples, "kept": kept,
            "kind": run.config.kind, "beside": None}
    if other is not None and other.config.kind == run.config.kind:
        data["beside"] = _samples(other, states[1])[0]
    facts = [_facts(each, some) for each, some in zip(runs, states, strict=True)]
    examinations = {each.name: found if found and each is run else examine(each, some)
                    for each, some in zip(runs, states, strict=True)}
    return page("report.html", "report.js", data, facts=facts, examinations=examinations,
                extremes=_extremes(run, states[0]), changed=_changed(run, other) if other else None)


def write_pictures(run: Run, other: Run | None, folder: Path) -> list[Path]:
    """The charts as PNG files, 300 dots an inch."""
    from matplotlib.figure import Figure

    runs = [run, *([other] if other else [])]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts(runs, [each.states() for each in runs]):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        _draw(figure.subplots(), chart, len(runs) > 1)
        written.append(folder / f"{chart.file}.png")
        figure.savefig(written[-1], dpi=300)
    return written


def _draw(axes: Any, chart: Chart, several: bool) -> None:
    for line in chart.lines:
        name = f"{line.run}: {line.name}" if several else line.name
        (drawn,) = axes.plot(line.x, line.y, label=name, linewidth=1.2, marker="." if len(line.y) < 40 else None)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.unit, fontsize="small")
    if len(chart.lines) > 1:
        axes.legend(fontsize="x-small", frameon=False)


# --- samples ---

def _samples(run: Run, states: list[TrainState]) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Iteration → some of its samples, the same prompts in each, or of its rollout where it was not evaluated; what was left
    out, in words."""
    if run.config.kind != "language":
        return _episodes(run, states), ""
    database = Database([run], {run.name: states})
    held_out, rolled = (database.sql(_first_of(query)).to_arrow_table().to_pylist() for query in (
        "SELECT row_id, iteration, coalesce(prompt_id, row_id) AS prompt_id, prompt, response, score, gold, kl FROM samples",
        "SELECT row_id, iteration, prompt_id, prompt, response, score, NULL AS gold, kl FROM responses"))
    found: dict[int, list[dict[str, Any]]] = {}
    for source, rows in (("held-out", held_out), ("rollout", rolled)):
        of_source: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            of_source.setdefault(row.pop("iteration"), []).append(row | {"source": source} | _shown(row))
        found = of_source | found
    return _within(found)


def _first_of(query: str) -> str:
    """The first sample to each of an iteration's first prompts, which are the same ones in each evaluation."""
    one_each = f"{query} QUALIFY row_number() OVER (PARTITION BY iteration, prompt_id ORDER BY row_id) = 1"
    few = f"QUALIFY row_number() OVER (PARTITION BY iteration ORDER BY row_id) <= {SHOWN}"
    return f"SELECT * FROM ({one_each}) {few} ORDER BY iteration, row_id"


def _within(found: dict[int, list[dict[str, Any]]]) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Of so many iterations that their text is no more than a page can hold."""
    sizes = {i: sum(len(row["prompt"]) + len(row["response"]) + 80 for row in rows) for i, rows in found.items()}
    stride = max(1, -(-sum(sizes.values()) // TEXT))
    there = sorted(found)
    kept = {str(i): found[i] for place, i in enumerate(there) if place % stride == 0 or i == there[-1]}
    whose = f"every {stride}th iteration" if stride > 1 else "all iterations"
    return kept, f"Samples of {whose} are on this page, up to {SHOWN} of each; baton inspect and baton sql show all."


def _episodes(run: Run, states: list[TrainState]) -> dict[str, list[dict[str, Any]]]:
    rows = Database([run], {run.name: states}).sql(
        "SELECT iteration, seed, episode_return, length, terminated FROM returns ORDER BY iteration, row_id").fetchall()
    found: dict[str, list[dict[str, Any]]] = {}
    for iteration, seed, episode_return, length, terminated in rows:
        some = found.setdefault(str(iteration), [])
        if len(some) < SHOWN:
            some.append({"seed": seed, "episode_return": episode_return, "length": length, "terminated": terminated})
    return found


def _extremes(run: Run, states: list[TrainState]) -> dict[str, list[dict[str, Any]]]:
    """Held-out samples at the start, half-way and at the end: the best, the worst, and those that changed most."""
    evaluated = [state for state in states if "evaluate" in state.artifacts]
    if run.config.kind != "language" or len(evaluated) < 2:
        return {}
    before, during, after = (evaluated[i] for i in (0, len(evaluated) // 2, -1))
    rows = {state.iteration: _by_prompt(run, state) for state in (before, during, after)}
    first, middle, last = (rows[state.iteration] for state in (before, during, after))
    shared = [prompt for prompt in last if prompt in first and prompt in middle]
    together = [{"prompt": last[i]["prompt"], "iterations": [before.iteration, during.iteration, after.iteration],
                 "samples": [first[i], middle[i], last[i]], "change": last[i]["gold"] - first[i]["gold"]} for i in shared]
    by_gold = sorted(together, key=lambda each: -each["samples"][-1]["gold"])
    by_change = sorted(together, key=lambda each: -abs(each["change"]))
    return {"Best": by_gold[:EXTREMES], "Worst": by_gold[::-1][:EXTREMES], "Most changed": by_change[:EXTREMES]}


def _by_prompt(run: Run, state: TrainState) -> dict[int, dict[str, Any]]:
    """The first sample to each held-out prompt."""
    rows = Database([run], {run.name: [state]}).sql(
        "SELECT coalesce(prompt_id, row_id) AS prompt_id, prompt, response, score, gold FROM samples ORDER BY row_id DESC")
    return {row["prompt_id"]: row | _shown(row) for row in rows.to_arrow_table().to_pylist()}


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {name: visible(row[name], CHARACTERS, newlines=True) for name in ("prompt", "response")}


# --- where it came from ---

def _facts(run: Run, states: list[TrainState]) -> dict[str, Any]:
    last = states[-1]
    made = next(manifest for state in reversed(states) for ref in state.artifacts.values()
                if (manifest := run.store.find(ref)) is not None)
    between, threads = [state.seconds for state in states[1:]], made.environment.threads
    return {
        "name": run.name, "kind": run.config.kind, "created": run.record.created, "parent": run.record.parent,
        "done": last.iteration, "iterations": max(last.iteration, run.config.iterations), "store": run.store.absolute,
        "seconds": float(np.median(between)) if between else None, "total": sum(state.seconds for state in states),
        "device": f"{made.environment.device_name}, {threads} thread{'s' * (threads > 1)}",
        "packages": made.environment.packages,
        "python": made.environment.python, "inputs": {role: ref.short for role, ref in run.inputs.items()},
        "best": last.best, "config": _yaml(run.config.model_dump(mode="json", exclude_defaults=True)),
        "lacking": lacking(run, states), "artifacts": {stage: ref.short for stage, ref in last.artifacts.items()}}


def _yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _changed(run: Run, other: Run) -> Sequence[str]:
    """Settings that the other run has otherwise."""
    if run.config.kind != other.config.kind:
        return [f"{run.name} is a {run.config.kind} run, {other.name} a {other.config.kind} run"]
    return differences(run.config.decides(), other.config.decides())
