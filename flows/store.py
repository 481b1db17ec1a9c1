"""The artifact store: every hand-over between stages is committed here, whole or not at all, and checked when read.

    <root>/artifacts/<stage>/<identity>/manifest.json        the only commit point
    <root>/artifacts/<stage>/<identity>/attempts/<uuid>/…    what the manifest lists
    <root>/runs/<run>/run.json, iterations/000003.json       see flows/runs.py

Files are written under a fresh attempt, hashed and synced; the manifest is then linked into place, which fails where
one exists already, so that of two writers the first wins and the second adopts its artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from schemas.artifacts import FORMAT_VERSION, ArtifactRef, FileEntry, Manifest, Recipe
from schemas.errors import StoreError, TableError
from schemas.tables import TABLES, Rollouts, Table, Trajectories, require_aligned
from stages.ops.progress import progress_bar

KEPT = 8  # artifacts: more than an iteration makes
SYNCED_AT_ONCE = 4  # files and folders: both waiting for the disk and hashing leave the interpreter to others
T = TypeVar("T", bound=Table)
M = TypeVar("M", bound=BaseModel)


class Attempt:
    """A folder in which one attempt at an artifact is written."""

    def __init__(self, ref: ArtifactRef, folder: Path) -> None:
        self.ref, self.folder = ref, folder
        self.tables: dict[type[Table], Table] = {}  # those written, as they were given
        self._entries: dict[str, FileEntry] = {}  # files that are synced and hashed already
        self._folders: set[Path] = {folder, folder.parent}  # to be synced; above `attempts` that is done with the manifest
        self._others = False  # whether somebody writes files of their own below the folder

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
            file.flush()
            os.fsync(file.fileno())
        self._entries[inner] = FileEntry(
            path=inner, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=None if table is None else len(table),
            columns=None if table is None else {f.name: str(f.type) for f in table.schema})

    def path(self, inner: str) -> Path:
        """Where somebody else writes a file or folder of the artifact; its parent exists."""
        self._others = True
        path = self.folder / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self) -> tuple[FileEntry, ...]:
        """Hashes and syncs what is not yet, several files at once; all entries, sorted by path."""
        others = [path for path in self.folder.rglob("*") if self._inner(path) not in self._entries] if self._others else []
        with ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
            found = progress_bar(pool.map(self._seal, others), f"{self.ref.stage}: commit", total=len(others))
            entries = [entry for entry in found if entry is not None]
        for folder in self._folders:
            _fsync(folder)
        return tuple(sorted([*self._entries.values(), *entries], key=lambda entry: entry.path))

    def _seal(self, path: Path) -> FileEntry | None:
        entry = None
        if path.is_file():
            path.chmod(0o644)  # safetensors files are made for their owner alone; stores are shared
            entry = FileEntry(path=self._inner(path), bytes=path.stat().st_size, sha256=sha256_file(path))
        _fsync(path)
        return entry

    def _inner(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


@dataclass(frozen=True)
class _Own:
    """An artifact that this process has committed."""

    manifest: Manifest
    digest: str  # of the manifest's bytes
    tables: dict[type[Table], Table]


class Store:
    """A store on local disk."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._own: OrderedDict[ArtifactRef, _Own] = OrderedDict()  # the last committed here
        self._synced: set[Path] = set()  # folders of stages that are known to be on disk

    # --- writing ---

    def attempt(self, recipe: Recipe) -> Attempt:
        """A fresh folder for one attempt at the recipe's artifact."""
        attempts = self._folder(recipe.ref) / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        folder = attempts / uuid.uuid4().hex
        folder.mkdir()
        return Attempt(recipe.ref, folder)

    def commit(self, manifest: Manifest, tables: Mapping[type[Table], Table] | None = None) -> Manifest:
        """Publishes a sealed attempt; the manifest that is now the artifact's, another writer's if that came first.

        The last manifests and `tables` that were published here are kept in memory: the next stage need not read them.
        """
        folder = self._folder(manifest.ref)
        if put_once(folder / "manifest.json", manifest):
            _fsync(folder.parent)
            if folder.parent not in self._synced:  # the stage's own folder may be new
                for above in (folder.parents[1], self.root):
                    _fsync(above)
                self._synced.add(folder.parent)
            self._own[manifest.ref] = _Own(manifest, hashlib.sha256(_text(manifest)).hexdigest(), dict(tables or {}))
            if len(self._own) > KEPT:
                self._own.popitem(last=False)
            return manifest
        shutil.rmtree(folder / "attempts" / manifest.attempt)
        return self.manifest(manifest.ref)

    def discard(self, attempt: Attempt) -> None:
        """Removes an attempt that was not committed."""
        shutil.rmtree(attempt.folder)

    # --- reading ---

    def find(self, ref: ArtifactRef) -> Manifest | None:
        """The artifact's manifest, or none if it was never committed. Raises `StoreError` if it cannot be believed."""
        path = self._folder(ref) / "manifest.json"
        if not path.exists():
            return None
        if ref in self._own:
            return self._own[ref].manifest
        manifest = read_record(path, Manifest)
        for name, found, expected in (("recipe", manifest.recipe.ref.identity, ref.identity),
                                       ("identity", manifest.identity, ref.identity)):
            if found != expected:
                raise StoreError(f"{path}: {name} gives identity {found[:12]}…, expected {expected[:12]}…")
        return manifest

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """As `find`; raises `StoreError` if there is none."""
        manifest = self.find(ref)
        if manifest is None:
            raise StoreError(f"{ref.short} is not in {self.root}; baton stage {ref.stage} RUN --iteration I makes it again")
        return manifest

    def manifest_digest(self, ref: ArtifactRef) -> str:
        """sha256 of the manifest's bytes."""
        if ref in self._own:
            return self._own[ref].digest
        return sha256_file(self._folder(ref) / "manifest.json")

    def table(self, ref: ArtifactRef, kind: type[T]) -> T:
        """A table of the artifact, its size, digest, schema and row count checked."""
        manifest = self.manifest(ref)
        if ref in self._own and kind in self._own[ref].tables:
            return self._own[ref].tables[kind]
        entry = _entry(manifest, kind.file)
        path = self._path(manifest, entry.path)
        data = path.read_bytes() if path.is_file() else None
        self._check(path, entry, None if data is None else len(data),
                    None if data is None else hashlib.sha256(data).hexdigest())
        return _parse(path, entry, pa.BufferReader(data), kind)

    def file(self, ref: ArtifactRef, inner: str) -> Path:
        """A file of the artifact, its size and digest checked."""
        manifest = self.manifest(ref)
        return self._checked(manifest, _entry(manifest, inner))

    def folder(self, ref: ArtifactRef, inner: str) -> Path:
        """A folder of the artifact, the size and digest of each file below it checked."""
        manifest = self.manifest(ref)
        entries = [entry for entry in manifest.files if entry.path.startswith(f"{inner}/")]
        if not entries:
            raise StoreError(f"{ref.short}: the manifest lists nothing below {inner}/")
        for entry in progress_bar(entries, f"{ref.stage}: read"):
            self._checked(manifest, entry)
        return self._path(manifest, inner)

    def place(self, ref: ArtifactRef, inner: str) -> Path:
        """Where a file or folder of the artifact lies, unchecked; to show to people."""
        return self._path(self.manifest(ref), inner)

    def verify(self, ref: ArtifactRef) -> Iterator[str]:
        """What is wrong with the artifact, one finding a line: manifest, every file's bytes, schemas, row alignment."""
        try:
            manifest = self.manifest(ref)
        except StoreError as error:
            yield str(error)
            return
        for entry in manifest.files:
            try:
                path = self._checked(manifest, entry)
                if entry.path in TABLES:
                    _parse(path, entry, str(path), TABLES[entry.path])
            except StoreError as error:
                yield str(error)
        for role, digest in manifest.input_manifests.items():
            source = manifest.recipe.inputs[role]
            if not (self._folder(source) / "manifest.json").exists():
                yield f"{ref.short}: its input {role}, {source.short}, is missing; make it again with baton stage"
            elif self.manifest_digest(source) != digest:
                yield f"{ref.short}: its input {role}, {source.short}, has another manifest than the one it was made from"
        yield from self._misaligned(manifest)

    def _misaligned(self, manifest: Manifest) -> Iterator[str]:
        """Tables of the artifact that do not have the rows of the rollouts they describe."""
        rollouts = manifest.recipe.inputs.get("rollouts")
        for entry in manifest.files if rollouts else ():
            if entry.path in TABLES:
                with contextlib.suppress(StoreError):  # a file that cannot be read is a finding of its own
                    try:
                        there = self.manifest(rollouts).digests()
                        kind = Trajectories if Trajectories.file in there else Rollouts
                        require_aligned(self.table(rollouts, kind), self.table(manifest.ref, TABLES[entry.path]))
                    except TableError as error:
                        yield f"{self._path(manifest, entry.path)}: {error}"

    def artifacts(self) -> list[ArtifactRef]:
        """All committed artifacts."""
        found = sorted(self.root.glob("artifacts/*/*/manifest.json"))
        return [ArtifactRef(stage=path.parts[-3], identity=path.parts[-2]) for path in found]

    def _folder(self, ref: ArtifactRef) -> Path:
        return self.root / "artifacts" / ref.stage / ref.identity

    def _path(self, manifest: Manifest, inner: str) -> Path:
        attempt = self._folder(manifest.ref) / "attempts" / manifest.attempt
        path = attempt / inner
        if not path.resolve().is_relative_to(attempt.resolve()):
            raise StoreError(f"{path}: leaves the artifact through a link; expected a plain file")
        return path

    def _checked(self, manifest: Manifest, entry: FileEntry) -> Path:
        path = self._path(manifest, entry.path)
        size = path.stat().st_size if path.is_file() else None
        self._check(path, entry, size, sha256_file(path) if size == entry.bytes else None)
        return path

    def _check(self, path: Path, entry: FileEntry, size: int | None, digest: str | None) -> None:
        """Raises `StoreError` unless size and digest are those of the manifest; `size` none: there is no such file."""
        if size is None:
            wrong = f"the file is missing; the manifest lists it with {entry.bytes} bytes"
        elif size != entry.bytes:
            wrong = f"size: expected {entry.bytes} bytes, found {size}"
        elif digest != entry.sha256:
            wrong = f"sha256: expected {entry.sha256[:12]}…, found {digest[:12]}…"
        else:
            return
        stage, identity = path.relative_to(self.root).parts[1:3]
        raise StoreError(f"{path}: {wrong}; remove {self.root / 'artifacts' / stage / identity} and make it again with "
                         f"baton stage {stage} RUN --iteration I")


# --- records: JSON files that are written once ---

def put_once(path: Path, record: BaseModel) -> bool:
    """Writes `record` to `path` unless it exists: whole, synced, or not at all. Whether this call wrote it."""
    missing = [] if path.parent.exists() else [folder for folder in path.parents if not folder.exists()]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_text(record))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        for folder in (path.parent, *(new.parent for new in missing)):
            _fsync(folder)


def _text(record: BaseModel) -> bytes:
    """A record as it is written."""
    return (record.model_dump_json(indent=1) + "\n").encode()


def read_record(path: Path, kind: type[M]) -> M:
    """A record as it was written. Raises `StoreError` naming file and field."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise StoreError(f"{path}: format_version {version}, this Baton reads {FORMAT_VERSION}"
                         + ("; use a newer Baton" if isinstance(version, int) and version > FORMAT_VERSION else ""))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        raise StoreError(f"{path}: {'.'.join(str(part) for part in finding['loc'])}: {finding['msg']}") from None


# --- files ---

def _entry(manifest: Manifest, inner: str) -> FileEntry:
    for entry in manifest.files:
        if entry.path == inner:
            return entry
    raise StoreError(f"{manifest.ref.short}: the manifest does not list {inner}")


def _parse(path: Path, entry: FileEntry, source: pa.BufferReader | str, kind: type[T]) -> T:
    try:
        table = pq.ParquetFile(source).read()
        if table.num_rows != entry.rows:
            raise TableError(f"rows: expected {entry.rows}, found {table.num_rows}")
        return kind.from_arrow(table)
    except (TableError, pa.ArrowInvalid) as error:
        raise StoreError(f"{path}: {error}") from None


def sha256_file(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
