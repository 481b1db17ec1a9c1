"""MLflow, the only file that knows it: one MLflow run for each training run, brought to what the store says.

A point is logged only where MLflow does not have it yet, so that a mirror that was away or broke off is completed by
the next start of the run, without double points.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from flows.runs import Run
from schemas.artifacts import TrainState
from schemas.tables import Samples

SAMPLES_SHOWN = 32  # rows of the table of samples
for _noisy in ("mlflow", "alembic"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class Client:
    """One MLflow run for the training run."""

    def __init__(self, run: Run, uri: str) -> None:
        self.run, self.uri, self.client = run, uri, mlflow.MlflowClient(uri)
        self.run_id = self._find() or self._create()
        self._log_params()
        self.logged, self.next = self._logged(), 0

    def bring_to(self, state: TrainState) -> None:
        """Every point up to `state` that is not there yet, its samples, and the model once the run is finished."""
        for iteration in range(self.next, state.iteration + 1):
            self._log(self.run.state(iteration))
        self.next = state.iteration + 1
        if state.iteration >= self.run.config.iterations:
            self._register(state)
            self.client.set_terminated(self.run_id)

    def _find(self) -> str | None:
        """The MLflow run that mirrors this one, by its tags."""
        experiment = self.client.get_experiment_by_name(self.run.config.tracking.experiment)
        if experiment is None:
            return None
        query = f"tags.`baton.run` = '{self.run.name}' and tags.`baton.created` = '{self.run.record.created}'"
        runs = self.client.search_runs([experiment.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def _create(self) -> str:
        name = self.run.config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._experiment(name)
        tags = {"baton.run": self.run.name, "baton.created": self.run.record.created,
                "baton.store": str(self.run.store.root)}
        return self.client.create_run(experiment_id, run_name=self.run.name, tags=tags).info.run_id

    def _log_params(self) -> None:
        """The settings the run was made with, those that are not there yet."""
        there = self.client.get_run(self.run_id).data.params
        params = [Param(key, str(value)[:500]) for key, value in _flat(self.run.record.config) if key not in there]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def _experiment(self, name: str) -> str:
        """A new experiment; over sqlite, its artifacts lie beside the database."""
        local = self.uri.startswith("sqlite:")
        place = Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlflow-artifacts"
        return self.client.create_experiment(name, artifact_location=place.as_uri() if local else None)

    def _logged(self) -> set[tuple[str, int]]:
        """(metric, iteration) of every point MLflow has."""
        keys = self.client.get_run(self.run_id).data.metrics
        return {(key, point.step) for key in keys for point in self.client.get_metric_history(self.run_id, key)}

    def _log(self, state: TrainState) -> None:
        at = _milliseconds(self.run, state)
        numbers = state.metrics | timings(self.run, state)
        points = [Metric(key, value, at, state.iteration) for key, value in numbers.items()
                  if (key, state.iteration) not in self.logged]
        if points:
            if "evaluate" in state.artifacts:
                self._log_samples(state)
            for start in range(0, len(points), 1000):
                self.client.log_batch(self.run_id, metrics=points[start : start + 1000])
            self.logged |= {(point.key, point.step) for point in points}

    def _log_samples(self, state: TrainState) -> None:
        """The table of samples of an evaluation, as an artifact that MLflow's page shows; once, since it would append."""
        path = f"samples/iteration-{state.iteration:06d}.json"
        if path in {item.path for item in self.client.list_artifacts(self.run_id, "samples")}:
            return
        samples = self.run.store.table(state.artifacts["evaluate"], Samples).to_arrow().slice(0, SAMPLES_SHOWN)
        self.client.log_table(self.run_id, samples.to_pydict(), path)

    def _register(self, state: TrainState) -> None:
        """The actor as a version of the run's registered model, alias `best`; the weights stay in the store."""
        name, artifact = f"baton-{self.run.name}", str(state.actor.artifact)
        with contextlib.suppress(MlflowException):  # it is there already
            self.client.create_registered_model(name)
        there = self.client.search_model_versions(f"name = '{name}'")
        versions = [version.version for version in there if version.tags.get("baton.artifact") == artifact]
        version = versions[0] if versions else self._new_version(name, artifact, state)
        self.client.set_registered_model_alias(name, "best", version)

    def _new_version(self, name: str, artifact: str, state: TrainState) -> str:
        folder = self.run.store.place(state.actor.artifact, state.actor.folder).resolve()
        tags = {"baton.artifact": artifact, "baton.folder": str(folder), "baton.iteration": str(state.iteration)}
        experiment, before = self.client.get_run(self.run_id).info.experiment_id, os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)  # the client has no call for external models, nor looks for them at its own
        try:
            model = mlflow.create_external_model(name, self.run_id, tags=tags, experiment_id=experiment)
            return self.client.create_model_version(name, f"models:/{model.model_id}", self.run_id, tags=tags,
                                                    model_id=model.model_id).version
        finally:
            mlflow.set_tracking_uri(before)


def timings(run: Run, state: TrainState) -> dict[str, float]:
    """Seconds, tokens per second and bytes written of each stage, and the seconds of the iteration."""
    out = {"iteration/seconds": state.seconds}
    for stage, ref in state.artifacts.items():
        manifest = run.store.manifest(ref)
        out |= {f"{stage}/seconds": manifest.seconds, f"{stage}/bytes": float(manifest.bytes)}
        if manifest.tokens_per_second:
            out[f"{stage}/tokens_per_second"] = manifest.tokens_per_second
    return out


def _milliseconds(run: Run, state: TrainState) -> int:
    """When the iteration was finished, from its last manifest."""
    created = max(run.store.manifest(ref).created for ref in state.artifacts.values())
    return int(datetime.fromisoformat(created).timestamp() * 1000)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key`, value."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
