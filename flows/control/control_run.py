"""A control task's run: all that the flows ask of this kind."""

from __future__ import annotations

from flows.control.check_environment import check, check_new
from flows.control.control_chain import ControlChain
from flows.control.control_tasks import TASKS
from flows.control.warm_policies import WarmPolicies
from flows.runs.kind import KindOfRun

CONTROL = KindOfRun(chain=ControlChain, task=TASKS.__getitem__, warm=WarmPolicies, check=check, check_new=check_new)
