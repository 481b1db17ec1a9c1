"""How every artifact comes to be: found if its recipe was committed before, else made in a fresh attempt and committed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flows.store.files import explained
from flows.store.store import Attempt, Store
from schemas.artifacts import ArtifactRef, Environment, Manifest, Recipe
from schemas.errors import NonFiniteError, StoreError
from schemas.metrics import Metrics
from schemas.settings import RunConfig
from schemas.tables import EPISODE_FILM

if TYPE_CHECKING:
    from flows.runs.run import Run

log = logging.getLogger("baton")
PACKAGES = ("baton", "torch", "transformers", "trl", "numpy", "pyarrow", "tokenizers", "safetensors", "prefect", "mlflow",
            "gymnasium")


@dataclass(frozen=True)
class Made:
    """What a stage says of an artifact that it has just written."""

    metrics: Metrics | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Reproduction:
    """A stage computed again next to its committed artifact: path → (committed digest, new digest) where they differ."""

    ref: ArtifactRef
    files: int
    different: dict[str, tuple[str | None, str | None]]
    folder: Path | None  # the new files, kept only where they differ


def produce(run: Run, recipe: Recipe, make: Callable[[Attempt], Made]) -> ArtifactRef:
    """The recipe's artifact. `make` writes it into an attempt, and is not called if it is committed already.

    In a rerun of its stage a committed artifact is made again beside itself and the digests are compared.
    """
    found = run.store.find(recipe.ref)
    if found and run.rerun != recipe.stage:
        log.debug("found %s", recipe.ref.short)
        run.found.append(recipe.ref)
        return recipe.ref
    _use_threads(run.config)
    attempt, manifest = write(run.store, run.config, recipe, make)
    if found:
        run.reproduction = _compare(run.store, found, manifest, attempt)
    else:
        _commit(run, manifest, attempt)
    return recipe.ref


def _use_threads(config: RunConfig) -> None:
    """Before anything is computed, new weights included: the last bits of a matrix product or a QR depend on it."""
    import torch

    torch.set_num_threads(config.execution.threads)


def write(store: Store, config: RunConfig, recipe: Recipe, make: Callable[[Attempt], Made]) -> tuple[Attempt, Manifest]:
    """A sealed attempt and its manifest, not committed; nothing is left behind if that fails."""
    attempt, started = store.attempt(recipe), time.perf_counter()
    try:
        with explained(store.uri, attempt.folder.parent):
            made = make(attempt)
            files = attempt.seal()
        metrics = _finite(recipe, made.metrics.flat() if made.metrics else {})
        return attempt, Manifest(
            identity=recipe.ref.identity, recipe=recipe, attempt=attempt.name, files=files, tokens=made.tokens,
            input_contents={role: store.manifest(ref).content for role, ref in recipe.inputs.items()}, metrics=metrics,
            environment=environment(config), created=now(), seconds=time.perf_counter() - started)
    except BaseException:
        with contextlib.suppress(OSError, StoreError):  # of a disk that is the reason why we are here
            store.discard(attempt)
        raise


def _finite(recipe: Recipe, metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"the metric {recipe.stage}/{name} is {value}; nothing was committed")
    return metrics


def _commit(run: Run, ours: Manifest, attempt: Attempt) -> None:
    try:
        theirs = run.store.commit(ours, attempt.tables)
    except BaseException:
        with contextlib.suppress(OSError, StoreError):
            if run.store.find(ours.ref) is None:  # or somebody else's, or ours after all
                run.store.discard(attempt)
        raise
    if theirs.attempt == ours.attempt:
        return
    same = theirs.digests() == ours.digests()
    log.warning("%s was committed by another writer meanwhile, with %s; it is used", theirs.ref.short,
                "the same bytes" if same else "OTHER BYTES than ours")
    if not same:
        run.models.forget(theirs.ref)


def _compare(store: Store, found: Manifest, again: Manifest, attempt: Attempt) -> Reproduction:
    old, new = found.digests(), again.digests()
    paths = sorted({*old, *new} - {EPISODE_FILM})  # drawn by whatever a machine draws with, or by nothing
    different = {path: (old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)}
    if not different:
        store.discard(attempt)
    return Reproduction(found.ref, len(paths), different, attempt.folder if different else None)


def environment(config: RunConfig) -> Environment:
    """What this process makes artifacts with."""
    execution = config.execution
    return Environment(
        packages={package: _version(package) for package in PACKAGES}, python=platform.python_version(),
        device=execution.device, device_name=_device_name(execution.device), threads=execution.threads or 0,
        execution=execution.model_dump(mode="json"))


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return platform.machine()
    import torch
    return torch.cuda.get_device_name(device)


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
