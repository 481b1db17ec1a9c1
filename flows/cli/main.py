"""`baton …`: each command reads its arguments, calls a flow or the store, and gives what is printed."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from gc import freeze
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from flows.cli import examples, report_commands, view_commands, what_if_commands  # noqa: F401, their commands
from flows.cli.command import SETTINGS, Answer, command, open_existing, open_shown, run_command, terminate
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from flows.runs.inputs import Checked, Files
    from flows.runs.run import Run
    from flows.runs.start import Request
    from schemas.artifacts import TrainState
    from schemas.settings import RunConfig

log = logging.getLogger("baton")


def tagged(flow: Callable[..., Any], name: str, **parameters: Any) -> Any:
    """Runs the flow, which is found on Prefect's page by the tags `baton` and the run's name."""
    from prefect import tags
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from flows.orchestration.server import a_server, server_errors

    alone = not _server_is_named()  # no server is watching for heartbeats, and stopping them takes a second
    with (server_errors("what was committed is whole, the same command goes on"), tags("baton", name),
          temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None} if alone else {}),
          a_server()):
        return flow(name, **parameters)


def _begin_server() -> None:
    from flows.orchestration.server import begin_own_server

    begin_own_server()


def _server_is_named() -> bool:
    """Whether the environment or one of Prefect's files names a server, on whose page a flow run can be seen.

    Where there is no such file Prefect, whose import takes a second, is not asked.
    """
    home, project = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser(), Path("pyproject.toml")
    files = (home / "profiles.toml", Path("prefect.toml"), Path(".env"))
    if not (any(name.startswith("PREFECT_API") or name == "PREFECT_PROFILES_PATH" for name in os.environ)
            or any(file.is_file() for file in files)
            or (project.is_file() and "[tool.prefect" in project.read_text(encoding="utf-8", errors="replace"))):
        return False
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


# --- commands ---

@command
@click.argument("config", required=False)
@click.option("--run", "name", help="The run's name; the name of the config's folder by default.")
@click.option("--iterations", type=click.IntRange(min=0), help="How far to train in this call, instead of the config's; 0 "
              "makes the run, its inputs in the store, and trains nothing.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, what is found and what that costs; write nothing.")
@SETTINGS
def train(
    config: str | None, name: str | None, iterations: int | None, dry_run: bool, settings: tuple[str, ...], root: str
) -> Answer:
    """Make a run, or go on with one. CONFIG is an example's folder or a YAML file; a run that is there needs none."""
    if config is None and name is None:
        raise ConfigError("train: name a CONFIG, for example data/reviews, or a run that is there with --run")
    from flows.chains import check_inputs
    from flows.runs.start import Request, start
    from flows.views.overview import progress
    from schemas.settings import NO_OVERRIDES, Overrides

    overrides = Overrides(iterations=iterations) if iterations else NO_OVERRIDES
    if dry_run and iterations == 0:
        raise ConfigError("--dry-run with --iterations 0: nothing would be trained; leave --iterations out")
    if dry_run:
        return _planned(Request(root, name, config, settings, overrides))

    def check(config: RunConfig, files: Files) -> Checked:
        """Of a run that is new, and so will need a server."""
        if iterations != 0:
            _begin_server()
        return check_inputs(config, files)

    run = start(Request(root, name, config, settings, overrides), check)
    last = run.last()
    if iterations == 0:
        return _made(run, last)
    if run.finished_by(last):
        return _nothing_to_do(run)
    log.info(f"run {run.name} in {root}: {progress(run, last)}")
    _begin_server()
    from flows.opening import opened
    from flows.train import train_flow

    with opened(run):
        state = tagged(train_flow, run.name, overrides=overrides, store=run.store.uri)
    return _finished(run, run.state(0), state, state, [])


def _planned(request: Request) -> Answer:
    from flows.cli.plan_lines import print_plan
    from flows.plan import plan

    found = plan(request)
    data = {
        "run": found.run.name, "there": found.there, "done": found.done, "iterations": found.iterations,
        "to_make": found.to_make, "evaluations": found.evaluations, "snapshots": found.snapshots,
        "seconds": found.seconds, "snapshot_bytes": found.snapshot_bytes, "free": found.free,
        "inputs": {role: {"artifact": str(ref), "found": there} for role, (ref, there) in found.inputs.items()},
        "steps": [{"iteration": step.iteration, "stage": step.stage, "artifact": str(step.ref),
                   "found": step.made is not None} for step in found.steps],
        "config": found.run.config.model_dump(mode="json")}
    return Answer(data, lambda console: print_plan(console, found))


def _made(run: Run, last: TrainState | None) -> Answer:
    from flows.views.overview import progress

    data = {"run": run.name, "iteration": last and last.iteration}
    return Answer(data, lambda console: console.print(
        f"run {run.name} is made: {progress(run, last)}; baton train --run {run.name}, or baton iterate {run.name}, goes on",
        highlight=False))


def _nothing_to_do(run: Run) -> Answer:
    from flows.tracking.tracking_uri import is_mirrored
    from flows.views.overview import found

    log.info(f"run {run.name}: all {run.config.iterations} iterations are there; nothing to do")
    states = run.states()
    for line in (lines := found(states)):
        log.info(line)
    if run.config.tracking.enabled and not is_mirrored(run, states[-1].iteration):
        from flows.tracking.mirror import Mirror

        with Mirror(run) as mirror:
            mirror.push(states[-1])
    evaluated = next(state for state in reversed(states) if "evaluate" in state.artifacts)
    return _finished(run, states[0], evaluated, states[-1], lines)


def _finished(run: Run, before: TrainState, evaluated: TrainState, last: TrainState, found: list[str]) -> Answer:
    """The end of a run that was at `before` when it began, and was `evaluated` last in that state."""
    from flows.cli import display
    from flows.tracking.tracking_uri import how_to_open

    data = {"run": run.name, "iteration": last.iteration, "metrics": last.metrics, "found": found,
            "actor": display.actor_folder(run, last), "mlflow": how_to_open(run)}
    return Answer(data, lambda console: display.summary(console, run, before, evaluated, last))


@command
@click.argument("run")
def iterate(run: str, root: str) -> Answer:
    """Exactly the next iteration of RUN. The first one prepares it."""
    from flows.chains import check_inputs
    from flows.runs.start import Request, start

    there = start(Request(root, run), check_inputs)
    there.require_unfinished(there.last())  # before Prefect starts
    from flows.iterate import iterate_flow
    from flows.opening import opened

    with opened(there):
        state = tagged(iterate_flow, run, store=root)
    return Answer(state.model_dump(mode="json"), lambda console: None)


@command
@click.argument("stage")
@click.argument("run")
@click.option("--iteration", type=click.IntRange(min=0), required=True,
              help="0 for base_model, sft, reward_model, policy and the first evaluate.")
@SETTINGS
@click.option("--print-call", is_flag=True, help="Print the stage's call as JSON and do nothing: baton perform performs "
              "it, in any process that reaches the store.")
def stage_command(
    stage: str, run: str, iteration: int, settings: tuple[str, ...], print_call: bool, root: str
) -> Answer:
    """A STAGE of RUN again, from saved artifacts. The run is left alone."""
    there = open_existing(root, run)
    there.recorded(stage, iteration)  # mistakes are reported before Prefect starts
    if print_call:
        return _call(there, stage, iteration, settings)
    from flows.cli import display
    from flows.runs.run import changed

    changed(there, settings=settings)
    if _server_is_named():
        from flows.stage import stage_flow

        result = tagged(stage_flow, run, stage=stage, iteration=iteration, settings=list(settings), store=root)
    else:  # a flow run would be seen by none, and its server takes seconds to start
        from flows.again import stage_again

        result = stage_again(there, stage, iteration, settings)
    produced, metrics = result.produced, result.metrics
    data = {"recorded": str(result.recorded), "artifact": str(produced.ref), "verdict": result.verdict,
            "models_loaded": result.models_loaded, "metrics": metrics, "different": sorted(produced.different)}
    return Answer(data, lambda console: display.stage(
        console, f"{stage} of iteration {iteration}", produced, metrics, loaded=result.models_loaded,
        new=produced.ref != result.recorded), code=1 if result.verdict == "different" else 0)


def _call(run: Run, stage: str, iteration: int, settings: tuple[str, ...]) -> Answer:
    from flows.again import call_again

    call = call_again(run, stage, iteration, settings)
    return Answer(call.model_dump(mode="json"), lambda console: click.echo(call.model_dump_json(indent=1)))


@partial(command, default_store=None)
@click.argument("call", type=click.Path(path_type=Path))
@click.option("--again", is_flag=True, help="Make an artifact that is there once more, and compare the bytes.")
def perform(call: Path, again: bool, root: str | None) -> Answer:
    """The stage CALL, a JSON file, in this process. In the store that it names, unless --store or BATON_STORE does.

    baton stage STAGE RUN --iteration I --print-call writes one.
    """
    from flows.chains import warm_of
    from flows.cli import display
    from flows.perform import perform as perform_call
    from flows.perform import read_call
    from flows.store.lease import wait_for_gc
    from flows.store.store import existing_store

    what = read_call(call)
    store = existing_store(root or what.store)
    wait_for_gc(store)
    with closing(warm_of(what.kind, store, what.execution)) as warm:
        produced = perform_call(what, store, warm, again=again)
    return Answer(produced.model_dump(mode="json"), lambda console: display.performed(console, produced),
                  code=1 if produced.how == "different" else 0)


@command
def runs(root: str) -> Answer:
    """The runs of the store."""
    from flows.cli import display
    from flows.runs.run import open_run, run_names
    from flows.store.store import Store
    from flows.views.overview import overview

    store = Store(root)
    rows = [overview(open_run(store, name)) for name in run_names(store)]
    return Answer(rows, lambda console: console.print(display.runs(rows) if rows else f"no runs in {root}"))


@command
@click.argument("run")
@click.option("--iteration", type=click.IntRange(min=0), help="Every metric of one iteration.")
@click.option("--live", is_flag=True, help="Curves, samples and times while it is trained; Ctrl-C ends the view alone.")
def show(run: str, iteration: int | None, live: bool, root: str) -> Answer:
    """The iterations of RUN. And where the time of the last, or of one, went."""
    from flows.cli import display
    from flows.views.overview import shard_times, time_spent, worth_showing

    what = open_shown(root, run)
    if live:
        return _followed(what, iteration)
    there = what.iterations() if iteration is None else [iteration]
    if not there:
        raise ConfigError(f"run {run!r} is not prepared yet; go on with baton train")
    last = what.state(there[-1])
    spent, shards = time_spent(what, last), shard_times(what, last)

    def print_all(console: Console) -> None:
        states = [what.state(number) for number in worth_showing(what, there)[:-1]]
        console.print(display.iterations([*states, last]) if iteration is None else display.metrics(last))
        console.print(display.time_of(last, spent))
        if shards:
            console.print(display.shard_times(shards))

    return Answer(lambda: {"states": [what.state(number).model_dump(mode="json") for number in there], "time": spent,
                           "shards": shards}, print_all)


def _followed(run: Run, iteration: int | None) -> Answer:
    if iteration is not None:
        raise ConfigError("--live with --iteration: one iteration does not change; leave one of them out")

    def print_all(console: Console) -> None:
        from flows.cli.live import follow

        follow(run, console)

    return Answer(lambda: {"states": [state.model_dump(mode="json") for state in run.states()]}, print_all)


@command
@click.argument("run", required=False)
def verify(run: str | None, root: str) -> Answer:
    """Check every byte of RUN, or of the whole store."""
    from flows.runs.verify import verify as verify_all
    from flows.store.store import existing_store

    artifacts, findings = verify_all(existing_store(root), run)

    def print_all(console: Console) -> None:
        for finding in findings:
            console.print(str(finding), soft_wrap=True, markup=False, highlight=False)
        console.print(f"{artifacts} artifacts checked, {len(findings)} findings", highlight=False)

    return Answer({"artifacts": artifacts, "findings": [asdict(finding) for finding in findings]}, print_all,
                  1 if findings else 0)


@command
@click.argument("run")
@click.option("--at", type=click.IntRange(min=0), required=True, help="The last iteration that both have in common.")
@click.option("--run", "name", required=True, help="The new run's name.")
@SETTINGS
def fork(run: str, at: int, name: str, settings: tuple[str, ...], root: str) -> Answer:
    """A new run from an iteration of RUN. With other settings or the same; what came before is shared."""
    from flows.chains import chain_of, check_new
    from flows.runs.fork import fork as fork_run

    made = fork_run(open_existing(root, run), at, name, settings, chain_of, check_new)
    data = {"run": made.name, "parent": made.record.parent}
    return Answer(data, lambda console: console.print(
        f"run {made.name}, forked from {made.record.parent}; baton train --run {made.name} goes on", highlight=False))


@command
@click.argument("a")
@click.argument("b")
def diff(a: str, b: str, root: str) -> Answer:
    """Where the runs A and B differ first. Iteration, stage, row and column, and the setting it comes from."""
    from flows.cli import display
    from flows.runs.diff import first_difference

    ours, theirs = open_existing(root, a), open_existing(root, b)
    found = first_difference(ours, theirs)
    return Answer(found and asdict(found), lambda console: display.difference(console, ours, theirs, found))


@command
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(min=0), help="After which; the last by default.")
@click.option("--best", is_flag=True, help="After the best iteration, by tracking.best.")
@click.option("--role", type=click.Choice(["actor", "critic", "reward_model"]), default="actor", show_default=True,
              help="Which of its models.")
@click.option("--merge", is_flag=True, help="Add an adapter to its base, so that nothing but transformers is needed.")
def export(
    run: str, folder: Path, iteration: int | None, best: bool, role: str, merge: bool, root: str
) -> Answer:
    """A model of RUN as a Hugging Face FOLDER. With a model card; plain transformers, or PEFT, loads it."""
    what = open_existing(root, run)
    if what.config.kind != "language":
        raise ConfigError(f"run {run!r} is a control task, whose policies are no Hugging Face models")
    if best and iteration is not None:
        raise ConfigError("--best: it names the iteration, as --iteration does; leave one out")
    from flows.language.export import export as export_model
    from flows.perform import restore as restore_model
    from flows.runs.best import best_of

    if best:
        if (found := best_of(what)) is None:
            raise ConfigError(f"--best: no iteration of run {run!r} has the metric {what.config.best_metric}; name another "
                              "with --iteration")
        iteration = found.iteration
    state = what.last() if iteration is None else what.state(iteration)
    if state is None:
        raise ConfigError(f"run {run!r} is not prepared yet; go on with baton train")
    if (model := getattr(state, role)) is not None:
        restore_model(what.store, model)
    made = export_model(what, state, role, folder, merge=merge)
    data = {"folder": str(made), "run": run, "iteration": state.iteration, "role": role}
    return Answer(data, lambda console: console.print(
        f"the {role} of run {run} after iteration {state.iteration} is in {made}", highlight=False, soft_wrap=True))


@command
@click.argument("run")
@click.option("--iteration", type=click.IntRange(min=1), required=True, help="After which the weights are wanted.")
def restore(run: str, iteration: int, root: str) -> Answer:
    """Make weights of RUN again that were not kept. By the updates since the last checkpoint that is whole, over saved
    tables; each result is held against its digests."""
    there = open_existing(root, run)
    state = there.state(iteration)
    from flows.perform import restore as restore_model

    models = [model for model in (state.optimizer, state.actor, state.critic) if model]
    replayed = sorted({each for model in models for each in restore_model(there.store, model)})
    folder = there.store.place(state.actor.artifact, state.actor.folder)
    said = f"by the updates {replayed[0]} to {replayed[-1]}" if replayed else "nothing was missing"
    return Answer({"run": run, "iteration": iteration, "updates": replayed, "actor": folder}, lambda console: console.print(
        f"iteration {iteration} of run {run} is whole: {said}; the actor is in {folder}", highlight=False, soft_wrap=True))


@command
@click.argument("run")
def rm(run: str, root: str) -> Answer:
    """Remove RUN. Its artifacts stay until baton gc finds that no other run needs them."""
    from flows.runs.run import remove_run
    from flows.store.store import Store

    remove_run(Store(root), run)
    return Answer({"removed": run}, lambda console: console.print(
        f"run {run} is removed; baton gc removes the artifacts that nothing else refers to", highlight=False))


@command
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--older-than", "hours", type=click.FloatRange(min=0), default=24.0, show_default=True, metavar="HOURS",
              help="Leave what is younger: another process may still be writing it.")
def gc(dry_run: bool, hours: float, root: str) -> Answer:
    """Remove what nothing needs. What no run refers to, broken-off attempts, and what retention does not keep."""
    from flows.cli import display
    from flows.runs.gc import collect
    from flows.store.store import existing_store

    found, younger = collect(existing_store(root), hours, dry_run=dry_run)
    data = {"removed": not dry_run, "bytes": sum(one.bytes for one in found),
            "found": [{"kind": one.kind, "what": one.what, "bytes": one.bytes} for one in found], "younger": len(younger)}
    return Answer(data, lambda console: display.garbage(console, found, younger, hours, dry_run))


@command
@click.argument("run")
@SETTINGS
def mlflow_sync(run: str, settings: tuple[str, ...], root: str) -> Answer:
    """Bring MLflow up to date with the store. Nothing is logged twice; --set tracking.uri=… names another server."""
    from flows.runs.run import changed
    from flows.tracking.mirror import sync
    from flows.tracking.tracking_uri import how_to_open

    what = changed(open_existing(root, run), {"tracking": {"enabled": True}}, settings)
    states = sync(what)
    return Answer({"run": run, "iterations": states, "mlflow": how_to_open(what)}, lambda console: console.print(
        f"run {run}: MLflow has its {states} states; {how_to_open(what)}", highlight=False, soft_wrap=True))


def main() -> None:
    """The `baton` command."""
    signal.signal(signal.SIGTERM, terminate)
    atexit.register(freeze)  # else the interpreter takes two seconds to free what it has imported, object by object
    sys.exit(run_command())


if __name__ == "__main__":
    main()
