"""Which parts of a run's checkpoints are kept: `retention` in its config, after each iteration and by `baton gc`.

    whole:   those of the last `keep_last` iterations, and of every `keep_every`-th
    others:  lose optimizer, critic and actor, in this order, up to `drop`

What goes is said beside the manifest (`dropped/<part>.json`) before it goes, so that nothing takes it for damage. A part
that another run keeps stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flows.runs.produce import now
from flows.runs.run import Run, open_run, run_names
from flows.store.store import Store, attempt_of, folder_of
from schemas.artifacts import ArtifactRef, Dropped
from schemas.errors import BatonError
from schemas.settings import PARTS, RetentionConfig


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint that need not be kept."""

    ref: ArtifactRef
    name: str
    run: str
    iteration: int
    bytes: int


def kept_whole(config: RetentionConfig, iteration: int, last: int) -> bool:
    """Whether a run whose last iteration is `last` keeps that checkpoint whole."""
    return (config.keep_last is None or iteration > last - config.keep_last
            or (config.keep_every is not None and iteration % config.keep_every == 0))


def droppable(run: Run, iterations: list[int] | None = None) -> Iterator[Part]:
    """The parts that are still there and need not be, of those iterations, or of all."""
    config, there = run.config.retention, run.iterations()
    if config.keep_last is None or not there:
        return
    for iteration in there if iterations is None else iterations:
        if iteration < 1 or kept_whole(config, iteration, there[-1]):
            continue
        ref = run.state(iteration).artifacts["ppo"]
        if not _kept_elsewhere(run, ref, iteration):
            manifest = run.store.manifest(ref)
            for name in PARTS[: PARTS.index(config.drop) + 1]:
                if run.store.files.names(f"{attempt_of(manifest)}/{name}"):
                    size = sum(entry.bytes for entry in manifest.files if entry.path.startswith(f"{name}/"))
                    yield Part(ref, name, run.name, iteration, size)


def drop(store: Store, part: Part) -> None:
    """Says that the part is gone, then removes it; to be repeated if that is interrupted."""
    store.put(f"{folder_of(part.ref)}/dropped/{part.name}.json", Dropped(part=part.name, run=part.run, created=now()))
    store.files.remove(f"{attempt_of(store.manifest(part.ref))}/{part.name}")


def retain(run: Run) -> None:
    """Before a run goes on: drops what is not kept of all its checkpoints."""
    for part in list(droppable(run)):
        drop(run.store, part)


def retain_after(run: Run, iteration: int) -> None:
    """After an iteration: drops what is not kept of the one that it has pushed out of the last ones."""
    if run.config.retention.keep_last is not None:
        for part in list(droppable(run, [iteration - run.config.retention.keep_last])):
            drop(run.store, part)


def _kept_elsewhere(run: Run, ref: ArtifactRef, iteration: int) -> bool:
    """Whether another run keeps that checkpoint whole; if it has it, then as that iteration."""
    for name in run_names(run.store):
        if name == run.name:
            continue
        try:
            other = open_run(run.store, name)
            there = other.iterations()
            if (iteration in there and other.state(iteration).artifacts.get("ppo") == ref
                    and kept_whole(other.config.retention, iteration, there[-1])):
                return True
        except BatonError:  # who cannot be asked keeps everything
            return True
    return False
