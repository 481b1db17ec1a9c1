"""A stage's call on a work pool: what `execution.placement` and `execution.runner: prefect` start there."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State
from pydantic import ValidationError

from flows.orchestration import page
from flows.runners.performer import perform_once
from schemas.artifacts import StageCall
from schemas.errors import BatonError
from schemas.records import first_finding


@flow(name="perform", persist_result=False)
def perform_flow(call: dict[str, Any]) -> State:
    """One call of a stage; what it makes is in the store that the call names.

    Args:
        call: As baton stage STAGE RUN --iteration I --print-call prints one.
    """
    try:
        one = StageCall.model_validate(call)
    except ValidationError as error:
        return Failed(name="ConfigError", message=f"not a call of a stage: {first_finding(error)}; the worker may have "
                                                  "another version of Baton than the run")
    try:
        with page.progress(f"{one.stage} of iteration {one.iteration}"):
            produced = perform_once(one)
    except BatonError as error:
        return Failed(name=type(error).__name__, message=str(error))
    return Completed(name="Found" if produced.how == "found" else None, message=produced.ref.short)
