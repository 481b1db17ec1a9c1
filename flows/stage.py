"""One stage again, from saved artifacts: with the same settings to see that it gives the same bytes, or with others."""

from __future__ import annotations

import inspect
import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Failed, State
from pydantic import NonNegativeInt

from flows.chains import chain
from flows.orchestration import page
from flows.orchestration.tasks import untagged
from flows.runs.inputs import check_function, functions_of, import_files, recipes_of
from flows.runs.produce import Reproduction
from flows.runs.run import Run, open_run
from flows.runs.start import reachable
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import ConfigError
from schemas.settings import Name

log = logging.getLogger("baton")
StageName = Literal["base_model", "sft", "reward_model", "reward_bias", "policy", "rollout", "reference", "reward", "value",
                    "gae", "ppo", "evaluate"]


@dataclass(frozen=True)
class StageResult:
    """What a rerun came to."""

    recorded: ArtifactRef  # what the run has
    ref: ArtifactRef  # what these settings give
    reproduction: Reproduction | None  # none where that is a new artifact
    models_loaded: int
    metrics: dict[str, tuple[float | None, float]]  # name → (as the run has it, as it is now)

    @property
    def verdict(self) -> str:
        """`same` or `different` bytes, or `new` artifact."""
        if self.reproduction is None:
            return "new"
        return "different" if self.reproduction.different else "same"

    @property
    def said(self) -> str:
        """The verdict in words."""
        return {"same": "reproduced, the same bytes", "different": "NOT reproduced, other bytes",
                "new": "a new artifact; the run is as it was"}[self.verdict]


@flow(name="stage", flow_run_name="{run}-{stage}-{iteration}", persist_result=False)
def stage_flow(
    run: Name, stage: StageName, iteration: NonNegativeInt, settings: list[str] | None = None, store: str | None = None
) -> StageResult | State:
    """One stage of one iteration again, from saved artifacts. The run itself is left alone.

    With the settings it was made with it must give the same bytes; with others it makes a new artifact.

    Args:
        run: The run's name.
        stage: Which stage.
        iteration: Of which iteration; 0 for base_model, sft, reward_model, policy and the first evaluate.
        settings: What to change of the run's config, each as key=value, for example gae.gae_lambda=0.9.
        store: Where artifacts and runs are kept, a folder or s3://bucket/prefix; BATON_STORE of the worker by default.
    """
    recorded_run = open_run(Store(reachable(store)), run)
    what = open_run(recorded_run.store, run, _as_recorded(recorded_run, stage, iteration), settings or ())
    use_new_functions(what, recorded_run)
    what.rerun = stage
    with untagged(), closing(what):
        ref = chain(what).STAGES[stage](what, iteration, **arguments(what, recorded_run, stage, iteration))
        recorded = what.recorded(stage, iteration)
        before, now = (what.store.manifest(one).metrics for one in (recorded, ref))
        metrics = {name: (before.get(name), value) for name, value in now.items()}
        result = StageResult(recorded, ref, what.reproduction, what.models.loaded, metrics)
    page.compare(what, stage, iteration, result)
    if deployment.id is not None:  # the command line has words of its own
        said = f"{stage} of iteration {iteration}: {result.said}, {ref.short}"
        log.info(said)
        if result.verdict == "different":
            return Failed(message=said)
    return result


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
