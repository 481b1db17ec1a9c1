"""A run while it is trained, in the terminal: how far it is, its curves, the last samples, where the time goes."""

from __future__ import annotations

import contextlib
import time
from statistics import mean

from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text
from textual.renderables.sparkline import Sparkline

from flows.cli.display import number
from flows.runs.run import Run, lease_key
from flows.store.lease import holder_of
from flows.views.charts import Chart, curves, drawn
from flows.views.overview import time_spent
from flows.views.samples import Sample, evaluated, sampled
from flows.views.visible import visible
from schemas.artifacts import TrainState

EVERY = 1.0  # seconds between two looks at the store
WIDTH, HEIGHT = 38, 3  # characters of a curve, and its lines
CYAN = Color.parse("cyan")
SAMPLES = 4
BELOW = 8 + SAMPLES  # lines that are not curves', beside one a stage
RECENT = 5  # iterations that the time left is told from


def follow(run: Run, console: Console) -> None:
    """Returns when the run is finished, or at Ctrl-C; the last view stays on the screen."""
    states: list[TrainState] = []
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            there = states[-1].iteration if states else -1
            states += [run.state(iteration) for iteration in run.iterations() if iteration > there]
            live.update(frame(run, states, console.width, console.height), refresh=True)
            if run.finished_by(states[-1] if states else None):
                return
            time.sleep(EVERY)


def frame(run: Run, states: list[TrainState], width: int, height: int) -> RenderableType:
    """What fits into so many characters and lines."""
    if not states:
        return Text(f"{run.name}: to be prepared; {_who(run)}")
    last = states[-1]
    spent = [row for row in time_spent(run, last) if row["seconds"] > 0]
    columns = max(1, width // (WIDTH + 2))
    rows = max(1, (height - BELOW - len(spent)) // (HEIGHT + 2))
    shown = drawn(curves([run], [states]))[: columns * rows]
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for start in range(0, len(shown), columns):
        grid.add_row(*(_curve(chart) for chart in shown[start : start + columns]))
    return Group(_progress(run, states), "", grid, "", *_samples(run, states), "", _time(last, spent))


def _progress(run: Run, states: list[TrainState]) -> RenderableType:
    last, total = states[-1], max(run.config.iterations, states[-1].iteration)
    recent = [state.seconds for state in states[-RECENT:] if state.iteration]
    rate = sum(recent) / len(recent) if recent else None
    line = Grid.grid(padding=(0, 2, 0, 0))
    left = "" if rate is None else f"{rate:.1f} s an iteration, about {_duration(rate * (total - last.iteration))} left"
    if last.iteration >= total:
        left = "finished"
    line.add_row(Text(run.name, style="bold"), f"iteration {last.iteration}/{total}",
                 ProgressBar(max(total, 1), last.iteration, width=30, complete_style="cyan", finished_style="cyan"), left)
    return line if last.iteration >= total else Group(line, Text(_who(run), style="dim"))


def _who(run: Run) -> str:
    """What works on it now."""
    holder = holder_of(run.store, lease_key(run.name))
    return (f"trained by {visible(holder)}" if holder else
            f"nothing trains it now: baton train --run {run.name} goes on")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _curve(chart: Chart) -> RenderableType:
    """Its line of the most points as bars; the last value of each."""
    line = max(chart.lines, key=lambda one: len(one.y))
    last = ", ".join(f"{one.name} {number(one.y[-1])}".strip() for one in chart.lines if one.y)
    about = Text.assemble((chart.title, "bold"), f"  {last}", no_wrap=True, overflow="ellipsis")
    about.truncate(WIDTH, overflow="ellipsis")
    low, high = number(min(line.y)), number(max(line.y))
    ends = Text(f"{low} to {high}, iteration {line.iterations[0]} to {line.iterations[-1]}", style="dim")
    ends.truncate(WIDTH, overflow="ellipsis")
    bars = Sparkline(line.y, width=WIDTH, height=HEIGHT, min_color=CYAN, max_color=CYAN, summary_function=mean)
    return Group(about, bars, "", ends)  # the bars have no end of line of their own


def _samples(run: Run, states: list[TrainState]) -> list[RenderableType]:
    """Of the last evaluation, if there was one."""
    for state in reversed(states):
        if samples := list(evaluated(run, state, SAMPLES)):
            return [Text(f"held-out samples after iteration {state.iteration}", style="bold"), *map(_sample, samples)]
    if samples := list(sampled(run, states[-1], SAMPLES)):
        return [Text(f"sampled in iteration {states[-1].iteration}", style="bold"), *map(_sample, samples)]
    return []


def _sample(sample: Sample) -> Text:
    name, value = next(iter(sample.given.items()))
    prompt, response = (visible(" ".join(text.split()), 400) for text in (sample.prompt, sample.response))
    return Text.assemble((f"{name} {value:+.2f}  ", "cyan"), (prompt, "dim"), "  ", response, no_wrap=True,
                         overflow="ellipsis")


def _time(state: TrainState, spent: list[dict]) -> RenderableType:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_row(Text(f"time of iteration {state.iteration}", style="bold"))
    for row in spent:
        grid.add_row(row["stage"], ProgressBar(1.0, min(row["fraction"], 1.0), width=30, complete_style="cyan"),
                     f"{row['seconds']:.2f} s", f"{row['fraction']:.0%}")
    return grid
