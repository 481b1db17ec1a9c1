"""`make pool`: Prefect's server, MLflow's page, a process work pool with everything deployed, and a worker, on this machine.

All on loopback and for one person; docs/work-pool.md is about servers and workers for more. Ctrl-C, SIGTERM, or the end of
one of the processes ends all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from schemas.errors import PrefectError

ROOT = Path(__file__).parents[2]
POOL = "baton"
LEASES = "prefect.server.concurrency.lease_storage.filesystem"  # slots outlive a restart of the server
WORKER = ("prefect", "worker", "start", "--pool", POOL, "--limit", "2")  # a queue without limit is tried all at once
PATIENCE = 180  # seconds for a server to come up
PATIENCE_AT_END = 20  # seconds for a process to end by itself
WHAT_NOW = """
Prefect  http://127.0.0.1:{port}   deployments train, iterate, stage, perform on the work pool {pool}
MLflow   {mlflow}
store    {store}

Open Prefect's page, Deployments, iterate, then Run (once) or + Schedule (every minute, say), with the parameters
run = cartpole and config = data/cartpole: each flow run makes one iteration, and the last one ends the schedule. Or:

    export PREFECT_API_URL={api}
    prefect deployment run iterate/iterate -p run=cartpole -p config=data/cartpole
    prefect deployment run stage/stage -p run=cartpole -p stage=gae -p iteration=1 -p 'settings=["gae.gae_lambda=0.9"]'

Ctrl-C here ends it all. The worker's log:
"""


class Processes:
    """Those that were started, each with the name by which a person knows it."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs, self.environment, self.started = logs, environment, {}

    def start(self, name: str, *command: str, logged: bool = True) -> None:
        """Starts `python -m command` in a session of its own, so that Ctrl-C reaches it through us."""
        with (self.logs / f"{name}.log").open("w") if logged else contextlib.nullcontext() as log:
            self.started[name] = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT if log else None, cwd=ROOT,
                env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL)

    def wait_for(self, name: str, url: str) -> None:
        """Until it answers."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.started[name].poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2).is_success:
                    return
            time.sleep(0.2)
        raise PrefectError(f"{name} did not come up at {url}; see {self.logs / name}.log")

    def wait(self) -> None:
        """Until one has ended."""
        while all(process.poll() is None for process in self.started.values()):
            time.sleep(0.5)
        ended = next(name for name, process in self.started.items() if process.poll() is not None)
        raise PrefectError(f"{ended} has ended with code {self.started[ended].returncode}; the others are ended too")

    def end(self) -> None:
        """The last first, each with all that it has started: a worker would else wait for its flow runs to be done."""
        for process in reversed(self.started.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                family = [top, *top.children(recursive=True)]
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.terminate()
                for member in psutil.wait_procs(family, PATIENCE_AT_END)[1]:
                    member.kill()
            process.wait()


@contextlib.contextmanager
def ending(processes: Processes) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("\nending the worker, MLflow and the server")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one would leave some of them alive
            signal.signal(number, signal.SIG_IGN)
        processes.end()


def require_free(port: int, option: str) -> None:
    """Raises `PrefectError` if something listens there."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise PrefectError(f"port {port} is taken, perhaps by another make pool; end that, or choose another "
                                       f"port with {option}")


def deploy(environment: dict[str, str], *options: str) -> None:
    """The work pool, the deployments of prefect.yaml and, with these options, the automations.

    Raises `PrefectError` with what Prefect prints.
    """
    for command in (
        ("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite"),
        ("prefect", "--no-prompt", "deploy", "--all"),
        ("flows.orchestration.automations", *options),
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise PrefectError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()}")


def crash_orphans(api: str) -> None:
    """Flow runs that an earlier worker of this pool had when it was ended: their slots would never be released."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.objects import StateType
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Crashed

    alive = FlowRunFilter(state={"type": {"any_": [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]}})
    ours = WorkPoolFilter(name={"any_": [POOL]})
    ended = Crashed(message="its worker was ended; what it committed is whole, the next flow run goes on")
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=alive, work_pool_filter=ours):
            client.set_flow_run_state(flow_run.id, ended, force=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.orchestration.pool", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's page and API (4200)")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="of MLflow's page (5000)")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    store = os.environ.get("BATON_STORE", "data/store")
    if "://" not in store:
        store = str(Path(store).resolve())
    beside = Path("data/store" if "://" in store else store).resolve()
    api, mlflow = f"http://127.0.0.1:{options.port}/api", f"http://127.0.0.1:{options.mlflow_port}"
    try:
        require_free(options.port, "--port")
        require_free(options.mlflow_port, "--mlflow-port")
        logs = beside / "pool"
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "BATON_STORE": store, "MLFLOW_TRACKING_URI": mlflow, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PREFECT_API_URL": api, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
            "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "WARNING",  # not two lines whenever a queue is polled
            "PREFECT_WORKER_QUERY_SECONDS": "3", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5"}
        processes = Processes(logs, environment)
        with ending(processes):
            print("starting Prefect's server and MLflow …", flush=True)
            processes.start("server", "prefect", "server", "start", "--port", str(options.port))
            processes.start("mlflow", "mlflow", "server", "--port", str(options.mlflow_port), "--workers", "1",
                            "--backend-store-uri", f"sqlite:///{beside / 'mlflow.db'}",
                            "--artifacts-destination", (beside / "mlflow-artifacts").as_uri())
            processes.wait_for("server", f"{api}/health")
            deploy(environment)
            crash_orphans(api)
            processes.wait_for("mlflow", f"{mlflow}/health")
            print(WHAT_NOW.format(port=options.port, pool=POOL, mlflow=mlflow, store=store, api=api), flush=True)
            processes.start("worker", *WORKER, logged=False)
            processes.wait()
    except PrefectError as error:
        print(f"make pool: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
