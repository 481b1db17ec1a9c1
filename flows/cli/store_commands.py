"""Commands on whole runs: `baton runs`, `show`, `verify`, `fork`, `diff`, `export`, `restore`, `rm`, `gc`, `mlflow-sync`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from flows.cli.command import SETTINGS, Answer, command, open_existing, open_shown
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from flows.runs.run import Run


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
