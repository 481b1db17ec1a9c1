"""A whole run: prepare, then fold TrainState through the iterations."""

from __future__ import annotations

import gc

from prefect import flow

from flows.iterate import session
from flows.orchestration import page
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
    with session(run, config, overrides, store) as work:
        state = work.run.last() or work.prepare()
        work.mirror.push(state)
        work.retention.before(state)
        gc.collect()
        gc.freeze()  # what is imported by now stays: the collector need not go through it again with every generation
        try:
            state = work.train(state, work.iterations)
        finally:
            gc.unfreeze()
        if work.run.finished_by(state):
            page.examined(work.run)
        page.end_schedules(work.run, state.iteration)
    return state
