"""What can be said of a run in a few lines: how far it is, and where its time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, TrainState, call_of
from schemas.stages import STAGES

LINES = 40  # iterations shown


def progress(run: Run, last: TrainState | None) -> str:
    """For people: how far it is."""
    there = "to be prepared" if last is None else f"{last.iteration} there"
    return f"{run.config.iterations} iterations, {there}"


def overview(run: Run) -> dict[str, Any]:
    """A run in a line: how far it is, and its last numbers."""
    last = run.last()
    metrics = last.metrics if last else {}
    done = last.iteration if last else 0
    return {"run": run.name, "iteration": done, "iterations": max(done, run.config.iterations),
            "reward": metrics.get("reward/score", metrics.get("rollout/episode_return")),
            "kl": metrics.get("gae/kl"), "gold": metrics.get("evaluate/gold"),
            "created": run.record.created, "parent": run.record.parent}


def time_spent(run: Run, state: TrainState) -> list[dict[str, Any]]:
    """Where an iteration's wall time went: each stage as its manifest has it, and what lies between them.

    Stages that ran side by side took less together than their sum, which is then the whole.
    """
    found = {stage: run.store.find(ref) for stage, ref in state.artifacts.items()}
    manifests = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    total = max(state.seconds, sum(manifest.seconds for manifest in manifests.values()))
    rows = [{"stage": stage, "seconds": m.seconds, "fraction": m.seconds / total,
             "tokens_per_second": m.tokens_per_second, "bytes": m.bytes, "artifact": m.ref.short}
            for stage, m in manifests.items()]
    between = total - sum(row["seconds"] for row in rows)
    return [*rows, {"stage": "between stages", "seconds": between, "fraction": between / total, "tokens_per_second": None,
                    "bytes": None, "artifact": None}]


def shard_times(run: Run, state: TrainState) -> list[dict[str, Any]]:
    """Of each stage of an iteration that was cut into shards: how long these took.

    `idle`: of workers that had a shard each, the part of their time in which they would have waited for the slowest one.
    """
    rows = []
    for stage, ref in state.artifacts.items():
        manifest = run.store.find(ref)
        cut = STAGES[run.config.kind][stage].sharded and manifest is not None
        if not cut or manifest.environment.execution.get("shards", 1) == 1:
            continue
        shards = [run.store.find(call.recipe.ref) for call in call_of(manifest, run.store.absolute).shards()]
        if None not in shards:
            seconds = [shard.seconds for shard in shards]
            rows.append({"stage": stage, "shards": len(seconds), "mean_seconds": sum(seconds) / len(seconds),
                         "slowest_seconds": max(seconds), "slowest": 1 + seconds.index(max(seconds)),
                         "idle": 1 - sum(seconds) / (len(seconds) * max(seconds)), "joined_seconds": manifest.seconds})
    return rows


def worth_showing(run: Run, iterations: list[int]) -> list[int]:
    """Of a long run every so many iterations, and the last; and those that were evaluated, if they are few."""
    stride, last = -(-len(iterations) // LINES), iterations[-1]
    evaluated = {i for i in iterations if i == 0 or run.config.evaluation_due(i, last)}
    few = evaluated if len(evaluated) <= LINES else set()
    return [i for i in iterations if i % stride == 0 or i == last or i in few]


def found(states: Iterable[TrainState]) -> list[str]:
    """A line per stage: the artifacts of a run that are there."""
    where: dict[str, list[tuple[int, ArtifactRef]]] = defaultdict(list)
    for state in states:
        for stage, ref in state.artifacts.items():
            where[stage].append((state.iteration, ref))
    return [f"found {stage:<13} {_span([i for i, _ in refs]):<18} {refs[0][1].short if len(refs) == 1 else ''}".rstrip()
            for stage, refs in where.items()]


def _span(iterations: list[int]) -> str:
    if len(iterations) == 1:
        return f"iteration {iterations[0]}"
    return f"{len(iterations)} iterations, {iterations[0]}…{iterations[-1]}"
