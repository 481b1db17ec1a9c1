"""Progress bars, on a terminal or for a listener; tqdm's own TQDM_DISABLE turns off those on the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

Listener = Callable[[str, float, float | None], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def progress_bar(*arguments: Any, **more: Any) -> tqdm:
    """As `tqdm`; without a terminal and a listener it does nothing."""
    if _listener.get() is not None:
        return _ListenedBar(*arguments, **more)
    return tqdm(*arguments, leave=False, **more) if sys.stderr.isatty() else tqdm(*arguments, disable=True, **more)


@contextmanager
def listened_to(listener: Listener) -> Iterator[None]:
    """Inside it `listener` is called for every bar: with its description, how much is done, of how much."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class _ListenedBar(tqdm):
    """A bar that calls the listener whenever it would be drawn, and is drawn on a terminal too."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._drawn = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
        self._listener = _listener.get()
        super().__init__(*arguments, leave=False, disable=False, file=None if self._drawn else io.StringIO(), **more)

    def display(self, *arguments: Any, **more: Any) -> None:
        self._listener(self.desc.removesuffix(": "), self.n, self.total)
        if self._drawn:
            super().display(*arguments, **more)
