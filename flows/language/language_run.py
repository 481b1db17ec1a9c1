"""A language model's run: all that the flows ask of this kind, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from flows.language.language_chain import LanguageChain
from flows.runs.inputs import Checked, Files
from flows.runs.kind import KindOfRun, Warm
from flows.runs.rows import Rows
from flows.runs.work import Task
from flows.store.store import Store
from schemas.settings import ExecutionConfig, RunConfig


def _task(stage: str) -> Task:
    if stage == "gae":
        from flows.language.gae_task import gae
        return gae
    from flows.language.language_tasks import TASKS
    return TASKS[stage]


def _warm(store: Store, execution: ExecutionConfig) -> Warm:
    from flows.language.warm_models import WarmModels
    return WarmModels(store, execution)


def _check(config: RunConfig, files: Files) -> Checked:
    from flows.language.check_inputs import check
    return check(config, files)


def _check_new(config: RunConfig, files: Files, data: Mapping[str, Rows]) -> None:
    from flows.language.check_inputs import check_new
    check_new(config, files, data)


LANGUAGE = KindOfRun(chain=LanguageChain, task=_task, warm=_warm, check=_check, check_new=_check_new)
