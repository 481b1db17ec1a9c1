"""Where a store's bytes lie, and the few things a store does with them: the protocol, and what goes wrong with disks.

local.py is a disk, s3.py a bucket.

A key is a path below the store's root, with `/`. What is written under a key is there whole and durable, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from schemas.errors import StoreError

REMEDIES = {
    errno.ENOSPC: "free some space (baton gc --dry-run lists what it would remove)",
    errno.EDQUOT: "free some space (baton gc --dry-run lists what it would remove)",
    errno.EACCES: "make it readable and writable for this user, or choose another with --store",
    errno.EPERM: "make it readable and writable for this user, or choose another with --store",
    errno.EROFS: "it is mounted read-only; mount it writable, or choose another with --store",
}


OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


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

    def put_file(self, path: Path, key: str) -> None:
        """Moves a synced file of a begun folder to where others read it as `key`, whole."""

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

        `holder`: a description for other processes; `waiting` is called with that of another holder, once, before waiting.
        """

    def holder(self, key: str) -> bytes | None:
        """What the process that holds the lock left there; none if it is free."""


@contextlib.contextmanager
def disk_errors(uri: str, below: Path | None = None) -> Iterator[None]:
    """Turns an error of the system about a disk or a bucket into a `StoreError` with a remedy.

    `below`: only errors about this folder, or about a disk as such.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        named = str(getattr(error, "filename", None) or "")
        if number is None or not (below is None or number in OF_DISKS or named.startswith(str(below))):
            raise
        where = getattr(error, "filename", None) or uri
        remedy = REMEDIES.get(number, "check the disk or the network")
        raise StoreError(f"{where}: {_reason(error, number)}; what was committed before is whole: {remedy}, then the same "
                         "command goes on") from error


def _errno(error: Exception) -> int | None:
    """Of an error of the operating system, also where a library has wrapped its number into a text."""
    if isinstance(error, OSError):
        return errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _reason(error: Exception, number: int) -> str:
    return getattr(error, "strerror", None) or os.strerror(number)
