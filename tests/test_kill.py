"""SIGKILL in every artifact, record and state of a run, then the same command: it goes on and ends in the same bytes.

The processes that are killed are forks that have everything imported (tests/faults.py); the first and the last are the real
command.
"""

import os
import signal
import subprocess
import sys

import pytest
from conftest import assert_same_bytes
from control import RUNS
from faults import Faults

from flows.runs.run import open_run
from flows.store.store import Store

# The command kills itself when it has written the files of a stage and is about to hash them.
KILLED = """
import os, signal, sys
from flows.store.attempt import Attempt
stage, arguments = sys.argv[1], sys.argv[2:]
seal = Attempt.seal
Attempt.seal = lambda attempt: os.kill(os.getpid(), signal.SIGKILL) if attempt.ref.stage == stage else seal(attempt)
from flows.cli.main import run_command
sys.exit(run_command(arguments))
"""


def command(*arguments):
    return subprocess.run([sys.executable, *arguments], env=os.environ, timeout=300).returncode


@pytest.mark.parametrize("name, stage", [("tiny", "rollout"), *((name, "ppo") for name in RUNS)])
def test_kill_9_anywhere_then_the_same_command(trained, controlled, tmp_path, name, stage):
    """In a control task episodes are open at every kill, and every start has to bring its environments there."""
    kill_anywhere(*(trained if name == "tiny" else (controlled[0] / name, controlled[1])), name, stage, tmp_path)


def kill_anywhere(folder, reference, name, stage, tmp_path):
    """The example's run, killed before each of its commits and within that stage, against the run in the other store."""
    faults = Faults(folder, tmp_path)
    try:
        commits = {point.label: point for point in faults.record() if point.name == "link"}  # of each the last
        for point in commits.values():
            assert faults.again_at(point, "before") == {"code": -9, "call": "link"}, point
    finally:
        faults.close()
    assert len(commits) > 12
    for ref in Store(faults.store).artifacts():  # what was killed before its commit was attempted once more
        attempts = list((faults.store / "artifacts" / ref.stage / ref.identity / "attempts").iterdir())
        assert len(attempts) == 2 or ref.stage.startswith("input."), ref  # the record follows the last input
    assert_same_bytes(open_run(Store(faults.work / "reference"), name), open_run(Store(reference), name))

    arguments = ["train", str(folder), "--store", str(faults.store), "--quiet", "--set", "tracking.enabled=false"]
    last = Store(faults.store).files
    last.remove(f"runs/{name}/iterations/{open_run(Store(faults.store), name).last().iteration:06d}.json")
    ref = open_run(Store(reference), name).last().artifacts[stage]
    last.remove(f"artifacts/{ref.stage}/{ref.identity}/manifest.json")
    assert command("-c", KILLED, stage, *arguments) == -signal.SIGKILL
    assert Store(faults.store).find(ref) is None
    assert command("-m", "flows.cli.main", *arguments) == 0
    assert_same_bytes(open_run(Store(faults.store), name), open_run(Store(reference), name))
