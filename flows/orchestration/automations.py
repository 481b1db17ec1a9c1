"""Automations of Prefect's server that end orphaned flow runs: `python -m flows.orchestration.automations`.

    missed-heartbeats  a flow run whose process or machine is gone: no heartbeat for a minute
    never-started      a flow run that a worker accepted and that never began
    stuck-cancelling   a flow run that was cancelled and whose process is gone
    overdue            an iteration, or a stage run again, that exceeds its time limit

A flow run that is ended by mistake loses nothing: its artifacts are committed, and the next one waits for its lease.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.settings import PREFECT_API_URL

from flows.orchestration.server import server_errors
from schemas.errors import PrefectError

OURS = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.baton"}
SHORT = {"prefect.resource.role": "flow", "prefect.resource.name": ["iterate", "stage"]}
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled")}
CANCELLING = {"prefect.flow-run.Cancelling"}
RESCHEDULED = {f"prefect.flow-run.{state}" for state in ("Scheduled", "AwaitingRetry", "AwaitingConcurrencySlot", "Late",
                                                  "Pending")}  # its process is gone, and it will be started again
OLD_NAMES = ("baton-zombies", "baton-stillborn", "baton-undead")
HEARTBEATS = "baton-missed-heartbeats"
HEARTBEAT = "prefect.flow-run.heartbeat"  # each 30 seconds, as in prefect.yaml; Prefect allows no shorter interval


def automations(patience: float = 60, start: float = 900, limit: float = 6 * 3600) -> list[AutomationCore]:
    """The four of them, of flow runs with the tag `baton`. All in seconds.

    patience: without a heartbeat, until a flow run counts as crashed; from being cancelled to its end
    start: from being accepted to running; longer than the pool needs to provision a machine or an image
    limit: of a flow run of `iterate` or `stage`, from its start
    """
    return [
        AutomationCore(
            name=HEARTBEATS,
            description="Ends flow runs whose process is gone, so that the next one need not wait.",
            trigger=_missing({HEARTBEAT}, {HEARTBEAT} | ENDED | CANCELLING | RESCHEDULED, patience),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"no heartbeat for {patience:g} s: its process or its "
                                        "machine is gone; what it committed is whole, the next flow run goes on")]),
        AutomationCore(
            name="baton-never-started", description="Ends flow runs that a worker accepted and that never began.",
            trigger=_missing({"prefect.flow-run.Pending"}, {"prefect.flow-run.Running"} | ENDED | CANCELLING, start),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"accepted by a worker {start:g} s ago and not started: it "
                                        "or its machine is gone")]),
        AutomationCore(
            name="baton-stuck-cancelling", description="Ends flow runs that were cancelled and whose process is gone.",
            trigger=_missing(CANCELLING, ENDED, patience),
            actions=[ChangeFlowRunState(state="CANCELLED", message=f"cancelled {patience:g} s ago and its process is "
                                        "gone; what it committed is whole")]),
        AutomationCore(
            name="baton-overdue", description="Cancels flow runs that exceed the time limit.",
            trigger=_missing({"prefect.flow-run.Running"}, ENDED | CANCELLING, limit, SHORT), actions=[CancelFlowRun()]),
    ]


def _missing(after: set[str], expect: set[str], seconds: float, *which: dict[str, Any]) -> EventTrigger:
    """For each flow run tagged `baton`: after one of the events `after`, none of those in `expect` for so many seconds."""
    return EventTrigger(
        posture=Posture.Proactive, after=after, expect=expect, within=timedelta(seconds=seconds), threshold=1,
        match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=[OURS, *which], for_each={"prefect.resource.id"})


def install(wanted: list[AutomationCore]) -> None:
    """Makes the server's automations of these names these, whatever they were; those of older versions go."""
    with get_client(sync_client=True) as client:
        for name in OLD_NAMES:
            for old in client.read_automations_by_name(name):
                client.delete_automation(old.id)
        for automation in wanted:
            old = client.read_automations_by_name(automation.name)
            if old:  # not a new one: what it has seen so far would be forgotten
                client.update_automation(old[0].id, automation)
            else:
                client.create_automation(automation)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.orchestration.automations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=60,
                        help="seconds without a heartbeat, or from being cancelled to its end (60)")
    parser.add_argument("--start", type=float, default=900, help="seconds from being accepted to running (900)")
    parser.add_argument("--limit", type=float, default=6 * 3600, help="seconds that an iteration may take (21600)")
    options = parser.parse_args()
    wanted = automations(options.patience, options.start, options.limit)
    try:
        if not PREFECT_API_URL.value():
            raise PrefectError("PREFECT_API_URL is not set: automations need a server that outlives the command")
        with server_errors("then once more"):
            install(wanted)
    except PrefectError as error:
        print(f"automations: {error}", file=sys.stderr)
        return 1
    print(f"automations: {', '.join(automation.name for automation in wanted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
