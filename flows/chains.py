"""Which chain of stages a run is: a language model's or a control task's. All that flows know of the difference."""

from __future__ import annotations

import importlib
from types import ModuleType

from flows.runs.run import Run
from schemas.control import ControlConfig


def chain(run: Run) -> ModuleType:
    """The chain's module, imported when it is needed, since transformers takes seconds.

    Both have STAGES, the tasks by stage; Warm, what a process keeps in memory; `prepare(run)`, state 0;
    `iteration(run, state, last)`, the next state; `line(metrics)`, an iteration in words;
    `saved(stage, run, recorded, iteration)`, what a stage is given again; and `forked(run, recorded, state)`, what a fork
    begins from.
    """
    control = isinstance(run.config, ControlConfig)
    return importlib.import_module("flows.control.control_chain" if control else "flows.language.language_chain")
