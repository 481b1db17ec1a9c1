"""What Prefect's server does about flow runs that nobody ends: `python -m flows.orchestration.automations`.

    zombies     a flow run whose process or machine is gone: its heart has not beaten for a minute
    stillborn   a flow run that was taken by a worker and never began
    undead      a flow run that was cancelled, and nobody is there to end it
    overdue     an iteration, or a stage run again, that takes longer than it may

A flow run that is ended by mistake loses nothing: its artifacts are committed, and whoever goes on waits for its lease.
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
ANEW = {f"prefect.flow-run.{state}" for state in ("Scheduled", "AwaitingRetry", "AwaitingConcurrencySlot", "Late",
                                                  "Pending")}  # taken from its process, to be begun again
HEARTBEAT = "prefect.flow-run.heartbeat"  # each 30 seconds, as prefect.yaml says; Prefect allows no more


def automations(patience: float = 60, start: float = 900, limit: float = 6 * 3600) -> list[AutomationCore]:
    """The four of them, of flow runs with the tag `baton`. All in seconds.

    patience: without a heartbeat, until a flow run counts as a zombie; from being cancelled to ending
    start: from being taken to running; longer than the pool needs to bring up a machine or an image
    limit: of a flow run of `iterate` or `stage`, from its begin
    """
    return [
        AutomationCore(
            name="baton-zombies", description="Ends flow runs whose process is gone, so that the next one need not wait.",
            trigger=_missing({HEARTBEAT}, {HEARTBEAT} | ENDED | CANCELLING | ANEW, patience),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"no sign of life for {patience:g} s: its process or its "
                                        "machine is gone; what it committed is whole, the next flow run goes on")]),
        AutomationCore(
            name="baton-stillborn", description="Ends flow runs that a worker took and that never began.",
            trigger=_missing({"prefect.flow-run.Pending"}, {"prefect.flow-run.Running"} | ENDED | CANCELLING, start),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"taken by a worker {start:g} s ago and not begun: it "
                                        "or its machine is gone")]),
        AutomationCore(
            name="baton-undead", description="Ends flow runs that were cancelled and whose process is gone.",
            trigger=_missing(CANCELLING, ENDED, patience),
            actions=[ChangeFlowRunState(state="CANCELLED", message=f"cancelled {patience:g} s ago, and nobody was there to "
                                        "end it; what it committed is whole")]),
        AutomationCore(
            name="baton-overdue", description="Cancels flow runs that take longer than they may.",
            trigger=_missing({"prefect.flow-run.Running"}, ENDED | CANCELLING, limit, SHORT), actions=[CancelFlowRun()]),
    ]


def _missing(after: set[str], expect: set[str], seconds: float, *which: dict[str, Any]) -> EventTrigger:
    """For each flow run of ours: after one of these events none of those has come for so long."""
    return EventTrigger(
        posture=Posture.Proactive, after=after, expect=expect, within=timedelta(seconds=seconds), threshold=1,
        match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=[OURS, *which], for_each={"prefect.resource.id"})


def install(wanted: list[AutomationCore]) -> None:
    """Makes the server's automations of these names these, whatever they were."""
    with get_client(sync_client=True) as client:
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
    parser.add_argument("--start", type=float, default=900, help="seconds from being taken to running (900)")
    parser.add_argument("--limit", type=float, default=6 * 3600, help="seconds that an iteration may take (21600)")
    given = parser.parse_args()
    wanted = automations(given.patience, given.start, given.limit)
    try:
        if not PREFECT_API_URL.value():
            raise PrefectError("PREFECT_API_URL is not set: automations are of a server that stays")
        with server_errors("then once more"):
            install(wanted)
    except PrefectError as error:
        print(f"automations: {error}", file=sys.stderr)
        return 1
    print(f"automations: {', '.join(automation.name for automation in wanted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
