"""Commands that compute over saved artifacts with other settings: `baton what-if`, `baton rescore`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from flows.cli.command import SETTINGS, Answer, command, open_existing
from flows.cli.display import number
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from flows.what_if import Agreement, Variant

METRICS_SHOWN = 8


@command
@click.argument("run")
@click.option("--iteration", type=click.IntRange(min=0), required=True, help="Whose saved artifacts it reads.")
@click.option("--grid", "grids", multiple=True, required=True, metavar="KEY=VALUE,VALUE", help="A setting and its values; "
              "of several each combination.")
@click.option("--stage", "stage", metavar="STAGE", help="Which stage; that of the settings' section by default.")
def what_if(run: str, iteration: int, grids: tuple[str, ...], stage: str | None, root: str) -> Answer:
    """One stage of RUN for each setting of a grid. Over what was sampled and scored; the run stays as it is."""
    from flows.what_if import grid_of, stage_of
    from flows.what_if import what_if as variants

    what, grid = open_existing(root, run), grid_of(grids)
    stage = stage or stage_of(what, grid)
    before = what.store.manifest(what.recorded(stage, iteration)).metrics
    found = list(variants(what, stage, iteration, grid))
    data = {"run": run, "stage": stage, "iteration": iteration, "recorded": before, "variants": [
        {"settings": each.settings, "artifact": str(each.ref), "how": each.how, "metrics": each.metrics} for each in found]}
    return Answer(data, lambda console: _print_variants(console, f"{stage} of iteration {iteration}", before, found))


def _print_variants(console: Console, what: str, before: dict[str, float], found: list[Variant]) -> None:
    """The metrics that the settings change most, beside the run's."""
    names = {name for each in found for name in each.metrics}
    rows = [before, *(each.metrics for each in found)]
    spread = {name: np.ptp(values) / (np.abs(values).max() or 1) for name in names
              if all(name in each.metrics for each in found)
              and len(values := [row[name] for row in rows if name in row]) > 1}
    shown = [name for name in found[0].metrics if spread.get(name, 0) > 1e-9]
    kept = sorted(shown, key=lambda name: -spread[name])[:METRICS_SHOWN]
    grid = Grid(title=what, title_justify="left")
    grid.add_column("settings")
    for name in (columns := [name for name in shown if name in kept]):
        grid.add_column(name, justify="right")
    grid.add_column("artifact")
    grid.add_row("as in the run", *(number(before.get(name)) for name in columns), "")
    for each in found:
        grid.add_row(", ".join(each.settings), *(number(each.metrics[name]) for name in columns), each.ref.short)
    console.print(grid)
    if not columns:
        console.print("no metric differs", highlight=False)
    elif len(shown) > len(kept):
        console.print(f"{len(shown) - len(kept)} more metrics differ: --json has them all", highlight=False)


@command
@click.argument("run")
@SETTINGS
@click.option("--iteration", "iterations", type=click.IntRange(min=1), multiple=True, help="Which; all by default.")
def rescore(run: str, settings: tuple[str, ...], iterations: tuple[int, ...], root: str) -> Answer:
    """RUN's responses under another reward. How far it agrees with the one that they were trained on; nothing is sampled."""
    from flows.what_if import rescore as agreements

    what = open_existing(root, run)
    if what.config.kind != "language":
        raise ConfigError(f"rescore: run {run!r} is a control task, whose rewards are its environment's")
    if not settings:
        raise ConfigError("rescore: name the other reward, for example --set reward.components.length.source=length")
    there = list(iterations) or [iteration for iteration in what.iterations() if iteration > 0]
    found = list(agreements(what, settings, there))
    return Answer([asdict(each) for each in found], lambda console: console.print(_agreements(found)))


def _agreements(found: list[Agreement]) -> Grid:
    grid = Grid()
    columns: dict[str, Any] = {"iteration": "iteration", "responses": "responses", "score": "before", "other score": "after",
                               "correlation": "correlation", "rank correlation": "rank_correlation",
                               "same order, to one prompt": "same_order"}
    for name in columns:
        grid.add_column(name, justify="right")
    for each in found:
        grid.add_row(*(str(value) if isinstance(value := getattr(each, name), int) else number(value)
                       for name in columns.values()))
    return grid
