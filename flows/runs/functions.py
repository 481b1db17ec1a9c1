"""Functions that a user brings: found, checked at the start, and run from their copy in the store.

BATON_ALLOWED_FUNCTIONS narrows which may run in this process: patterns separated by commas, of names (`rewards.py:*`,
`mypackage.*:score`) or of contents (`sha256:…`, of the function's file). docs/security.md is about who can do what.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from flows.store.store import Store, sha256_file
from schemas.artifacts import ArtifactRef
from schemas.errors import ConfigError


def function_file(source: str, folder: Path) -> Path:
    """The Python file of `file.py:function` (below `folder`) or `package.module:function`; nothing is imported.

    Raises `ConfigError`.
    """
    place, colon, name = source.rpartition(":")
    if not place or not colon or not name.isidentifier() or ":" in place:
        raise ConfigError(f"function {source!r}: expected file.py:function or package.module:function")
    path = folder / place if place.endswith(".py") else _installed(place)
    if path is None or not path.is_file():
        raise ConfigError(f"function {source!r}: no such {f'file: {path}' if place.endswith('.py') else f'module: {place}'}")
    return path


def _installed(module: str) -> Path | None:
    """The source file of an installed module, found without running its packages, as `importlib.util.find_spec` would."""
    parts, search = module.split("."), None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        found = (finder.find_spec(name, search) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        search = spec.submodule_search_locations or []
    return Path(spec.origin) if spec.has_location else None


def load_function(source: str, file: Path) -> Callable:
    """The function, from `file` or from its installed package, which must have the same source. Raises `ConfigError`."""
    place, _, name = source.rpartition(":")
    require_allowed(source, file)
    if not place.endswith(".py") and sha256_file(function_file(source, file.parent)) != sha256_file(file):
        raise ConfigError(f"function {source!r}: the installed file is not the one the run was made with; install that "
                          "version, or make another run")
    try:
        module = _module_of(file) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever a user's file does when it is run
        raise ConfigError(f"function {source!r}: {file} cannot be run: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"function {source!r}: {place} has no function {name!r}")
    return function


def check_function(source: str, file: Path) -> None:
    """Loads the function from a copy of its file alone, as it will be from the store. Raises `ConfigError`."""
    with tempfile.TemporaryDirectory() as alone:
        load_function(source, Path(shutil.copy(file, alone)))


def stored_function(store: Store, ref: ArtifactRef, source: str) -> Callable:
    """The function of an imported file: of a file, from its copy in the store; of a package, as it is installed."""
    (entry,) = store.manifest(ref).files
    return load_function(source, store.file(ref, entry.path))


def _module_of(file: Path) -> ModuleType:
    """The file as a module, under a name made from its content, so that a process can hold several versions."""
    name = f"baton_user_{sha256_file(file)[:16]}"
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _matches(source: str, pattern: str) -> bool:
    """Place and name each match; a pattern of packages matches no file, whatever the file is called."""
    (place, _, name), (places, _, names) = source.rpartition(":"), pattern.rpartition(":")
    if pattern == "*":
        return True
    return place.endswith(".py") == places.endswith(".py") and fnmatchcase(place, places) and fnmatchcase(name, names)


def require_allowed(source: str, file: Path | None = None) -> None:
    """Raises `ConfigError` if BATON_ALLOWED_FUNCTIONS is set and names neither `source` nor the content of its file.

    `file`: none for what is known by its name alone, such as an environment that a module registers.
    """
    allowed = os.environ.get("BATON_ALLOWED_FUNCTIONS")
    if allowed is None:
        return
    patterns = [pattern.strip() for pattern in allowed.split(",")]
    contents = [pattern for pattern in patterns if pattern.startswith("sha256:")]
    if any(_matches(source, pattern) for pattern in patterns if pattern not in contents):
        return
    digest = f"sha256:{sha256_file(file)}" if file else None
    if digest not in contents:
        raise ConfigError(f"function {source!r}: BATON_ALLOWED_FUNCTIONS does not allow it here; add its name"
                          + (f" or {digest}" if digest else ""))
