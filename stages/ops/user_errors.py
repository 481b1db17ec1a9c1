"""Errors of a user's code in words: what was raised, and in which of its lines."""

from __future__ import annotations

import importlib.metadata
import os
import re
import traceback
from pathlib import Path

from schemas.errors import DISTRIBUTION, installed_by

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
    if isinstance(raised, ModuleNotFoundError) and (extra := _extra_of(raised.name or "")):
        beside = f"; {installed_by(extra)}"
    return " ".join(what.split()) + where + beside


def _extra_of(module: str) -> str | None:
    """The extra of this package by which a module comes that is called as its distribution."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        found = re.match(r"""([\w.-]+).*extra == ["']([\w-]+)["']""", line)
        if found and found[1].replace("-", "_").lower() == module.lower():
            return found[2]
    return None
