"""A store's bytes on a disk of this machine, or on one that it has mounted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from flows.store.files import Stat
from schemas.errors import StoreError

log = logging.getLogger("baton")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without them


class LocalFiles:
    """A folder on a disk of this machine, or one that it has mounted."""

    def __init__(self, root: Path) -> None:
        self.root, self.uri, self.beside = root, str(root), root
        self._synced: set[Path] = set()  # folders whose own names are known to be on disk
        self._warned = False

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

    def put_file(self, path: Path, key: str) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        self._sync_up(target.parent)

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
        """By flock: the kernel releases it with the process, however that ends."""
        path = self.root / key
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                self._lock(file, waiting)
                if not _same_file(file, path):  # removed while this process waited: another would lock a new one
                    continue
                file.truncate(0)
                file.write(holder)
                file.flush()
                yield
                return

    def _lock(self, file: BinaryIO, waiting: Callable[[bytes], None]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            waiting(file.read())
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._warn_of_no_locks(error)

    def _warn_of_no_locks(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s: its file system has no locks (%s): nothing keeps two processes from working on one run, or gc "
                        "from running beside one; start one at a time", self.root, error.strerror)

    def holder(self, key: str) -> bytes | None:
        try:
            with (self.root / key).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except BlockingIOError:
            return self.read(key)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._warn_of_no_locks(error)
        return None


def _same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
