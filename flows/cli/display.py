"""What the command line shows: tables and lines for people, nothing that a program would read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from flows.runs.diff import Difference
from flows.runs.gc import Garbage
from flows.runs.run import Run
from flows.tracking.tracking_uri import how_to_open
from flows.views.visible import visible
from schemas.artifacts import Produced, TrainState, short_digest
from schemas.stages import STAGES
from schemas.tables import EPISODE_FILM, Samples

SAMPLES_SHOWN = 5
SCORES = (("gold", "evaluate/gold"), ("reward", "evaluate/score"), ("KL, nats a response", "evaluate/kl"),
          ("wins against the start", "evaluate/win_rate"), ("response tokens", "evaluate/response_length"),
          ("ended by themselves", "evaluate/eos_fraction"), ("gold, likeliest tokens", "evaluate/greedy_gold"))
RETURNS = (("mean", "evaluate/episode_return"), ("σ", "evaluate/episode_return_std"),
           ("least", "evaluate/episode_return_min"), ("greatest", "evaluate/episode_return_max"),
           ("steps, mean", "evaluate/episode_length"))

HOW = {"made": "made", "found": "found, it was committed before", "adopted": "committed by another writer meanwhile",
       "reproduced": "reproduced, the same bytes", "different": "NOT reproduced, other bytes"}


def summary(console: Console, run: Run, before: TrainState, after: TrainState, last: TrainState) -> None:
    """The end of a run: held-out samples before and after, the scores, where the actor lies, MLflow's page.

    `before`, `after`: the first state and the last one that was evaluated; `last`: the latest.
    """
    if STAGES[run.config.kind]["evaluate"].table is Samples:
        console.print(_samples(run, before, after))
        console.print(_scores(before, after))
    else:
        console.print(_returns(before, after))
    if (picture := _picture(run, after)) is not None:
        console.print(Text(f"film    {picture}"), soft_wrap=True)
    console.print(Text(f"actor   {actor_folder(run, last)}"), soft_wrap=True)
    if (where := how_to_open(run)) is not None:
        console.print(Text(f"MLflow  {where}"), soft_wrap=True)


def actor_folder(run: Run, state: TrainState) -> str:
    """Where `from_pretrained` finds the actor."""
    return run.store.place(state.actor.artifact, state.actor.folder)


def _samples(run: Run, before: TrainState, after: TrainState) -> Grid:
    """The first held-out prompts, with the response and its gold score at the start and now."""
    old, new = (run.store.table(state.artifacts["evaluate"], Samples) for state in (before, after))
    grid = Grid(title="held-out samples", title_justify="left", show_lines=True, expand=True)
    for name, width in (("prompt", 3), ("before", 5), (f"after {after.iteration} iterations", 5)):
        grid.add_column(name, ratio=width)
    for i in np.unique(new.prompt_ids, return_index=True)[1][:SAMPLES_SHOWN]:
        texts = (f"{s.gold[i]:+.2f} {visible(s.response[i].strip(), newlines=True)}" for s in (old, new))
        grid.add_row(Text(visible(new.prompt[i], newlines=True)), *map(Text, texts))
    return grid


def _scores(before: TrainState, after: TrainState) -> Grid:
    grid = Grid(title="held-out scores", title_justify="left")
    for name in ("mean over samples", "before", "after"):
        grid.add_column(name, justify="left" if name.startswith("mean") else "right")
    there = [(label, key) for label, key in SCORES if key in after.metrics]
    for prefix, words in (("pass_at_", "pass@"), ("best_of_", "gold, best of "), ("judge_", "")):
        there += [(words + key.removeprefix(f"evaluate/{prefix}"), key) for key in after.metrics
                  if key.startswith(f"evaluate/{prefix}")]
    for label, key in there:
        grid.add_row(label, *(_with_interval(state.metrics, key) for state in (before, after)))
    grid.add_row("gold, σ of the samples", f"{before.metrics['evaluate/gold_std']:.3f}",
                 f"{after.metrics['evaluate/gold_std']:.3f}")
    return grid


def _with_interval(metrics: Mapping[str, float], key: str) -> str:
    """A mean, with its interval if there is one."""
    ends = [metrics[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in metrics]
    return number(metrics.get(key)) + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def _returns(before: TrainState, after: TrainState) -> Grid:
    grid = Grid(title="returns with the most likely actions", title_justify="left")
    for name in ("over episodes", "before", f"after {after.iteration} iterations"):
        grid.add_column(name, justify="left" if name.startswith("over") else "right")
    for label, key in RETURNS:
        grid.add_row(label, *(f"{state.metrics[key]:.2f}" for state in (before, after)))
    return grid


def _picture(run: Run, state: TrainState) -> str | None:
    """Where the animated picture of an evaluated episode lies, if there is one."""
    ref = state.artifacts["evaluate"]
    if EPISODE_FILM not in run.store.manifest(ref).digests():
        return None
    return run.store.place(ref, EPISODE_FILM)


def runs(rows: list[dict[str, Any]]) -> Grid:
    """All runs of a store."""
    grid = Grid()
    for name in ("run", "iterations", "reward", "KL", "gold", "created", "parent"):
        grid.add_column(name, justify="right" if name in ("iterations", "reward", "KL", "gold") else "left")
    for row in rows:
        grid.add_row(row["run"], f"{row['iteration']}/{row['iterations']}", number(row["reward"]), number(row["kl"]),
                     number(row["gold"]), row["created"], row["parent"] or "")
    return grid


def iterations(states: list[TrainState]) -> Grid:
    """A line per iteration; the columns that they have."""
    columns = (
        ("return", "rollout/episode_return"), ("evaluated", "evaluate/episode_return"), ("reward", "reward/score"),
        ("KL", "gae/kl"), ("gold", "evaluate/gold"), ("wins", "evaluate/win_rate"), ("entropy", "ppo/entropy"),
        ("approx KL", "ppo/approx_kl"), ("clipped", "ppo/clip_fraction"), ("expl. var.", "gae/explained_variance"),
        ("tokens", "rollout/response_length"))
    columns = [(label, key) for label, key in columns if any(key in state.metrics for state in states)]
    grid = Grid()
    for name in ("iteration", *(label for label, _ in columns), "seconds"):
        grid.add_column(name, justify="right")
    for state in states:
        numbers = (number(state.metrics.get(key)) for _, key in columns)
        grid.add_row(str(state.iteration), *numbers, f"{state.seconds:.1f}")
    return grid


def time_of(state: TrainState, rows: list[dict[str, Any]]) -> Grid:
    """Where an iteration's time went."""
    grid = Grid(title=f"iteration {state.iteration}", title_justify="left")
    unit = "tokens/s" if state.reference else "steps/s"
    for name in ("stage", "seconds", "fraction", unit, "bytes", "artifact"):
        grid.add_column(name, justify="left" if name in ("stage", "artifact") else "right")
    for row in rows:
        rate = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""
        grid.add_row(row["stage"], f"{row['seconds']:.2f}", f"{row['fraction']:.0%}", rate,
                     f"{row['bytes']:,}" if row["bytes"] is not None else "", row["artifact"] or "")
    return grid


def shard_times(rows: list[dict[str, Any]]) -> Grid:
    """How long the shards of an iteration's stages took."""
    grid = Grid(title="shards", title_justify="left")
    for name in ("stage", "shards", "mean, seconds", "slowest, seconds", "which", "idle, one each", "joined in, seconds"):
        grid.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        grid.add_row(row["stage"], str(row["shards"]), f"{row['mean_seconds']:.2f}", f"{row['slowest_seconds']:.2f}",
                     str(row["slowest"]), f"{row['idle']:.0%}", f"{row['joined_seconds']:.2f}")
    return grid


def metrics(state: TrainState) -> Grid:
    """Every metric of an iteration."""
    grid = Grid()
    grid.add_column("metric")
    grid.add_column("value", justify="right")
    for key, value in state.metrics.items():
        grid.add_row(key, f"{value:.6g}")
    return grid


def stage(
    console: Console, what: str, produced: Produced, metrics: Mapping[str, tuple[float | None, float]], *, loaded: int,
    new: bool,
) -> None:
    """What a rerun came to. `metrics`: name → (in the run, now); `loaded`: models; `new`: not the recorded artifact."""
    models = f"{loaded} models loaded" if loaded else "no model loaded"
    if produced.how == "reproduced":
        console.print(f"{what}: reproduced, {_files(produced)}, the same bytes, {produced.ref.short}; {models}",
                      highlight=False)
    elif produced.how == "different":
        console.print(f"{what}: NOT reproduced, {produced.ref.short}; {models}", highlight=False, soft_wrap=True)
        _differences(console, produced)
    else:
        console.print(f"{what}: a new artifact, {produced.ref.short}; {models}; the run is as it was", highlight=False)
    if new:
        console.print(_compared(metrics))


def performed(console: Console, produced: Produced) -> None:
    """What came of a call."""
    console.print(f"{produced.ref.short}: {HOW[produced.how]}, {_files(produced)}", highlight=False)
    if produced.how == "different":
        _differences(console, produced)


def _files(produced: Produced) -> str:
    return f"{produced.files} file{'s' if produced.files > 1 else ''}"


def _digest(written: str | None) -> str:
    return "no such file" if written is None else short_digest(written)


def _differences(console: Console, produced: Produced) -> None:
    for path, (old, now) in produced.different.items():
        console.print(f"  {path}: committed {_digest(old)}, now {_digest(now)}",
                      highlight=False, soft_wrap=True)
    console.print(f"  the new files are in {produced.folder}", highlight=False, soft_wrap=True)


def difference(console: Console, a: Run, b: Run, found: Difference | None) -> None:
    """Where two runs differ first."""
    if found is None:
        common = {*a.iterations()} & {*b.iterations()}
        console.print(f"{a.name} and {b.name}: the same bytes in all {len(common)} states that both have", highlight=False)
        return
    where = f"row {found.row}, column {found.column}" if found.row is not None else found.column or ""
    place = f", place {found.place}" if found.place is not None else ""
    console.print(f"{a.name} and {b.name} differ first in iteration {found.iteration}, stage {found.stage}: "
                  f"{', '.join(part for part in (found.file, where) if part)}{place}", highlight=False, soft_wrap=True)
    console.print(f"  {a.name}: {found.a}\n  {b.name}: {found.b}", highlight=False, markup=False, soft_wrap=True)
    for setting in found.settings:
        console.print(f"  setting {setting}", highlight=False, markup=False, soft_wrap=True)
    if found.inputs:
        console.print(f"  other inputs: {', '.join(found.inputs)}", highlight=False)


def garbage(console: Console, rows: list[Garbage], younger: list[Garbage], hours: float, dry_run: bool) -> None:
    """What goes, and how much that is; and what stays because it is `younger` than so many hours."""
    for one in rows:
        console.print(f"{one.kind:<10} {one.bytes:>15,} bytes  {one.what}", highlight=False, markup=False, soft_wrap=True)
    total = sum(one.bytes for one in rows)
    done = "would be removed; nothing was" if dry_run else "removed"
    console.print(f"{len(rows)} things, {total:,} bytes {done}", highlight=False)
    if younger:
        console.print(f"{len(younger)} more, {sum(one.bytes for one in younger):,} bytes, are younger than {hours:g} hours, "
                      "or a run is at work: --older-than 0 takes them when none is", highlight=False, soft_wrap=True)


def _compared(metrics: Mapping[str, tuple[float | None, float]]) -> Grid:
    grid = Grid()
    for column in ("metric", "in the run", "with these settings"):
        grid.add_column(column, justify="left" if column == "metric" else "right")
    for name, (recorded, value) in metrics.items():
        grid.add_row(name, number(recorded), number(value))
    return grid


def number(value: float | None) -> str:
    """To three places, or two digits where that would show nothing."""
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
