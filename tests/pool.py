"""A Prefect server, a work pool and a worker as real processes on loopback, to be killed; and a run that waits when told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from conftest import free_port, save_tiny_model, write_example
from control import write_control
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, TaskRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.orchestration.pool import LEASES, WORKER, Processes, deploy

PATIENCE = 240  # seconds for anything, on a busy machine

HOLDING = '''
import os, sys, time

import gymnasium
import numpy as np
from gymnasium import spaces


def held():
    """Whether the file HOLD is there, and this is a step of an evaluation."""
    frame = sys._getframe()
    while frame and frame.f_code.co_name != "control_evaluate":
        frame = frame.f_back
    return frame is not None and os.path.exists(os.environ["HOLD"])


class Holding(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        while held():
            time.sleep(0.02)
        self.steps += 1
        return self.np_random.random(2, np.float32), float(action), self.steps == 4, False, {}


def holding():
    return Holding()
'''
HEARTBEATS_MISSED = 40  # seconds until a flow run without a heartbeat is ended; they come every 30


@contextmanager
def running_pool(folder: Path) -> Iterator[Pool]:
    """A server with everything deployed, and a worker."""
    pool = Pool(folder, free_port())
    try:
        pool.start_server()
        deploy(pool.environment, "--patience", str(HEARTBEATS_MISSED))
        pool.start_worker()
        yield pool
    finally:
        pool.processes.end()


class Pool:
    """A server with everything deployed, and at most one worker. While the file `hold` exists, flow runs of a
    `holding_example` wait in the `evaluate` of the next iteration."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.api = folder, port, f"http://127.0.0.1:{port}/api"
        self.hold, self.store = folder / "hold", folder / "store"
        self.store.mkdir(parents=True)
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": self.api, "BATON_STORE": str(self.store),
            "HOLD": str(self.hold), "PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES, "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "4"}
        self.processes = Processes(folder, self.environment)

    # --- processes ---

    def start_server(self) -> None:
        self.processes.start("server", "prefect", "server", "start", "--port", str(self.port))
        self.processes.wait_for("server", f"{self.api}/health")

    def start_worker(self) -> None:
        self.processes.start("worker", *WORKER)

    def kill(self, name: str) -> None:
        """-9, for the server or the worker and all that it has started."""
        process = self.processes.started[name]
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.wait()
        psutil.wait_procs(family, PATIENCE)

    def wait(self, ready: Callable[[], Any], what: str) -> Any:
        """What `ready` gives once that is true of something."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := ready():
                return found
            time.sleep(0.05)
        logs = "\n".join(path.read_text()[-4000:] for path in self.folder.glob("*.log"))
        pytest.fail(f"waited in vain for {what}\n{logs}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside it the next iteration waits in its evaluation."""
        self.hold.touch()
        try:
            yield
        finally:
            self.hold.unlink(missing_ok=True)

    def in_the_middle(self, begin: Callable[[], Any] = lambda: None) -> Any:
        """Waits until the iteration that `begin`, or a schedule, begins has its update; what `begin` gave."""
        updates = self.committed("ppo")
        begun = begin()
        self.wait(lambda: self.committed("ppo") > updates, "the middle of an iteration")
        return begun

    @contextmanager
    def without_server(self, begin: Callable[[], Any]) -> Iterator[Any]:
        """What `begin` gave, the server killed in the middle of the iteration that it begins; afterwards it is back."""
        try:
            with self.held():
                begun = self.in_the_middle(begin)
                self.kill("server")
            yield begun
        finally:
            self.start_server()

    # --- what a person does on the page ---

    def client(self) -> SyncPrefectClient:
        with temporary_settings({PREFECT_API_URL: self.api}):
            return get_client(sync_client=True)

    def deployment(self, name: str) -> UUID:
        with self.client() as client:
            return client.read_deployment_by_name(f"{name}/{name}").id

    def run(self, deployment: str, **parameters: Any) -> FlowRun:
        """A flow run, begun and not waited for."""
        with self.client() as client:
            return client.create_flow_run_from_deployment(self.deployment(deployment), parameters=parameters)

    def schedule(self, seconds: float, **parameters: Any) -> DeploymentSchedule:
        """Has a flow run of `iterate` begun every so many seconds."""
        every = IntervalSchedule(interval=timedelta(seconds=seconds))
        with self.client() as client:
            return client.create_deployment_schedules(self.deployment("iterate"), [(every, True)], parameters=parameters)[0]

    def scheduled(self, schedule: DeploymentSchedule) -> bool:
        """Whether it is still switched on."""
        with self.client() as client:
            there = client.read_deployment_schedules(schedule.deployment_id)
        return next(one for one in there if one.id == schedule.id).active

    def flow_runs(self, run: str) -> list[FlowRun]:
        """Of `iterate`, for that run, in the order in which they were begun; those that were not are left out."""
        return sorted((one for one in self._iterate(run) if one.run_count), key=lambda one: one.start_time)

    def queued(self, run: str) -> int:
        """How many wait until another one has ended."""
        return len(self._iterate(run, state={"name": {"any_": ["AwaitingConcurrencySlot"]}}))

    def _iterate(self, run: str, **which: Any) -> list[FlowRun]:
        of_iterate = FlowRunFilter(deployment_id={"any_": [self.deployment("iterate")]}, **which)
        with self.client() as client:
            return [one for one in client.read_flow_runs(flow_run_filter=of_iterate) if one.parameters["run"] == run]

    def finished(self, flow_run: FlowRun) -> FlowRun:
        """It, once it has ended."""
        def ended() -> FlowRun | None:
            now = self.read(flow_run)
            return now if now.state.is_final() else None

        return self.wait(ended, f"{flow_run.name} to end")

    def read(self, flow_run: FlowRun) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(flow_run.id)

    def task_runs(self, flow_run: FlowRun) -> list[TaskRun]:
        with self.client() as client:
            return client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))

    def log(self, flow_run: FlowRun) -> list[str]:
        """The lines on its page."""
        with self.client() as client:
            return [line.message for line in client.read_logs(LogFilter(flow_run_id={"any_": [flow_run.id]}))]

    def assets(self, run: str) -> dict[str, list[tuple[dict[str, Any], set[str]]]]:
        """By stage, the oldest first: what each asset event says, and the stages that the asset is made from."""
        prefix = f"{self.store.as_uri()}/runs/{run}/"
        wanted = EventFilter(event=EventNameFilter(prefix=["prefect.asset."]),
                             resource=EventResourceFilter(id_prefix=[prefix]))
        with self.client() as client:
            events = sorted(client.read_events(wanted, limit=50).events, key=lambda event: event.occurred)
        stages: dict[str, list[tuple[dict[str, Any], set[str]]]] = {}
        for event in events:
            sources = {each.id.removeprefix(prefix) for each in event.related if each.role == "asset"}
            stages.setdefault(event.resource.id.removeprefix(prefix), []).append((event.payload, sources))
        return stages

    # --- what lies in the store ---

    def states(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.store / "runs" / run / "iterations").glob("*.json"))

    def committed(self, stage: str) -> int:
        """Artifacts of that stage."""
        return len(list((self.store / "artifacts" / stage).glob("*/manifest.json")))


def holding_example(folder: Path, iterations: int, seed: int) -> Path:
    """A control task, since a language model's libraries take longer to import than all of this takes to train; another seed
    shares no artifacts."""
    write_control(folder, seed=seed, iterations=iterations, environment={"id": "holding.py:holding", "kwargs": {}},
                  policy={"hidden": [4]}, rollout={"num_envs": 1, "num_steps": 8}, ppo={"epochs": 1, "minibatches": 2},
                  evaluate={"every": 1, "episodes": 1}, tracking={"enabled": False})
    (folder / "holding.py").write_text(HOLDING)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["execution"] |= {"environment_timeout": 600.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def language_example(folder: Path, iterations: int, seed: int) -> Path:
    """The tiny example with a base model that is there already, since TRL's trainers take long to import."""
    write_example(folder)
    save_tiny_model(folder / "model")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"seed": seed, "iterations": iterations, "evaluate": {"every": 0}, "value": {"start": "actor"},
               "reward": {"components": {"gold": {"source": "grammar.py:gold"}}}, "base_model": {"source": "model"}}
    config["data"] = {role: f"{role}.jsonl" for role in ("prompts", "heldout_prompts")}
    del config["reward_model"], config["sft"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(pool: Pool, example: Path, *more: str, **environment: str) -> subprocess.Popen:
    """A local run, begun and not waited for, that Prefect's server is told of."""
    command = [sys.executable, "-m", "flows.cli.main", "train", str(example), "--quiet", *more]
    return subprocess.Popen(command, env=pool.environment | environment, stderr=subprocess.PIPE, text=True)
