"""The Prefect server of a command for which none is named."""

import os
import subprocess
import sys
import time

import psutil

from flows.cli.command import run_command
from flows.runs.run import open_run
from flows.store.store import Store

TRAIN = [sys.executable, "-m", "flows.cli.main", "train", "--run", "tiny", "--iterations", "1000", "--set",
         "tracking.enabled=false", "--store"]


def without_a_server(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | more


def test_it_ends_with_a_command_that_is_killed(copied):
    store = copied[1]
    last = open_run(Store(str(store)), "tiny").last().iteration
    process = subprocess.Popen([*TRAIN, str(store)], env=without_a_server(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while open_run(Store(str(store)), "tiny").last().iteration == last:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    servers = [child for child in psutil.Process(process.pid).children() if "server_process" in " ".join(child.cmdline())]
    process.kill()
    process.wait()
    assert len(servers) == 1 and not psutil.wait_procs(servers, timeout=30)[1]
    assert run_command(["verify", "tiny", "--store", str(store)]) == 0


def test_one_that_cannot_start_says_why_at_once(copied, tmp_path):
    missing = f"sqlite+aiosqlite:///{tmp_path}/missing/prefect.db"
    done = subprocess.run([*TRAIN, str(copied[1])], text=True, capture_output=True, timeout=200,
                          env=without_a_server(PREFECT_SERVER_DATABASE_CONNECTION_URL=missing))
    assert done.returncode == 1
    assert "baton: Prefect's server of this command ended with code 3: " in done.stderr
    assert "unable to open database file" in done.stderr
    assert open_run(Store(str(copied[1])), "tiny").last().iteration < 1000
