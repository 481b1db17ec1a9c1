"""Which chain of stages a run is: a language model's or a control task's. All that flows know of the difference."""

from __future__ import annotations

import importlib
from types import ModuleType

from flows.runs import Run
from schemas.control import ControlConfig


def chain(run: Run) -> ModuleType:
    """`flows.language` or `flows.control`, imported when it is needed, since transformers takes seconds.

    Both have STAGES, the tasks by stage; Warm, what a process keeps in memory; `prepare(run)`, state 0;
    `iteration(run, state, last)`, the next state; `line(metrics)`, an iteration in words;
    `saved(stage, run, recorded, iteration)`, what a stage is given again; and `forked(run, recorded, state)`, what a fork
    begins from.
    """
    return importlib.import_module("flows.control" if isinstance(run.config, ControlConfig) else "flows.language")
