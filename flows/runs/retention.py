"""Which parts of a run's checkpoints are kept: `retention` in its config, after each iteration and by `baton gc`.

    whole:   those of the last `keep_last` iterations, the newest one that was written (checkpoints.every) and all since,
             those of every `keep_every`-th iteration, and that of the best
    others:  lose optimizer, critic and actor, in this order, up to `drop`

What goes is recorded beside the manifest (`dropped/<part>.json`) before it goes, so that it is not taken for damage; `baton
restore` makes it again. A part that another run keeps stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flows.runs.best import best_by
from flows.runs.run import Run, find_run, possible_runs, state_key
from flows.store.attempt import folder_of
from flows.store.store import Store, attempt_of
from schemas.artifacts import ArtifactRef, Best, Dropped, Manifest, TrainState
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


def kept_whole(config: RetentionConfig, iteration: int, last: int, snapshot: int, best: Best | None) -> bool:
    """Whether a run keeps that checkpoint whole; its last iteration is `last`, the newest whose weights were written
    `snapshot`, the best so far `best`."""
    return (config.keep_last is None or iteration > last - config.keep_last or iteration >= snapshot
            or (config.keep_every is not None and iteration % config.keep_every == 0)
            or (config.keep_best and best is not None and iteration == best.iteration))


def snapshot_before(run: Run, last: TrainState) -> int:
    """The newest iteration whose weights were written; 0 if there was none."""
    iteration, state = last.iteration, last
    while iteration > 0 and _committed(run.store, state.artifacts["ppo"]).unwritten:
        iteration -= 1
        state = run.state(iteration)
    return iteration


class Retention:
    """What a run keeps of its checkpoints, and what other runs of the store keep of the same ones.

    An iteration asks each other run for one state, however many iterations there are.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.retention
        self._snapshots: dict[int, int] = {}  # of the last state that was asked for

    def droppable(self, iterations: Iterable[int], last: TrainState) -> Iterator[Part]:
        """The parts that are still there and need not be, of those iterations; `last`: the run's latest state."""
        best, snapshot = best_by(self.run, last), self._snapshot(last)
        for iteration in iterations:
            if iteration < 1 or kept_whole(self.config, iteration, last.iteration, snapshot, best):
                continue
            ref = self.run.state(iteration).artifacts["ppo"]
            there = {name: size for name in PARTS[: PARTS.index(self.config.drop) + 1]
                     if (size := self._bytes(_committed(self.run.store, ref), name))}
            if there and not self._kept_elsewhere(ref, iteration):
                for name, size in there.items():
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
            snapshot = self._snapshot(before)
            pushed = {state.iteration - self.config.keep_last, *([before.best.iteration] if before.best else [])}
            if self._snapshot(state) != snapshot:  # all that waited for the next one
                pushed |= set(range(snapshot, state.iteration - self.config.keep_last + 1))
            for part in list(self.droppable(sorted(pushed), state)):
                drop(self.run.store, part)

    def _snapshot(self, last: TrainState) -> int:
        """As `snapshot_before`, found once of each state."""
        if last.iteration not in self._snapshots:
            written = last.iteration == 0 or not _committed(self.run.store, last.artifacts["ppo"]).unwritten
            known = last.iteration if written else self._snapshots.get(last.iteration - 1)
            self._snapshots = {last.iteration: snapshot_before(self.run, last) if known is None else known}
        return self._snapshots[last.iteration]

    def _bytes(self, manifest: Manifest, part: str) -> int:
        """Of the part that are in the store."""
        if not self.run.store.files.names(f"{attempt_of(manifest)}/{part}"):
            return 0
        gone = {entry.path for entry in self.run.store.missing(manifest.ref, f"{part}/")}
        return sum(entry.bytes for entry in manifest.files if entry.path.startswith(f"{part}/") and entry.path not in gone)

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
            return kept_whole(other.config.retention, iteration, last.iteration, snapshot_before(other, last),
                              best_by(other, last))
        except (StoreError, ConfigError):  # a run that cannot be read keeps everything
            return True


def drop(store: Store, part: Part) -> None:
    """Records that the part is gone, then removes it; to be repeated if that is interrupted."""
    store.put(f"{folder_of(part.ref)}/dropped/{part.name}.json", Dropped(part=part.name, run=part.run, created=now()))
    store.files.remove(f"{attempt_of(_committed(store, part.ref))}/{part.name}")


def _committed(store: Store, ref: ArtifactRef) -> Manifest:
    """Of a saved state. `Store.manifest` would wait for what is pending, and this may be the thread that commits."""
    manifest = store.committed(ref)
    if manifest is None:
        raise StoreError(f"{ref.short} is not in {store.uri}")
    return manifest


def all_droppable(run: Run) -> Iterator[Part]:
    """Of all iterations of a run."""
    last = run.last()
    if run.config.retention.keep_last is not None and last is not None:
        yield from Retention(run).droppable(run.iterations(), last)
