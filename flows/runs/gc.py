"""`baton gc`: what may go. Artifacts that no run refers to, attempts without a manifest, unfinished records and uploads; and
what retention does not keep.

A running or interrupted iteration has committed, or found, what no state names yet. So nothing goes that is younger than an
age; and while the lease of any run is held no artifact goes, however old, nor an attempt younger than the run's last state.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flows.runs.retention import Part, all_droppable, drop
from flows.runs.run import Run, lease_key, open_run, possible_runs, record_key, references, run_folders, run_names
from flows.store.attempt import folder_of
from flows.store.files import Stat
from flows.store.lease import GC, holder_of, lease
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import StoreError
from schemas.settings import NAME_PATTERN
from stages.ops.progress import progress_bar


@dataclass(frozen=True)
class Garbage:
    """Something that may go."""

    kind: str  # `artifact`, `attempt`, `unfinished` or the part of a checkpoint
    what: str  # for people
    bytes: int
    modified: float
    of: ArtifactRef | str | Stat | Part  # what is removed


def collect(store: Store, hours: float, *, dry_run: bool) -> tuple[list[Garbage], list[Garbage]]:
    """All that may go and is older than so many hours, removed unless that is only asked for; and what is younger.

    Raises `StoreError` if what the runs refer to is unknown.
    """
    if dry_run:
        return garbage(store, hours)
    with lease(store, GC, "the store"):  # a start waits meanwhile, so that nothing it finds is removed
        found, younger = garbage(store, hours)
        remove(store, found)
    return found, younger


def garbage(store: Store, hours: float) -> tuple[list[Garbage], list[Garbage]]:
    """All that may go and is older than so many hours; and what is younger, or not yet safe to remove.

    Raises `StoreError` if what the runs refer to is unknown.
    """
    working = list(_in_use(store))
    before = min([time.time() - 3600 * hours, *working])
    runs = [open_run(store, name) for name in run_names(store)]
    live = _live(store, runs)
    found = list(_artifacts(store, live))
    found += (_one("unfinished", stat.key, [stat], stat) for stat in store.files.unfinished())
    parts = [part for run in runs for part in all_droppable(run)]
    dropped = [Garbage(part.name, f"{part.ref.short}, iteration {part.iteration} of run {part.run}", part.bytes, 0, part)
               for part in parts]
    old = [one for one in found if one.modified < before and not (working and one.kind == "artifact")]
    kept = {id(one) for one in old}
    return [*dropped, *old], [one for one in found if id(one) not in kept]


def remove(store: Store, found: Iterable[Garbage]) -> None:
    """Removes them; an artifact's manifest first, so that it is whole or not there at any moment."""
    for one in progress_bar(list(found), "remove"):
        if isinstance(one.of, Part):
            drop(store, one.of)
        elif isinstance(one.of, Stat):
            store.files.abort(one.of)
        elif isinstance(one.of, ArtifactRef):
            store.files.remove(f"{folder_of(one.of)}/manifest.json")
            store.files.remove(folder_of(one.of))
        else:
            store.files.remove(one.of)


def _in_use(store: Store) -> Iterator[float]:
    """Of each run whose lease is held, when its last state was written; 0 where there is none."""
    for name in possible_runs(store):
        if holder_of(store, lease_key(name)):
            yield max((stat.modified for stat in store.files.walk(f"runs/{name}/iterations")), default=0.0)


def _live(store: Store, runs: list[Run]) -> set[ArtifactRef]:
    """What the runs refer to, and what that was made from. Raises `StoreError` if some of that is missing."""
    for name in run_folders(store):
        if store.files.names(f"runs/{name}/iterations") and not store.files.exists(record_key(name)):
            raise StoreError(f"{store.files.address(record_key(name))}: is missing, so that it is unknown what the run "
                             f"needs; nothing was removed: baton verify {name}")
    todo = [ref for run in runs for ref in references(run)]
    live: set[ArtifactRef] = set()
    with progress_bar(desc="look", unit=" artifacts") as bar:
        while todo:
            ref = todo.pop()
            if ref not in live:
                live.add(ref)
                todo += store.manifest(ref).recipe.inputs.values()
                bar.update()
    return live


def _artifacts(store: Store, live: set[ArtifactRef]) -> Iterator[Garbage]:
    """Artifacts that are not live, and attempts that are not those of a manifest."""
    files: dict[ArtifactRef, list[Stat]] = defaultdict(list)
    for stat in store.files.walk("artifacts"):
        _, stage, identity, *_ = [*stat.key.split("/"), "", ""]
        if re.fullmatch("[0-9a-f]{64}", identity) and re.fullmatch(NAME_PATTERN, stage):
            files[ArtifactRef(stage=stage, identity=identity)].append(stat)
    for ref, stats in files.items():
        folder = folder_of(ref)
        committed = any(stat.key == f"{folder}/manifest.json" for stat in stats)
        if committed and ref not in live:
            yield _one("artifact", ref.short, stats, ref)
            continue
        own = store.manifest(ref).attempt if committed else None
        attempts: dict[str, list[Stat]] = defaultdict(list)
        for stat in stats:
            below = stat.key.removeprefix(f"{folder}/attempts/")
            if below != stat.key and below.partition("/")[0] != own:
                attempts[below.partition("/")[0]].append(stat)
        for name, of in attempts.items():
            yield _one("attempt", f"{ref.short}, attempt {name[:12]}", of, f"{folder}/attempts/{name}")


def _one(kind: str, what: str, stats: list[Stat], of: ArtifactRef | str | Stat) -> Garbage:
    return Garbage(kind, what, sum(stat.bytes for stat in stats), max(stat.modified for stat in stats), of)
