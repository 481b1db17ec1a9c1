"""`execution.runner: ray`: workers that are actors of a Ray cluster, one of this machine or that at `ray_address`.

Ray's own retries are off: a call that is lost is tried again as a stage's task is, and what was committed is found.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flows.runners.performer import Outcome, Performer
from flows.runners.workers import Workers, part_of
from schemas.artifacts import Produced, StageCall
from schemas.errors import ConfigError, StoppedError, TransientError
from schemas.settings import ExecutionConfig
from stages.ops.progress import pause

log = logging.getLogger("baton")
ANSWERS = 10.0  # seconds that an address may take
STORE_BYTES = 100 << 20  # Ray's memory for objects: a call and its outcome are some kilobytes
PATIENCE = 30.0  # seconds after which it is said that an actor has no place yet


@contextmanager
def ray_workers(execution: ExecutionConfig, count: int) -> Iterator[Workers]:
    """Raises `ConfigError` if ray is not installed or the address does not answer."""
    ray = _connected(execution, count)
    workers = Workers([Actor(ray, execution) for _ in range(count)])
    try:
        yield workers
    finally:
        workers.close()
        ray.shutdown()


class Actor:
    """One of them, begun with its first call. One that ends, killed or with its machine, costs the call that it was at;
    another takes its place."""

    def __init__(self, ray: Any, execution: ExecutionConfig) -> None:
        self._ray, self._needs = ray, needs(execution)
        self._handle: Any = None
        self._ended = False

    def perform(self, call: StageCall) -> Produced:
        """As `Worker.perform`."""
        if self._ended:
            raise StoppedError(f"{call.stage}: not begun")
        ray = self._ray
        if self._handle is None:
            options = self._needs | {"scheduling_strategy": "SPREAD", "max_restarts": 0, "max_task_retries": 0}
            self._handle = ray.remote(**options)(Performer).remote()
        try:
            return Outcome.model_validate_json(self._waited(call)).result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:  # of the actor, its machine or the cluster
            self._handle = None
            said = " ".join(str(error).split())
            raise TransientError(f"{part_of(call)}: the Ray actor that made it has ended; it is made again ({said[:200]})"
                                 ) from None

    def _waited(self, call: StageCall) -> str:
        """What the actor answers. Raises `StoppedError` once the event of `interrupted_by` is set."""
        began, said = time.monotonic(), False
        answer, placed = self._handle.perform.remote(call.model_dump_json()), self._handle.__ray_ready__.remote()
        while not self._ray.wait([answer], timeout=0.2)[0]:
            pause(0, call.stage)
            if not said and time.monotonic() - began >= PATIENCE:
                said = True
                if not self._ray.wait([placed], timeout=0)[0]:
                    wanted = ", ".join(f"{amount:g} {name.removeprefix('num_')}" for name, amount in self._needs.items())
                    there = self._ray.cluster_resources()
                    log.warning("%s waits for a place in the Ray cluster: a worker needs %s, and there are %g CPUs and %g "
                                "GPUs, other workers' included", part_of(call), wanted, there.get("CPU", 0),
                                there.get("GPU", 0))
        return self._ray.get(answer)

    def end(self) -> None:
        """As `Worker.end`."""
        self._ended = True
        if self._handle is not None:
            self._ray.kill(self._handle)
            self._handle = None


def needs(execution: ExecutionConfig) -> dict[str, float]:
    """What a worker takes of a machine, as Ray counts it."""
    return {"num_cpus": execution.threads or 1, "num_gpus": 1 if execution.device == "cuda" else 0}


def _connected(execution: ExecutionConfig, count: int) -> Any:
    """The package, connected: to the cluster at the address, else to one of this machine that ends with this process."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError("execution.runner=ray: ray is not installed; pip install 'baton[ray]' here and on all machines "
                          "of the cluster") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = execution.ray_address
    if address is None:
        local = needs(execution)
        where = {"num_cpus": int(count * local["num_cpus"]), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        _require_answer(address)
        where = {"address": address}
    with _signals_kept():
        try:
            ray.init(**where, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"execution.ray_address={address}: {' '.join(str(error).split())}") from None
    return ray


def _require_answer(address: str) -> None:
    """Raises `ConfigError` if nothing listens there; Ray itself would try for a minute."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)", address)
    if not found:
        raise ConfigError(f"execution.ray_address={address!r}: expected HOST:PORT, as ray start --head prints it")
    try:
        socket.create_connection((found["host"], int(found["port"])), ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"execution.ray_address={address}: no Ray cluster answers there ({error}); start one with ray "
                          "start --head, or leave it out for one of this machine") from None


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Inside it Ray may set its handler of SIGTERM; then it is again what it was."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
