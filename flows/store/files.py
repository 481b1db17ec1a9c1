"""Where a store's bytes lie, and the few things a store does with them: on a local disk here, on S3 in flows/store/s3.py.

A key is a path below the store's root, with `/`. What is written under a key is there whole and durable, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from schemas.errors import StoreError

MENDED = {
    errno.ENOSPC: "free some space (baton gc --dry-run says what it would remove)",
    errno.EDQUOT: "free some space (baton gc --dry-run says what it would remove)",
    errno.EACCES: "make it readable and writable for this user, or choose another with --store",
    errno.EPERM: "make it readable and writable for this user, or choose another with --store",
    errno.EROFS: "it is mounted read-only; mount it writable, or choose another with --store",
}


OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a network's disk without them: nobody is kept waiting


@dataclass(frozen=True)
class Stat:
    """A file below the root."""

    key: str
    bytes: int
    modified: float  # seconds since the epoch


class Files(Protocol):
    """What a store needs of a disk or a bucket."""

    uri: str
    """The root, for people and for other processes."""
    beside: Path
    """A local folder for what is beside the store and can be made again."""

    def read(self, key: str) -> bytes | None:
        """A file's bytes; none if there is no such file."""

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""

    def put_once(self, key: str, data: bytes) -> bool:
        """Writes a file unless it exists, all of it or nothing, durably. Whether what is there is this call's."""

    def names(self, key: str) -> list[str]:
        """What is directly below, in order."""

    def walk(self, key: str) -> Iterator[Stat]:
        """All files below, and folders that hold nothing, whose keys end with `/`."""

    def remove(self, key: str) -> None:
        """Removes a file, or all that is below; nothing, where nothing is."""

    def begin(self, key: str) -> Path:
        """A fresh local folder in which the files of `key` are written."""

    def sync(self, path: Path) -> None:
        """Makes a file or folder below a begun one durable, where that is where it stays."""

    def publish(self, key: str) -> None:
        """Puts the files of a begun folder where others read them."""

    def local(self, key: str, inner: str) -> Path:
        """Where a file below the folder `key` can be read. Raises `StoreError` if that leaves the folder."""

    def forget(self, key: str, inner: str) -> bool:
        """Lets go of a local copy, so that it is fetched again; False if the local file is the only one."""

    def unfinished(self) -> list[Stat]:
        """What writers that may be gone have left half done, outside of attempts."""

    def abort(self, unfinished: Stat) -> None:
        """Removes one of these."""

    def probe(self) -> None:
        """Raises `StoreError` or `OSError` if the root cannot be written, or not in the way that a store needs."""

    def address(self, key: str) -> str:
        """Where a file or folder is found, for people."""

    def exclusive(self, key: str, holder: bytes, waiting: Callable[[bytes], None]) -> AbstractContextManager[None]:
        """A lock that one process holds, and that is free when the process is gone.

        `holder`: what others are told of it; `waiting` is called with what another holder left, once, before waiting.
        """

    def holder(self, key: str) -> bytes | None:
        """What the process that holds the lock left there; none if it is free."""


def open_files(root: str | Path) -> Files:
    """For a folder, or `s3://bucket/prefix`. Raises `ConfigError`."""
    if str(root).startswith("s3://"):
        from flows.store.s3 import S3Files
        return S3Files(str(root))
    return LocalFiles(Path(root))


class LocalFiles:
    """A folder on a disk of this machine, or one that it has mounted."""

    def __init__(self, root: Path) -> None:
        self.root, self.uri, self.beside = root, str(root), root
        self._synced: set[Path] = set()  # folders whose own names are known to be on disk

    # --- reading ---

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def names(self, key: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / key))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, key: str) -> Iterator[Stat]:
        for folder, folders, files in os.walk(self.root / key):
            files += [name for name in folders if Path(folder, name).is_symlink()]
            if not folders and not files:
                yield Stat(f"{Path(folder).relative_to(self.root).as_posix()}/", 0, Path(folder).lstat().st_mtime)
            for name in sorted(files):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found = path.lstat()
                    yield Stat(path.relative_to(self.root).as_posix(), found.st_size, found.st_mtime)

    def local(self, key: str, inner: str) -> Path:
        top, _, rest = key.partition("/")  # artifacts/ may lie on another disk; below it nothing is a link
        path = self.root / key / inner
        if path.resolve() != (self.root / top).resolve() / rest / inner:
            raise StoreError(f"{path}: leaves the artifact through a link; expected a plain file")
        return path

    def forget(self, key: str, inner: str) -> bool:
        return False

    def address(self, key: str) -> str:
        return str(self.root / key)

    # --- writing ---

    def put_once(self, key: str, data: bytes) -> bool:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            self._sync_up(path.parent)

    def begin(self, key: str) -> Path:
        folder = self.root / key
        folder.mkdir(parents=True)
        return folder

    def sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, key: str) -> None:
        """They are there, and synced."""

    def _sync_up(self, folder: Path) -> None:
        """Syncs the folder, and those above it whose own names may not be on disk yet."""
        self.sync(folder)
        for above in folder.parents:
            if folder in self._synced or not above.is_relative_to(self.root):
                return
            self.sync(above)
            self._synced.add(folder)
            folder = above

    def remove(self, key: str) -> None:
        path = self.root / key
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            self.sync(path.parent)

    def unfinished(self) -> list[Stat]:
        return [stat for part in ("artifacts", "runs") for stat in self.walk(part)
                if re.search(r"\.[0-9a-f]{32}\.tmp$", stat.key)]

    def abort(self, unfinished: Stat) -> None:
        self.remove(unfinished.key)

    def probe(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusive(self, key: str, holder: bytes, waiting: Callable[[bytes], None]) -> Iterator[None]:
        """By flock: the kernel lets go of it with the process, however that ends."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(file.read())
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            file.truncate(0)
            file.write(holder)
            file.flush()
            yield

    def holder(self, key: str) -> bytes | None:
        try:
            with (self.root / key).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except BlockingIOError:
            return self.read(key)


@contextlib.contextmanager
def explained(uri: str, below: Path | None = None) -> Iterator[None]:
    """Turns what the system says about a disk or a bucket into a `StoreError` that says what helps.

    `below`: only what it says of this folder, or of a disk as such.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        named = str(getattr(error, "filename", None) or "")
        if number is None or not (below is None or number in OF_DISKS or named.startswith(str(below))):
            raise
        where = getattr(error, "filename", None) or uri
        helps = MENDED.get(number, "see to the disk or the network")
        raise StoreError(f"{where}: {_reason(error, number)}; what was committed before is whole: {helps}, then the same "
                         "command goes on") from error


def _errno(error: Exception) -> int | None:
    """Of an error of the operating system, also where a library has wrapped its number into a text."""
    if isinstance(error, OSError):
        return errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _reason(error: Exception, number: int) -> str:
    return getattr(error, "strerror", None) or os.strerror(number)
