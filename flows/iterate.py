"""One iteration: TrainState i − 1 to TrainState i. What a work pool schedules."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from contextvars import copy_context

from prefect import flow

from flows.chains import chain_of, warm_of
from flows.opening import requested
from flows.orchestration import page
from flows.orchestration.tasks import StageTasks, untagged
from flows.perform import perform
from flows.runners.spread import spread_of
from flows.runs.best import best_after
from flows.runs.kind import Warm
from flows.runs.retention import Retention
from flows.runs.run import Run, lease_key, require_there
from flows.runs.start import Source
from flows.store.lease import working_on
from flows.store.writer import Writer
from flows.tracking.mirror import Mirror
from schemas.artifacts import Produced, StageCall, TrainState
from schemas.errors import SupersededError
from schemas.settings import NO_OVERRIDES, Name, Overrides
from schemas.stages import STAGES

log = logging.getLogger("baton")
LOG_INTERVAL = 1.0  # seconds: of faster iterations not every one gets a line


class Session:
    """A run that this process works on: its chain, what is warm, and what is reported to people meanwhile.

    What an iteration makes is committed while the next one samples and scores; a state is saved after all that it names.
    """

    def __init__(self, run: Run, warm: Warm, mirror: Mirror, writer: Writer, resources: ExitStack) -> None:
        self.run, self.warm, self.mirror, self.writer = run, warm, mirror, writer
        execution = run.config.execution
        spread = resources.enter_context(spread_of(run.store, execution, writer.wait))
        self.tasks = StageTasks(run.name, self._perform, execution.concurrent_stages, spread)
        self.chain, self.retention = chain_of(run), Retention(run)
        self.iterations = run.config.iterations
        self._logged = float("-inf")  # when an iteration last got a line
        self._saved: tuple[TrainState, TrainState] | None = None  # that one, and the one before it

    def prepare(self) -> TrainState:
        """State 0, committed."""
        started = time.perf_counter()
        state = self.chain.prepare(self._announced)
        state = state.model_copy(update={"seconds": time.perf_counter() - started,
                                         "best": best_after(self.run, None, state)})
        self.run.save(state)
        self.mirror.push(state)
        page.materialized(self.run, state, ())
        page.report(self.run, state, None)
        return state

    def train(self, state: TrainState, until: int) -> TrainState:
        """From that state up to iteration `until`, all of it committed."""
        while True:
            try:
                while state.iteration < until:
                    state = self._iterate(state)
                self.writer.wait()
                self._report()
                return state
            except SupersededError as error:
                log.warning("%s; going on from what is committed", error)
                self.writer.clear()
                self.run.store.forget_pending()
                self.warm.close()
                state = self.run.last()

    def _iterate(self, state: TrainState) -> TrainState:
        """The iteration after `state`, computed; it is committed later."""
        started, found = time.perf_counter(), []

        def tracked(*calls: StageCall) -> dict[str, Produced]:
            made = self.tasks(*calls)
            found.extend(stage for stage, produced in made.items() if produced.how == "found")
            return made

        evaluated = self.run.config.evaluation_due(state.iteration + 1, self.iterations)
        after = self.chain.iteration(state, tracked, evaluated)
        after = after.model_copy(update={"seconds": time.perf_counter() - started,
                                         "best": best_after(self.run, state, after)})
        self._report()
        here = copy_context()  # in which Prefect's log knows the flow run
        self.writer.later(lambda: here.run(self._save, after, state, found))
        return after

    def _save(self, state: TrainState, before: TrainState, found: list[str]) -> None:
        """A state whose artifacts are committed."""
        self.run.save(state)
        self.mirror.push(state)
        page.materialized(self.run, state, found)
        self.retention.after(before, state)
        if time.monotonic() - self._logged >= LOG_INTERVAL or state.iteration >= self.iterations:
            self._logged = time.monotonic()
            self._log(state, found)
            self._saved = state, before

    def _report(self) -> None:
        """The page, of the last state that has got a line since; by the thread that the flow runs in."""
        saved, self._saved = self._saved, None
        if saved is not None:
            page.report(self.run, *saved)

    def _perform(self, call: StageCall) -> Produced:
        """What comes before the first iteration is committed at once."""
        return perform(call, self.run.store, self.warm, writer=self.writer if call.iteration else None)

    def _announced(self, *calls: StageCall) -> dict[str, Produced]:
        """Performs what comes before the first iteration, with a line for each stage."""
        made = self.tasks(*calls)
        for name, produced in made.items():
            headline = STAGES[self.run.config.kind][name].headline
            numbers = "  ".join(f"{metric} {produced.metrics[metric]:.4g}" for metric in headline
                                if metric in produced.metrics)
            how = "found" if produced.how == "found" else f"{produced.seconds:.1f} s"
            log.info(f"{name:<13} {numbers}  {how}")
        return made

    def _log(self, state: TrainState, found: list[str]) -> None:
        """A line about the iteration: what it came to, what was there already."""
        skipped = f"  (found {', '.join(found)})" if found else ""
        log.info(f"iteration {state.iteration:>{len(str(self.iterations))}}/{self.iterations}  "
                 f"{self.chain.line(state.metrics)}  {state.seconds:5.1f} s{skipped}")


@contextmanager
def session(name: str, config: Source | None, overrides: Overrides, store: str | None) -> Iterator[Session]:
    """The run of that name, held by this process alone."""
    run = requested(name, config, overrides, store)
    warm = warm_of(run.config.kind, run.store, run.config.execution)
    with (untagged(), working_on(run.store, lease_key(name), f"run {name!r}"), closing(warm), Mirror(run) as mirror,
          Writer() as writer, ExitStack() as resources):
        require_there(run)
        yield Session(run, warm, mirror, writer, resources)


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
    with session(run, config, overrides, store) as work:
        state = work.run.last()
        if state is None:
            page.rename(f"{run}-iterate-{0:06d}")
            state = work.prepare()
        elif state.iteration < work.iterations:
            page.rename(f"{run}-iterate-{state.iteration + 1:06d}")
            state = work.train(state, state.iteration + 1)
            if state.iteration >= work.iterations:
                page.examined(work.run)
        else:
            log.info(f"run {run}: all {work.iterations} iterations are there; nothing to do")
            work.mirror.push(state)
        if state.iteration >= work.iterations:
            page.end_schedules(work.run, state.iteration)
    return state
