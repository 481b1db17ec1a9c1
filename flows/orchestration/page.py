"""What Prefect's page of a flow run shows beside its log: its name, metrics, samples, progress, MLflow's link.

Best effort: nothing of it where Prefect has no server that outlives the command, and nothing for a minute after a call that
failed, but for the end of a finished run's schedules.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.events.clients import NullEventsClient, PrefectEventsClient
from prefect.events.worker import EventsWorker
from prefect.runtime import deployment
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_CLOUD_API_URL, temporary_settings
from prefect.states import Cancelled

from flows.orchestration.server import lasting_server
from flows.runs.run import Run, open_run
from flows.store.store import Store
from flows.views.samples import Sample, evaluated, sampled
from flows.views.visible import visible
from schemas.artifacts import TrainState
from stages.ops.progress import listened_to

log = logging.getLogger("baton")
SHOWN = 8  # samples of a report
HEADLINES = ("evaluate/gold", "evaluate/score", "evaluate/kl", "evaluate/win_rate", "evaluate/response_length",
             "evaluate/episode_return", "reward/score", "ppo/entropy", "gae/explained_variance")
EVERY = 5.0  # seconds between two signs of progress
PAUSE = 60.0  # seconds without further calls after one has failed
_silent_until = 0.0  # of the monotonic clock


def configure_events() -> None:
    """Once per process, before its first flow.

    Prefect is to give up an event that its server does not take, rather than try each for ten seconds at the end. Without a
    server that outlives this process no page shows tasks: no event is sent.
    """
    if log.level == logging.NOTSET:  # a worker's process; the command line has its own options
        log.setLevel(logging.INFO)
    address = lasting_server()
    if not address:
        EventsWorker.set_client_override(NullEventsClient)
    elif not address.startswith(PREFECT_CLOUD_API_URL.value()):
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=2)


def _watched() -> bool:
    return bool(lasting_server()) and FlowRunContext.get() is not None


def _attempt(function: Callable[..., None], *arguments: Any, **more: Any) -> None:
    """Nothing where no server is watching; an error is logged, and training goes on."""
    global _silent_until
    if not _watched():
        return
    try:
        function(*arguments, **more)
    except Exception as error:  # whatever a server does
        _silent_until = time.monotonic() + PAUSE
        log.warning("Prefect's page is not written: %s; training goes on without it", " ".join(str(error).split())[:200])


def _best_effort(function: Callable[..., None]) -> Callable[..., None]:
    """As `_attempt`, with one try more where Prefect would have five, which take a minute; and a pause once a call has
    failed."""

    @functools.wraps(function)
    def tried(*arguments: Any, **more: Any) -> None:
        if time.monotonic() >= _silent_until and _watched():  # before the settings, which take 30 ms to make
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
                _attempt(function, *arguments, **more)

    return tried


@_best_effort
def rename(name: str) -> None:
    """Gives the flow run the name of its iteration, which is only known once it runs."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(FlowRunContext.get().flow_run.id, name=name)


@_best_effort
def report(run: Run, state: TrainState, before: TrainState | None) -> None:
    """An iteration's metrics, beside those of the one before, and some of its samples, as artifacts of the flow run."""
    rows = [{"metric": name, f"iteration {state.iteration}": f"{value:.6g}"} for name, value in state.metrics.items()]
    for row in rows if before and before.iteration else ():
        value = before.metrics.get(row["metric"])
        row[f"iteration {before.iteration}"] = "" if value is None else f"{value:.6g}"
    create_table_artifact(rows, key=_key(run, "metrics"), description=f"{run.name}, iteration {state.iteration}: metrics")
    create_markdown_artifact(_samples(run, state), key=_key(run, "samples"),
                             description=f"{run.name}, iteration {state.iteration}: samples")


@_best_effort
def examined(run: Run) -> None:
    """At the end of a run: what is wrong with its training, and how it went, as an artifact of the flow run."""
    from flows.views.doctor import examine

    states = run.states()
    found = examine(run, states)
    lines = [f"### {run.name}: {found.summary}", ""]
    lines += [f"- **{verdict.name}**: {_escaped(verdict.reason)}. *What helps:* {_escaped(verdict.remedy)}."
              for verdict in found.verdicts]
    lines += ["", "| | first | last |", "|---|---|---|"]
    for key in HEADLINES:
        values = [state.metrics[key] for state in states if key in state.metrics]
        if values:
            lines.append(f"| {key} | {values[0]:.4g} | {values[-1]:.4g} |")
    lines += ["", f"`baton report {run.name} --store {run.store.absolute}` makes the page with the curves and samples."]
    create_markdown_artifact("\n".join(lines), key=_key(run, "doctor"), description=f"{run.name}: {found.summary}")


@_best_effort
def compare(
    run: Run, stage: str, iteration: int, metrics: Mapping[str, tuple[float | None, float]], summary: str
) -> None:
    """What a rerun of a stage came to; `metrics`: name → (in the run, now)."""
    rows = [{"metric": f"{stage}/{name}", "now": f"{now:.6g}", "in the run": "" if before is None else f"{before:.6g}"}
            for name, (before, now) in metrics.items()]
    create_table_artifact(rows, key=_key(run, stage),
                          description=f"{run.name}, {stage} of iteration {iteration}: {summary}")


@_best_effort
def materialized(run: Run, state: TrainState, found: Sequence[str]) -> None:
    """An asset event for each artifact of a committed state, made from those of other stages: an asset for each stage of a
    run. Without those that were `found`.

    A Prefect server has them in its feed of events; Prefect Cloud draws assets and what they come from.
    """
    place = run.store.absolute if "://" in run.store.absolute else Path(run.store.absolute).as_uri()

    def key(stage: str) -> str:
        return re.sub(r"""[\s#?&%"'<>\[\]{}|\\^`]""", "_", unquote(f"{place}/runs/{run.name}/{stage}"))  # Prefect's rule

    for stage, ref in state.artifacts.items():
        if stage not in found:
            manifest = run.store.manifest(ref)
            sources = sorted({each.stage for each in manifest.recipe.inputs.values()} - {stage})
            emit_event("prefect.asset.materialization.succeeded",
                       {"prefect.resource.id": key(stage), "prefect.resource.name": f"{run.name}: {stage}"},
                       related=[{"prefect.resource.id": key(each), "prefect.resource.role": "asset"} for each in sources],
                       payload={"iteration": state.iteration, "artifact": str(ref), "seconds": manifest.seconds})


@_best_effort
def link(run: Run, address: str) -> None:
    """To the MLflow run, where that has a page."""
    log.info(f"MLflow: {address}")
    create_link_artifact(address, key=_key(run, "mlflow"), link_text=f"{run.name} in MLflow")


def _key(run: Run, what: str) -> str:
    """Under which the page keeps an artifact of all flow runs of a run, the newest first."""
    return re.sub("[^a-z0-9]+", "-", f"{run.name}-{what}")


def _samples(run: Run, state: TrainState) -> str:
    """Markdown: held-out samples if the iteration was evaluated, else responses with their rewards; or episodes."""
    if held_out := list(evaluated(run, state, SHOWN)):
        return _markdown(f"evaluated after iteration {state.iteration}", held_out, 2)
    if trained_on := list(sampled(run, state, SHOWN)):
        return _markdown(f"sampled in iteration {state.iteration}", trained_on, 1)
    return f"Iteration {state.iteration} was not evaluated; its episodes are in its metrics."


def _markdown(title: str, samples: list[Sample], numbers: int) -> str:
    """A list, since the page cuts off what is wider than a table's cell: numbers, the prompt in bold, the response."""
    lines = [f"### {title}", ""]
    for sample in samples:
        figures = "  ".join(f"{name} {value:.3f}" for name, value in list(sample.given.items())[:numbers])
        texts = f" **{_escaped(sample.prompt)}** {_escaped(sample.response)}" if sample.prompt or sample.response else ""
        lines.append(f"- `{figures}`{texts}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """On one line, and nothing in it is markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", visible(" ".join(text.split()), 2000))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Inside it the bars of a stage that takes long are shown on the page of its task."""
    shown = _Progress(what)
    with listened_to(shown) if _watched() else nullcontext():
        yield
    shown.end()


class _Progress:
    """Listens to a bar; from the fifth second on the page shows its progress."""

    def __init__(self, what: str) -> None:
        self.what, self.shown_at, self.artifact, self.bar = what, time.monotonic(), None, ""

    def __call__(self, bar: str, done: float, total: float | None) -> None:
        if total and time.monotonic() - self.shown_at >= EVERY:
            self._tell(bar, 100 * done / total)
            self.shown_at = time.monotonic()

    def end(self) -> None:
        """What was shown is done."""
        if self.artifact is not None:
            self._tell(self.bar, 100)

    @_best_effort
    def _tell(self, bar: str, percent: float) -> None:
        self.bar, about = bar, f"{self.what}: {bar}"
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, description=about)
        else:
            update_progress_artifact(self.artifact, percent, description=about)


def end_schedules(run: Run, iteration: int) -> None:
    """Switches off the schedules of this deployment that have nothing more to start, now that the run is at `iteration`,
    cancels the flow runs of them that wait in the queue, and logs it. Tried whatever failed before: a schedule that stays on
    starts flow runs for ever."""
    _attempt(_end_schedules, run, iteration)


def _end_schedules(run: Run, iteration: int) -> None:
    if deployment.id is None:
        return
    recorded = open_run(run.store, run.name).config.iterations  # this call's may be others

    def done(parameters: dict[str, Any]) -> bool:
        wanted = (parameters.get("overrides") or {}).get("iterations") or recorded
        store = parameters.get("store") or os.environ.get("BATON_STORE", "")
        return parameters.get("run") == run.name and Store(store).uri == run.store.uri and iteration >= wanted

    with get_client(sync_client=True) as client:
        what = client.read_deployment(deployment.id)
        for schedule in what.schedules:
            if schedule.active and done(what.parameters | schedule.parameters):
                client.update_deployment_schedule(what.id, schedule.id, active=False)
                log.info(f"run {run.name} is finished: schedule {schedule.slug or schedule.id} of deployment {what.name} "
                         "is switched off")
        waiting = FlowRunFilter(deployment_id={"any_": [what.id]}, state={"type": {"any_": [StateType.SCHEDULED]}})
        for flow_run in client.read_flow_runs(flow_run_filter=waiting):
            if done(flow_run.parameters):
                client.set_flow_run_state(flow_run.id, Cancelled(message=f"run {run.name} is finished"))
