"""Actors as MLflow's logged models, with the metrics that were measured of them, and as versions of a registered model."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from flows.runs.run import Run
from schemas.artifacts import TrainState

SOURCE = {"mlflow.source.name": "baton train", "mlflow.source.type": "LOCAL"}


class LoggedModels:
    """Of one run. A logged model is external: the weights stay in the store, its tags say where,
    and what makes those again that were not kept."""

    def __init__(self, run: Run, client: mlflow.MlflowClient, experiment_id: str, run_id: str) -> None:
        self.run, self.client, self.experiment_id, self.run_id = run, client, experiment_id, run_id

    def of(self, state: TrainState) -> str:
        """The id of the logged model of the state's actor; made if it is not there."""
        where = f"source_run_id = '{self.run_id}' AND tags.`baton.iteration` = '{state.iteration}'"
        there = [model.model_id for model in self.client.search_logged_models([self.experiment_id], where)
                 if model.status == LoggedModelStatus.READY]  # one that is not was begun by a process that has ended
        name = f"{self.run.name}-{state.iteration:06d}".replace(".", "-")
        model_id = there[0] if there else mlflow.create_external_model(
            name, self.run_id, tags=self._tags(state), experiment_id=self.experiment_id).model_id
        outputs = self.client.get_run(self.run_id).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, state.iteration)])
        return model_id

    def register(self, state: TrainState, alias: str) -> None:
        """The state's actor as a version of the run's registered model, with that alias."""
        name, tags = f"baton-{self.run.name}", self._tags(state)
        with contextlib.suppress(MlflowException):  # it is there already
            self.client.create_registered_model(name)
        there = self.client.search_model_versions(f"name = '{name}'")
        versions = [version.version for version in there if version.tags.get("baton.artifact") == tags["baton.artifact"]]
        if not versions:
            model_id = self.of(state)
            versions = [self.client.create_model_version(name, f"models:/{model_id}", self.run_id, tags=tags,
                                                         model_id=model_id).version]
        self.client.set_registered_model_alias(name, alias, versions[0])

    def _tags(self, state: TrainState) -> dict[str, str]:
        folder = self.run.store.place(state.actor.artifact, state.actor.folder)
        folder = folder if "://" in folder else str(Path(folder).resolve())
        return SOURCE | {"baton.artifact": str(state.actor.artifact), "baton.folder": folder,
                         "baton.iteration": str(state.iteration),
                         "baton.restore": f"baton restore {self.run.name} --iteration {state.iteration} --store "
                                          f"{shlex.quote(self.run.store.absolute)}"}
