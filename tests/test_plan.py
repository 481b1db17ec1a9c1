"""`baton train --dry-run`: what it foresees is what then happens, and nothing is written."""

import json

import pytest
from conftest import write_example

from flows.cli.main import run_command
from flows.plan import BYTES_A_PARAMETER, plan
from flows.runs.run import open_run
from flows.runs.start import Request
from flows.store.store import Store


def tree(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def test_a_new_run_is_made_as_foreseen(tmp_path, prefect_server):
    folder, store = write_example(tmp_path / "tiny"), tmp_path / "store"
    found = plan(Request(str(store), source=str(folder)))
    assert not store.exists()
    assert (found.there, found.done, found.to_make, found.evaluations, found.snapshots) == (False, None, 2, 1, 2)
    assert [step.stage for step in found.steps] == ["base_model", "sft", "reward_model", "evaluate"]
    assert not any(step.made for step in found.steps) and not any(there for _, there in found.inputs.values())
    assert run_command(["train", str(folder), "--iterations", "1", "--store", str(store), "--quiet"]) == 0
    run = open_run(Store(store), "tiny")
    assert {step.stage: step.ref for step in found.steps} == run.state(0).artifacts
    assert {role: ref for role, (ref, _) in found.inputs.items()} == run.inputs
    before = tree(store)
    next_ = plan(Request(str(store), source=str(folder)))
    assert tree(store) == before
    assert next_.there and next_.done == 1 and next_.to_make == 1 and all(there for _, there in next_.inputs.values())
    assert run_command(["train", str(folder), "--store", str(store), "--quiet"]) == 0
    made = open_run(Store(store), "tiny").state(2).artifacts
    assert next_.steps[0].stage == "rollout" and next_.steps[0].ref == made["rollout"]
    assert {step.stage for step in next_.steps} == set(made)
    finished = plan(Request(str(store), name="tiny"))
    assert finished.to_make == 0 and finished.done == 2 and finished.steps == []


def test_what_another_run_has_made_is_found(copied):
    folder, store = copied
    same = plan(Request(str(store), name="again", source=str(folder)))
    assert not same.there and same.done == 2 and same.to_make == 0 and all(step.made for step in same.steps)
    other = plan(Request(str(store), name="other", source=str(folder), settings=("kl.coef=0.3",)))
    assert other.done == 0 and other.to_make == 2
    missing = [step.stage for step in other.steps if step.made is None]
    assert missing == ["gae", "ppo"] and {step.stage for step in other.steps if step.iteration == 1 and step.made} == {
        "rollout", "reference", "reward", "value"}
    base = open_run(Store(store), "tiny")
    parameters = base.store.manifest(base.state(0).artifacts["base_model"]).metrics["parameters"]
    assert other.snapshot_bytes == parameters * BYTES_A_PARAMETER * 2
    written = sum(entry.bytes for entry in base.store.manifest(base.state(2).artifacts["ppo"]).files)
    assert written == pytest.approx(other.snapshot_bytes, rel=0.5)  # files of a tokenizer weigh as much as so small a model


def test_the_command(copied, capsys):
    folder, store = copied
    before = tree(store)
    assert run_command(["train", str(folder), "--dry-run", "--run", "new", "--set", "seed=9", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "new, new, 2 iterations" in out and "5 of 6 in the store" not in out and "6 of 6 in the store" in out
    assert "to make     before the first iteration: base_model, sft, reward_model, evaluate" in out
    assert "1 to 2, 1 of them evaluated" in out and "GB free" in out and "seed: 9" in out
    assert run_command(["train", "--run", "tiny", "--dry-run", "--iterations", "5", "--json", "--store", str(store)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["done"], data["to_make"], data["snapshots"]) == (2, 3, 3) and data["snapshot_bytes"] > 0
    assert tree(store) == before


@pytest.mark.parametrize("arguments, words", [
    (["--run", "nope"], "no run 'nope'"),
    (["no/such", "--run", "x"], "no such folder or file"),
])
def test_what_a_start_would_refuse(copied, capsys, arguments, words):
    assert run_command(["train", *arguments, "--dry-run", "--store", str(copied[1])]) == 2
    assert words in capsys.readouterr().err


def test_another_config_under_a_name_that_is_there(copied, capsys):
    folder, store = copied
    assert run_command(["train", str(folder), "--dry-run", "--set", "seed=9", "--store", str(store)]) == 2
    assert "seed" in capsys.readouterr().err


def test_a_control_task(controlled, tmp_path):
    folder = controlled[0] / "cartpole"
    found = plan(Request(str(tmp_path / "none"), source=str(folder)))
    assert [step.stage for step in found.steps] == ["policy", "evaluate"] and found.snapshot_bytes is None
    there = plan(Request(str(controlled[1]), name="again", source=str(folder)))
    assert there.to_make == 0 and all(step.made for step in there.steps)
