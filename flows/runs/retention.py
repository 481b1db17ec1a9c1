"""Which parts of a run's checkpoints are kept: `retention` in its config, after each iteration and by `baton gc`.

    whole:   those of the last `keep_last` iterations, of every `keep_every`-th, and of the best
    others:  lose optimizer, critic and actor, in this order, up to `drop`

What goes is recorded beside the manifest (`dropped/<part>.json`) before it goes, so that it is not taken for damage. A part
that another run keeps stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flows.runs.best import best_by
from flows.runs.run import Run, find_run, possible_runs, state_key
from flows.store.store import Store, attempt_of, folder_of
from schemas.artifacts import ArtifactRef, Best, Dropped, TrainState
from schemas.errors import ConfigError, StoreError
from schemas.records import now
from schemas.settings import PARTS, RetentionConfig


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint that need not be kept."""

    ref: ArtifactRef
    name: str
    run: str
    iteration: int
    bytes: int


def kept_whole(config: RetentionConfig, iteration: int, last: int, best: Best | None) -> bool:
    """Whether a run whose last iteration is `last`, and `best` the best so far, keeps that checkpoint whole."""
    return (config.keep_last is None or iteration > last - config.keep_last
            or (config.keep_every is not None and iteration % config.keep_every == 0)
            or (config.keep_best and best is not None and iteration == best.iteration))


class Retention:
    """What a run keeps of its checkpoints, and what other runs of the store keep of the same ones.

    An iteration asks each other run for one state, however many iterations there are.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.retention

    def droppable(self, iterations: Iterable[int], last: TrainState) -> Iterator[Part]:
        """The parts that are still there and need not be, of those iterations; `last`: the run's latest state."""
        best = best_by(self.run, last)
        for iteration in iterations:
            if iteration < 1 or kept_whole(self.config, iteration, last.iteration, best):
                continue
            ref = self.run.state(iteration).artifacts["ppo"]
            manifest = self.run.store.manifest(ref)
            there = [name for name in PARTS[: PARTS.index(self.config.drop) + 1]
                     if self.run.store.files.names(f"{attempt_of(manifest)}/{name}")]
            if there and not self._kept_elsewhere(ref, iteration):
                for name in there:
                    size = sum(entry.bytes for entry in manifest.files if entry.path.startswith(f"{name}/"))
                    yield Part(ref, name, self.run.name, iteration, size)

    def before(self, last: TrainState) -> None:
        """Before a run goes on from its last state: drops what is not kept of all its checkpoints."""
        if self.config.keep_last is not None:
            for part in list(self.droppable(range(1, last.iteration + 1), last)):
                drop(self.run.store, part)

    def after(self, before: TrainState, state: TrainState) -> None:
        """After an iteration: drops what is not kept of the one that it has pushed out of the last ones, and of the one that
        was the best before it."""
        if self.config.keep_last is not None:
            pushed = {state.iteration - self.config.keep_last, *([before.best.iteration] if before.best else [])}
            for part in list(self.droppable(sorted(pushed), state)):
                drop(self.run.store, part)

    def _kept_elsewhere(self, ref: ArtifactRef, iteration: int) -> bool:
        """Whether another run keeps that checkpoint whole; if it has it, then as that iteration."""
        others = (name for name in possible_runs(self.run.store) if name != self.run.name)
        return any(self._kept_by(name, ref, iteration) for name in others)

    def _kept_by(self, name: str, ref: ArtifactRef, iteration: int) -> bool:
        try:
            state = self.run.store.get(state_key(name, iteration), TrainState)
            if state is None or state.artifacts.get("ppo") != ref:
                return False
            other = find_run(self.run.store, name)
            if other is None:  # a fork that is just being made needs what its states name
                return True
            last = other.last()
            return kept_whole(other.config.retention, iteration, last.iteration, best_by(other, last))
        except (StoreError, ConfigError):  # a run that cannot be read keeps everything
            return True


def drop(store: Store, part: Part) -> None:
    """Records that the part is gone, then removes it; to be repeated if that is interrupted."""
    store.put(f"{folder_of(part.ref)}/dropped/{part.name}.json", Dropped(part=part.name, run=part.run, created=now()))
    store.files.remove(f"{attempt_of(store.manifest(part.ref))}/{part.name}")


def all_droppable(run: Run) -> Iterator[Part]:
    """Of all iterations of a run."""
    last = run.last()
    if run.config.retention.keep_last is not None and last is not None:
        yield from Retention(run).droppable(run.iterations(), last)
