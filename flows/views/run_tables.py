"""Which tables runs have, and where each lies: by view, the name of a table's file, and iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, Manifest, TrainState
from schemas.stages import STAGES, Kind, Stage
from schemas.tables import Rewards, Table

OF_DEMONSTRATIONS = "demonstration_rewards"
"""The view of what `reward_bias` writes, which is no iteration's rewards."""
INPUTS = ("prompts", "heldout_prompts", "demonstrations", "pairs", "heldout_pairs")
"""Views of imported data, by role."""


def views(kind: Kind) -> dict[str, type[Table]]:
    """View → the table that a run of that kind may have there."""
    return {_view(stage, table): table for stage in STAGES[kind].values() for table in _tables(stage)}


@dataclass(frozen=True)
class Part:
    """A table of one iteration."""

    run: Run
    iteration: int
    manifest: Manifest
    file: str

    @property
    def ref(self) -> ArtifactRef:
        return self.manifest.ref

    @property
    def path(self) -> Path:
        """Its file, size and digest checked. Raises `StoreError`."""
        return self.run.store.file(self.ref, self.file)

    @property
    def columns(self) -> dict[str, str]:
        """Name → type."""
        return next(entry.columns or {} for entry in self.manifest.files if entry.path == self.file)


def parts(run: Run, view: str, states: list[TrainState]) -> Iterator[Part]:
    """A view's tables, in order of iterations. Where `resample` has made a batch anew, its own. Without those that are
    not in the store (`lacking.py`)."""
    stages = [stage for stage in STAGES[run.config.kind].values()
              if any(_view(stage, table) == view for table in _tables(stage))]
    for state in states:
        for stage in reversed(stages):
            ref = state.artifacts.get(stage.name)
            if ref is None:
                continue
            manifest, file = run.store.find(ref), f"{_file(view)}.parquet"
            if manifest is not None and file in manifest.digests():
                yield Part(run, state.iteration, manifest, file)
                break


def input_file(run: Run, role: str) -> Path | None:
    """A role's imported rows, if the run has some: Parquet, or JSON lines in stores before format 5."""
    ref = run.inputs.get(role)
    return ref and run.store.file(ref, run.store.manifest(ref).files[0].path)


def gae_settings(manifest: Manifest) -> dict[str, Any]:
    """What of `gae` decides δ: γ, and whether the value after a cut response counts."""
    settings = manifest.recipe.config
    return {"gamma": float(settings["gamma"]), "bootstraps": settings["truncation"] == "bootstrap"}


def _tables(stage: Stage) -> tuple[type[Table], ...]:
    return (*([stage.table] if stage.table else []), *stage.beside)


def _view(stage: Stage, table: type[Table]) -> str:
    return OF_DEMONSTRATIONS if stage.name == "reward_bias" else table.file.removesuffix(".parquet")


def _file(view: str) -> str:
    return Rewards.file.removesuffix(".parquet") if view == OF_DEMONSTRATIONS else view


ALL_VIEWS: dict[str, type[Table]] = {name: table for kind in STAGES for name, table in views(kind).items()}
