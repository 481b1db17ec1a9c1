"""One stage's work, in any process: `baton perform CALL.json` in one of its own.

A call names all that decides a result by references alone, so that nothing else has to cross: `baton stage STAGE RUN
--iteration I --print-call > CALL.json` writes one of a run.
"""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from itertools import groupby
from pathlib import Path

from pydantic import ValidationError

from flows.chains import warm_of
from flows.rank_processes import ranks_beside, ranks_of, work_on
from flows.runs.kind import Warm
from flows.runs.produce import StageOutput, environment, produce
from flows.runs.start import check_device
from flows.store.attempt import Attempt
from flows.store.store import Store
from flows.store.writer import Writer
from schemas.artifacts import ArtifactRef, ModelRef, Produced, StageCall, call_of
from schemas.errors import ConfigError, NonFiniteError, ReplayError
from schemas.records import first_finding
from schemas.stages import STAGES
from stages.ops.device import keep_freed_memory, threads_kept

log = logging.getLogger("baton")
OF_AN_ITERATION = ("learning_rate_factor", "train_actor", "kl_coef")  # settings of an update that its iteration decides
_RESTORING = threading.RLock()  # stages side by side may need the same weights


def perform(
    call: StageCall, store: Store, warm: Warm, *, again: bool = False, restoring: bool = False, writer: Writer | None = None
) -> Produced:
    """Load → call → commit. Found, where the recipe was committed before.

    `again`: made once more beside what is committed; `restoring`: what is missing of that is then put back; `writer`: what
    commits it later. Models that it reads which were not kept are restored first. Raises `ConfigError` if this version has
    no such stage, `ReplayError` where a model cannot be restored, and what the stage raises.
    """
    stage = STAGES[call.kind].get(call.stage)
    if stage is None or stage.version != call.version:
        has = f"version {stage.version}" if stage else f"the stages {', '.join(STAGES[call.kind])}"
        raise ConfigError(f"call of {call.stage}, version {call.version}: this Baton has {has}; make the call with it")
    if writer is not None:
        writer.check()
    keep_freed_memory()

    def make(attempt: Attempt) -> StageOutput:
        ranks = ranks_beside(warm, call) if ranks_of(call) > 1 else None
        if ranks is not None and writer is not None:
            writer.wait()  # the others read what is committed
        for model in (each for each in call.inputs.values() if isinstance(each, ModelRef)):
            if not warm.holds(model) or (ranks is not None and ranks.fresh):
                restore(store, model)
        if ranks is None:
            return work_on(call, store, warm, attempt)
        return ranks.together(call, lambda: work_on(call, store, warm, attempt))

    try:
        produced = produce(store, call, make, again=again, restoring=restoring, writer=writer)
    except NonFiniteError as error:
        raise NonFiniteError(f"{call.stage} of iteration {call.iteration}: {error}; nothing was committed") from error
    if produced.how == "adopted" and produced.different:
        warm.forget(produced.ref)  # what it holds is ours
    return produced


# --- weights that were not kept ---

def restore(store: Store, model: ModelRef) -> list[int]:
    """Makes the weights of a model again that were not written, or not kept, and puts them back; the iterations whose
    updates were made again for it, none if it is whole.

    From the nearest checkpoint that is whole, each update over its saved tables, each result held against its digests.
    Raises `ReplayError` where that gives other bytes, and `StoreError` where a table is missing.
    """
    with _RESTORING, threads_kept():
        calls = [call_of(store.manifest(ref), store.absolute) for ref in reversed(_lacking(store, model))]
        if calls:
            log.info("making iteration %d again, %d updates from iteration %d on", calls[-1].iteration, len(calls),
                     calls[0].iteration - 1)
        for _, alike in groupby(calls, _shared):
            *between, last = alike
            check_device(last.execution)
            with closing(warm_of(last.kind, store, last.execution)) as warm:
                for call in between:
                    _again(call.model_copy(update={"snapshot": False}), store, warm, restoring=False)
                _again(last, store, warm, restoring=True)
    return [call.iteration for call in calls]


def _shared(call: StageCall) -> tuple[object, ...]:
    """What updates have in common that go on with each other's optimizer in memory: how they are computed, which decides the
    last bits, their settings but for those that change from iteration to iteration, and whether there is a critic."""
    settings = {name: value for name, value in call.settings.items() if name not in OF_AN_ITERATION}
    return call.execution, settings, "critic" in call.inputs


def _again(call: StageCall, store: Store, warm: Warm, restoring: bool) -> None:
    """Raises `ReplayError` if the call gives other bytes than it did."""
    produced = perform(call, store, warm, again=True, restoring=restoring)
    if produced.how == "different":
        raise _not_replayed(store, call, produced)


def _lacking(store: Store, model: ModelRef) -> list[ArtifactRef]:
    """The model's artifact if weights of it are missing, the one it was trained from if so are they, and so on."""
    found: list[ArtifactRef] = []
    todo = [model]
    while todo:
        model = todo.pop()
        if model.artifact not in found and store.missing(model.artifact, f"{model.folder}/"):
            found.append(model.artifact)
            inputs = call_of(store.manifest(model.artifact), store.absolute).inputs.values()
            todo += [ref for ref in inputs if isinstance(ref, ModelRef)]
    return found


def _not_replayed(store: Store, call: StageCall, produced: Produced) -> ReplayError:
    """Says in what this process differs from the one that made it."""
    made, here = store.manifest(produced.ref).environment, environment(call.execution)
    before, now = ({"device": of.device_name, "threads": of.threads, "Python": of.python, **of.packages}
                   for of in (made, here))
    other = [f"{name} {before[name]} → {now.get(name)}" for name in before if before[name] != now.get(name)]
    reason = f"what differs from where it was made: {', '.join(other)}" if other else "nothing that is recorded differs"
    return ReplayError(f"{call.stage} of iteration {call.iteration} gives other bytes here than were committed "
                       f"({', '.join(produced.different)}); {reason}. Restore it on a machine like that one, or fork "
                       "from an iteration whose weights are there")


def read_call(path: Path) -> StageCall:
    """Raises `ConfigError` if the file holds no call."""
    try:
        return StageCall.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file with a stage's call") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a stage's call: {first_finding(error)}") from None
