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
from schemas.errors import ConfigError, StoppedError, TransientError, installed_by
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
    wanted = needs(execution, ray.cluster_resources().get("GPU", 0) > 0)
    places = sum(_places(node["Resources"], wanted) for node in ray.nodes() if node["Alive"])
    if not places:
        raise ConfigError(f"execution.runner=ray: no machine of the cluster has {_in_words(wanted)}, which a worker needs; "
                          "set execution.threads and execution.device to what there is")
    if places < count:
        log.warning("the Ray cluster has room for %d of %d workers, which need %s each", places, count, _in_words(wanted))
    workers = Workers([Actor(ray, wanted) for _ in range(min(count, places))])
    try:
        yield workers
    finally:
        workers.close()
        ray.shutdown()


class Actor:
    """One of them, begun with its first call. One that ends, killed or with its machine, costs the call that it was at;
    another takes its place."""

    def __init__(self, ray: Any, needs: dict[str, float]) -> None:
        self._ray, self._needs = ray, needs
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
                    log.warning("%s waits for a place in the Ray cluster: a worker needs %s, which others have",
                                part_of(call), _in_words(self._needs))
        return self._ray.get(answer)

    def end(self) -> None:
        """As `Worker.end`."""
        self._ended = True
        if self._handle is not None:
            self._ray.kill(self._handle)
            self._handle = None


def needs(execution: ExecutionConfig, gpus: bool) -> dict[str, float]:
    """What a worker takes of a machine, as Ray counts it. `gpus`: whether the cluster has any."""
    gpu = execution.device == "cuda" or (execution.device == "auto" and gpus)
    return {"num_cpus": execution.threads or 1, "num_gpus": int(gpu)}


def _places(resources: dict[str, float], wanted: dict[str, float]) -> int:
    """How many workers a machine has room for."""
    there = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    return int(min(there[name] // amount for name, amount in wanted.items() if amount))


def _in_words(wanted: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in (("CPUs", wanted["num_cpus"]), ("GPUs", wanted["num_gpus"]))
                        if amount)


def _connected(execution: ExecutionConfig, count: int) -> Any:
    """The package, connected: to the cluster at the address, else to one of this machine that ends with this process."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(f"execution.runner=ray: ray is not installed; {installed_by('ray')} here and on all machines of "
                          "the cluster") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = execution.ray_address
    if address is None:
        cpus = int(count * needs(execution, gpus=False)["num_cpus"])
        where = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES,
                 "_node_ip_address": "127.0.0.1"}
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
