"""One stage's work: `python -m flows.perform CALL.json` in a process of its own, and the same call in any other.

A call names all that decides a result by references alone, so that nothing else has to cross: `baton stage STAGE RUN
--iteration I --print-call > CALL.json` writes one of a run.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import click
from pydantic import ValidationError

from flows.chains import kind_of, warm_of
from flows.runs.kind import Warm
from flows.runs.produce import produce
from flows.runs.work import Work
from flows.store.store import Store
from schemas.artifacts import Produced, StageCall
from schemas.errors import BatonError, ConfigError
from schemas.stages import STAGES
from stages.ops.device import Device


def perform(call: StageCall, store: Store, warm: Warm, *, again: bool = False) -> Produced:
    """Load → call → commit. Found, where the recipe was committed before; with `again` made once more beside that.

    Raises `ConfigError` if this version of Baton has no such stage, and what the stage raises.
    """
    stage = STAGES[call.kind].get(call.stage)
    if stage is None or stage.version != call.version:
        has = f"version {stage.version}" if stage else f"the stages {', '.join(STAGES[call.kind])}"
        raise ConfigError(f"call of {call.stage}, version {call.version}: this Baton has {has}; make the call with it")
    Device(call.execution.device).use_threads(call.execution.threads)
    task = kind_of(call.kind).tasks[call.stage]
    produced = produce(store, call, lambda attempt: task(Work(call, store, warm, attempt)), again=again)
    if produced.how == "adopted" and produced.different:
        warm.forget(produced.ref)  # what it holds is ours
    return produced


def read_call(path: Path) -> StageCall:
    """Raises `ConfigError` if the file holds no call."""
    try:
        return StageCall.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in finding["loc"])
        raise ConfigError(f"{path}: not a stage's call: {key + ': ' if key else ''}{finding['msg']}") from None


@click.command()
@click.argument("call", type=click.Path(path_type=Path))
@click.option("--store", help="Where artifacts are kept, instead of the store that the call names.")
@click.option("--again", is_flag=True, help="Make an artifact that is there once more, and compare the bytes.")
def main(call: Path, store: str | None, again: bool) -> None:
    """Perform the stage CALL, a JSON file, and print what came of it as JSON."""
    try:
        stage_call = read_call(call)
        place = Store(store or stage_call.store)
        with closing(warm_of(stage_call.kind, place, stage_call.execution)) as warm:
            produced = perform(stage_call, place, warm, again=again)
    except BatonError as error:
        click.echo(f"perform: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    click.echo(produced.model_dump_json(indent=1))
    sys.exit(1 if produced.how == "different" else 0)


if __name__ == "__main__":
    main()
