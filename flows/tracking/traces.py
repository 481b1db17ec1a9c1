"""What an evaluated iteration produced, on MLflow's page: a table, a trace a sample with what it was given, and a film."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import mlflow
from mlflow.entities import AssessmentSource
from mlflow.entities.trace_location import MlflowExperimentLocation

from flows.runs.run import Run
from flows.views.samples import evaluated, sampled
from flows.views.visible import visible
from schemas.artifacts import TrainState
from schemas.errors import TrackingError
from schemas.tables import EPISODE_FILM, Returns, Samples

ROWS = 32  # of the table


def log_samples(
    run: Run, client: mlflow.MlflowClient, experiment_id: str, run_id: str, state: TrainState, model_id: str
) -> None:
    """Those of the state's evaluation and of its rollout. Once: the table, which is written last, says that all is there."""
    evaluation, name = run.store.manifest(state.artifacts["evaluate"]), f"iteration-{state.iteration:06d}"
    if f"samples/{name}.json" in {item.path for item in client.list_artifacts(run_id, "samples")}:
        return
    if Samples.file in evaluation.digests() and run.config.tracking.traces:
        _log_traces(run, client, experiment_id, run_id, state, model_id)
    if EPISODE_FILM in evaluation.digests():
        with tempfile.TemporaryDirectory() as folder:
            film = shutil.copy(run.store.file(evaluation.ref, EPISODE_FILM), Path(folder) / f"{name}.gif")
            client.log_artifact(run_id, film, "films")
    for kind in (Samples, Returns):
        if kind.file in evaluation.digests():
            rows = run.store.table(evaluation.ref, kind).to_arrow().slice(0, ROWS).to_pydict()
            shown = {name: [_shown(value) if isinstance(value, str) else value for value in values]
                     for name, values in rows.items()}
            client.log_table(run_id, shown, f"samples/{name}.json")


def _log_traces(
    run: Run, client: mlflow.MlflowClient, experiment_id: str, run_id: str, state: TrainState, model_id: str
) -> None:
    """A trace a sample. Its numbers are MLflow's feedback, so that its page sorts and filters by them."""

    def there() -> list[str]:
        found = client.search_traces(locations=[experiment_id], run_id=run_id, include_spans=False, max_results=500,
                                     filter_string=f"tags.`baton.iteration` = '{state.iteration}'")
        return [trace.info.trace_id for trace in found]

    if begun := there():  # by a process that ended in the middle
        client.delete_traces(experiment_id, trace_ids=begun)
    place, count = MlflowExperimentLocation(experiment_id), run.config.tracking.traces
    tags = {"baton.run": run.name, "baton.iteration": str(state.iteration)}
    groups = (("evaluate", list(evaluated(run, state, count)), model_id),
              ("rollout", list(sampled(run, state, count)), None))  # by an actor before
    for stage, samples, model in groups:
        for sample in samples:
            with mlflow.start_span(stage, attributes=sample.about, trace_destination=place, run_id=run_id) as span:
                span.set_inputs({"prompt": _shown(sample.prompt)})
                span.set_outputs({"response": _shown(sample.response)})
                mlflow.update_current_trace(tags | {"baton.stage": stage}, model_id=model)
                for name, value in sample.given.items():
                    if math.isfinite(value):
                        mlflow.log_feedback(trace_id=span.trace_id, name=name, value=value,
                                            source=AssessmentSource("CODE", f"baton {stage}"))
    sent, arrived = sum(len(samples) for _, samples, _ in groups), len(there())
    if arrived != sent:  # MLflow logs why, and raises nothing
        raise TrackingError(f"{arrived} of {sent} traces of iteration {state.iteration} have arrived")


def _shown(text: str) -> str:
    return visible(text, newlines=True)
