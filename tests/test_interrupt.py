"""Ctrl-C, which a terminal sends to the command and to what it has started in its session."""

import os
import signal
import subprocess
import sys
import time

from flows.runs.run import open_run
from flows.store.store import Store


def test_ctrl_c_in_the_middle_of_a_training(trained, tmp_path):
    """The command ends by itself, with what was committed, and the same command goes on."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "flows.cli.main", "train", str(trained[0]), "--store", str(store), "--iterations",
               "1000", "--set", "tracking.enabled=false"]
    own = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=own, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # else that of whoever runs the tests
        deadline = time.monotonic() + 240
        while not list(store.glob("runs/tiny/iterations/000002.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
    assert "baton: interrupted; the same command goes on from here" in (tmp_path / "log").read_text()
    run = open_run(Store(str(store)), "tiny")
    assert 2 <= run.last().iteration < 1000
