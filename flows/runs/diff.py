"""`baton diff`: where two runs differ first: iteration, stage, row and column; and the setting or input it comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, FileEntry, Manifest, short_digest
from schemas.config import differences
from schemas.errors import DroppedError
from schemas.stages import STAGES
from schemas.tables import TABLES, Table


@dataclass(frozen=True)
class Difference:
    """The first artifact in which two runs have other bytes."""

    iteration: int
    stage: str
    file: str
    row: int | None  # of a table
    column: str | None  # of a table; the tensor, of a checkpoint
    place: int | None  # in the row or the tensor, from 0
    a: str
    b: str
    settings: tuple[str, ...]  # `key: a → b` of the recipes
    inputs: tuple[str, ...]  # roles that are other artifacts


def first_difference(a: Run, b: Run) -> Difference | None:
    """None where all that both have is the same, byte for byte."""
    for iteration in sorted({*a.iterations()} & {*b.iterations()}):
        ours, theirs = a.state(iteration).artifacts, b.state(iteration).artifacts
        for stage in [stage for stage in STAGES[a.config.kind] if stage in ours or stage in theirs]:
            if stage not in ours or stage not in theirs:
                return Difference(iteration, stage, "", None, None, None, *(
                    "there" if stage in has else "no such stage" for has in (ours, theirs)), (), ())
            if ours[stage] != theirs[stage] and (found := _difference(a, b, iteration, ours[stage], theirs[stage])):
                return found
    return None


def _difference(a: Run, b: Run, iteration: int, ours: ArtifactRef, theirs: ArtifactRef) -> Difference | None:
    """How the artifacts differ; None where another recipe has led to the same bytes."""
    one, other = a.store.manifest(ours), b.store.manifest(theirs)
    settings = tuple(differences(one.recipe.config, other.recipe.config))
    if one.recipe.seed != other.recipe.seed:
        settings += (f"seed: {one.recipe.seed} → {other.recipe.seed}",)
    inputs = tuple(role for role in sorted({*one.recipe.inputs, *other.recipe.inputs})
                   if one.recipe.inputs.get(role) != other.recipe.inputs.get(role))
    here, there = one.digests(), other.digests()
    for path in sorted({*here, *there}, key=lambda path: (path not in TABLES, path)):
        in_both = path in here and path in there
        if here.get(path) != there.get(path) and not (in_both and _alike(a, b, one, other, path)):
            where = _where(a, b, one, other, path) if in_both else (
                None, None, None, *("there" if path in has else "no such file" for has in (here, there)))
            return Difference(iteration, ours.stage, path, *where, settings, inputs)
    return None


def _alike(a: Run, b: Run, one: Manifest, other: Manifest, path: str) -> bool:
    """Whether a file of both, hashed by SHA-256 in the one and by BLAKE3 in the other, is the same; where it was not kept,
    whether what both stages measured is the same."""
    here, there = _entry(one, path), _entry(other, path)
    if here.algorithm == there.algorithm or here.bytes != there.bytes:
        return False
    try:
        return a.store.sha256(one, here) == b.store.sha256(other, there)
    except DroppedError:
        return all(one.metrics[name] == other.metrics[name] for name in {*one.metrics} & {*other.metrics})


def _where(a: Run, b: Run, one: Manifest, other: Manifest, path: str) -> tuple[Any, ...]:
    """Row, column, place, and what each has there."""
    if path in TABLES:
        return _in_tables(*(run.store.table(manifest.ref, TABLES[path]) for run, manifest in ((a, one), (b, other))))
    if path.endswith(".safetensors"):
        with contextlib.suppress(DroppedError):
            return _in_tensors(*(run.store.file(manifest.ref, path) for run, manifest in ((a, one), (b, other))))
    return None, None, None, *(f"{entry.bytes} bytes, {entry.algorithm} {short_digest(entry.digest)}…"
                               for entry in (_entry(one, path), _entry(other, path)))


def _entry(manifest: Manifest, path: str) -> FileEntry:
    return next(entry for entry in manifest.files if entry.path == path)


def _in_tables(one: Table, other: Table) -> tuple[Any, ...]:
    """The first row in which any column differs, and the first such column."""
    for row in range(min(len(one), len(other))):
        for name in one.schema().names:
            for x, y, more in _cells(name, getattr(one, name), getattr(other, name), row):
                if not _same(x, y):
                    return row, f"{name}{more}", *_in_cell(x, y)
    return min(len(one), len(other)), "row_id", None, f"{len(one)} rows", f"{len(other)} rows"


def _cells(name: str, one: Any, other: Any, row: int) -> Iterator[tuple[Any, Any, str]]:
    if isinstance(one, dict):
        for key in sorted({*one, *other}):
            yield *(has[key][row] if key in has else None for has in (one, other)), f".{key}"
    else:
        yield one[row], other[row], ""


def _same(x: Any, y: Any) -> bool:
    return np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f")


def _in_cell(x: Any, y: Any) -> tuple[int | None, str, str]:
    """The first place in which two cells differ, none if they are single values, and both values."""
    if np.ndim(x) == 0 or np.ndim(y) == 0:
        return None, str(x), str(y)
    short = min(len(x), len(y))
    ours, theirs = (np.asarray(values)[:short] for values in (x, y))
    unlike = (ours != theirs) & ~((ours != ours) & (theirs != theirs))  # NaN is like NaN
    if unlike.any():
        first = int(unlike.reshape(short, -1).any(1).argmax())
        return first, str(x[first]), str(y[first])
    return short, f"{len(x)} long", f"{len(y)} long"


def _in_tensors(one: Path, other: Path) -> tuple[Any, ...]:
    """The first tensor that differs; each is read only when it is its turn."""
    from safetensors import safe_open

    with safe_open(one, "numpy") as ours, safe_open(other, "numpy") as theirs:
        for name in sorted({*ours.keys(), *theirs.keys()}):
            x, y = (has.get_tensor(name) if name in has.keys() else None for has in (ours, theirs))  # noqa: SIM118
            if x is None or y is None or x.shape != y.shape:
                return None, name, None, *("no such tensor" if has is None else str(has.shape) for has in (x, y))
            if not _same(x, y):
                return None, name, *_in_cell(x.reshape(-1), y.reshape(-1))
    return None, None, None, "other bytes", "the same numbers"
