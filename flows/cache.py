"""A local copy of what is read from a store elsewhere, laid out as the store is, and never larger than it may be.

What goes first is what was used longest ago, a whole attempt at a time; never what this process has used, nor what anybody
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

IN_USE = 600.0  # seconds after which somebody else's copy may go


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
        if folder not in self._used and folder.is_dir():
            self._used.add(folder)
            os.utime(folder)
        return folder / inner

    def begin(self, key: str) -> Path:
        """A fresh folder for an attempt."""
        folder = self.folder / key
        folder.mkdir(parents=True)
        self._used.add(folder)
        return folder

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
        path = self.folder / key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def make_room(self) -> None:
        """Lets go of the attempts used longest ago, of all stores, until the rest is within the limit."""
        self._arrived = 0
        folders = list(self.root.glob("*/artifacts/*/*/attempts/*"))
        sizes = {folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders}
        over = sum(sizes.values()) - self.limit
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
            if over <= 0:
                return
            if folder not in self._used and time.time() - folder.stat().st_mtime > IN_USE:
                shutil.rmtree(folder, ignore_errors=True)
                over -= sizes[folder]


def _limit() -> float:
    text = os.environ.get("BATON_CACHE_GB", "20")
    try:
        return float(text) * 1e9
    except ValueError:
        raise ConfigError(f"BATON_CACHE_GB={text}: expected a number of gigabytes") from None
