"""Progress bars, on a terminal or for a listener; tqdm's own TQDM_DISABLE turns off those on the terminal."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from schemas.errors import StoppedError

STOPPED = "{}: ended in the middle, nothing of it was committed"
Listener = Callable[[str, float, float | None], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


def progress_bar(*arguments: Any, **more: Any) -> tqdm:
    """As `tqdm`; without a terminal, a listener and `interrupted_by` it does nothing. Raises `StoppedError`."""
    if _listener.get() is not None or _stop.get() is not None:
        return _ListenedBar(*arguments, **more)
    return tqdm(*arguments, leave=False, **more) if sys.stderr.isatty() else tqdm(*arguments, disable=True, **more)


def pause(seconds: float, what: str) -> None:
    """As `time.sleep`, but over once the event of `interrupted_by` is set. Raises `StoppedError` then, naming `what`."""
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise StoppedError(STOPPED.format(what))


@contextmanager
def interrupted_by(stop: threading.Event) -> Iterator[None]:
    """Inside it every bar raises `StoppedError` where it would be drawn next, and every pause, once `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


@contextmanager
def listened_to(listener: Listener) -> Iterator[None]:
    """Inside it `listener` is called for every bar: with its description, how much is done, of how much."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class _ListenedBar(tqdm):
    """A bar that asks the event and calls the listener whenever it would be drawn, and is drawn on a terminal too."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._drawn = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
        self._listener, self._stop = _listener.get(), _stop.get()
        super().__init__(*arguments, leave=False, disable=False, file=None if self._drawn else io.StringIO(), **more)

    def refresh(self, *arguments: Any, **more: Any) -> None:
        if self._stop is not None and self._stop.is_set():  # here, before the lock of all bars is taken
            raise StoppedError(STOPPED.format(self.desc or "stage"))
        super().refresh(*arguments, **more)

    def display(self, *arguments: Any, **more: Any) -> None:
        if self._listener is not None:
            self._listener(self.desc.removesuffix(": "), self.n, self.total)
        if self._drawn:
            super().display(*arguments, **more)
