"""`baton verify`: every file of a run, or of the whole store, against what it must be, and the remedy where it is not.

Records: their own digest, fields, and what they say of each other. Artifacts: size and digest of every file, no others,
table schemas, rows that line up with the rollouts they describe, inputs that are those they were made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flows.runs.run import record_key, run_folders
from flows.store.attempt import folder_of
from flows.store.store import Store, attempt_of, read_table, unlisted
from schemas.artifacts import ArtifactRef, Manifest, RunRecord, TrainState, sha256_json
from schemas.errors import ConfigError, DamageError, DroppedError, StoreError, TableError
from schemas.records import HINT
from schemas.tables import TABLES, Rollouts, Trajectories, require_aligned
from stages.ops.progress import progress_bar


@dataclass(frozen=True)
class Finding:
    """What is wrong with a file."""

    file: str
    field: str
    expected: str
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: expected {self.expected}, found {self.found}; {self.hint}"


class Verifier:
    """Checks runs and artifacts of a store; remembers which run refers to what, so that a hint can name the command."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.users: dict[ArtifactRef, str] = {}  # the command that makes it again
        self._by_sha256: dict[ArtifactRef, str] = {}  # contents as they were taken before format 7
        self.incomplete = False  # whether a record could not be read, so that not all references are known

    def run(self, name: str) -> Iterator[Finding]:
        """The records of a run. What they refer to is in `users` afterwards."""
        again = f"the command that made the run (baton train CONFIG --run {name}) imports it again"
        place = self.store.files.address(record_key(name))
        try:
            record = self.store.get(record_key(name), RunRecord)
            if record is None:
                raise DamageError(place, "file", "the run's record", "no such file", HINT)
            self.users |= dict.fromkeys(record.inputs.values(), again)
            if record.name != name:
                raise DamageError(place, "name", name, record.name, HINT)
        except StoreError as error:
            self.incomplete = True
            yield _as_finding(error, f"baton rm {name}, then make the run again: its artifacts are found")
        names = self.store.files.names(f"runs/{name}/iterations")
        for number, file in enumerate(file for file in names if file.endswith(".json")):
            yield from self._state(name, number, f"runs/{name}/iterations/{file}")

    def _state(self, name: str, number: int, key: str) -> Iterator[Finding]:
        file, hint = self.store.files.address(key), (f"remove it and those after it; baton train --run {name} finds their "
                                                     "artifacts and writes them again")
        try:
            state = self.store.get(key, TrainState)
        except StoreError as error:
            self.incomplete = True
            yield _as_finding(error, hint)
            return
        if not key.endswith(f"/{number:06d}.json"):
            yield Finding(file, "file", f"{number:06d}.json next, none left out", file.rpartition("/")[2], hint)
        elif state.iteration != number:
            yield Finding(file, "iteration", str(number), str(state.iteration), hint)
        for stage, ref in state.artifacts.items():
            self.users.setdefault(ref, f"baton stage {stage} {name} --iteration {state.iteration} makes it again")
        for ref in state.models():
            self.users.setdefault(ref, f"baton stage {ref.stage} {name} --iteration I makes it again")

    def artifact(self, ref: ArtifactRef) -> Iterator[Finding]:
        """One artifact."""
        folder = self.store.files.address(folder_of(ref))
        again = self.users.get(ref)
        hint = f"remove {folder}, then {again}" if again else "no run refers to it: baton gc removes it"
        if self.incomplete and not again:
            hint = "mend the records first, then baton verify again"
        try:
            manifest = self.store.find(ref)
        except StoreError as error:
            yield _as_finding(error, hint)
            return
        if manifest is None:
            yield Finding(f"{folder}/manifest.json", "file", "a committed artifact", "no such file", again or hint)
            return
        whole = True
        for error in self._damages(manifest):
            whole = False
            yield _as_finding(error, hint)
        yield from self._lineage(manifest, folder, hint)
        if whole:
            yield from self._misaligned(manifest, hint)

    def _damages(self, manifest: Manifest) -> Iterator[StoreError]:
        for entry in manifest.files:
            try:
                self.store.files.forget(attempt_of(manifest), entry.path)  # a copy would say nothing of the file itself
                path = self.store.checked(manifest, entry)
                if entry.path in TABLES:
                    read_table(path, entry, TABLES[entry.path])
            except DroppedError:
                pass
            except StoreError as error:
                yield error
        key, listed = attempt_of(manifest), manifest.digests()
        for stat in self.store.files.walk(key):
            if not stat.key.endswith("/") and stat.key.removeprefix(f"{key}/") not in listed:
                yield unlisted(self.store.files.address(stat.key))
        try:
            self.store.dropped(manifest.ref)
        except StoreError as error:
            yield error

    def _lineage(self, manifest: Manifest, folder: str, hint: str) -> Iterator[Finding]:
        """Inputs that are missing, or hold other bytes than it was made from."""
        for role, source in manifest.recipe.inputs.items():
            expected = (manifest.input_contents or {}).get(role)
            try:
                found = self.store.manifest(source)
            except StoreError:
                yield Finding(f"{folder}/manifest.json", f"recipe.inputs.{role}", source.short, "none that can be read",
                              self.users.get(source, hint))
                continue
            if expected not in (None, found.content) and not self._made_anew(found, expected, manifest):
                yield Finding(f"{folder}/manifest.json", f"input_contents.{role}", f"{source.short} with {expected[:12]}…",
                              f"{found.content[:12]}…", hint)

    def _made_anew(self, source: Manifest, expected: str, manifest: Manifest) -> bool:
        """Whether an input of other digests may hold the bytes that the artifact was made from: before format 7 they were
        SHA-256 for all files. Where its weights are not there, only if it is younger than the artifact; where they are
        damaged that is a finding of its own."""
        try:
            if source.ref not in self._by_sha256:
                self._by_sha256[source.ref] = sha256_json(
                    {entry.path: self.store.sha256(source, entry) for entry in source.files})
            return self._by_sha256[source.ref] == expected
        except DroppedError:
            return source.created > manifest.created
        except StoreError:
            return True

    def _misaligned(self, manifest: Manifest, hint: str) -> Iterator[Finding]:
        """Tables that do not have the rows of the rollouts they describe."""
        source = manifest.recipe.inputs.get("rollouts")
        for entry in manifest.files if source else ():
            if entry.path in TABLES:
                try:
                    kind = Trajectories if Trajectories.file in self.store.manifest(source).digests() else Rollouts
                    require_aligned(self.store.table(source, kind), self.store.table(manifest.ref, TABLES[entry.path]))
                except TableError as error:
                    place = self.store.files.address(f"{attempt_of(manifest)}/{entry.path}")
                    yield Finding(place, "rows", f"those of {source.short}", str(error), hint)
                except StoreError:
                    pass  # the rollouts are a finding of their own


def verify(store: Store, name: str | None) -> tuple[int, list[Finding]]:
    """How many artifacts were checked of a run, or of the whole store, and what was found. Raises `ConfigError`."""
    there = run_folders(store)
    if name is not None and name not in there:
        raise ConfigError(f"no run {name!r} in {store.uri}; runs there: {', '.join(there) or 'none'}")
    verifier = Verifier(store)
    findings = [finding for run in (there if name is None else [name]) for finding in verifier.run(run)]
    refs = list(dict.fromkeys([*verifier.users, *(store.artifacts() if name is None else ())]))
    for ref in progress_bar(refs, "verify"):
        findings += verifier.artifact(ref)
    return len(refs), findings


def _as_finding(error: StoreError, hint: str) -> Finding:
    if isinstance(error, DamageError):
        own = hint if error.hint == HINT else error.hint  # an error that has a better remedy
        return Finding(error.file, error.field, error.expected, error.found, own)
    where, _, what = str(error).partition(": ")
    return Finding(where, "content", "what a store holds", what, hint)
