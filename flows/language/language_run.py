"""A language model's run: all that the flows ask of this kind."""

from __future__ import annotations

from flows.language.check_inputs import check, check_new
from flows.language.language_chain import LanguageChain
from flows.language.language_tasks import TASKS
from flows.language.warm_models import WarmModels
from flows.runs.kind import KindOfRun

LANGUAGE = KindOfRun(chain=LanguageChain, tasks=TASKS, warm=WarmModels, check=check, check_new=check_new)
