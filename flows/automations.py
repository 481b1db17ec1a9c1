"""What Prefect's server does about flow runs that nobody ends: `python -m flows.automations`, against PREFECT_API_URL.

    zombies     a flow run whose process or machine is gone: its heart has not beaten for a minute
    stillborn   a flow run that was taken by a worker and never began
    overdue     an iteration, or a stage run again, that takes longer than it may

A run that is ended by mistake loses nothing: its artifacts are committed, and whoever goes on waits for its lease.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.server import explained
from schemas.errors import PrefectError

OURS = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.baton"}
SHORT = {"prefect.resource.role": "flow", "prefect.resource.name": ["iterate", "stage"]}
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling")}
HEARTBEAT = "prefect.flow-run.heartbeat"  # each 30 seconds, as prefect.yaml says; Prefect allows no more


def automations(patience: float = 60, start: float = 900, limit: float = 6 * 3600) -> list[AutomationCore]:
    """The three of them, of flow runs with the tag `baton`. All in seconds.

    patience: without a heartbeat, until a flow run counts as a zombie
    start: from being taken to running; longer than the pool needs to bring up a machine or an image
    limit: of a flow run of `iterate` or `stage`, from its begin
    """
    return [
        AutomationCore(
            name="baton-zombies", description="Ends flow runs whose process is gone, so that the next one need not wait.",
            trigger=_missing({HEARTBEAT}, {HEARTBEAT} | ENDED, patience),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"no sign of life for {patience:g} s: its process or its "
                                        "machine is gone; what it committed is whole, the next flow run goes on")]),
        AutomationCore(
            name="baton-stillborn", description="Ends flow runs that a worker took and that never began.",
            trigger=_missing({"prefect.flow-run.Pending"}, {"prefect.flow-run.Running"} | ENDED, start),
            actions=[ChangeFlowRunState(state="CRASHED", message=f"taken by a worker {start:g} s ago and not begun: it "
                                        "or its machine is gone")]),
        AutomationCore(
            name="baton-overdue", description="Cancels flow runs that take longer than they may.",
            trigger=_missing({"prefect.flow-run.Running"}, ENDED, limit, SHORT), actions=[CancelFlowRun()]),
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
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.automations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=60, help="seconds without a heartbeat (60)")
    parser.add_argument("--start", type=float, default=900, help="seconds from being taken to running (900)")
    parser.add_argument("--limit", type=float, default=6 * 3600, help="seconds that an iteration may take (21600)")
    given = parser.parse_args()
    wanted = automations(given.patience, given.start, given.limit)
    try:
        with explained("then once more"):
            install(wanted)
    except PrefectError as error:
        print(f"automations: {error}", file=sys.stderr)
        return 1
    print(f"automations: {', '.join(automation.name for automation in wanted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
