"""`baton fork`: a new run that begins where another one was after an iteration, and shares its artifacts up to there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from flows.runs.kind import Chain
from flows.runs.run import Run, changed, lease_key, record_key, remove_states, run_names
from flows.runs.start import CheckNew, with_new_inputs
from flows.store.lease import working_on
from schemas.artifacts import RunRecord, TrainState, check_name
from schemas.errors import ConfigError
from schemas.records import now
from stages.ops.progress import progress_bar

BEFORE = ("lora", "sft", "reward_model", "value", "policy")  # sections that decide what was made before the first iteration


def fork(
    parent: Run, at: int, name: str, settings: Iterable[str], chain_of: Callable[[Run], Chain],
    check_new: CheckNew,
) -> Run:
    """The run `name`, whose states up to `at` are the parent's. Raises `ConfigError`, and then makes nothing."""
    store = parent.store
    check_name(name, "run name")
    if name in run_names(store):
        raise ConfigError(f"run {name!r} exists; choose another name with --run, or baton rm {name}")
    state = parent.state(at)
    run = changed(parent, settings=settings)
    for section in BEFORE:
        new, old = (getattr(config, section, None) for config in (run.config, parent.config))
        if new != old and not (section == "value" and new is None):
            raise ConfigError(f"--set {section}…: it was decided before the first iteration; make another run with it")
    with working_on(store, lease_key(name), f"run {name!r}"):  # gc spares what is imported and in no record yet
        if name in run_names(store):
            raise ConfigError(f"run {name!r} exists by now; choose another name with --run")
        try:
            return _made(with_new_inputs(run, parent, check_new), parent, state, name, chain_of)
        except ConfigError:
            remove_states(store, name)
            store.files.remove(record_key(name))
            store.files.remove(f"runs/{name}")
            raise


def _made(run: Run, parent: Run, state: TrainState, name: str, chain_of: Callable[[Run], Chain]) -> Run:
    """The run, its record written last: with it the run is there, and retention keeps what it needs."""
    first = chain_of(run).forked(parent, state)
    record = RunRecord(name=name, config=run.config.model_dump(mode="json"), inputs=run.inputs,
                       parent=f"{parent.name}@{state.iteration}", created=now())
    remove_states(run.store, name)  # what an interrupted fork has left
    run = replace(run, record=record)
    for iteration in progress_bar([i for i in parent.iterations() if i <= state.iteration], "fork"):
        run.save(first if iteration == state.iteration else parent.state(iteration))
    run.store.put(record_key(name), record)
    return run
