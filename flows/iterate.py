"""One iteration: TrainState i − 1 to TrainState i. What a work pool schedules."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any

from prefect import flow

from flows.chains import chain
from flows.lease import lease
from flows.mirror import Mirror
from flows.retention import retain_after
from flows.runs import Run, open_run
from flows.store import Store
from flows.tasks import untagged
from schemas.artifacts import ArtifactRef, TrainState

log = logging.getLogger("baton")


def run_iteration(run: Run, state: TrainState, last: int) -> TrainState:
    """The iteration after `state`, committed; `last`: the one that is evaluated in any case."""
    started, found = time.perf_counter(), len(run.found)
    after = chain(run).iteration(run, state, last)
    after = after.model_copy(update={"seconds": time.perf_counter() - started})
    run.save(after)
    retain_after(run, after.iteration)
    _say(run, after, last, run.found[found:])
    return after


def _say(run: Run, state: TrainState, last: int, found: list[ArtifactRef]) -> None:
    """A line about the iteration: what it came to, what was there already; not more than one a second."""
    if time.monotonic() - run.said < 1 and state.iteration < last:
        return
    run.said = time.monotonic()
    skipped = f"  (found {', '.join(ref.stage for ref in found)})" if found else ""
    log.info(f"iteration {state.iteration:>{len(str(last))}}/{last}  {chain(run).line(state.metrics)}  "
             f"{state.seconds:5.1f} s{skipped}")


@flow(name="iterate", flow_run_name="{name}-iterate", persist_result=False)
def iterate_flow(name: str, store: str, overrides: dict[str, Any] | None = None) -> TrainState:
    """The next iteration of the run `name`. Raises `ConfigError` when it is finished or not prepared."""
    run = open_run(Store(store), name, overrides)
    with untagged(), lease(run.store, name), closing(run), Mirror(run) as mirror:
        state = run.to_iterate()
        mirror.push(state)
        after = run_iteration(run, state, run.config.iterations)
        mirror.push(after)
    return after
