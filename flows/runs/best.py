"""The best iteration of a run: that with the greatest value of the metric which the config names."""

from __future__ import annotations

import difflib

from flows.runs.run import Run
from schemas.artifacts import Best, TrainState
from schemas.errors import ConfigError
from schemas.settings import RunConfig
from schemas.stages import STAGES


def best_after(run: Run, before: TrainState | None, state: TrainState) -> Best | None:
    """The best of all states up to `state`, the latest of equals; `before`: the one before it."""
    metric = run.config.best_metric
    last = before and best_by(run, before)
    value = state.metrics.get(metric)
    if value is None or (last is not None and last.value > value):
        return last
    return Best(metric=metric, value=value, iteration=state.iteration)


def best_by(run: Run, last: TrainState) -> Best | None:
    """The best of all states of a run whose last one is `last`, by the metric that is asked for now."""
    known = "best" in last.model_fields_set and (last.best is None or last.best.metric == run.config.best_metric)
    return last.best if known else best_of(run)  # another metric was asked for, or the format did not have it


def best_of(run: Run) -> Best | None:
    """The best of all states that there are."""
    metric = run.config.best_metric
    found = [Best(metric=metric, value=state.metrics[metric], iteration=state.iteration) for state in run.states()
             if metric in state.metrics]
    return max(found, key=lambda best: (best.value, best.iteration), default=None)


def check_best(config: RunConfig) -> None:
    """Raises `ConfigError` if the config's metric is one that no stage measures."""
    stage, _, name = config.best_metric.partition("/")
    stages = STAGES[config.kind]
    fields = stages[stage].metrics.model_fields if stage in stages else {}
    if name in fields or any(name.startswith(f"{field}_") and "dict" in str(fields[field].annotation) for field in fields):
        return
    there = [f"{each}/{field}" for each in stages for field in stages[each].metrics.model_fields]
    near = difflib.get_close_matches(config.best_metric, there, 3, 0.3)
    raise ConfigError(f"tracking.best={config.best_metric!r}: no stage of this run measures it"
                      + (f"; near it are {', '.join(near)}" if near else ""))
