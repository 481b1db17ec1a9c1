"""`baton train --dry-run`: what a run would find and make, and what that would cost; nothing is written.

A stage's identity is that of its recipe, which names what it reads by identity: so a whole chain is known before anything
of it is computed, as far as no number that it will measure goes on into the next recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from flows.chains import chain_of, check_inputs
from flows.runs.run import Run
from flows.runs.start import Request, preview
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, Manifest, Moments, Outputs, Produced, Recipe, StageCall, TrainState
from schemas.tables import Table

BYTES_A_PARAMETER = 12
"""Of a network and its AdamW in float32: the weights and two moments."""


@dataclass(frozen=True)
class Step:
    """A stage of an iteration, and what is committed of it."""

    iteration: int
    stage: str
    ref: ArtifactRef
    made: Manifest | None


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    run: Run
    there: bool
    """Whether the run is there."""
    inputs: dict[str, tuple[ArtifactRef, bool]]
    """Role → its artifact, and whether it is in the store."""
    steps: list[Step]
    """Of all iterations that are found whole, and of the first one that is not."""
    done: int | None
    """The last iteration that is found whole; none if not even the start is."""
    free: int | None
    """Bytes that the store's disk has left, if it is a disk."""

    @property
    def iterations(self) -> int:
        return self.run.config.iterations

    @property
    def to_make(self) -> int:
        """Iterations, beside what is prepared."""
        return max(0, self.iterations - (self.done or 0))

    @property
    def evaluations(self) -> int:
        """Of the iterations that are to be made."""
        return sum(self.run.config.evaluation_due(i, self.iterations) for i in self._coming)

    @property
    def snapshots(self) -> int:
        """Checkpoints whose weights would be written."""
        return sum(self.run.config.snapshot_due(i) for i in self._coming)

    @property
    def _coming(self) -> range:
        return range((self.done or 0) + 1, self.iterations + 1)

    @property
    def seconds(self) -> float | None:
        """Of an iteration, by those that are found."""
        state = self.run.last() if self.there else None
        if state is not None and state.iteration > 0:
            return state.seconds
        found = [step.made.seconds for step in self.steps if step.made and step.iteration == self.done]
        return sum(found) if found and self.done else None

    @property
    def snapshot_bytes(self) -> int | None:
        """Of a checkpoint, by one that is found, else by the parameters of actor and critic where they are known."""
        if (made := self._of_last("ppo")) is not None:
            return sum(entry.bytes for entry in made.files)
        parameters = self._parameters()
        if parameters is None or getattr(self.run.config, "lora", None) is not None:
            return None
        return parameters * BYTES_A_PARAMETER * (2 if getattr(self.run.config, "value", None) else 1)

    def _of_last(self, stage: str) -> Manifest | None:
        """Of the last iteration that is there, what that stage made."""
        state = self.run.last() if self.there else None
        if state is not None and stage in state.artifacts:
            return self.run.store.manifest(state.artifacts[stage])
        return next((step.made for step in reversed(self.steps) if step.stage == stage and step.made), None)

    def _parameters(self) -> int | None:
        """Of the base model."""
        first = self.run.state_if_reached(0) if self.there else None
        base = next((step.made for step in self.steps if step.stage == "base_model" and step.made), None)
        if first is not None and "base_model" in first.artifacts:
            base = self.run.store.manifest(first.artifacts["base_model"])
        brought, there = self.inputs.get("base_model", (None, False))
        if base is None and brought and there:
            base = self.run.store.manifest(brought)
        return int(base.metrics["parameters"]) if base and "parameters" in base.metrics else None


class _Foreseen(Store):
    """A store that knows the recipes of what is not made yet."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.recipes: dict[ArtifactRef, Recipe] = {}

    def recipe(self, ref: ArtifactRef) -> Recipe:
        return self.recipes.get(ref) or super().recipe(ref)

    def has_table(self, ref: ArtifactRef, kind: type[Table]) -> bool:
        return self.find(ref) is not None and super().has_table(ref, kind)


@dataclass
class _Looked:
    """Performs nothing: a call whose artifact is not committed has what the next calls need of it stood in for."""

    store: Store
    foreseen: _Foreseen
    steps: list[Step] = field(default_factory=list)
    unknown: bool = False
    """Whether the next recipes have a number that is not known yet."""

    def __call__(self, *calls: StageCall) -> dict[str, Produced]:
        return {call.stage: self._looked_up(call) for call in calls}

    def _looked_up(self, call: StageCall) -> Produced:
        made = None if self.unknown else self.store.find(call.recipe.ref)
        self.unknown |= made is None and call.stage == "reward_bias"  # whose number goes on into recipes
        self.foreseen.recipes[call.recipe.ref] = call.recipe
        self.steps.append(Step(call.iteration, call.stage, call.recipe.ref, made))
        outputs = made.outputs if made else Outputs(kl=0.0, bias=0.0, moments=Moments())
        return Produced(ref=call.recipe.ref, how="found" if made else "made", outputs=outputs,
                        metrics=made.metrics if made else {}, seconds=made.seconds if made else 0.0)


def plan(request: Request) -> Plan:
    """Raises `ConfigError` for what `start` would refuse."""
    with TemporaryDirectory() as scratch:
        run, there = preview(request, check_inputs, _Foreseen(scratch))
        store = Store(request.store)
        if there:
            run = replace(run, store=_Foreseen(request.store))
        steps, done = _look(run, store, run.last() if there else None)
        inputs = {role: (ref, store.find(ref) is not None) for role, ref in run.inputs.items()}
    return Plan(replace(run, store=store), there, inputs, steps, done, _free(store))


def _look(run: Run, store: Store, last: TrainState | None) -> tuple[list[Step], int | None]:
    """The steps from the last state on, or from the beginning, to the first iteration of which something is to be made; and
    the last iteration that is found whole."""
    chain, looked, done = chain_of(run), _Looked(store, run.store), None
    state = last or chain.prepare(looked)
    while all(step.made for step in looked.steps):
        done = state.iteration
        if done >= run.config.iterations:
            break
        due = run.config.evaluation_due(done + 1, run.config.iterations)
        state = chain.iteration(state, looked, due)
    return looked.steps, done


def _free(store: Store) -> int | None:
    """Of the folder, or of the nearest one above it that is there."""
    if "://" in store.uri:
        return None
    place = Path(store.absolute)
    while not place.exists():
        place = place.parent
    return psutil.disk_usage(str(place)).free
