"""What a task is given to do a stage: its call, read and checked, and the attempt that it writes to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from flows.runs.functions import stored_function
from flows.runs.inputs import stored_rows
from flows.runs.produce import StageOutput
from flows.runs.rows import Rows
from flows.store.attempt import Attempt
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, ModelRef, Moments, StageCall
from schemas.errors import ConfigError
from schemas.records import first_finding
from schemas.settings import Settings
from schemas.tables import Table

log = logging.getLogger("baton")
S = TypeVar("S", bound=Settings)
T = TypeVar("T", bound=Table)
W = TypeVar("W")  # what a process keeps warm


@dataclass(frozen=True)
class Work(Generic[W]):
    """One call, with the store it is about and the models this process has in memory."""

    call: StageCall
    store: Store
    warm: W
    attempt: Attempt

    def settings(self, kind: type[S], section: str | None = None) -> S:
        """The call's settings that are of that class; those below `section`, if one is named. Raises `ConfigError`."""
        values = self.call.settings if section is None else self.setting(section)
        try:
            return kind.model_validate({name: value for name, value in values.items() if name in kind.model_fields})
        except ValidationError as error:
            raise self._unusable(f"settings: {first_finding(error)}") from None

    def setting(self, name: str) -> Any:
        """One of the settings. Raises `ConfigError` if the call has none of that name."""
        if name not in self.call.settings:
            raise self._unusable(f"settings.{name}: missing")
        return self.call.settings[name]

    @property
    def moments(self) -> Moments:
        """Running moments before this call; those of nothing where they are not kept."""
        return Moments.model_validate(self.call.settings.get("moments", {}))

    def ref(self, role: str) -> ArtifactRef:
        """An artifact that is read. Raises `ConfigError` if the call has none in that role."""
        if role not in self.call.inputs:
            raise self._unusable(f"inputs.{role}: missing")
        found = self.call.inputs[role]
        return found.artifact if isinstance(found, ModelRef) else found

    def ref_if_given(self, role: str) -> ArtifactRef | None:
        """The same, none if the call has none in that role."""
        return self.ref(role) if role in self.call.inputs else None

    def model(self, role: str) -> ModelRef:
        """A model that is read. Raises `ConfigError` if the call has none in that role."""
        if not isinstance(found := self.call.inputs.get(role), ModelRef):
            raise self._unusable(f"inputs.{role}: " + ("expected a model's artifact and folder" if found else "missing"))
        return found

    def model_if_given(self, role: str) -> ModelRef | None:
        """The same, none if the call has none in that role."""
        return self.model(role) if role in self.call.inputs else None

    def made_with(self, role: str) -> dict[str, Any]:
        """The settings that an artifact which is read was made with."""
        return self.store.recipe(self.ref(role)).config

    def table(self, role: str, kind: type[T]) -> T:
        """A table that is read."""
        return self.store.table(self.ref(role), kind)

    def table_if_given(self, role: str, kind: type[T]) -> T | None:
        """The same, none if the call has none in that role."""
        return self.table(role, kind) if role in self.call.inputs else None

    def table_beside(self, role: str, kind: type[T]) -> T | None:
        """Another table of the artifact in that role, none if it has none."""
        return self.table(role, kind) if self.store.has_table(self.ref(role), kind) else None

    def rows(self, role: str) -> Rows:
        """The rows of an imported file."""
        return stored_rows(self.store, self.ref(role))

    def function(self, role: str, source: str) -> Callable[..., Any]:
        """A user's function."""
        return stored_function(self.store, self.ref(role), source)

    def in_parts(
        self, count: int, part: Callable[[slice], tuple[Table | None, ...]], kinds: tuple[type[Table], ...], unit: int = 1
    ) -> list[Any]:
        """Tables of `count` rows, one a kind: of the call's shard alone; or joined from those of all shards, which were made
        before (`parts`) or are made here, one after the other, to the same bytes.

        `part`: rows → their tables, none where the stage gives none of that kind; `unit`: rows that stay together.
        """
        if self.call.parts:
            made = [tuple(self.store.table(ref, kind) if self.store.has_table(ref, kind) else None for kind in kinds)
                    for ref in self.call.parts]
        else:
            shards = [self.call.shard] if self.call.shard else [call.shard for call in self.call.shards()]
            slices = [shard.rows(count, unit) for shard in shards]
            if any(rows.start == rows.stop for rows in slices):
                raise ConfigError(f"execution.shards={self.call.execution.shards}: {self.call.stage} has {count // unit} "
                                  "rows that can be parted; take at most as many")
            made = [part(rows) for rows in slices]
        if len(made) == 1:
            return list(made[0])
        return [None if some[0] is None else kind.joined(some)
                for kind, some in zip(kinds, zip(*made, strict=True), strict=True)]

    def warn(self, lines: Iterable[str]) -> None:
        """Says them of this stage."""
        for line in lines:
            log.warning("%s of iteration %d: %s", self.call.stage, self.call.iteration, line)

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(f"call of {self.call.stage}: {reason}; baton stage {self.call.stage} RUN --iteration I "
                           "--print-call writes one that is whole")


Task = Callable[[Work], StageOutput]
