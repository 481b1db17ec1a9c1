"""Commands that train or make artifacts: `baton train`, `iterate`, `stage`, `perform`."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.command import SETTINGS, Answer, command, open_existing
from flows.cli.flow_runs import begin_server, server_is_named, tagged
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from flows.runs.inputs import Checked, Files
    from flows.runs.run import Run
    from flows.runs.start import Request
    from schemas.artifacts import TrainState
    from schemas.settings import RunConfig

log = logging.getLogger("baton")


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
            begin_server()
        return check_inputs(config, files)

    run = start(Request(root, name, config, settings, overrides), check)
    last = run.last()
    if iterations == 0:
        return _made(run, last)
    if run.finished_by(last):
        return _nothing_to_do(run)
    log.info(f"run {run.name} in {root}: {progress(run, last)}")
    begin_server()
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
    if server_is_named():
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
