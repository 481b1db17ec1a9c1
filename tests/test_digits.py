"""The example of arithmetic sequences: its rewards by hand, and what is paid at which token."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import module_of

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.tables import Advantages, Rewards, Rollouts, TokenRewards

FOLDER = Path(__file__).parents[1] / "data" / "digits"


@pytest.fixture(scope="module")
def digits():
    return module_of(FOLDER / "rewards.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prefect_server):
    """A small iteration of the example, made anew; the run and its store."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("model"))
    subprocess.run([sys.executable, folder / "make_inputs.py"], check=True, capture_output=True)
    for name in ("prompts.jsonl", "heldout_prompts.jsonl"):
        assert (folder / name).read_bytes() == (FOLDER / name).read_bytes(), "the script writes these files"
    settings = ("rollout.batch_size=64", "iterations=1", "tracking.enabled=false", "execution.threads=1")
    assert run_command(["train", str(folder), "--store", str(folder / "store"), "--quiet",
                        *(part for setting in settings for part in ("--set", setting))]) == 0
    return open_run(Store(str(folder / "store")), "digits")


@pytest.mark.parametrize(("response", "paid"), [
    ("2,4,6<eos>", [0.2] * 5 + [0]), ("2,5,6", [0.2, 0.2, 0, 0, 0]), ("<pad>2", [0, 0]), ("2,4,6,8", [0.2] * 5 + [0, 0]),
])
def test_rewards_by_hand(digits, response, paid):
    assert digits.answer("7,9:9,3") == "2,4,6"
    assert digits.matched(["7,9:9,3"], [response]) == [paid]
    assert digits.solved(["7,9:9,3"], [response]) == [response == "2,4,6<eos>"]


def test_each_token_is_paid_where_it_was_earned(trained, digits):
    made = trained.state(1).artifacts
    rollouts, rewards, tokens, advantages = (trained.store.table(made[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("reward", Rewards), ("reward", TokenRewards), ("gae", Advantages)))
    right, characters = 0, ["<bos>", "<eos>", "<pad>", "<unk>", *"0123456789,:"]
    for row, ids in enumerate(rollouts.response_tokens):
        response = "".join(characters[i] for i in ids)
        (expected,) = digits.matched([rollouts.prompt[row]], [response])
        np.testing.assert_allclose(tokens.rewards[row], expected, rtol=1e-6)
        np.testing.assert_allclose(rewards.score[row], sum(expected), rtol=1e-6)
        right += sum(expected) > 0
    assert right > 0
    np.testing.assert_allclose(advantages.rewards.values, tokens.rewards.values, atol=1e-6)  # no KL, no other component


def test_gae_again_reads_them(trained, capsys):
    assert run_command(["stage", "gae", "digits", "--iteration", "1", "--store", trained.store.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"
    assert run_command(["verify", "digits", "--store", trained.store.uri, "--json"]) == 0
