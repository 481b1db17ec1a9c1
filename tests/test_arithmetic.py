"""The examples of sums and of a calculator: their files are what their scripts write; the tool and its rewards by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import module_of

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["arithmetic", "calculator"])
def test_the_files_are_what_the_script_writes_and_nothing_held_out_is_learned(tmp_path, name):
    shutil.copy(DATA / name / "make_inputs.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_inputs.py"], check=True)
    rows = {}
    for file in ("prompts.jsonl", "heldout_prompts.jsonl", "demonstrations.jsonl"):
        assert (tmp_path / file).read_bytes() == (DATA / name / file).read_bytes()
        rows[file] = [json.loads(line) for line in (DATA / name / file).read_text().splitlines()]
    heldout = {row["prompt"] for row in rows.pop("heldout_prompts.jsonl")}
    assert not heldout & {row["prompt"] for there in rows.values() for row in there}
    for row in rows["prompts.jsonl"]:
        assert eval(row["prompt"].removesuffix("=")) == row["answer"]
    for row in rows["demonstrations.jsonl"]:
        assert row["completion"].rpartition(";")[2] == str(eval(row["prompt"].removesuffix("=")))


@pytest.mark.parametrize("said, reply", [
    ("[12*34]", "408;"), ("so [3*4]", "12;"), ("[12*34", None), ("408", None), ("[12+34]", None), ("[12345*3]", None)])
def test_the_calculator(said, reply):
    tools, turns = module_of(DATA / "calculator/tools.py"), [{"role": "user", "content": "p"}]
    assert tools.calculate([[*turns, {"role": "assistant", "content": said}]]) == [reply]
    whole = [*turns, {"role": "assistant", "content": said}, {"role": "user", "content": "408;"},
             {"role": "assistant", "content": "408"}]
    assert tools.right([whole, whole], [408, 12]) == [1, 0] and tools.called([whole]) == [float(reply is not None)]
