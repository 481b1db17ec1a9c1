"""A local copy of what is read from a store elsewhere, laid out as the store is, and never larger than it may be.

The least recently used goes first, a whole attempt at a time; never what this process has used, nor what any process
has used within the last minutes. Copies are checked like everything else, so the cache may be removed at any time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import ConfigError, StoreError

IN_USE = 600.0  # seconds after which another process's copy may go
ABANDONED = 7 * 86400.0  # after which what is half made was abandoned by its process


class Cache:
    """The copies of one store, `name`, in a folder that all stores share."""

    def __init__(self, name: str) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.root = Path(os.environ.get("BATON_CACHE") or f"{home}/baton").expanduser()
        self.folder, self.limit = self.root / name, _limit()
        self._used: set[Path] = set()  # attempts, by this process
        self._arrived = 0  # bytes since room was last made

    def path(self, key: str, inner: str) -> Path:
        """Where a file of an attempt, the folder `key`, lies or will lie. Raises `StoreError` if that leaves the folder."""
        folder = self.folder / key
        if not (folder / inner).resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"{key}/{inner}: leaves the artifact; expected a path within it")
        self._used.add(folder)
        with contextlib.suppress(FileNotFoundError):
            os.utime(folder)
        return folder / inner

    def begin(self, key: str) -> Path:
        """A fresh folder for an attempt; what is being made is no copy, and is not let go of."""
        folder = self.making(key)
        folder.mkdir(parents=True)
        return folder

    def making(self, key: str) -> Path:
        """Where an attempt is being made."""
        return self.folder / "making" / key

    def keep(self, key: str) -> None:
        """What was made and has been uploaded becomes a copy."""
        place = self.path(key, ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.making(key), place)
        self.make_room()

    @contextlib.contextmanager
    def arriving(self, path: Path) -> Iterator[Path]:
        """Where a copy is written before it gets its name `path`, whole."""
        temporary = self.folder / "arriving" / uuid.uuid4().hex
        for folder in (temporary.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            self._arrived += temporary.stat().st_size
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if self._arrived > self.limit / 20:
            self.make_room()

    def remove(self, key: str) -> None:
        """Lets go of a file or folder."""
        for path in (self.folder / key, self.making(key)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def make_room(self) -> None:
        """Lets go of the attempts used longest ago, of all stores, until the rest is within the limit; and of what processes
        that are gone have left half made."""
        self._arrived, now = 0, time.time()
        for left in (*self.root.glob("*/arriving/*"), *self.root.glob("*/making/artifacts/*/*/attempts/*")):
            if now - _newest(left) > ABANDONED:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        folders = {folder: (_used_last(folder), _size(folder)) for folder in self.root.glob("*/artifacts/*/*/attempts/*")}
        over = sum(size for _, size in folders.values()) - self.limit
        for folder, (used, size) in sorted(folders.items(), key=lambda item: item[1][0]):
            if over > 0 and folder not in self._used and now - used > IN_USE:
                shutil.rmtree(folder, ignore_errors=True)
                over -= size


def _used_last(folder: Path) -> float:
    """When a copy was used last; now, if another process has just let go of it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _newest(path: Path) -> float:
    return max([_used_last(path), *(_used_last(inner) for inner in _below(path))])


def _size(folder: Path) -> int:
    total = 0
    for path in _below(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _below(folder: Path) -> Iterator[Path]:
    """What is below, whatever other processes remove meanwhile."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def _limit() -> float:
    text = os.environ.get("BATON_CACHE_GB", "20")
    try:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text) * 1e9
    except ValueError:
        raise ConfigError(f"BATON_CACHE_GB={text}: expected a number of gigabytes") from None
