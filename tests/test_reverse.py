"""The example of lists of words: its files are what the script writes, and its rewards by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import module_of

FOLDER = Path(__file__).parents[1] / "data" / "reverse"
FILES = ("prompts.jsonl", "heldout_prompts.jsonl", "demonstrations.jsonl")


def test_the_files_are_what_the_script_writes_and_no_list_is_in_two(tmp_path):
    for name in ("make_inputs.py", "rewards.py"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_inputs.py"], check=True)
    prompts = []
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
        prompts += [json.loads(line)["prompt"] for line in (FOLDER / name).read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) == 540


@pytest.mark.parametrize(("response", "reward"), [
    ("pot sea owl", 1), (" pot sea owl", 1), ("pot owl sea", 1 / 3), ("pot sea owl fox", 3 / 4), ("pot", 1 / 3), ("", 0),
    ("owl sea pot", 0)])
def test_rewards_by_hand(response, reward):
    rewards, prompt = module_of(FOLDER / "rewards.py"), "Words: owl sea pot\nBackwards:"
    assert rewards.reversed_words([prompt], [response]) == [reward]
    assert rewards.solved([prompt], [response]) == [reward == 1]
