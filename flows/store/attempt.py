"""What an artifact holds before it is committed; how it is written, hashed and made durable, perhaps in another thread."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from flows.store.digests import Hash, sha256_file
from flows.store.files import Files, disk_errors
from schemas.artifacts import Algorithm, ArtifactRef, FileEntry
from schemas.errors import StoppedError
from schemas.tables import Table
from stages.ops.progress import progress_bar

CONCURRENT_SYNCS = 2  # files and folders: both waiting for the disk and hashing leave the interpreter to others
PIECE, SYNC_EVERY = 2**22, 2**26  # bytes of weights that are hashed and written at once; and after which the disk takes them


class Attempt:
    """What one attempt at an artifact holds. It is written when it is sealed, which may be later and in another thread, so
    that what it is given must stay as it is until then."""

    def __init__(self, ref: ArtifactRef, files: Files) -> None:
        self.ref, self.files, self.name = ref, files, uuid.uuid4().hex
        self.tables: dict[type[Table], Table] = {}  # as they are in memory
        self.weights_kept = True
        """Whether weights are written, or hashed alone."""
        self.algorithm: Algorithm = "blake3"
        """By which weights are hashed."""
        self.stop = threading.Event()
        """Once set, `seal` raises `StoppedError` in the middle of a large file."""
        self._writes: list[Callable[[], None]] = []
        self._weights: dict[str, Callable[[], Iterable[memoryview]]] = {}
        self._entries: dict[str, FileEntry] = {}  # files that are synced and hashed already
        self._folders: set[Path] = set()  # to be synced; above `attempts` that is done with the manifest
        self._sealed = False
        self._others = False  # whether a library writes files of its own below the folder

    @cached_property
    def folder(self) -> Path:
        """Where it is written; made when it is first asked for."""
        with disk_errors(self.files.uri):
            folder = self.files.begin(f"{folder_of(self.ref)}/attempts/{self.name}")
        self._folders |= {folder, folder.parent}
        return folder

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        return "folder" in self.__dict__

    def begin_anew(self) -> None:
        """Under another name: what was written so far may be another try's, and committed."""
        self.__dict__.pop("folder", None)
        self.name, self._sealed = uuid.uuid4().hex, False
        self._entries.clear()
        self._folders.clear()

    # --- what it is given ---

    def table(self, table: Table) -> None:
        """A table, as Parquet under its file name."""
        self.tables[type(table)] = table
        self._writes.append(lambda: self._write_table(table))

    def write(self, inner: str, data: bytes) -> None:
        """A file that fits into memory."""
        self._writes.append(lambda: self._write(inner, data))

    def weights(self, inner: str, pieces: Callable[[], Iterable[memoryview]]) -> None:
        """A file of weights, as it comes."""
        self._weights[inner] = pieces

    def files_of(self, inner: str, write: Callable[[Path], object]) -> None:
        """What a library writes, called with the path of a file or folder whose parent exists."""
        self._writes.append(lambda: write(self.path(inner)))

    def path(self, inner: str) -> Path:
        """Where a library writes a file or folder at once; its parent exists."""
        self._others = True
        path = self.folder / inner
        self._make_parent(path)
        return path

    # --- writing it ---

    def seal(self) -> tuple[FileEntry, ...]:
        """Writes, hashes and syncs everything, large files several at once; all entries, sorted by path. A second time it is
        written anew."""
        if self._sealed:
            self.begin_anew()
        self._sealed = True
        for write in self._writes:
            write()
        for inner in self._weights if self.weights_kept else ():
            self._make_parent(self.folder / inner)
        others = [path for path in self.folder.rglob("*") if self._inner(path) not in self._entries] if self._others else []
        works = [*(partial(self._write_weights, *item) for item in self._weights.items()),
                 *(partial(self._seal, path) for path in others)]
        with ThreadPoolExecutor(CONCURRENT_SYNCS) as pool:
            found = progress_bar(pool.map(lambda work: work(), works), f"{self.ref.stage}: commit", total=len(works))
            entries = [entry for entry in found if entry is not None]
        for folder in self._folders:
            self.files.sync(folder)
        return tuple(sorted([*self._entries.values(), *entries], key=lambda entry: entry.path))

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Files whose digests alone were taken."""
        return () if self.weights_kept else tuple(sorted(self._weights))

    def _write_table(self, table: Table) -> None:
        sink, arrow = pa.BufferOutputStream(), table.to_arrow()
        texts = [f.name for f in arrow.schema if pa.types.is_string(f.type)]
        pq.write_table(arrow, sink, compression="zstd", use_dictionary=texts, write_statistics=False)  # one row group
        self._write(table.file, sink.getvalue(), arrow)

    def _write(self, inner: str, data: bytes | pa.Buffer, table: pa.Table | None = None) -> None:
        """Written, synced and hashed in one go. `table`: what it holds, if it is one."""
        path = self.folder / inner
        self._make_parent(path)
        with path.open("wb") as file:  # buffered: a raw write may be a part of it and say nothing
            file.write(data)
        self.files.sync(path)
        self._entries[inner] = FileEntry(
            path=inner, bytes=len(data), digest=hashlib.sha256(data).hexdigest(), rows=None if table is None else len(table),
            columns=None if table is None else {f.name: str(f.type) for f in table.schema})

    def _write_weights(self, inner: str, pieces: Callable[[], Iterable[memoryview]]) -> FileEntry:
        """Hashed as it is written, if it is."""
        hashed, size, synced = Hash(self.algorithm), 0, 0
        path = self.folder / inner if self.weights_kept else None
        with path.open("wb") if path else contextlib.nullcontext() as file:
            for piece in pieces():
                for begin in range(0, len(piece), PIECE):
                    if self.stop.is_set():
                        raise StoppedError(f"{self.ref.short}: ended in the middle of its commit")
                    part = piece[begin : begin + PIECE]
                    hashed.update(part)
                    size += len(part)
                    if file:
                        file.write(part)
                        if size - synced >= SYNC_EVERY:
                            synced = size
                            self._sync_so_far(path, file)
            if file:
                self._sync_so_far(path, file)
        return FileEntry(path=inner, bytes=size, digest=hashed.digest())

    def _sync_so_far(self, path: Path, file: BinaryIO) -> None:
        """Has the disk take what was written, and the system forget it: memory that was never touched costs a virtual
        machine more than the disk, and a checkpoint would touch as much as it has bytes."""
        file.flush()
        self.files.sync(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _seal(self, path: Path) -> FileEntry | None:
        entry = None
        if path.is_file():
            path.chmod(0o644)  # libraries may make files for their owner alone; stores are shared
            entry = FileEntry(path=self._inner(path), bytes=path.stat().st_size, digest=sha256_file(path))
        self.files.sync(path)
        return entry

    def _make_parent(self, path: Path) -> None:
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders |= {folder for folder in path.parents if folder.is_relative_to(self.folder)}

    def _inner(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def folder_of(ref: ArtifactRef) -> str:
    """The key of an artifact's folder."""
    return f"artifacts/{ref.stage}/{ref.identity}"
