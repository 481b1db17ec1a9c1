"""Calls performed on a Prefect work pool: `execution.placement`, and `execution.runner: prefect`.

Each is a flow run of the flow `perform` (flows/placed.py), which a worker of the pool makes, on any machine that reaches the
store. Nothing but the call goes there, and nothing but a state comes back: what was made is looked up in the store.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling, State

from flows.orchestration.automations import HEARTBEATS
from flows.orchestration.server import lasting_server, server_errors
from flows.store.store import Store
from schemas.artifacts import Manifest, Produced, StageCall
from schemas.errors import BatonError, ConfigError, PrefectError, StoreError, TransientError, error_named
from stages.ops.progress import pause

log = logging.getLogger("baton")
FLOW = "perform"
POLLS = (0.2, 2.0)  # seconds between two questions about a flow run: at first, and at most
SAID_EVERY = 30.0  # seconds: while no worker takes a flow run, or the server does not answer
LOOKS = 30  # at the store for what a worker says it has made
SERVER_PATIENCE = 600.0  # seconds that the server may not answer
_CREATING = threading.Lock()  # Prefect numbers the flow runs that a flow run starts


class WorkPool:
    """Performs calls on the pool of that name. Raises `ConfigError` if it cannot."""

    def __init__(self, store: Store, name: str, worker_timeout: float | None) -> None:
        if not lasting_server():
            raise ConfigError(f"work pool {name!r}: PREFECT_API_URL is not set, and the server of this command alone has no "
                              "pools; set it to that of the server which the workers ask (make pool starts one)")
        self.store, self.name, self.worker_timeout = store, name, worker_timeout
        with server_errors("the same command goes on"), get_client(sync_client=True) as client:
            self.deployment = _deployment(client, name)
            if not client.read_automations_by_name(HEARTBEATS):
                log.warning("Prefect's server has no automation %s: a worker whose machine is gone would be waited for for "
                            "ever; python -m flows.orchestration.automations makes it", HEARTBEATS)

    def __call__(self, call: StageCall) -> Produced:
        """Waits until it is made. Raises `TransientError` if the worker is lost or the server does not answer,
        `PrefectError` if no worker takes it in time or the flow run is cancelled, and what the stage raises there."""
        with _CREATING, _server_answers(call):
            flow_run = run_deployment(self.deployment, parameters={"call": call.model_dump(mode="json")},
                                      flow_run_name=_name_of(call), timeout=0)
        try:
            return self._outcome(call, self._final_state(flow_run.id, call))
        except BaseException:
            with contextlib.suppress(Exception):  # it is ended where it can be; what matters is the error
                _cancel(flow_run.id)
            raise

    def _final_state(self, flow_run: UUID, call: StageCall) -> State:
        """Polls until there is one."""
        began = said = answered = attended = time.monotonic()
        interval = POLLS[0]
        while True:
            pause(interval, call.stage)
            interval, now = min(1.2 * interval, POLLS[1]), time.monotonic()
            try:
                with get_client(sync_client=True) as client:
                    found = client.read_flow_run(flow_run)
                    online = _online(client, self.name) if _waits(found) and now - said >= SAID_EVERY else None
            except (httpx.TransportError, PrefectHTTPStatusError, RuntimeError) as error:
                if now - answered > SERVER_PATIENCE:
                    raise TransientError(f"{call.stage}: Prefect's server has not answered for {SERVER_PATIENCE:.0f} s: "
                                         f"{error}") from None
                if now - said >= SAID_EVERY:
                    said = now
                    log.warning("%s: Prefect's server does not answer (%s); it is asked again", call.stage,
                                type(error).__name__)
                continue
            answered = now
            if found.state.is_final():
                return found.state
            if _waits(found):
                if self.worker_timeout is not None and now - attended > self.worker_timeout:
                    raise PrefectError(f"{call.stage}: work pool {self.name!r} has had no worker online for "
                                       f"{self.worker_timeout:.0f} s (execution.worker_timeout); start one with prefect "
                                       f"worker start --pool {self.name}, and the same command goes on")
                if online is not None:
                    attended = now if online else attended
                    said = now
                    log.warning("%s waits for a worker of work pool %r, %.0f s so far; %s", _name_of(call), self.name,
                                now - began, f"{online} online, at work on something else" if online else
                                f"none is online: prefect worker start --pool {self.name}")

    def _found(self, call: StageCall) -> Manifest | None:
        """Its manifest; looked for once more and again, since a network's file system may remember that it was not there."""
        for _ in range(LOOKS):
            if (manifest := self.store.find(call.recipe.ref)) is not None:
                return manifest
            pause(POLLS[1], call.stage)
        return None

    def _outcome(self, call: StageCall, state: State) -> Produced:
        if state.is_completed():
            if (manifest := self._found(call)) is None:
                raise StoreError(f"{call.stage}: a worker of work pool {self.name!r} has made {call.recipe.ref.short}, and "
                                 f"{self.store.uri} does not have it here: both must reach the same store at that place")
            return Produced(ref=call.recipe.ref, how="found" if state.name == "Found" else "made", outputs=manifest.outputs,
                            metrics=manifest.metrics, seconds=manifest.seconds, files=len(manifest.files))
        if state.is_crashed():
            raise TransientError(f"{call.stage}: its flow run on work pool {self.name!r} has crashed ("
                                 f"{' '.join((state.message or 'its worker is gone').split())[:200]}); it is made again")
        if state.is_cancelled():
            raise PrefectError(f"{call.stage}: its flow run on work pool {self.name!r} was cancelled; the same command goes "
                               "on")
        raise _error_of(state, call, self.name)


def _error_of(state: State, call: StageCall, pool: str) -> BatonError:
    """That of a flow run that has failed: its state is named after it, where the stage has raised one."""
    error = error_named(state.name or "", state.message or "")
    if type(error) is BatonError:
        return PrefectError(f"{call.stage}, on work pool {pool!r}: {' '.join((state.message or 'failed').split())[:500]}")
    return error


def _deployment(client: SyncPrefectClient, pool: str) -> UUID:
    """Of the flow `perform` on that pool. Raises `ConfigError` if there is no such pool, or nothing to deploy on it."""
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        there = ", ".join(sorted(each.name for each in client.read_work_pools())) or "none"
        raise ConfigError(f"no work pool {pool!r} at {PREFECT_API_URL.value()}; there: {there}. prefect work-pool create "
                          f"{pool} --type process makes one") from None
    deployments = client.read_deployments(flow_filter=FlowFilter(name={"any_": [FLOW]}))
    for each in deployments:
        if each.work_pool_name == pool:
            return each.id
    for each in deployments:
        if each.name == FLOW:
            return _copied(client, each, pool)
    raise ConfigError(f"work pool {pool!r}: the flow {FLOW} is not deployed; prefect --no-prompt deploy --all, where "
                      "prefect.yaml is, deploys it")


def _copied(client: SyncPrefectClient, deployment: DeploymentResponse, pool: str) -> UUID:
    """That deployment once more, on another pool."""
    log.info("deploying the flow %s on work pool %s, as %s/%s-%s", FLOW, pool, FLOW, FLOW, pool)
    return client.create_deployment(
        deployment.flow_id, f"{FLOW}-{pool}", version=deployment.version, description=deployment.description,
        work_pool_name=pool, tags=deployment.tags, path=deployment.path, entrypoint=deployment.entrypoint,
        parameter_openapi_schema=deployment.parameter_openapi_schema, pull_steps=deployment.pull_steps,
        enforce_parameter_schema=deployment.enforce_parameter_schema, job_variables=deployment.job_variables)


def _name_of(call: StageCall) -> str:
    part = f"-{call.shard.name}" if call.shard else ""
    return f"{call.stage}-{call.iteration:06d}{part}"


def _waits(flow_run: FlowRun) -> bool:
    """Whether no worker has begun it."""
    return flow_run.state.type in (StateType.SCHEDULED, StateType.PENDING)


def _online(client: SyncPrefectClient, pool: str) -> int:
    """How many workers of the pool have sent a heartbeat of late."""
    return sum(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))


def _cancel(flow_run: UUID) -> None:
    """Ends it where it is: what it has not committed is as after a crash."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run).state
        if not state.is_final():
            ended = Cancelled if state.type == StateType.SCHEDULED else Cancelling
            client.set_flow_run_state(flow_run, ended(message="the run that it was for has ended"))


@contextmanager
def _server_answers(call: StageCall) -> Iterator[None]:
    """Raises `TransientError` where it does not."""
    try:
        yield
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise TransientError(f"{call.stage}: Prefect's server has not taken its flow run: {error}") from None
