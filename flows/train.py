"""A whole run: prepare, then fold TrainState through the iterations."""

from __future__ import annotations

import gc

from prefect import flow

from flows.iterate import at_work, prepare, run_iteration
from flows.orchestration import page
from flows.runs.retention import retain
from flows.runs.start import Source
from schemas.artifacts import TrainState
from schemas.settings import NO_OVERRIDES, Name, Overrides


@flow(name="train", flow_run_name="{run}-train", persist_result=False)
def train_flow(
    run: Name, config: Source | None = None, overrides: Overrides = NO_OVERRIDES, store: str | None = None
) -> TrainState:
    """A whole run, or what is left of it. Goes on where it stopped: what is committed is found, not computed again.

    Args:
        run: The run's name.
        config: What to make the run of, if it is not there: an example's folder or a YAML file on the worker, or what such
            a file holds. Left out for a run that is there.
        overrides: What holds for this call only.
        store: Where artifacts and runs are kept, a folder or s3://bucket/prefix; BATON_STORE of the worker by default.
    """
    with at_work(run, config, overrides, store) as (what, mirror):
        state, last = what.last() or prepare(what), what.config.iterations
        mirror.push(state)
        retain(what)
        gc.collect()
        gc.freeze()  # what is imported by now stays: the collector need not go through it again with every generation
        try:
            while state.iteration < last:
                state = run_iteration(what, state, last)
                mirror.push(state)
        finally:
            gc.unfreeze()
        page.end_schedules(what, state.iteration)
    return state
