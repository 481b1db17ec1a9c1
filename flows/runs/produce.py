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
from functools import cache

from flows.store.files import disk_errors
from flows.store.store import Attempt, Store
from schemas.artifacts import Environment, Manifest, Outputs, Produced, Recipe, StageCall
from schemas.errors import NonFiniteError, StoreError
from schemas.metrics import Metrics
from schemas.records import now
from schemas.settings import ExecutionConfig
from schemas.tables import EPISODE_FILM

log = logging.getLogger("baton")
PACKAGES = ("baton", "torch", "transformers", "trl", "numpy", "pyarrow", "tokenizers", "safetensors", "prefect", "mlflow",
            "gymnasium")


@dataclass(frozen=True)
class StageOutput:
    """What a stage reports of an artifact that it has just written."""

    metrics: Metrics | None = None
    tokens: int | None = None
    outputs: Outputs = Outputs()


def produce(store: Store, call: StageCall, make: Callable[[Attempt], StageOutput], *, again: bool = False) -> Produced:
    """The call's artifact. `make` writes it into an attempt, and is not called if it is committed already.

    `again`: a committed artifact is made again beside itself and the digests are compared.
    """
    there = store.find(call.recipe.ref)
    if there and not again:
        log.debug("found %s", there.ref.short)
        return _produced(there, "found")
    attempt, ours = write(store, call.recipe, call.execution, make, call)
    if there:
        return _compared(store, there, ours, attempt)
    theirs = _commit(store, ours, attempt)
    if theirs.attempt == ours.attempt:
        return _produced(theirs, "made")
    different = differing(theirs, ours)
    log.warning("%s was committed by another writer meanwhile, with %s; it is used", theirs.ref.short,
                "OTHER BYTES than ours" if different else "the same bytes")
    return _produced(theirs, "adopted", different)


def write(
    store: Store, recipe: Recipe, execution: ExecutionConfig, make: Callable[[Attempt], StageOutput],
    call: StageCall | None = None,
) -> tuple[Attempt, Manifest]:
    """A sealed attempt and its manifest, not committed; nothing is left behind if that fails. `call`: none for an input."""
    attempt, started = store.attempt(recipe), time.perf_counter()
    try:
        with disk_errors(store.uri, attempt.folder.parent):
            made = make(attempt)
            files = attempt.seal()
        metrics = _finite(recipe, made.metrics.flat() if made.metrics else {})
        return attempt, Manifest(
            identity=recipe.ref.identity, recipe=recipe, attempt=attempt.name, files=files, tokens=made.tokens,
            input_contents={role: store.manifest(ref).content for role, ref in recipe.inputs.items()}, metrics=metrics,
            outputs=made.outputs, kind=call and call.kind, iteration=None if call is None else call.iteration,
            folders=call.folders if call else {}, environment=environment(execution), created=now(),
            seconds=time.perf_counter() - started)
    except BaseException:
        with contextlib.suppress(OSError, StoreError):  # of a disk that is the reason why we are here
            store.discard(attempt)
        raise


def _finite(recipe: Recipe, metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"the metric {recipe.stage}/{name} is {value}")
    return metrics


def _commit(store: Store, ours: Manifest, attempt: Attempt) -> Manifest:
    """The manifest that is the artifact's now."""
    try:
        return store.commit(ours, attempt.tables)
    except BaseException:
        with contextlib.suppress(OSError, StoreError):
            if store.find(ours.ref) is None:  # another writer's, or ours after all
                store.discard(attempt)
        raise


def _produced(manifest: Manifest, how: str, different: dict | None = None, folder: str | None = None) -> Produced:
    files = len(set(manifest.digests()) - {EPISODE_FILM})
    return Produced(ref=manifest.ref, how=how, outputs=manifest.outputs, metrics=manifest.metrics, seconds=manifest.seconds,
                    files=files, different=different or {}, folder=folder)


def _compared(store: Store, there: Manifest, again: Manifest, attempt: Attempt) -> Produced:
    different = differing(there, again)
    if different:
        return _produced(there, "different", different, str(attempt.folder))
    store.discard(attempt)
    return _produced(there, "reproduced")


def differing(committed: Manifest, ours: Manifest) -> dict[str, tuple[str | None, str | None]]:
    """Path → (committed digest, our digest) of the files in which they differ, the film aside."""
    old, new = committed.digests(), ours.digests()
    paths = sorted({*old, *new} - {EPISODE_FILM})  # drawn by whatever a machine draws with, or by nothing
    return {path: (old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)}


def environment(execution: ExecutionConfig) -> Environment:
    """What this process makes artifacts with."""
    from stages.ops.device import Device  # torch: not before something is made

    device = Device(execution.device)
    return Environment(
        packages={package: _version(package) for package in PACKAGES}, python=platform.python_version(),
        device=device.name, device_name=device.description, threads=execution.threads or 0,
        execution=execution.model_dump(mode="json") | {"device": device.name})


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)
