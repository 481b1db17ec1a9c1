"""A run while it is trained, in the terminal: how far it is, its curves, the last samples, where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

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
from schemas.errors import StoreError

EVERY = 1.0  # seconds between two looks at the store
HOLDER_EVERY = 10.0  # and between two questions who trains it, which cost a bucket some requests
CYAN = Color.parse("cyan")
WIDTH, HEIGHT = 38, 3  # characters of a curve, and its lines
CURVE = HEIGHT + 2  # lines of one, with what it is above and its ends below
SAMPLES = 4
RECENT = 5  # iterations that the time left is told from


def follow(run: Run, console: Console) -> None:
    """Returns when the run has its last iteration and nothing trains it, or at Ctrl-C; the last view stays on the screen."""
    states: list[TrainState] = []
    holder, asked = holder_now(run), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            there = states[-1].iteration if states else -1
            new = [run.state(iteration) for iteration in run.iterations() if iteration > there]
            states += new
            ended = run.finished_by(states[-1] if states else None)
            before = holder
            if time.monotonic() - asked >= HOLDER_EVERY or (ended and new):
                holder, asked = holder_now(run), time.monotonic()
            if new or not states or holder != before:
                live.update(frame(run, states, holder, console.width, console.height), refresh=True)
            if ended and holder is None:
                return
            time.sleep(EVERY)


def holder_now(run: Run) -> str | None:
    """The process that trains it, if that can be told."""
    with contextlib.suppress(StoreError):
        return holder_of(run.store, lease_key(run.name))
    return None


def frame(run: Run, states: Sequence[TrainState], holder: str | None, width: int, height: int) -> RenderableType:
    """What fits into so many characters and lines: progress, a row of curves, times, samples, then more curves."""
    if not states:
        return Text(f"{run.name}: to be prepared; {_who(run, holder)}", overflow="ellipsis", no_wrap=True)
    last, columns = states[-1], max(1, width // (WIDTH + 2))
    found = drawn(curves([run], [list(states)]))
    left, rows = height - 3, 1  # the last line is the terminal's
    left -= CURVE + 1
    spent = [row for row in time_spent(run, last) if row["seconds"] > 0][: max(0, left - 2)]
    left -= len(spent) + 2 if spent else 0
    samples = _samples(run, states)[: max(0, left - 1)]
    left -= len(samples) + 1
    rows += max(0, left) // CURVE
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for start in range(0, min(len(found), columns * rows), columns):
        grid.add_row(*(_curve(chart, min(WIDTH, width)) for chart in found[start : start + columns]))
    parts = [_progress(run, states, width), Text(_who(run, holder), style="dim", overflow="ellipsis", no_wrap=True), grid]
    parts += ["", *samples] if samples else []
    parts += ["", _time(last, spent)] if spent else []
    return Group(*parts)


def _progress(run: Run, states: Sequence[TrainState], width: int) -> RenderableType:
    last, total = states[-1].iteration, run.config.iterations
    recent = [state.seconds for state in states[-RECENT:] if state.iteration]
    rate = mean(recent) if recent else None
    line = Grid.grid(padding=(0, 2, 0, 0))
    about = [Text(run.name, style="bold"), f"iteration {last}" if last > total else f"iteration {last}/{total}"]
    if width >= 80:
        about.append(ProgressBar(max(total, last, 1), last, width=30, complete_style="cyan", finished_style="cyan"))
    if rate is not None:
        about.append(f"{rate:.1f} s each" + (f", about {_duration(rate * (total - last))} left" if last < total else ""))
    line.add_row(*about)
    return line


def _who(run: Run, holder: str | None) -> str:
    """What works on it."""
    return f"trained by {visible(holder)}" if holder else f"no process holds it; baton train --run {run.name} goes on"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _curve(chart: Chart, width: int) -> RenderableType:
    """Its line of the most points as bars; the last value of each."""
    line = max(chart.lines, key=lambda one: len(one.y))
    last = ", ".join(f"{one.name} {number(one.y[-1])}".strip() for one in chart.lines if one.y)
    about = Text.assemble((chart.title, "bold"), f"  {last}")
    about.truncate(width, overflow="ellipsis")
    low, high = number(min(line.y)), number(max(line.y))
    ends = Text(f"{low} to {high}, iteration {line.iterations[0]} to {line.iterations[-1]}", style="dim")
    ends.truncate(width, overflow="ellipsis")
    bars = Sparkline(line.y, width=width, height=HEIGHT, min_color=CYAN, max_color=CYAN, summary_function=mean)
    return Group(about, bars, "", ends)  # the bars have no end of line of their own


def _samples(run: Run, states: Sequence[TrainState]) -> list[RenderableType]:
    """Of the last evaluation, if there was one."""
    last = next((state for state in reversed(states) if "evaluate" in state.artifacts), None)
    if last is not None:
        return [Text(f"evaluated after iteration {last.iteration}", style="bold"),
                *map(_sample, evaluated(run, last, SAMPLES))]
    samples = list(sampled(run, states[-1], SAMPLES))
    return [Text(f"sampled in iteration {states[-1].iteration}", style="bold"), *map(_sample, samples)] if samples else []


def _sample(sample: Sample) -> Text:
    name, value = next(iter(sample.given.items()))
    prompt, response = (visible(" ".join(text.split()), 400) for text in (sample.prompt, sample.response))
    return Text.assemble((f"{name} {value:+.2f}  ", "cyan"), (prompt, "dim"), "  ", response, no_wrap=True,
                         overflow="ellipsis")


def _time(state: TrainState, spent: Sequence[dict[str, Any]]) -> RenderableType:
    """A line, and one a stage."""
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for row in spent:
        grid.add_row(row["stage"], f"{row['seconds']:.2f} s", f"{row['fraction']:.0%}",
                     ProgressBar(1.0, min(row["fraction"], 1.0), width=10, complete_style="cyan"))
    return Group(Text(f"time of iteration {state.iteration}", style="bold"), grid)
