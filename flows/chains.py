"""The two kinds of run there are: a language model's and a control task's. Each is imported when it is needed."""

from __future__ import annotations

from collections.abc import Mapping

from flows.runs.inputs import Checked, Files
from flows.runs.kind import Chain, KindOfRun, Warm, WarmLater
from flows.runs.rows import Rows
from flows.runs.run import Run
from flows.store.store import Store
from schemas.settings import ExecutionConfig, RunConfig
from schemas.stages import Kind


def kind_of(kind: Kind) -> KindOfRun:
    """What that kind of run brings."""
    match kind:
        case "language":
            from flows.language.language_run import LANGUAGE
            return LANGUAGE
        case "control":
            from flows.control.control_run import CONTROL
            return CONTROL


def chain_of(run: Run) -> Chain:
    """Which stages the run has, and what each is called with."""
    return kind_of(run.config.kind).chain(run)


def warm_of(kind: Kind, store: Store, execution: ExecutionConfig) -> Warm:
    """What a process keeps in memory between calls of that kind."""
    return WarmLater(lambda: kind_of(kind).warm(store, execution))


def check_new(config: RunConfig, files: Files, data: Mapping[str, Rows]) -> None:
    """Reads functions and models that settings name which the run was not made with. Raises `ConfigError`."""
    kind_of(config.kind).check_new(config, files, data)


def check_inputs(config: RunConfig, files: Files) -> Checked:
    """Reads all that a new run is made of before it is imported. Raises `ConfigError`."""
    return kind_of(config.kind).check(config, files)
