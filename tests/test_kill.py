"""SIGKILL in the middle of every stage, then the same command: it goes on and ends in the same bytes."""

import os
import signal
import subprocess
import sys

from flows.runs import open_run
from flows.store import Store

# The process kills itself when a stage has written its files and is about to hash them: before the commit.
KILLED = """
import os, signal, sys
from flows.store import Attempt
stage, arguments = sys.argv[1], sys.argv[2:]
seal = Attempt.seal
def die(self):
    if self.ref.stage == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    return seal(self)
Attempt.seal = die
from flows.cli import run_command
sys.exit(run_command(arguments))
"""
ORDER = ["base_model", "sft", "reward_model", "evaluate", "rollout", "reference", "reward", "value", "gae", "ppo"]


def test_kill_9_in_every_stage_then_the_same_command(trained, tmp_path):
    folder, reference = trained
    store = tmp_path / "store"
    arguments = ["train", str(folder), "--store", str(store), "--quiet", "--set", "tracking.enabled=false"]
    for stage in ORDER:
        killed = subprocess.run([sys.executable, "-c", KILLED, stage, *arguments], env=os.environ, timeout=300)
        assert killed.returncode == -signal.SIGKILL, stage
        assert not [ref for ref in Store(store).artifacts() if ref.stage == stage], f"{stage} was committed"
    finished = subprocess.run([sys.executable, "-m", "flows.cli", *arguments], env=os.environ, timeout=300)
    assert finished.returncode == 0

    ours, theirs = open_run(Store(store), "tiny"), open_run(Store(reference), "tiny")
    for mine, other in zip(ours.states(), theirs.states(), strict=True):
        assert mine.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})
        for ref in mine.artifacts.values():
            assert ours.store.manifest(ref).digests() == theirs.store.manifest(ref).digests()
    for ref in ours.store.artifacts():  # committed once; one more attempt where a kill fell, its first artifact
        attempts = list((store / "artifacts" / ref.stage / ref.identity / "attempts").iterdir())
        first = ref in [next(s for s in ours.states() if stage in s.artifacts).artifacts[stage] for stage in ORDER]
        assert len(attempts) == (2 if first else 1), ref
