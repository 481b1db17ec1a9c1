"""A whole run: prepare, then fold TrainState through the iterations."""

from __future__ import annotations

import gc
from contextlib import closing
from typing import Any

from prefect import flow

from flows.chains import chain
from flows.iterate import run_iteration
from flows.lease import lease
from flows.mirror import Mirror
from flows.retention import retain
from flows.runs import open_run
from flows.store import Store
from flows.tasks import untagged
from schemas.artifacts import TrainState


@flow(name="train", flow_run_name="{name}-train", persist_result=False)
def train_flow(name: str, store: str, overrides: dict[str, Any] | None = None) -> TrainState:
    """The last state of the run `name`. Goes on where it stopped: what is committed is found, not computed again."""
    run = open_run(Store(store), name, overrides)
    with untagged(), lease(run.store, name), closing(run), Mirror(run) as mirror:
        state = run.last() or chain(run).prepare(run)
        mirror.push(state)
        retain(run)
        gc.collect()
        gc.freeze()  # what is imported by now stays: the collector need not go through it again with every generation
        try:
            while state.iteration < run.config.iterations:
                state = run_iteration(run, state, run.config.iterations)
                mirror.push(state)
        finally:
            gc.unfreeze()
    return state
