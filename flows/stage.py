"""One stage again, from saved artifacts: with the same settings to see that it gives the same bytes, or with others."""

from __future__ import annotations

import logging
from typing import Literal

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Failed, State
from pydantic import NonNegativeInt

from flows.again import StageResult, stage_again
from flows.opening import store_of_flow
from flows.orchestration import page
from flows.orchestration.tasks import StageTasks, untagged
from flows.runs.run import open_run
from schemas.settings import Name
from schemas.stages import STAGE_NAMES

log = logging.getLogger("baton")
StageName = Literal[STAGE_NAMES]


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
    with untagged():
        result = stage_again(recorded, stage, iteration, settings or (), lambda one: StageTasks(run, one, at_once=1))
    page.compare(recorded, stage, iteration, result.metrics, result.summary)
    if deployment.id is not None:  # the command line has words of its own
        line = f"{stage} of iteration {iteration}: {result.summary}, {result.produced.ref.short}"
        log.info(line)
        if result.verdict == "different":
            return Failed(message=line)
    return result
