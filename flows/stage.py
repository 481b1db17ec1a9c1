"""One stage again, from saved artifacts: with the same settings to see that it gives the same bytes, or with others."""

from __future__ import annotations

import inspect
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.chains import chain
from flows.inputs import check_function, functions_of, import_files, recipes_of
from flows.produce import Reproduction
from flows.runs import Run, open_run
from flows.store import Store
from flows.tasks import untagged
from schemas.artifacts import ArtifactRef
from schemas.errors import ConfigError


@dataclass(frozen=True)
class StageResult:
    """What a rerun came to."""

    recorded: ArtifactRef  # what the run has
    ref: ArtifactRef  # what these settings give
    reproduction: Reproduction | None  # none where that is a new artifact
    models_loaded: int

    @property
    def verdict(self) -> str:
        """`same` or `different` bytes, or `new` artifact."""
        if self.reproduction is None:
            return "new"
        return "different" if self.reproduction.different else "same"


@flow(name="stage", flow_run_name="{name}-{stage}-{iteration}", persist_result=False)
def stage_flow(
    name: str, store: str, stage: str, iteration: int, settings: tuple[str, ...] = ()
) -> StageResult:
    """That stage of that iteration, computed again; the run itself is left alone. Raises `ConfigError`.

    `settings`: `a.b=value`, what to change of the run's config.
    """
    recorded_run = open_run(Store(store), name)
    run = open_run(recorded_run.store, name, _as_recorded(recorded_run, stage, iteration), settings)
    use_new_functions(run, recorded_run)
    run.rerun = stage
    with untagged(), closing(run):
        ref = chain(run).STAGES[stage](run, iteration, **arguments(run, recorded_run, stage, iteration))
        return StageResult(run.recorded(stage, iteration), ref, run.reproduction, run.models.loaded)


def _as_recorded(run: Run, stage: str, iteration: int) -> dict[str, Any]:
    """The execution settings the artifact was made with: its last bits depend on them."""
    manifest = run.store.find(run.recorded(stage, iteration))
    return {"execution": manifest.environment.execution} if manifest else {}


def use_new_functions(run: Run, recorded: Run) -> None:
    """Imports the functions that the settings name and the run did not; files are looked for below this folder.

    Raises `ConfigError`, also where a setting names another preset, other data, another base model or environment: those
    belong to a run.
    """
    for section in ("preset", "data", "base_model", "environment"):
        if getattr(run.config, section, None) != getattr(recorded.config, section, None):
            raise ConfigError(f"--set {section}…: it belongs to the run as a whole; make another run with it")
    old = functions_of(recorded.config)
    files = {role: [check_function(source, Path.cwd())] for role, source in functions_of(run.config).items()
             if old.get(role) != source}
    run.inputs |= import_files(run.store, run.config, files, recipes_of(files))


def arguments(run: Run, recorded: Run, stage: str, iteration: int) -> dict[str, Any]:
    """The stage's inputs, by the names of its task's parameters."""
    saved = chain(run).saved(stage, run, recorded, iteration)
    wanted = inspect.signature(chain(run).STAGES[stage]).parameters
    return {name: saved[name]() for name in wanted if name not in ("run", "iteration")}
