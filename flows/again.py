"""The call of a stage that a run has recorded, made again from saved states: with its own settings, or with others."""

from __future__ import annotations

from collections.abc import Iterable

from flows.chains import chain_of, check_new
from flows.runs.run import Run, changed
from flows.runs.start import with_new_inputs
from schemas.artifacts import StageCall


def call_again(recorded: Run, stage: str, iteration: int, settings: Iterable[str]) -> StageCall:
    """Raises `ConfigError` where what was saved cannot be used with these settings.

    The execution settings are those the artifact was made with: its last bits depend on them.
    """
    manifest = recorded.store.find(recorded.recorded(stage, iteration))
    overrides = {"execution": manifest.environment.execution} if manifest else {}
    run = with_new_inputs(changed(recorded, overrides, settings), recorded, check_new)
    return chain_of(run).again(stage, recorded, iteration)
