"""`baton diff`: where two runs part, the first iteration, stage, row and column; and the setting or input it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flows.chains import chain
from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, FileEntry, Manifest
from schemas.config import differences
from schemas.tables import TABLES, Table


@dataclass(frozen=True)
class Parting:
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


def first_parting(a: Run, b: Run) -> Parting | None:
    """None where all that both have is the same, byte for byte."""
    for iteration in sorted({*a.iterations()} & {*b.iterations()}):
        ours, theirs = a.state(iteration).artifacts, b.state(iteration).artifacts
        for stage in [stage for stage in chain(a).STAGES if stage in ours or stage in theirs]:
            if stage not in ours or stage not in theirs:
                return Parting(iteration, stage, "", None, None, None, *(
                    "there" if stage in has else "no such stage" for has in (ours, theirs)), (), ())
            if ours[stage] != theirs[stage] and (found := _parted(a, b, iteration, ours[stage], theirs[stage])):
                return found
    return None


def _parted(a: Run, b: Run, iteration: int, ours: ArtifactRef, theirs: ArtifactRef) -> Parting | None:
    """How the artifacts differ; None where another recipe has led to the same bytes."""
    one, other = a.store.manifest(ours), b.store.manifest(theirs)
    settings = tuple(differences(one.recipe.config, other.recipe.config))
    if one.recipe.seed != other.recipe.seed:
        settings += (f"seed: {one.recipe.seed} → {other.recipe.seed}",)
    inputs = tuple(role for role in sorted({*one.recipe.inputs, *other.recipe.inputs})
                   if one.recipe.inputs.get(role) != other.recipe.inputs.get(role))
    here, there = one.digests(), other.digests()
    for path in sorted({*here, *there}, key=lambda path: (path not in TABLES, path)):
        if here.get(path) != there.get(path):
            where = _where(a, b, one, other, path) if path in here and path in there else (
                None, None, None, *("there" if path in has else "no such file" for has in (here, there)))
            return Parting(iteration, ours.stage, path, *where, settings, inputs)
    return None


def _where(a: Run, b: Run, one: Manifest, other: Manifest, path: str) -> tuple[Any, ...]:
    """Row, column, place, and what each has there."""
    if path in TABLES:
        return _in_tables(*(run.store.table(manifest.ref, TABLES[path]) for run, manifest in ((a, one), (b, other))))
    if path.endswith(".safetensors"):
        return _in_tensors(*(run.store.file(manifest.ref, path) for run, manifest in ((a, one), (b, other))))
    return None, None, None, *(f"{_entry(manifest, path).bytes} bytes, sha256 {_entry(manifest, path).sha256[:12]}…"
                               for manifest in (one, other))


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
    unlike = np.flatnonzero([not _same(p, q) for p, q in zip(x[:short], y[:short], strict=True)])
    if len(unlike):
        return int(unlike[0]), str(x[unlike[0]]), str(y[unlike[0]])
    return short, f"{len(x)} long", f"{len(y)} long"


def _in_tensors(one: Any, other: Any) -> tuple[Any, ...]:
    from safetensors.numpy import load_file

    ours, theirs = load_file(one), load_file(other)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            return None, name, None, *(str(has[name].shape) if name in has else "no such tensor" for has in (ours, theirs))
        if not _same(ours[name], theirs[name]):
            return None, name, *_in_cell(ours[name].reshape(-1), theirs[name].reshape(-1))
    return None, None, None, "other bytes", "the same numbers"
