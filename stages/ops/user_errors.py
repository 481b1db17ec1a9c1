"""Errors of a user's code in words: what was raised, and in which of its lines."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

BATON = Path(__file__).parents[2]
NOT_OWN = ("<", os.path.dirname(os.__file__), *(str(BATON / package) + os.sep for package in ("flows", "stages", "schemas")))
"""Generated code, Python's library, and what calls a user's."""


def said(raised: BaseException) -> str:
    """What a user's code raised, and in which of its lines."""
    exits = isinstance(raised, SystemExit)
    what = f"called sys.exit({raised.code!r})" if exits else f"raised {type(raised).__name__}: {raised}"
    frames = traceback.extract_tb(raised.__traceback__)[1:]  # the first is the caller's
    own = [frame for frame in frames if not frame.filename.startswith(NOT_OWN) and "site-packages" not in frame.filename]
    where = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    beside = ""
    if isinstance(raised, FileNotFoundError):
        beside = "; of what lies beside a function's file, only the modules that it imports are kept in the store"
    return " ".join(what.split()) + where + beside
