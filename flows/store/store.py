"""The artifact store: every hand-over between stages is committed here, whole or not at all, and checked when read.

    <root>/artifacts/<stage>/<identity>/manifest.json        the only commit point
    <root>/artifacts/<stage>/<identity>/attempts/<uuid>/…    what the manifest lists
    <root>/artifacts/<stage>/<identity>/dropped/<part>.json  a part of a checkpoint that is not kept any more
    <root>/runs/<run>/run.json, iterations/000003.json       see flows/runs/run.py

Files are written under a fresh attempt, hashed and made durable; the manifest is then put in place, which fails where
one exists already, so that of two writers the first wins and the second adopts its artifact. flows/store/files.py is how.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from flows.store.attempt import Attempt, folder_of
from flows.store.digests import file_digest, sha256_file
from flows.store.files import Files, disk_errors
from flows.store.local import LocalFiles
from flows.store.writer import Writer
from schemas.addresses import without_user_info
from schemas.artifacts import ArtifactRef, Dropped, FileEntry, Manifest, Recipe, short_digest
from schemas.errors import ConfigError, DamageError, DroppedError, StoreError, TableError
from schemas.records import HINT, decode, encode
from schemas.settings import NAME_PATTERN
from schemas.tables import Table
from stages.ops.progress import progress_bar

KNOWN, TABLES_KEPT = 256, 8  # artifacts whose manifests, and whose tables, are kept in memory: an iteration makes fewer
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
T = TypeVar("T", bound=Table)
M = TypeVar("M", bound=BaseModel)


@dataclass
class _Pending:
    """An artifact that this process has computed, and is about to commit."""

    attempt: Attempt
    recipe: Recipe
    committed: Future[Manifest] | None = None  # set as soon as the writer has it


@dataclass(frozen=True)
class _Known:
    """An artifact whose manifest this process has read, or committed with these tables."""

    manifest: Manifest
    tables: dict[type[Table], Table]


class Store:
    """A store in a folder, or below `s3://bucket/prefix`."""

    def __init__(self, root: str | Path) -> None:
        self.files = open_files(root)
        self.uri = self.files.uri
        self._known: OrderedDict[ArtifactRef, _Known] = OrderedDict()
        self._pending: dict[ArtifactRef, _Pending] = {}
        self._lock = threading.Lock()  # of what is known: stages may run side by side

    @property
    def absolute(self) -> str:
        """Its address for processes that work in another folder."""
        return self.uri if "://" in self.uri else os.path.abspath(self.uri)

    # --- writing ---

    def attempt(self, recipe: Recipe) -> Attempt:
        """One attempt at the recipe's artifact, of which nothing is written yet."""
        return Attempt(recipe.ref, self.files)

    def commit(self, manifest: Manifest, tables: Mapping[type[Table], Table] | None = None) -> Manifest:
        """Publishes a sealed attempt; the manifest that is now the artifact's, another writer's if that came first.

        The last manifests and `tables` that were published here are kept in memory: the next stage need not read them.
        """
        with disk_errors(self.uri):
            self.files.publish(attempt_of(manifest))
        if self.put(f"{folder_of(manifest.ref)}/manifest.json", manifest):
            self._keep(manifest, tables or {})
            return manifest
        theirs = self._require(manifest.ref, self.committed(manifest.ref))
        if theirs.attempt != manifest.attempt:
            self.files.remove(attempt_of(manifest))
        return theirs

    def commit_later(self, attempt: Attempt, recipe: Recipe, commit: Callable[[], Manifest], writer: Writer) -> None:
        """Has the writer commit it. Until then its recipe and tables are those in memory, and who asks for more waits."""

        def done() -> Manifest:
            manifest = commit()
            with self._lock:
                self._pending.pop(recipe.ref, None)
            return manifest

        pending = _Pending(attempt, recipe)
        with self._lock:
            self._pending[recipe.ref] = pending
        try:
            pending.committed = writer.later(done)
        except BaseException:
            with self._lock:
                self._pending.pop(recipe.ref, None)
            raise

    def forget_pending(self) -> None:
        """After a writer that has failed: what it has not committed is not there."""
        with self._lock:
            self._pending.clear()

    def discard(self, attempt: Attempt) -> None:
        """Removes what was written of an attempt that was not committed."""
        if attempt.begun:
            self.files.remove(f"{folder_of(attempt.ref)}/attempts/{attempt.name}")

    # --- artifacts ---

    def find(self, ref: ArtifactRef) -> Manifest | None:
        """The artifact's manifest, or none if it was never committed; of one that is pending, once it is committed.

        Raises `StoreError` if it cannot be believed, and what the commit of a pending one raises.
        """
        pending = self._pending_of(ref)
        return pending.committed.result() if pending else self.committed(ref)

    def committed(self, ref: ArtifactRef) -> Manifest | None:
        """As `find`, of what is committed by now. It is read once, since it does not change."""
        with self._lock:
            known = self._known.get(ref)
            if known:
                self._known.move_to_end(ref)
        return known.manifest if known else self._read(ref)

    def _read(self, ref: ArtifactRef) -> Manifest | None:
        key = f"{folder_of(ref)}/manifest.json"
        manifest = self.get(key, Manifest)
        if manifest is None:
            return None
        for name, found in (("recipe", manifest.recipe.ref.identity), ("identity", manifest.identity)):
            if found != ref.identity:
                raise DamageError(self.files.address(key), name, f"identity {ref.identity}", found, HINT)
        self._keep(manifest, {})
        return manifest

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """As `find`; raises `StoreError` if there is none."""
        return self._require(ref, self.find(ref))

    def recipe(self, ref: ArtifactRef) -> Recipe:
        """What the artifact is made from, known before it is committed."""
        pending = self._pending_of(ref)
        return pending.recipe if pending else self.manifest(ref).recipe

    def has_table(self, ref: ArtifactRef, kind: type[Table]) -> bool:
        """Whether it holds that table."""
        pending = self._pending_of(ref)
        return kind in pending.attempt.tables if pending else kind.file in self.manifest(ref).digests()

    def _pending_of(self, ref: ArtifactRef) -> _Pending | None:
        with self._lock:
            return self._pending.get(ref)

    def _require(self, ref: ArtifactRef, manifest: Manifest | None) -> Manifest:
        if manifest is None:
            raise StoreError(f"{ref.short} is not in {self.uri}; baton stage {ref.stage} RUN --iteration I makes it again")
        return manifest

    def _keep(self, manifest: Manifest, tables: Mapping[type[Table], Table]) -> None:
        with self._lock:
            self._known[manifest.ref] = _Known(manifest, dict(tables))
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            own = [known for known in self._known.values() if known.tables]
            for old in own[:-TABLES_KEPT]:
                old.tables.clear()

    def table(self, ref: ArtifactRef, kind: type[T]) -> T:
        """A table of the artifact, its size, digest, schema and row count checked."""
        with self._lock:
            pending, known = self._pending.get(ref), self._known.get(ref)
        kept = (pending.attempt.tables if pending else known.tables if known else {}).get(kind)
        if kept is not None:
            return kept
        manifest = self.manifest(ref)
        entry = _entry(manifest, kind.file)
        return read_table(self.checked(manifest, entry), entry, kind)

    def file(self, ref: ArtifactRef, inner: str) -> Path:
        """A file of the artifact, its size and digest checked."""
        manifest = self.manifest(ref)
        return self.checked(manifest, _entry(manifest, inner))

    def folder(self, ref: ArtifactRef, inner: str) -> Path:
        """A folder of the artifact: the size and digest of each file below it checked, and that there are no others."""
        manifest = self.manifest(ref)
        entries = [entry for entry in manifest.files if entry.path.startswith(f"{inner}/")]
        if not entries:
            raise StoreError(f"{ref.short}: the manifest lists nothing below {inner}/")
        for entry in progress_bar(entries, f"{ref.stage}: read"):
            if entry.path.endswith(PICKLED):
                raise StoreError(f"{ref.short}: {entry.path} may hold a pickle, which can run anything; it is never read")
            path = self.checked(manifest, entry)
        folder = path.parents[entry.path.removeprefix(f"{inner}/").count("/")]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
        if more := there - {entry.path.removeprefix(f"{inner}/") for entry in entries}:
            raise unlisted(str(folder / min(more)))
        return folder

    def checked(self, manifest: Manifest, entry: FileEntry) -> Path:
        """Where a file of the artifact can be read. Raises `DamageError` unless it is the one the manifest lists."""
        key = attempt_of(manifest)
        with disk_errors(self.files.address(f"{key}/{entry.path}")):
            path = self.files.local(key, entry.path)
            wrong = _wrong(path, entry)
            if wrong and self.files.forget(key, entry.path):  # it was a copy: another one may be whole
                path = self.files.local(key, entry.path)
                wrong = _wrong(path, entry)
        if wrong is None:
            return path
        if wrong[0] == "file" and (reason := self._left_out(manifest, entry)):
            again = f"baton restore RUN --iteration {manifest.iteration} makes it again"
            raise DroppedError(f"{manifest.ref.short}: {entry.path} {reason}; {again}")
        raise DamageError(self.files.address(f"{key}/{entry.path}"), *wrong, HINT)

    def _left_out(self, manifest: Manifest, entry: FileEntry) -> str | None:
        """Why a file that is listed need not be there, if there is a reason."""
        if entry.path in manifest.unwritten:
            return "was not written (checkpoints.every)"
        for dropped in self.dropped(manifest.ref):
            if entry.path.startswith(f"{dropped.part}/"):
                return f"is not kept any more: retention of run {dropped.run!r} dropped it at {dropped.created}"
        return None

    def sha256(self, manifest: Manifest, entry: FileEntry) -> str:
        """Of a file of the artifact: as it is listed, or else taken from the file. Raises as `checked`."""
        if entry.algorithm == "sha256":
            return entry.digest
        with disk_errors(self.files.address(f"{attempt_of(manifest)}/{entry.path}")):
            return sha256_file(self.checked(manifest, entry))

    def missing(self, ref: ArtifactRef, inner: str = "") -> list[FileEntry]:
        """The files below a folder of the artifact, or of all of it, that were not written or not kept, nor restored."""
        manifest, parts = self.manifest(ref), tuple(f"{dropped.part}/" for dropped in self.dropped(ref))
        return [entry for entry in manifest.files
                if entry.path.startswith(inner) and (entry.path in manifest.unwritten or entry.path.startswith(parts))
                and not self.files.exists(f"{attempt_of(manifest)}/{entry.path}")]

    def holds_weights(self, ref: ArtifactRef) -> bool:
        """Whether all that the artifact lists is in the store, or will be once it is committed."""
        pending = self._pending_of(ref)
        if pending:
            return pending.attempt.weights_kept
        return self.committed(ref) is not None and not self.missing(ref)

    def restore(self, manifest: Manifest, attempt: Attempt) -> None:
        """Puts what is missing of the artifact back, from a sealed attempt that holds the same bytes."""
        with disk_errors(self.uri):
            for entry in self.missing(manifest.ref):
                self.files.put_file(attempt.folder / entry.path, f"{attempt_of(manifest)}/{entry.path}")

    def dropped(self, ref: ArtifactRef) -> list[Dropped]:
        """The parts of a checkpoint that retention has dropped."""
        folder = f"{folder_of(ref)}/dropped"
        records = (self.get(f"{folder}/{name}", Dropped) for name in self.files.names(folder) if name.endswith(".json"))
        return [record for record in records if record]

    def place(self, ref: ArtifactRef, inner: str) -> str:
        """Where a file or folder of the artifact lies, unchecked; to show to people."""
        return self.files.address(f"{attempt_of(self.manifest(ref))}/{inner}")

    def artifacts(self) -> list[ArtifactRef]:
        """All committed artifacts, sorted."""
        found = (stat.key.split("/") for stat in self.files.walk("artifacts") if stat.key.endswith("/manifest.json"))
        return [ArtifactRef(stage=parts[1], identity=parts[2]) for parts in sorted(found)
                if len(parts) == 4 and re.fullmatch("[0-9a-f]{64}", parts[2]) and re.fullmatch(NAME_PATTERN, parts[1])]

    # --- records of runs ---

    def put(self, key: str, record: BaseModel) -> bool:
        """Writes a record unless there is one; whether it is this one that is there now."""
        with disk_errors(self.files.address(key)):
            return self.files.put_once(key, encode(record))

    def get(self, key: str, kind: type[M]) -> M | None:
        """A record, none if there is none. Raises `StoreError` naming file and field if it cannot be believed."""
        with disk_errors(self.files.address(key)):
            data = self.files.read(key)
        return None if data is None else decode(data, self.files.address(key), kind)


def existing_store(root: str) -> Store:
    """The store at `root`; of a folder that is not there none is made. Raises `ConfigError`."""
    if "://" not in root and not Path(root).is_dir():
        raise ConfigError(f"store {root}: no such folder on {socket.gethostname()}; mount it there, or make it if it is to "
                          "be a new store")
    return Store(root)


def open_files(root: str | Path) -> Files:
    """For a folder, or `s3://bucket/prefix`. Raises `ConfigError`."""
    scheme, separator, _ = str(root).partition("://")
    if not separator:
        return LocalFiles(Path(root))
    if scheme != "s3":
        raise ConfigError(f"--store {without_user_info(str(root))}: {scheme}:// is not supported; expected a folder, or "
                          "s3://bucket/prefix")
    from flows.store.s3 import S3Files

    return S3Files(str(root))


def attempt_of(manifest: Manifest) -> str:
    """The key of the folder that holds a committed artifact's files."""
    return f"{folder_of(manifest.ref)}/attempts/{manifest.attempt}"


def unlisted(path: str) -> DamageError:
    """A file in an artifact that its manifest does not list: a model would be loaded with it."""
    return DamageError(path, "file", "no file but those the manifest lists", "this one", "remove it")


# --- files ---

def _entry(manifest: Manifest, inner: str) -> FileEntry:
    for entry in manifest.files:
        if entry.path == inner:
            return entry
    raise StoreError(f"{manifest.ref.short}: the manifest does not list {inner}")


def _wrong(path: Path, entry: FileEntry) -> tuple[str, str, str] | None:
    """What of a file is not as it is listed: field, expected, found."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "file", f"{entry.bytes} bytes", "no such file"
    if size != entry.bytes:
        return "size", f"{entry.bytes} bytes", f"{size}"
    found = entry.model_copy(update={"digest": file_digest(path, entry.algorithm)})
    return None if found == entry else (entry.algorithm, *(f"{short_digest(each.digest)}…" for each in (entry, found)))


def read_table(path: Path, entry: FileEntry, kind: type[T]) -> T:
    """The table in a checked file. Raises `StoreError` if its rows or columns are not those of the entry and the kind."""
    try:
        table = pq.ParquetFile(path).read()
        if table.num_rows != entry.rows:
            raise DamageError(str(path), "rows", entry.rows, table.num_rows, HINT)
        return kind.from_arrow(table)
    except (TableError, pa.ArrowException, OSError, ValueError) as error:  # whatever Arrow makes of other bytes
        raise StoreError(f"{path}: {' '.join(str(error).split())}") from None
