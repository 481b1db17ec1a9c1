"""One iteration: TrainState i − 1 to TrainState i. What a work pool schedules."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from prefect import flow

from flows.chains import chain
from flows.orchestration import page
from flows.orchestration.tasks import untagged
from flows.runs.retention import retain_after
from flows.runs.run import Run
from flows.runs.start import Source, requested
from flows.store.lease import lease
from flows.tracking.mirror import Mirror
from schemas.artifacts import ArtifactRef, TrainState
from schemas.settings import NO_OVERRIDES, Name, Overrides

log = logging.getLogger("baton")


@contextmanager
def at_work(name: str, config: Source | None, overrides: Overrides, store: str | None) -> Iterator[tuple[Run, Mirror]]:
    """The run of that name, which nobody else works on meanwhile, and its mirror."""
    run = requested(name, config, overrides, store)
    with untagged(), lease(run.store, name), closing(run), Mirror(run) as mirror:
        yield run, mirror


def prepare(run: Run) -> TrainState:
    """State 0, committed."""
    state = chain(run).prepare(run)
    page.report(run, state, None)
    return state


def run_iteration(run: Run, state: TrainState, last: int) -> TrainState:
    """The iteration after `state`, committed; `last`: the one that is evaluated in any case."""
    started, found = time.perf_counter(), len(run.found)
    after = chain(run).iteration(run, state, last)
    after = after.model_copy(update={"seconds": time.perf_counter() - started})
    run.save(after)
    retain_after(run, after.iteration)
    if time.monotonic() - run.said >= 1 or after.iteration >= last:  # not more than one a second is spoken of
        run.said = time.monotonic()
        _say(run, after, last, run.found[found:])
        page.report(run, after, state)
    return after


def _say(run: Run, state: TrainState, last: int, found: list[ArtifactRef]) -> None:
    """A line about the iteration: what it came to, what was there already."""
    skipped = f"  (found {', '.join(ref.stage for ref in found)})" if found else ""
    log.info(f"iteration {state.iteration:>{len(str(last))}}/{last}  {chain(run).line(state.metrics)}  "
             f"{state.seconds:5.1f} s{skipped}")


@flow(name="iterate", flow_run_name="{run}-iterate", persist_result=False)
def iterate_flow(
    run: Name, config: Source | None = None, overrides: Overrides = NO_OVERRIDES, store: str | None = None
) -> TrainState:
    """The next iteration of a run, which is what a schedule starts. What is committed is found, not computed again.

    The first one prepares the run. Once it is finished, the schedules that would start it again are switched off.

    Args:
        run: The run's name.
        config: What to make the run of, if it is not there: an example's folder or a YAML file on the worker, or what such
            a file holds. Left out for a run that is there.
        overrides: What holds for this call only.
        store: Where artifacts and runs are kept, a folder or s3://bucket/prefix; BATON_STORE of the worker by default.
    """
    with at_work(run, config, overrides, store) as (what, mirror):
        state, last = what.last(), what.config.iterations
        if state is None:
            page.rename(f"{run}-iterate-{0:06d}")
            state = prepare(what)
        elif state.iteration < last:
            page.rename(f"{run}-iterate-{state.iteration + 1:06d}")
            mirror.push(state)
            state = run_iteration(what, state, last)
        else:
            log.info(f"run {run}: all {last} iterations are there; nothing to do")
        mirror.push(state)
        if state.iteration >= last:
            page.end_schedules(what, state.iteration)
    return state
