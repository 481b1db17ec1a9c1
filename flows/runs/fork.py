"""`baton fork`: a new run that begins where another one was after an iteration, and shares its artifacts up to there."""

from __future__ import annotations

from collections.abc import Iterable

from flows.chains import chain
from flows.runs.produce import now
from flows.runs.run import Run, open_run, record_key, remove_run, remove_states, run_names
from flows.stage import use_new_functions
from flows.store.lease import lease
from flows.store.store import attempt_of
from schemas.artifacts import ModelRef, RunRecord, TrainState, check_name
from schemas.errors import ConfigError

BEFORE = ("sft", "reward_model", "value", "policy")  # sections that decide what was made before the first iteration


def fork(parent: Run, at: int, name: str, settings: Iterable[str]) -> Run:
    """The run `name`, whose states up to `at` are the parent's. Raises `ConfigError`, and then makes nothing."""
    store = parent.store
    check_name(name, "run name")
    if name in run_names(store):
        raise ConfigError(f"run {name!r} exists; choose another name with --run, or baton rm {name}")
    state = parent.state(at)
    run = open_run(store, parent.name, settings=settings)
    for section in BEFORE:
        new, old = (getattr(config, section, None) for config in (run.config, parent.config))
        if new != old and not (section == "value" and new is None):
            raise ConfigError(f"--set {section}…: it was decided before the first iteration; make another run with it")
    use_new_functions(run, parent)
    _require_kept(state, run)
    changed = chain(run).forked(run, parent, state)
    record = RunRecord(name=name, config=run.config.model_dump(mode="json"), inputs=run.inputs,
                       parent=f"{parent.name}@{at}", created=now())
    with lease(store, name):
        if name in run_names(store):
            raise ConfigError(f"run {name!r} exists by now; choose another name with --run")
        remove_states(store, name)  # what an interrupted fork has left
        run.record = record
        for iteration in parent.iterations():
            if iteration <= at:
                run.save(changed if iteration == at else parent.state(iteration))
        store.put(record_key(name), record)  # last: with it the run is there, and retention keeps what it needs
        try:
            _require_kept(state, run)
        except ConfigError:
            remove_run(store, name)
            raise
    return open_run(store, name)


def _require_kept(state: TrainState, run: Run) -> None:
    """Raises `ConfigError` if retention has dropped what the next iteration begins with."""
    for part in (state.actor, state.critic, state.optimizer):
        if isinstance(part, ModelRef):
            there = run.store.files.names(f"{attempt_of(run.store.manifest(part.artifact))}/{part.folder}")
            if not there:
                raise ConfigError(f"iteration {state.iteration}: its {part.folder} is not kept any more; fork at a later "
                                  "iteration, or raise retention.keep_last of runs to come")
