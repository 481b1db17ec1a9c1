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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from schemas.artifacts import FORMAT_VERSION, ArtifactRef, FileEntry, Manifest, Recipe
from schemas.errors import StoreError, TableError
from schemas.tables import TABLES, Rollouts, Table, require_aligned

T = TypeVar("T", bound=Table)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Attempt:
    """A folder in which one attempt at an artifact is written."""

    ref: ArtifactRef
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def table(self, table: Table) -> None:
        """Writes `table` as Parquet under its file name."""
        pq.write_table(table.to_arrow(), self.folder / table.file, compression="zstd")

    def path(self, inner: str) -> Path:
        """Where a file or folder of the artifact goes; its parent exists."""
        path = self.folder / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self) -> tuple[FileEntry, ...]:
        """Hashes and syncs every file and folder; sorted by path."""
        entries, paths = [], sorted(self.folder.rglob("*"))
        for path in tqdm(paths, f"{self.ref.stage}: commit", leave=False, disable=None):
            if path.is_file():
                path.chmod(0o644)  # safetensors files are made for their owner alone; stores are shared
                entries.append(_describe(path, path.relative_to(self.folder).as_posix()))
            _fsync(path)
        for folder in (self.folder, *self.folder.parents[:5]):  # attempts, identity, stage, artifacts, root
            _fsync(folder)
        return tuple(entries)


class Store:
    """A store on local disk."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    # --- writing ---

    def attempt(self, recipe: Recipe) -> Attempt:
        """A fresh folder for one attempt at the recipe's artifact."""
        folder = self._folder(recipe.ref) / "attempts" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return Attempt(recipe.ref, folder)

    def commit(self, manifest: Manifest) -> Manifest:
        """Publishes a sealed attempt; the manifest that is now the artifact's, another writer's if that came first."""
        folder = self._folder(manifest.ref)
        if put_once(folder / "manifest.json", manifest):
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
        manifest = read_record(path, Manifest)
        for field, found, expected in (("recipe", manifest.recipe.ref.identity, ref.identity),
                                       ("identity", manifest.identity, ref.identity)):
            if found != expected:
                raise StoreError(f"{path}: {field} gives identity {found[:12]}…, expected {expected[:12]}…")
        return manifest

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """As `find`; raises `StoreError` if there is none."""
        manifest = self.find(ref)
        if manifest is None:
            raise StoreError(f"{ref.short} is not in {self.root}; baton stage {ref.stage} RUN --iteration I makes it again")
        return manifest

    def manifest_digest(self, ref: ArtifactRef) -> str:
        """sha256 of the manifest's bytes."""
        return sha256_file(self._folder(ref) / "manifest.json")

    def table(self, ref: ArtifactRef, kind: type[T]) -> T:
        """A table of the artifact, its size, digest, schema and row count checked."""
        manifest = self.manifest(ref)
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
        for entry in tqdm(entries, f"{ref.stage}: read", leave=False, disable=None):
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
                        require_aligned(self.table(rollouts, Rollouts), self.table(manifest.ref, TABLES[entry.path]))
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
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(record.model_dump_json(indent=1) + "\n")
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

def _describe(path: Path, inner: str) -> FileEntry:
    rows = columns = None
    if path.suffix == ".parquet":
        metadata = pq.read_metadata(path)
        rows, columns = metadata.num_rows, {f.name: str(f.type) for f in metadata.schema.to_arrow_schema()}
    return FileEntry(path=inner, bytes=path.stat().st_size, sha256=sha256_file(path), rows=rows, columns=columns)


def _entry(manifest: Manifest, inner: str) -> FileEntry:
    for entry in manifest.files:
        if entry.path == inner:
            return entry
    raise StoreError(f"{manifest.ref.short}: the manifest does not list {inner}")


def _parse(path: Path, entry: FileEntry, source: pa.BufferReader | str, kind: type[T]) -> T:
    try:
        table = pq.read_table(source)
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
