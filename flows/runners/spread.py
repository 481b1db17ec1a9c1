"""How the calls of a run are spread: what is cut into shards, and what is performed elsewhere.

A shard is a call of its own (`StageCall.shards`), whose artifact is found if it was committed before, so that one that is
lost is made again alone. The stage's own call then joins them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from flows.orchestration.work_pools import WorkPool
from flows.runners.processes import Process
from flows.runners.ray_actors import ray_workers
from flows.runners.workers import Workers
from flows.runs.produce import environment
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, Produced, StageCall
from schemas.settings import ExecutionConfig
from schemas.stages import STAGES

log = logging.getLogger("baton")
Perform = Callable[[StageCall], Produced]


@dataclass(frozen=True)
class Spread:
    """What of a run is made in parts, and where."""

    store: Store
    execution: ExecutionConfig
    runner: Perform | None
    """Performs shards; none: this process does."""
    pools: Mapping[str, Perform]
    """Stage → performs it on its work pool."""
    settle: Callable[[], object]
    """Called before others are to read what was made last: returns when it is committed."""
    _said: set[str] = field(default_factory=set)

    def shards(self, call: StageCall) -> tuple[StageCall, ...]:
        """The calls of its shards; none where it is not cut, or its artifact is there."""
        cut = self.execution.shards > 1 and STAGES[call.kind][call.stage].sharded
        return () if not cut or self._found(call.recipe.ref) else call.shards()

    def elsewhere(self, call: StageCall) -> Perform | None:
        """What performs it outside of this process; none: this process does, as what is there or only has to be joined."""
        perform = self.pools.get(call.stage) or (self.runner if call.shard else None)
        if perform is None or call.parts or self._found(call.recipe.ref):
            return None
        self.settle()
        return lambda one: self._compared(perform(one))

    def _found(self, ref: ArtifactRef) -> bool:
        return self.store.find(ref) is not None

    def _compared(self, produced: Produced) -> Produced:
        """Says once what another machine computes with that this one does not: last bits may be others."""
        made, here = self.store.manifest(produced.ref).environment, environment(self.execution)
        other = [f"{name} {there} (here {here.packages.get(name)})" for name, there in made.packages.items()
                 if there != here.packages.get(name)]
        other += [f"Python {made.python} (here {here.python})"] if made.python != here.python else []
        if other and (line := ", ".join(other)) not in self._said:
            self._said.add(line)
            log.warning("%s was made with %s: a rerun here may give other last bits", produced.ref.stage, line)
        return produced


@contextmanager
def spread_of(store: Store, execution: ExecutionConfig, settle: Callable[[], object]) -> Iterator[Spread]:
    """Raises `ConfigError` where a runner or work pool of the settings is not there."""
    names = set(execution.placement.values()) | ({execution.work_pool} if execution.runner == "prefect" else set())
    pools = {name: WorkPool(store, name, execution.worker_timeout) for name in sorted(names)}
    with ExitStack() as resources:
        yield Spread(store, execution, _runner(execution, pools, resources),
                     {stage: pools[name] for stage, name in execution.placement.items()}, settle)


def _runner(execution: ExecutionConfig, pools: Mapping[str, WorkPool], resources: ExitStack) -> Perform | None:
    count = min(execution.workers, execution.shards)
    if execution.shards == 1:
        return None
    match execution.runner:
        case "inline":
            return None
        case "processes":
            workers = Workers([Process() for _ in range(count)])
            resources.callback(workers.close)
            return workers
        case "ray":
            return resources.enter_context(ray_workers(execution, count))
        case "prefect":
            return pools[execution.work_pool]
