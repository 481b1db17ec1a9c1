"""The call of a stage that a run has recorded, made again from saved states: with its own settings, or with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass

from flows.chains import chain_of, check_new, warm_of
from flows.perform import perform
from flows.runs.kind import Perform
from flows.runs.run import Run, changed
from flows.runs.start import check_device, with_new_inputs
from flows.store.lease import wait_for_gc
from schemas.artifacts import ArtifactRef, Produced, StageCall

ELSEWHERE = frozenset({"runner", "workers", "ray_address", "work_pool", "placement", "worker_timeout"})
"""Execution settings that say where it was made, which decides nothing here."""


@dataclass(frozen=True)
class StageResult:
    """What a rerun came to."""

    recorded: ArtifactRef  # what the run has
    produced: Produced
    models_loaded: int
    metrics: dict[str, tuple[float | None, float]]  # name → (as the run has it, as it is now)

    @property
    def verdict(self) -> str:
        """`same` or `different` bytes, or `new` artifact."""
        return {"reproduced": "same", "different": "different"}.get(self.produced.how, "new")

    @property
    def summary(self) -> str:
        """The verdict in words."""
        return {"same": "reproduced, the same bytes", "different": "NOT reproduced, other bytes",
                "new": "a new artifact; the run is as it was"}[self.verdict]


def stage_again(
    recorded: Run, stage: str, iteration: int, settings: Iterable[str],
    performing: Callable[[Callable[[StageCall], Produced]], Perform] | None = None,
) -> StageResult:
    """That stage once more, from saved states. `performing`: what performs its call, where that is not this process alone.

    Raises `ConfigError` where what was saved cannot be used with these settings.
    """
    wait_for_gc(recorded.store)
    call = call_again(recorded, stage, iteration, settings)
    check_device(call.execution)
    ref, store = recorded.recorded(stage, iteration), recorded.store
    with closing(warm_of(call.kind, store, call.execution)) as warm:
        def again(one: StageCall) -> Produced:
            return perform(one, store, warm, again=True)

        produced = performing(again)(call)[stage] if performing else again(call)
        before = store.manifest(ref).metrics
        metrics = {name: (before.get(name), value) for name, value in produced.metrics.items()}
        return StageResult(ref, produced, warm.loaded, metrics)


def call_again(recorded: Run, stage: str, iteration: int, settings: Iterable[str]) -> StageCall:
    """Raises `ConfigError` where what was saved cannot be used with these settings.

    The execution settings are those the artifact was made with: its last bits depend on them.
    """
    manifest = recorded.store.find(recorded.recorded(stage, iteration))
    made_with = manifest.environment.execution if manifest else {}
    overrides = {"execution": {name: value for name, value in made_with.items() if name not in ELSEWHERE}}
    run = with_new_inputs(changed(recorded, overrides, settings), recorded, check_new)
    return chain_of(run).again(stage, recorded, iteration).model_copy(update={"snapshot": True})
