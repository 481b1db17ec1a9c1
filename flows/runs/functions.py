"""Functions that a user brings: found, checked at the start, and run from their copy in the store.

BATON_ALLOWED_FUNCTIONS narrows which may run in this process: patterns separated by commas, of names (`rewards.py:*`,
`mypackage.*:score`) or of contents (`sha256:…`, of the function's file). docs/security.md is about who can do what.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from flows.store.digests import sha256_file
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import ConfigError
from stages.ops.user_errors import said


def function_files(source: str, folder: Path) -> list[Path]:
    """The Python file of `file.py:function` (below `folder`), the modules beside it that it imports, and these theirs,
    and the data that their `FILES` name.

    Of `package.module:function` the module's file alone; nothing is imported. Raises `ConfigError`.
    """
    place, colon, name = source.rpartition(":")
    if not place or not colon or not name.isidentifier() or ":" in place:
        raise ConfigError(f"function {source!r}: expected file.py:function or package.module:function")
    path = folder / place if place.endswith(".py") else _installed(place)
    if path is None or not path.is_file():
        raise ConfigError(f"function {source!r}: no such {f'file: {path}' if place.endswith('.py') else f'module: {place}'}")
    if not place.endswith(".py"):
        return [path]
    modules = _with_modules_beside(path)
    return list(dict.fromkeys([*modules, *(data for module in modules for data in _data_of(source, module, path.parent))]))


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


def _with_modules_beside(file: Path) -> list[Path]:
    """`file` first."""
    files, todo = [file], [file]
    while todo:
        for name in _imported(todo.pop()):
            beside = [file.parent / f"{name}.py", *sorted((file.parent / name).rglob("*.py"))]
            new = [path for path in beside if path.is_file() and path not in files]
            files, todo = files + new, todo + new
    return files


def _data_of(source: str, module: Path, folder: Path) -> list[Path]:
    """What a module's FILES = ["words.txt", "lists/*.json"] name below the folder. Raises `ConfigError`."""
    try:
        tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError):  # said when it is run
        return []
    named = [node.value for node in tree.body if isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "FILES" for target in node.targets)]
    found: list[Path] = []
    for value in named:
        try:
            patterns = [str(pattern) for pattern in ast.literal_eval(value)]
        except (ValueError, TypeError):
            raise ConfigError(f"function {source!r}: FILES in {module.name} is not a list of texts as it stands; write the "
                              "names of the files out") from None
        for pattern in patterns:
            inside = not Path(pattern).is_absolute() and ".." not in Path(pattern).parts
            new = sorted(path for path in folder.glob(pattern) if path.is_file()) if inside and pattern else []
            if not new:
                raise ConfigError(f"function {source!r}: FILES in {module.name} names {pattern!r}, and there is no such "
                                  f"file in {folder}")
            found += new
    return found


def _imported(file: Path) -> list[str]:
    """Top names of the modules that a file imports, at its top or in a function; none if it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # said when it is run
        return []
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def load_function(source: str, files: list[Path]) -> Callable:
    """The function, from the first of its files or from its installed package, which must have the same source.

    Raises `ConfigError`.
    """
    place, _, name = source.rpartition(":")
    require_allowed(source, files)
    if not place.endswith(".py") and sha256_file(function_files(source, Path())[0]) != sha256_file(files[0]):
        raise ConfigError(f"function {source!r}: the installed file is not the one the run was made with; install that "
                          "version, or make another run")
    from stages.ops.guest import switches_kept  # torch: not in a process that only looks for files

    try:
        with switches_kept(), redirect_stdout(sys.stderr):
            module = _module_of(files) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever a user's file does when it is run
        raise ConfigError(f"function {source!r}: {files[0].name} cannot be run: it {said(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"function {source!r}: {place} has no function {name!r}")
    return function if len(files) == 1 else _with_its_modules(function, module, files)


def check_function(
    source: str, files: list[Path], look: Callable[[Callable], object] = lambda function: None
) -> None:
    """Loads the function from copies of its files alone, as it will be from the store, and looks at it.

    Raises `ConfigError`.
    """
    with tempfile.TemporaryDirectory() as alone:
        copies = [Path(alone) / path.relative_to(files[0].parent) for path in files]
        for path, copy in zip(files, copies, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        function = load_function(source, copies)
        sys.modules.pop(_module_name(copies), None)
        try:
            look(function)
        except ConfigError as error:
            raise ConfigError(f"function {source!r}: {error}") from None


def stored_function(store: Store, ref: ArtifactRef, source: str) -> Callable:
    """The function of imported files: of files, from their copies in the store; of a package, as it is installed."""
    entries = store.manifest(ref).files
    place = source.rpartition(":")[0]
    main = Path(place).name if place.endswith(".py") else entries[0].path
    names = [main, *(entry.path for entry in entries if entry.path != main)]
    return load_function(source, [store.file(ref, name) for name in names])


def _module_of(files: list[Path]) -> ModuleType:
    """The first file as a module."""
    name = _module_name(files)
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, files[0])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        module.__baton_modules__ = {}
        try:
            with _Importable(files, module.__baton_modules__):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _module_name(files: list[Path]) -> str:
    """Made from their contents, so that a process can hold several versions."""
    return f"baton_user_{hashlib.sha256(''.join(map(sha256_file, files)).encode()).hexdigest()[:16]}"


class _Importable:
    """Inside it `import` finds the modules beside the first file before all others, and nothing of them stays imported.

    Entered by several calls that are awaited side by side, it lasts until the last has left.
    """

    def __init__(self, files: list[Path], own: dict[str, ModuleType]) -> None:
        """`own`: those that were imported, by name."""
        self.folder, self.own, self.others, self.inside = str(files[0].parent), own, {}, 0
        self.names = {path.relative_to(files[0].parent).parts[0].removesuffix(".py") for path in files[1:]}
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.others = self._taken()
                sys.modules.update(self.own)
                sys.path.insert(0, self.folder)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                sys.path.remove(self.folder)
                self.own.update(self._taken())
                sys.modules.update(self.others)

    def _taken(self) -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in self.names}


def _with_its_modules(function: Callable, module: ModuleType, files: list[Path]) -> Callable:
    """The function, which may import the modules beside its file when it is called, or awaited, too."""
    importable = _Importable(files, module.__baton_modules__)

    async def awaited(value: Awaitable[object]) -> object:
        with importable:
            return await value

    @functools.wraps(function)
    def called(*arguments: object, **more: object) -> object:
        with importable:
            value = function(*arguments, **more)
        return awaited(value) if inspect.isawaitable(value) else value

    return called


def _matches(source: str, pattern: str) -> bool:
    """Place and name each match; a pattern of packages matches no file, whatever the file is called."""
    (place, _, name), (places, _, names) = source.rpartition(":"), pattern.rpartition(":")
    if pattern == "*":
        return True
    return place.endswith(".py") == places.endswith(".py") and fnmatchcase(place, places) and fnmatchcase(name, names)


def require_allowed(source: str, files: Sequence[Path] = ()) -> None:
    """Raises `ConfigError` if BATON_ALLOWED_FUNCTIONS is set and names neither `source` nor the contents of all its files.

    `files`: none for what is known by its name alone, such as an environment that a module registers.
    """
    allowed = os.environ.get("BATON_ALLOWED_FUNCTIONS")
    if allowed is None:
        return
    patterns = [pattern.strip() for pattern in allowed.split(",")]
    if any(_matches(source, pattern) for pattern in patterns if not pattern.startswith("sha256:")):
        return
    missing = [digest for path in files if (digest := f"sha256:{sha256_file(path)}") not in patterns]
    if missing or not files:
        more = f" or {','.join(missing)}" if missing else ""
        raise ConfigError(f"function {source!r}: BATON_ALLOWED_FUNCTIONS does not allow it here; add its name{more}")
