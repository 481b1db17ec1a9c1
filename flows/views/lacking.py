"""What the states of a run name and the store does not have: of a run that was half collected, or copied in part.

Views leave it out, and say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from flows.runs.run import Run
from schemas.artifacts import TrainState


def lacking(run: Run, states: Sequence[TrainState]) -> list[str]:
    """A line for each stage of which artifacts are missing, with the command that makes one again."""
    there, missing = set(run.store.artifacts()), defaultdict(list)
    for state in states:
        for stage, ref in state.artifacts.items():
            if ref not in there and ref not in {each for _, each in missing[stage]}:
                missing[stage].append((state.iteration, ref))
    return [_line(run, stage, [iteration for iteration, _ in found]) for stage, found in missing.items() if found]


def _line(run: Run, stage: str, iterations: list[int]) -> str:
    which = f"iteration {iterations[0]}" if len(iterations) == 1 else (
        f"{len(iterations)} iterations, {iterations[0]} to {iterations[-1]},")
    return (f"{stage} of {which} is not in the store, and left out; baton stage {stage} {run.name} --iteration "
            f"{iterations[0]} makes it again")
