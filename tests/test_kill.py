"""SIGKILL in the middle of every stage and between stages, then the same command: it goes on and ends in the same bytes."""

import os
import signal
import subprocess
import sys

from conftest import assert_same_bytes

from flows.runs.run import open_run
from flows.store.store import Store

# The process kills itself when it is about to call `place` with an argument whose text holds `word`.
KILLED = """
import os, signal, sys
from flows.runs import inputs
from flows.runs import run as runs
from flows.store import store
place, word, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
owner, name = {"seal": (store.Attempt, "seal"), "save": (runs.Run, "save"), "copy": (inputs, "_copy")}[place]
call = getattr(owner, name)
def die(*given):
    about = given[0].ref.stage if place == "seal" else str(given[-1].iteration if place == "save" else given[0])
    if about == word:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*given)
setattr(owner, name, die)
from flows.cli.main import run_command
sys.exit(run_command(arguments))
"""
# A stage has written its files and is about to hash them: before the commit.
STAGES = ["base_model", "sft", "reward_model", "evaluate", "rollout", "reference", "reward", "value", "gae", "ppo"]
# Inputs half imported; every stage of an iteration committed, its state not.
BEFORE, *AFTER = [("copy", "heldout_prompts"), ("save", "0"), ("save", "1"), ("save", "2")]
SEALS = [("seal", stage) for stage in STAGES]
ORDER = [BEFORE, *SEALS[:4], AFTER[0], *SEALS[4:], *AFTER[1:]]


def test_kill_9_anywhere_then_the_same_command(trained, tmp_path):
    folder, reference = trained
    store = tmp_path / "store"
    arguments = ["train", str(folder), "--store", str(store), "--quiet", "--set", "tracking.enabled=false"]
    for place, word in ORDER:
        killed = subprocess.run([sys.executable, "-c", KILLED, place, word, *arguments], env=os.environ, timeout=300)
        assert killed.returncode == -signal.SIGKILL, (place, word)
        if place == "seal":
            assert not [ref for ref in Store(store).artifacts() if ref.stage == word], f"{word} was committed"
    finished = subprocess.run([sys.executable, "-m", "flows.cli.main", *arguments], env=os.environ, timeout=300)
    assert finished.returncode == 0

    ours, theirs = open_run(Store(store), "tiny"), open_run(Store(reference), "tiny")
    assert_same_bytes(ours, theirs)
    firsts = {stage: next(s.artifacts[stage] for s in ours.states() if stage in s.artifacts) for stage in STAGES}
    for ref in ours.store.artifacts():  # computed once; once more where a kill fell before its commit
        attempts = list((store / "artifacts" / ref.stage / ref.identity / "attempts").iterdir())
        killed_here = ref == firsts.get(ref.stage) or ref.stage == "input.heldout_prompts"
        assert len(attempts) == (2 if killed_here else 1), ref
