"""One stage's work, in any process: `baton perform CALL.json` in one of its own.

A call names all that decides a result by references alone, so that nothing else has to cross: `baton stage STAGE RUN
--iteration I --print-call > CALL.json` writes one of a run.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from flows.chains import kind_of
from flows.runs.kind import Warm
from flows.runs.produce import produce
from flows.runs.work import Work
from flows.store.store import Store
from schemas.artifacts import Produced, StageCall
from schemas.errors import ConfigError, NonFiniteError
from schemas.records import first_finding
from schemas.stages import STAGES
from stages.ops.device import Device, keep_freed_memory


def perform(call: StageCall, store: Store, warm: Warm, *, again: bool = False) -> Produced:
    """Load → call → commit. Found, where the recipe was committed before; with `again` made once more beside that.

    Raises `ConfigError` if this version of Baton has no such stage, and what the stage raises.
    """
    stage = STAGES[call.kind].get(call.stage)
    if stage is None or stage.version != call.version:
        has = f"version {stage.version}" if stage else f"the stages {', '.join(STAGES[call.kind])}"
        raise ConfigError(f"call of {call.stage}, version {call.version}: this Baton has {has}; make the call with it")
    keep_freed_memory()
    Device(call.execution.device).use_threads(call.execution.threads)
    task = kind_of(call.kind).tasks[call.stage]
    try:
        produced = produce(store, call, lambda attempt: task(Work(call, store, warm, attempt)), again=again)
    except NonFiniteError as error:
        raise NonFiniteError(f"{call.stage} of iteration {call.iteration}: {error}; nothing was committed") from error
    if produced.how == "adopted" and produced.different:
        warm.forget(produced.ref)  # what it holds is ours
    return produced


def read_call(path: Path) -> StageCall:
    """Raises `ConfigError` if the file holds no call."""
    try:
        return StageCall.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file with a stage's call") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a stage's call: {first_finding(error)}") from None
