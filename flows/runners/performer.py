"""A call performed in a process that was begun for it: JSON in, JSON out, models warm from call to call."""

from __future__ import annotations

from contextlib import closing

from pydantic import BaseModel

from flows.chains import warm_of
from flows.perform import perform
from flows.runs.kind import Warm
from flows.runs.start import check_device
from flows.store.store import Store, existing_store
from schemas.artifacts import Produced, StageCall
from schemas.errors import BatonError, error_named
from stages.ops.progress import listened_to


class Outcome(BaseModel):
    """What came of a call in another process: an artifact, or the error by the name of its class."""

    produced: Produced | None = None
    error: str = ""
    message: str = ""

    def result(self) -> Produced:
        """Raises the error."""
        if self.produced is None:
            raise error_named(self.error, self.message)
        return self.produced


class Performer:
    """Keeps the store and the models of the last call for the next one."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._warm: Warm | None = None
        self._made_for: object = None

    def perform(self, text: str) -> str:
        """A `StageCall` to an `Outcome`. Raises what is no `BatonError`."""
        try:
            call = StageCall.model_validate_json(text)
            self._prepare(call)
            with listened_to(lambda bar, done, total: None):  # no bars beside each other on one terminal
                return Outcome(produced=perform(call, self._store, self._warm)).model_dump_json()
        except BatonError as error:
            return Outcome(error=type(error).__name__, message=str(error)).model_dump_json()

    def _prepare(self, call: StageCall) -> None:
        if self._made_for == (call.kind, call.store, call.execution):
            return
        if self._warm is not None:
            self._warm.close()
        self._store, self._warm = _opened(call)
        self._made_for = call.kind, call.store, call.execution


def perform_once(call: StageCall) -> Produced:
    """The call in a process that makes nothing else. Raises what the stage raises."""
    store, warm = _opened(call)
    with closing(warm):
        return perform(call, store, warm)


def _opened(call: StageCall) -> tuple[Store, Warm]:
    """Raises `ConfigError` where the store or the device of the call is not here."""
    store = existing_store(call.store)
    check_device(call.execution)
    return store, warm_of(call.kind, store, call.execution)
