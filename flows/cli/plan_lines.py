"""`baton train --dry-run` as people read it."""

from __future__ import annotations

import yaml
from rich.console import Console

from flows.plan import Plan


def print_plan(console: Console, found: Plan) -> None:
    """What a run would do."""
    def say(what: str, text: str) -> None:
        console.print(f"{what:<11} {text}", highlight=False, markup=False, soft_wrap=True)

    say("run", f"{found.run.name}, {'goes on' if found.there else 'new'}, {found.iterations} iterations")
    missing = [role for role, (_, there) in found.inputs.items() if not there]
    say("inputs", f"{len(found.inputs) - len(missing)} of {len(found.inputs)} in the store"
        + (f"; to be imported: {', '.join(missing)}" if missing else ""))
    for title, steps in (("found", [s for s in found.steps if s.made]), ("to make", [s for s in found.steps if not s.made])):
        by_iteration: dict[int, list[str]] = {}
        for step in steps:
            by_iteration.setdefault(step.iteration, []).append(step.ref.short if step.made else step.stage)
        for iteration, stages in list(by_iteration.items())[:3]:
            when = f"iteration {iteration}" if iteration else "before the first iteration"
            say(title, f"{when}: {', '.join(stages)}")
        if len(by_iteration) > 3:
            say(title, f"… to iteration {max(by_iteration)}")
    if not found.to_make:
        say("to make", "nothing")
        return
    first = (found.done or 0) + 1
    times = f", about {found.seconds:.1f} s each, as the last one took" if found.seconds else ""
    say("iterations", f"{first} to {found.iterations}, {found.evaluations} of them evaluated{times}")
    size = f" of {found.snapshot_bytes / 1e6:,.1f} MB" if found.snapshot_bytes else ", of a size that is not known yet"
    whole = f", {found.snapshots * found.snapshot_bytes / 1e9:,.2f} GB in all" if found.snapshot_bytes else ""
    kept = found.run.config.retention.keep_last
    say("weights", f"{found.snapshots} checkpoints{size}{whole}" + (f"; the last {kept} are kept whole" if kept else ""))
    if found.free is not None:
        say("disk", f"{found.free / 1e9:,.1f} GB free")
    config = yaml.safe_dump(found.run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(config, markup=False, highlight=False)
