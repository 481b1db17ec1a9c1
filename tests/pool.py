"""A Prefect server, a work pool and a worker as real processes on loopback, to be killed; and a run that waits when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
import yaml
from conftest import write_example
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[1]
PATIENCE = 240  # seconds for anything, on a busy machine

HOLDING_REWARD = '''
import os, time

def score(prompts, responses):
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(0.02)
    return [len(response) / 10 for response in responses]
'''


class Pool:
    """A server with everything deployed, and at most one worker. Flow runs wait in `reward` while the file `hold` exists."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.api = folder, port, f"http://127.0.0.1:{port}/api"
        self.hold, self.store = folder / "hold", folder / "store"
        self.store.mkdir(parents=True)
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": self.api, "BATON_STORE": str(self.store),
            "HOLD": str(self.hold), "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2"}
        self.server: subprocess.Popen | None = None
        self.worker: subprocess.Popen | None = None

    # --- processes ---

    def start_server(self) -> None:
        self.server = self._start("server", "server", "start", "--port", str(self.port))
        self.wait(lambda: self._answers(), "the server to answer")

    def start_worker(self) -> None:
        self.worker = self._start("worker", "worker", "start", "--pool", "baton")

    def _start(self, name: str, *command: str) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen([sys.executable, "-m", "prefect", *command], stdout=log, stderr=subprocess.STDOUT,
                                    cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL for the process and all that it has started."""
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            one.send_signal(signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                self.kill(process)

    def wait(self, ready: Callable[[], Any], what: str) -> Any:
        """What `ready` gives once that is true of something."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := ready():
                return found
            time.sleep(0.05)
        logs = "\n".join(path.read_text()[-4000:] for path in self.folder.glob("*.log"))
        pytest.fail(f"waited in vain for {what}\n{logs}")

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

    def finished(self, flow_run: FlowRun) -> FlowRun:
        """It, once it has ended."""
        def ended() -> FlowRun | None:
            now = self.read(flow_run)
            return now if now.state.is_final() else None

        return self.wait(ended, f"{flow_run.name} to end")

    def read(self, flow_run: FlowRun) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(flow_run.id)

    def flow_runs(self) -> list[FlowRun]:
        """Those of `iterate`, in the order in which they began; those that did not are last."""
        with self.client() as client:
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id={"any_": [self.deployment("iterate")]}))
        return sorted(runs, key=lambda run: (run.start_time is None, run.start_time or run.expected_start_time))

    def schedule(self, seconds: float, **parameters: Any) -> UUID:
        """Has `iterate` started every so many seconds."""
        every = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=seconds)), active=True,
                                         parameters=parameters)
        with self.client() as client:
            answer = client.request("POST", "/deployments/{id}/schedules", path_params={"id": self.deployment("iterate")},
                                    json=[every.model_dump(mode="json", exclude_none=True)])
            return UUID(answer.json()[0]["id"])

    def delete_schedule(self, schedule: UUID) -> None:
        with self.client() as client:
            client.delete_deployment_schedule(self.deployment("iterate"), schedule)

    # --- what lies in the store ---

    def states(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.store / "runs" / run / "iterations").glob("*.json"))

    def committed(self, stage: str) -> int:
        """Artifacts of that stage."""
        return len(list((self.store / "artifacts" / stage).glob("*/manifest.json")))


def holding_example(folder: Path, iterations: int, seed: int) -> Path:
    """The tiny example, whose reward waits while the file named by HOLD exists; another seed shares no artifacts."""
    write_example(folder)
    (folder / "holding.py").write_text(HOLDING_REWARD)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"seed": seed, "iterations": iterations, "reward": {"components": {"length": {"source": "holding.py:score"}}}}
    config["evaluate"] = {"every": 0}
    config["value"] = {"start": "actor"}
    del config["reward_model"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
