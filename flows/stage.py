"""One stage again, from saved artifacts: with the same settings to see that it gives the same bytes, or with others."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Failed, State
from pydantic import NonNegativeInt

from flows.again import call_again
from flows.chains import warm_of
from flows.opening import store_of_flow
from flows.orchestration import page
from flows.orchestration.tasks import StageTasks, untagged
from flows.perform import perform
from flows.runs.run import open_run
from flows.runs.start import check_device
from flows.store.lease import wait_for_gc
from schemas.artifacts import ArtifactRef, Produced
from schemas.settings import Name
from schemas.stages import STAGE_NAMES

log = logging.getLogger("baton")
StageName = Literal[STAGE_NAMES]


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
    recorded = open_run(store_of_flow(store), run)
    wait_for_gc(recorded.store)
    call = call_again(recorded, stage, iteration, settings or ())
    check_device(call.execution)
    ref, there = recorded.recorded(stage, iteration), recorded.store
    with untagged(), closing(warm_of(call.kind, there, call.execution)) as warm:
        tasks = StageTasks(run, lambda one: perform(one, there, warm, again=True), at_once=1)
        produced = tasks(call)[stage]
        before = there.manifest(ref).metrics
        metrics = {name: (before.get(name), value) for name, value in produced.metrics.items()}
        result = StageResult(ref, produced, warm.loaded, metrics)
    page.compare(recorded, stage, iteration, metrics, result.summary)
    if deployment.id is not None:  # the command line has words of its own
        line = f"{stage} of iteration {iteration}: {result.summary}, {produced.ref.short}"
        log.info(line)
        if result.verdict == "different":
            return Failed(message=line)
    return result
