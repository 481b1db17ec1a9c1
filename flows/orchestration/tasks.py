"""What every Prefect task is: load → call → save. Tasks pass references, never tensors; the store decides what is done.

A task is named after its stage. Its parameters say which artifacts it reads: an iteration passes those it has just made,
and `flows/stage.py` those of a saved one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.context import TagsContext
from prefect.states import Completed, State
from prefect.utilities.annotations import quote

from flows.orchestration import page
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef
from schemas.errors import TransientError
from schemas.settings import Settings

log = logging.getLogger("baton")
page.settle()  # now: Prefect begins to tell its server before it calls a flow
RETRY_DELAYS = (2, 10, 30)  # seconds before a stage is tried again that a server or a network has failed
ITERATION_DECIDES = frozenset({"critic_warmup", "warmup_iterations", "schedule", "schedule_iterations"})
SHOWN = {"base_model": ("parameters",), "sft": ("loss",), "reward_model": ("heldout_accuracy",), "reward_bias": ("bias",),
         "policy": ("actor_parameters", "critic_parameters"), "evaluate": ("gold", "score", "episode_return")}


def stage_task(function: Callable[..., ArtifactRef]) -> Callable[..., ArtifactRef]:
    """A Prefect task named after the stage, nothing persisted or cached by Prefect.

    What it reads is passed in quotes: Prefect would search all of it for futures, which takes as long as the rest of a task.
    """
    name = function.__name__

    @task(name=name, task_run_name="{run.name}-" + name + "-{iteration:06d}", persist_result=False, cache_policy=NO_CACHE,
          retries=len(RETRY_DELAYS), retry_delay_seconds=list(RETRY_DELAYS), retry_condition_fn=_may_pass)
    def staged(run: Run, iteration: int, artifacts: dict[str, Any]) -> ArtifactRef | State:
        found = len(run.found)
        with page.progress(f"{name} of iteration {iteration}"):
            ref = function(run, iteration, **artifacts)
        if run.found[found:] == [ref]:
            return Completed(name="Found", message=f"{ref.short} was committed before", data=ref)
        return ref

    @functools.wraps(function)
    def call(run: Run, iteration: int, **artifacts: Any) -> ArtifactRef:
        made = staged(run, iteration, quote(artifacts))
        return made.result() if isinstance(made, State) else made

    return call


def _may_pass(task: Task, task_run: TaskRun, state: State) -> bool:
    """Whether the task is tried again: a server or a network has failed, and every stage is safe to repeat."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, TransientError):
        return False
    log.warning("%s: %s", task.name, error)
    return True


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
