"""What every Prefect task is: load → call → save. Tasks pass references, never tensors; the store decides what is done.

A task is named after its stage. Its parameters say which artifacts it reads: an iteration passes those it has just made,
and `flows/stage.py` those of a saved one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TagsContext
from prefect.utilities.annotations import quote

from flows.runs import Run
from schemas.artifacts import ArtifactRef
from schemas.settings import Settings

log = logging.getLogger("baton")
ITERATION_DECIDES = frozenset({"critic_warmup", "warmup_iterations", "schedule", "schedule_iterations"})
SHOWN = {"base_model": ("parameters",), "sft": ("loss",), "reward_model": ("heldout_accuracy",), "reward_bias": ("bias",),
         "policy": ("actor_parameters", "critic_parameters"), "evaluate": ("gold", "score", "episode_return")}


def stage_task(function: Callable[..., ArtifactRef]) -> Callable[..., ArtifactRef]:
    """A Prefect task named after the stage, nothing persisted or cached by Prefect.

    What it reads is passed in quotes: Prefect would search all of it for futures, which takes as long as the rest of a task.
    """
    name = function.__name__

    @task(name=name, task_run_name=name + "-{iteration:06d}", persist_result=False, cache_policy=NO_CACHE)
    def staged(run: Run, iteration: int, artifacts: dict[str, Any]) -> ArtifactRef:
        return function(run, iteration, **artifacts)

    @functools.wraps(function)
    def call(run: Run, iteration: int, **artifacts: Any) -> ArtifactRef:
        return staged(run, iteration, quote(artifacts))

    return call


def untagged() -> TagsContext:
    """Inside it tasks do not inherit the tags of their flow run: for each one Prefect would ask its server, before every
    task, whether a limit on that tag lets it begin."""
    return TagsContext(current_tags=set())


def settings_of(section: Settings, exclude: frozenset[str] = frozenset(), **more: Any) -> dict[str, Any]:
    """What of the config decides a stage's result; `exclude`: settings that `more` says the outcome of."""
    return section.model_dump(mode="json", exclude=set(exclude)) | more


def given(**inputs: ArtifactRef | None) -> dict[str, ArtifactRef]:
    """Those that are there."""
    return {role: ref for role, ref in inputs.items() if ref is not None}


def said(run: Run, ref: ArtifactRef) -> ArtifactRef:
    """The reference, after a line about what was made or found."""
    manifest = run.store.manifest(ref)
    numbers = "  ".join(f"{name} {manifest.metrics[name]:.4g}" for name in SHOWN[ref.stage] if name in manifest.metrics)
    how = "found" if ref in run.found else f"{manifest.seconds:.1f} s"
    log.info(f"{ref.stage:<13} {numbers}  {how}")
    return ref
