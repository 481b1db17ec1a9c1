"""How every artifact comes to be: found if its recipe was committed before, else made in a fresh attempt and committed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from flows.store.attempt import Attempt
from flows.store.digests import algorithm_of_weights
from flows.store.files import disk_errors
from flows.store.store import Store
from flows.store.writer import Writer
from schemas.artifacts import Environment, Manifest, Outputs, Produced, Recipe, StageCall
from schemas.errors import NonFiniteError, StoreError, SupersededError
from schemas.metrics import Metrics
from schemas.records import now, version
from schemas.settings import ExecutionConfig
from schemas.tables import EPISODE_FILM

log = logging.getLogger("baton")
PACKAGES = ("torch", "transformers", "trl", "numpy", "pyarrow", "tokenizers", "safetensors", "prefect", "mlflow",
            "gymnasium")


@dataclass(frozen=True)
class StageOutput:
    """What a stage reports of an artifact that it has just written."""

    metrics: Metrics | None = None
    tokens: int | None = None
    outputs: Outputs = Outputs()


def produce(
    store: Store, call: StageCall, make: Callable[[Attempt], StageOutput], *, again: bool = False, restoring: bool = False,
    writer: Writer | None = None,
) -> Produced:
    """The call's artifact. `make` says what it holds, and is not called if it is committed already.

    `again`: a committed artifact is made again beside itself and the digests are compared; `restoring`: what is missing of
    it is then put back, if they are equal; `writer`: commits it later, where it raises `SupersededError` should another
    process have come first with other bytes.
    """
    there = store.find(call.recipe.ref)
    if there and not again:
        log.debug("found %s", there.ref.short)
        return _produced(there, "found")
    made = compute(store, call.recipe, call.execution, make, call)
    if there:
        made.attempt.algorithm = algorithm_of_weights(there)
        return _compared(store, there, seal(store, made), made.attempt, restoring)
    if writer is not None:
        made.attempt.stop = writer.stop
        store.commit_later(made.attempt, call.recipe, lambda: _commit_ours(store, made), writer)
        return Produced(ref=call.recipe.ref, how="made", outputs=made.output.outputs, metrics=made.metrics,
                        seconds=made.seconds)
    ours, theirs, different = _commit(store, made)
    if theirs.attempt == ours.attempt:
        return _produced(theirs, "made")
    log.warning("%s; it is used", _superseded(theirs, different))
    return _produced(theirs, "adopted", different)


@dataclass(frozen=True)
class Made:
    """What was computed, of which nothing need be written yet."""

    recipe: Recipe
    call: StageCall | None
    attempt: Attempt
    output: StageOutput
    metrics: dict[str, float]
    environment: Environment
    seconds: float


def write(store: Store, recipe: Recipe, execution: ExecutionConfig, make: Callable[[Attempt], StageOutput]) -> Manifest:
    """A sealed attempt at an input, not committed; nothing is left behind if that fails."""
    return seal(store, compute(store, recipe, execution, make))


def compute(
    store: Store, recipe: Recipe, execution: ExecutionConfig, make: Callable[[Attempt], StageOutput],
    call: StageCall | None = None,
) -> Made:
    """What `make` gives an attempt, and what is known of it before it is written."""
    started, attempt = time.perf_counter(), store.attempt(recipe)
    with _nothing_left(store, attempt):
        output = make(attempt)
        metrics = _finite(recipe, output.metrics.flat() if output.metrics else {})
    attempt.weights_kept = call is None or call.snapshot
    return Made(recipe, call, attempt, output, metrics, environment(execution), time.perf_counter() - started)


def seal(store: Store, made: Made) -> Manifest:
    """Writes it; its manifest, not committed. Nothing is left behind if that fails."""
    recipe, call, started = made.recipe, made.call, time.perf_counter()
    with _nothing_left(store, made.attempt):
        files = made.attempt.seal()
        return Manifest(
            identity=recipe.ref.identity, recipe=recipe, attempt=made.attempt.name, files=files,
            unwritten=made.attempt.unwritten, tokens=made.output.tokens,
            input_contents={role: store.manifest(ref).content for role, ref in recipe.inputs.items()},
            metrics=made.metrics, outputs=made.output.outputs, kind=call and call.kind,
            iteration=None if call is None else call.iteration, folders=call.folders if call else {},
            environment=made.environment, created=now(), seconds=made.seconds + time.perf_counter() - started)


@contextlib.contextmanager
def _nothing_left(store: Store, attempt: Attempt) -> Iterator[None]:
    """Discards the attempt where that fails."""
    try:
        with disk_errors(store.uri, store.files.beside):
            yield
    except BaseException:
        with contextlib.suppress(OSError, StoreError):  # of a disk that is the reason why we are here
            store.discard(attempt)
        raise


def _finite(recipe: Recipe, metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"the metric {recipe.stage}/{name} is {value}")
    return metrics


def _commit(store: Store, made: Made) -> tuple[Manifest, Manifest, dict[str, tuple[str | None, str | None]]]:
    """Our manifest, the one that is the artifact's now, and in which files they differ."""
    there = store.committed(made.recipe.ref)
    if there and there.attempt == made.attempt.name:  # a try before this one, whose reply was lost
        return there, there, {}
    if there:  # not if an older version commits while ours is sealed: then its bytes count as other ones
        made.attempt.algorithm = algorithm_of_weights(there)
    ours = seal(store, made)
    try:
        theirs = store.commit(ours, made.attempt.tables)
    except BaseException:
        with contextlib.suppress(OSError, StoreError):
            if store.committed(ours.ref) is None:  # another writer's, or ours after all
                store.discard(made.attempt)
        raise
    return ours, theirs, differing(theirs, ours)


def _commit_ours(store: Store, made: Made) -> Manifest:
    """As `_commit`, of what this process has gone on with. Raises `SupersededError` if another's is the artifact now."""
    _, theirs, different = _commit(store, made)
    if different:
        raise SupersededError(_superseded(theirs, different))
    return theirs


def _superseded(theirs: Manifest, different: dict) -> str:
    how = "OTHER BYTES than ours" if different else "the same bytes"
    return f"{theirs.ref.short} was committed by another writer meanwhile, with {how}"


def _produced(manifest: Manifest, how: str, different: dict | None = None, folder: str | None = None) -> Produced:
    files = len(set(manifest.digests()) - {EPISODE_FILM})
    return Produced(ref=manifest.ref, how=how, outputs=manifest.outputs, metrics=manifest.metrics, seconds=manifest.seconds,
                    files=files, different=different or {}, folder=folder)


def _compared(store: Store, there: Manifest, again: Manifest, attempt: Attempt, restoring: bool) -> Produced:
    different = differing(there, again)
    if different and attempt.weights_kept and not restoring:  # to be looked at
        return _produced(there, "different", different, str(attempt.folder))
    if restoring and not different:
        store.restore(there, attempt)
    store.discard(attempt)
    return _produced(there, "different" if different else "reproduced", different)


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
        packages={"baton": version()} | {package: _version(package) for package in PACKAGES},
        python=platform.python_version(),
        device=device.name, device_name=device.description, threads=execution.threads or 0,
        execution=execution.model_dump(mode="json") | {"device": device.name})


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)
