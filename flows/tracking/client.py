"""MLflow: one MLflow run for each training run, brought to what the store has.

Run as `python -m flows.tracking.client STORE` by `mirror.py`, which writes the address, the run's record and its config, and
then the number of each committed state, to its standard input, a line each. It prints `page …`, where a server shows the
run; `at …`, the last iteration that is there; `whole …`, that there is all up to it; `error …`, why it could not go on; and
`recovered`, when a later try could.

The tag `baton.mirrored` of the MLflow run is the last iteration that is there whole, so that a process begins where the one
before it ended, however long the run is; `baton.shown` is the last evaluation whose model and samples are there. These come
after the points, so that what a server refuses of them keeps no metric back. A point that is logged twice, after an
interruption, is the same point: its time is that of the artifact.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import getpass
import json
import logging
import os
import select
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # without these a call waits four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")  # its threads wait for each other's lock of sqlite
import mlflow
from mlflow import entities
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param

from flows.runs.best import best_of
from flows.runs.run import Run
from flows.store.store import Store
from flows.tracking.logged_models import SOURCE, LoggedModels
from flows.tracking.machine import Machine
from flows.tracking.traces import log_samples
from flows.tracking.tracking_uri import database_of
from schemas.addresses import without_user_info
from schemas.artifacts import Manifest, RunRecord, TrainState
from schemas.config import parse_config
from schemas.data import COLUMNS
from schemas.errors import TrackingError

BATCH = 1000  # the most metrics that MLflow takes in one call
DIGEST = 36  # the most characters that it takes of a dataset's digest
MIRRORED = "baton.mirrored"
SHOWN = "baton.shown"
INTERVAL = 2.0  # seconds: states that come faster are logged together
for _noisy in ("mlflow", "alembic"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class Client:
    """One MLflow run for the training run."""

    def __init__(self, run: Run, uri: str) -> None:
        self.run, self.uri, self.client = run, uri, mlflow.MlflowClient(uri)
        self.run_id = self._find() or self._create()
        there = self.client.get_run(self.run_id)
        self.experiment_id = there.info.experiment_id
        self.models = LoggedModels(run, self.client, self.experiment_id, self.run_id)
        self._log_params(there.data.params)
        if not (there.inputs and there.inputs.dataset_inputs):
            self._log_inputs()
        self.next, self.logged = self._end(there)
        self.shown = int(there.data.tags.get(SHOWN, -1))  # the last evaluation whose samples are there

    @property
    def page(self) -> str:
        """Where a server shows the run, in its view of trainings."""
        address = without_user_info(self.uri).rstrip("/")
        return f"{address}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"

    def bring_to(self, state: TrainState, logged: Callable[[int], object] = lambda last: None,
                 newer: Callable[[], bool] = lambda: False) -> bool:
        """Every point up to `state` that is not there yet, and the end of a finished run with its report; then models and
        samples of what was evaluated, one after the other until there is a `newer` state. Whether all is there.

        `logged` is called with the last iteration that is there, whenever some were logged.
        """
        with _at(self.uri):
            self._log_points(state, logged)
            finished = state.iteration >= self.run.config.iterations
            if finished:
                ended = max(self.run.store.manifest(ref).created for ref in state.artifacts.values())
                self.client.set_terminated(self.run_id, end_time=_milliseconds(ended))
                self._log_report()
            while self.shown < state.iteration:
                if newer():
                    return False
                self._show(self.run.state(self.shown + 1))
            self.client.set_tag(self.run_id, SHOWN, self.shown)  # past those that were not evaluated
            if finished:
                self.models.register(state, "last")
                if (best := best_of(self.run)) is not None:
                    self.models.register(self.run.state(best.iteration), "best")
        return True

    def _log_points(self, state: TrainState, logged: Callable[[int], object]) -> None:
        points = []
        while self.next <= state.iteration:
            points += self._points(self.run.state(self.next))
            self.next += 1
            if len(points) >= BATCH or self.next > state.iteration:
                self._log(points)
                logged(self.next - 1)
                points = []

    def _show(self, state: TrainState) -> None:
        """The actor that was evaluated as a model with what was measured of it, and its samples; nothing of another."""
        if "evaluate" in state.artifacts:
            model_id, data = self.models.of(state), self._dataset("heldout_prompts")
            measured = [Metric(point.key, point.value, point.timestamp, point.step, model_id, **data)
                        for point in self._points(state) if point.key.startswith("evaluate/")]
            self.client.log_batch(self.run_id, metrics=measured)
            log_samples(self.run, self.client, self.experiment_id, self.run_id, state, model_id)
            self.client.set_tag(self.run_id, SHOWN, state.iteration)
        self.shown = state.iteration

    def _find(self) -> str | None:
        """The MLflow run that mirrors this one, by its tags."""
        experiment = self._experiment()
        if experiment is None:
            return None
        query = f"tags.`baton.run` = '{self.run.name}' and tags.`baton.created` = '{self.run.record.created}'"
        runs = self.client.search_runs([experiment.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def _create(self) -> str:
        experiment = self._experiment()
        experiment_id = experiment.experiment_id if experiment else self._new_experiment()
        tags = {"baton.run": self.run.name, "baton.created": self.run.record.created, "baton.store": self.run.store.absolute,
                "mlflow.note.content": self._description(), "mlflow.user": _user()} | SOURCE
        begun = _milliseconds(self.run.record.created)
        return self.client.create_run(experiment_id, begun, tags, run_name=self.run.name).info.run_id

    def _description(self) -> str:
        """Shown on the run's page: what it was made of, and where it lies."""
        parent = f", forked from {self.run.record.parent}" if self.run.record.parent else ""
        inputs = "\n".join(f"- {role}: `{ref.short}`" for role, ref in sorted(self.run.inputs.items()))
        return (f"Baton's run **{self.run.name}**{parent}, in `{self.run.store.absolute}`.\n\nInputs:\n\n{inputs}\n\n"
                f"`baton show {self.run.name} --store {shlex.quote(self.run.store.absolute)}`")

    def _log_params(self, there: Mapping[str, str]) -> None:
        """The settings the run was made with, those that are not there yet."""
        params = [Param(key, str(value)[:500]) for key, value in _flat(self.run.record.config) if key not in there]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def _log_inputs(self) -> None:
        """Imported data by role, with a digest of what it holds."""
        store = self.run.store
        given = [DatasetInput(Dataset(role, ref.identity[:DIGEST], "local", json.dumps({"uri": store.place(ref, "")}),
                                      profile=json.dumps(store.manifest(ref).metrics)),
                              [InputTag("mlflow.data.context", role)])
                 for role, ref in sorted(self.run.inputs.items()) if role in COLUMNS]
        if given:
            self.client.log_inputs(self.run_id, given)

    def _log_report(self) -> None:
        """The page of a finished run, and what is wrong with its training."""
        from flows.views.doctor import examine  # imported at the end of a run alone
        from flows.views.report import report

        try:
            examined = examine(self.run, self.run.states())
            found, text = examined.summary, report(self.run, found=examined)
        except Exception as error:  # a damaged table, say, of which verify and the commands speak
            found, text = f"not examined: {' '.join(str(error).split())[:400]}", None
        self.client.set_tag(self.run_id, "baton.doctor", found)
        if text is not None:
            self.client.log_text(self.run_id, text, "report.html")

    def _experiment(self) -> Experiment | None:
        """The config's. Raises `TrackingError` if it was deleted, with what brings it back."""
        name = self.run.config.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(f"the experiment {name!r} was deleted there: mlflow experiments restore --experiment-id "
                                f"{found.experiment_id} brings it back, --set tracking.experiment=NAME takes another")
        return found

    def _new_experiment(self) -> str:
        """Of the kind whose page shows curves; over sqlite, its artifacts lie beside the database."""
        place = (database_of(self.uri).parent / "mlflow-artifacts").as_uri() if self.uri.startswith("sqlite:") else None
        return self.client.create_experiment(self.run.config.tracking.experiment, artifact_location=place, tags={
            "mlflow.experimentKind": "custom_model_development"})

    def _end(self, run: entities.Run) -> tuple[int, set[tuple[str, int]]]:
        """The first iteration that is not there whole; and (metric, iteration) of points that are there all the same, in a
        run that was mirrored before there was the tag."""
        if MIRRORED in run.data.tags:
            return int(run.data.tags[MIRRORED]) + 1, set()
        return 0, {(key, point.step) for key in run.data.metrics
                   for point in self.client.get_metric_history(self.run_id, key)}

    def _points(self, state: TrainState) -> list[Metric]:
        """Those of an iteration that are not there yet."""
        manifests = {stage: self.run.store.manifest(ref) for stage, ref in state.artifacts.items()}
        at = max(datetime.fromisoformat(manifest.created).timestamp() for manifest in manifests.values())
        return [Metric(key, value, int(at * 1000), state.iteration)
                for key, value in (state.metrics | timings(state, manifests)).items()
                if (key, state.iteration) not in self.logged]

    def _dataset(self, role: str) -> dict[str, str]:
        ref = self.run.inputs.get(role)
        return {} if ref is None else {"dataset_name": role, "dataset_digest": ref.identity[:DIGEST]}

    def _log(self, points: list[Metric]) -> None:
        for start in range(0, len(points), BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + BATCH])
        self.client.set_tag(self.run_id, MIRRORED, self.next - 1)


@contextlib.contextmanager
def _at(uri: str) -> Iterator[None]:
    """Inside it MLflow's functions for external models and traces, which the client lacks, go there."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def timings(state: TrainState, manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Seconds, tokens per second and bytes written of each stage, and the iteration's seconds; in groups of their own."""
    out = {"seconds/iteration": state.seconds}
    for stage, manifest in manifests.items():
        out |= {f"seconds/{stage}": manifest.seconds, f"bytes/{stage}": float(manifest.bytes)}
        if manifest.tokens_per_second:
            out[f"tokens_per_second/{stage}"] = manifest.tokens_per_second
    return out


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # none of that number, as in some containers
        return ""


def _milliseconds(created: str) -> int:
    """Since the epoch, of a time in ISO 8601."""
    return int(datetime.fromisoformat(created).timestamp() * 1000)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key`, value."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- the process ---

def main(root: str) -> int:
    """Brings MLflow to each state whose number it reads, several at once where they come fast, until its input ends.

    After an error a new client tries again with the next state, and once more at the end.
    """
    atexit.register(gc.freeze)  # else it takes a second to free what it has imported
    answers, sys.stdout = sys.stdout, sys.stderr  # MLflow prints there too
    lines = Lines(sys.stdin.fileno())
    begin = json.loads(lines.first())
    record = RunRecord.model_validate(begin["record"])
    run = Run(Store(root), record, parse_config(begin["config"], f"run {record.name!r}"))
    mirror = _Retried(run, begin["uri"], begin["live"], lambda line: print(line, file=answers, flush=True), lines.more)
    mirror.bring_to(None)
    while (iteration := lines.last()) is not None:
        mirror.bring_to(int(iteration))
    if not mirror.whole:
        mirror.bring_to(mirror.wanted)
    mirror.close()
    return 1 if mirror.failed else 0


class _Retried:
    """A client that is made anew after an error. `live`: this machine trains the run now, so that its use is the run's."""

    def __init__(
        self, run: Run, uri: str, live: bool, answer: Callable[[str], None], newer: Callable[[], bool] = lambda: False
    ) -> None:
        self.run, self.uri, self.answer, self.newer = run, uri, answer, newer
        self.client: Client | None = None
        self.machine = Machine(mlflow.MlflowClient(uri), uri) if live and run.config.tracking.system_metrics else None
        self.wanted: int | None = None
        self.failed, self.whole = False, True

    def bring_to(self, iteration: int | None) -> None:
        """To the state of that iteration; None: only connects. Prints what changes: an error once, not with every try."""
        self.wanted, self.whole = iteration, False
        try:
            if self.client is None:
                self.client = Client(self.run, self.uri)
                if self.uri.startswith("http"):
                    self.answer(f"page {self.client.page}")
            if self.machine is not None:
                self._watch(iteration)
            self.whole = iteration is None or self.client.bring_to(
                self.run.state(iteration), lambda last: self.answer(f"at {last}"), self.newer)
            if iteration is not None and self.whole:
                self.answer(f"whole {iteration}")
        except Exception as error:  # whatever a tracking server does, the training goes on
            lines = without_user_info(str(error)).strip().splitlines() or [type(error).__name__]
            if not self.failed:
                self.answer(f"error {textwrap.shorten(lines[0], 400, placeholder=' …')}")
            self.client, self.failed = None, True
        else:
            if self.failed:
                self.answer("recovered")
            self.failed = False

    def close(self) -> None:
        """Ends its thread."""
        if self.machine is not None:
            self.machine.end()

    def _watch(self, iteration: int | None) -> None:
        """Until the last iteration is there."""
        if self.run.finished_by(self.run.last() if iteration is None else self.run.state(iteration)):
            self.machine.end()
        else:
            self.machine.watch(self.client.run_id)


class Lines:
    """Lines of a pipe, read as they come."""

    def __init__(self, file: int) -> None:
        self.file, self.rest, self.ended = file, b"", False

    def first(self) -> bytes:
        """The next line."""
        while b"\n" not in self.rest and not self.ended:
            self._read()
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def last(self) -> bytes | None:
        """The newest line after at most INTERVAL of waiting for newer ones; None at the end."""
        line = self.first()
        deadline = time.monotonic() + INTERVAL
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            if select.select([self.file], [], [], left)[0]:
                self._read()
        *_, newest = [line, *self.rest.split(b"\n")[:-1]]
        self.rest = self.rest[self.rest.rfind(b"\n") + 1 :]
        return newest or None

    def more(self) -> bool:
        """Whether a line waits."""
        if not self.ended and select.select([self.file], [], [], 0)[0]:
            self._read()
        return b"\n" in self.rest

    def _read(self) -> None:
        data = os.read(self.file, 65536)
        self.rest, self.ended = self.rest + data, not data


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
