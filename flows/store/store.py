"""The artifact store: every hand-over between stages is committed here, whole or not at all, and checked when read.

    <root>/artifacts/<stage>/<identity>/manifest.json        the only commit point
    <root>/artifacts/<stage>/<identity>/attempts/<uuid>/…    what the manifest lists
    <root>/artifacts/<stage>/<identity>/dropped/<part>.json  a part of a checkpoint that is not kept any more
    <root>/runs/<run>/run.json, iterations/000003.json       see flows/runs/run.py

Files are written under a fresh attempt, hashed and made durable; the manifest is then put in place, which fails where
one exists already, so that of two writers the first wins and the second adopts its artifact. flows/store/files.py is how.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from flows.store.files import Files, disk_errors
from flows.store.local import LocalFiles
from schemas.addresses import without_user_info
from schemas.artifacts import ArtifactRef, Dropped, FileEntry, Manifest, Recipe
from schemas.errors import ConfigError, DamageError, DroppedError, StoreError, TableError
from schemas.records import HINT, decode, encode
from schemas.settings import NAME_PATTERN
from schemas.tables import Table
from stages.ops.progress import progress_bar

KNOWN, TABLES_KEPT = 256, 8  # artifacts whose manifests, and whose tables, are kept in memory: an iteration makes fewer
CONCURRENT_SYNCS = 4  # files and folders: both waiting for the disk and hashing leave the interpreter to others
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
T = TypeVar("T", bound=Table)
M = TypeVar("M", bound=BaseModel)


class Attempt:
    """A folder in which one attempt at an artifact is written."""

    def __init__(self, ref: ArtifactRef, folder: Path, files: Files) -> None:
        self.ref, self.folder, self.files = ref, folder, files
        self.tables: dict[type[Table], Table] = {}  # those written, as they are in memory
        self._entries: dict[str, FileEntry] = {}  # files that are synced and hashed already
        self._folders: set[Path] = {folder, folder.parent}  # to be synced; above `attempts` that is done with the manifest
        self._others = False  # whether a library writes files of its own below the folder

    @property
    def name(self) -> str:
        return self.folder.name

    def table(self, table: Table) -> None:
        """Writes `table` as Parquet under its file name."""
        sink, arrow = pa.BufferOutputStream(), table.to_arrow()
        texts = [f.name for f in arrow.schema if pa.types.is_string(f.type)]
        pq.write_table(arrow, sink, compression="zstd", use_dictionary=texts, write_statistics=False)  # one row group
        self.write(table.file, sink.getvalue(), arrow)
        self.tables[type(table)] = table

    def write(self, inner: str, data: bytes | pa.Buffer, table: pa.Table | None = None) -> None:
        """A file that fits into memory: written, synced and hashed in one go. `table`: what it holds, if it is one."""
        path = self.folder / inner
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders |= {folder for folder in path.parents if folder.is_relative_to(self.folder)}
        with path.open("wb") as file:  # buffered: a raw write may be a part of it and say nothing
            file.write(data)
        self.files.sync(path)
        self._entries[inner] = FileEntry(
            path=inner, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=None if table is None else len(table),
            columns=None if table is None else {f.name: str(f.type) for f in table.schema})

    def path(self, inner: str) -> Path:
        """Where a library writes a file or folder of the artifact; its parent exists."""
        self._others = True
        path = self.folder / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self) -> tuple[FileEntry, ...]:
        """Hashes and syncs what is not yet, several files at once; all entries, sorted by path."""
        others = [path for path in self.folder.rglob("*") if self._inner(path) not in self._entries] if self._others else []
        with ThreadPoolExecutor(CONCURRENT_SYNCS) as pool:
            found = progress_bar(pool.map(self._seal, others), f"{self.ref.stage}: commit", total=len(others))
            entries = [entry for entry in found if entry is not None]
        for folder in self._folders:
            self.files.sync(folder)
        return tuple(sorted([*self._entries.values(), *entries], key=lambda entry: entry.path))

    def _seal(self, path: Path) -> FileEntry | None:
        entry = None
        if path.is_file():
            path.chmod(0o644)  # safetensors files are made for their owner alone; stores are shared
            entry = FileEntry(path=self._inner(path), bytes=path.stat().st_size, sha256=sha256_file(path))
        self.files.sync(path)
        return entry

    def _inner(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


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
        self._lock = threading.Lock()  # of what is known: stages may run side by side

    @property
    def absolute(self) -> str:
        """Its address for processes that work in another folder."""
        return self.uri if "://" in self.uri else os.path.abspath(self.uri)

    # --- writing ---

    def attempt(self, recipe: Recipe) -> Attempt:
        """A fresh folder for one attempt at the recipe's artifact."""
        with disk_errors(self.uri):
            folder = self.files.begin(f"{folder_of(recipe.ref)}/attempts/{uuid.uuid4().hex}")
        return Attempt(recipe.ref, folder, self.files)

    def commit(self, manifest: Manifest, tables: Mapping[type[Table], Table] | None = None) -> Manifest:
        """Publishes a sealed attempt; the manifest that is now the artifact's, another writer's if that came first.

        The last manifests and `tables` that were published here are kept in memory: the next stage need not read them.
        """
        with disk_errors(self.uri):
            self.files.publish(attempt_of(manifest))
        if self.put(f"{folder_of(manifest.ref)}/manifest.json", manifest):
            self._keep(manifest, tables or {})
            return manifest
        self.files.remove(attempt_of(manifest))
        return self.manifest(manifest.ref)

    def discard(self, attempt: Attempt) -> None:
        """Removes an attempt that was not committed."""
        self.files.remove(f"{folder_of(attempt.ref)}/attempts/{attempt.name}")

    # --- artifacts ---

    def find(self, ref: ArtifactRef) -> Manifest | None:
        """The artifact's manifest, or none if it was never committed; read once, since it does not change.

        Raises `StoreError` if it cannot be believed.
        """
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
        manifest = self.find(ref)
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
        manifest = self.manifest(ref)
        known = self._known.get(ref)
        kept = known.tables.get(kind) if known else None
        if kept is not None:
            return kept
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
        if wrong[0] == "file":
            for dropped in self.dropped(manifest.ref):
                if entry.path.startswith(f"{dropped.part}/"):
                    raise DroppedError(f"{manifest.ref.short}: its {dropped.part} is not kept any more: retention of run "
                                       f"{dropped.run!r} dropped it at {dropped.created}; go on from a later iteration")
        raise DamageError(self.files.address(f"{key}/{entry.path}"), *wrong, HINT)

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


def folder_of(ref: ArtifactRef) -> str:
    """The key of an artifact's folder."""
    return f"artifacts/{ref.stage}/{ref.identity}"


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
    digest = sha256_file(path)
    return None if digest == entry.sha256 else ("sha256", f"{entry.sha256[:12]}…", f"{digest[:12]}…")


def read_table(path: Path, entry: FileEntry, kind: type[T]) -> T:
    """The table in a checked file. Raises `StoreError` if its rows or columns are not those of the entry and the kind."""
    try:
        table = pq.ParquetFile(path).read()
        if table.num_rows != entry.rows:
            raise DamageError(str(path), "rows", entry.rows, table.num_rows, HINT)
        return kind.from_arrow(table)
    except (TableError, pa.ArrowException, OSError, ValueError) as error:  # whatever Arrow makes of other bytes
        raise StoreError(f"{path}: {' '.join(str(error).split())}") from None


def sha256_file(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
