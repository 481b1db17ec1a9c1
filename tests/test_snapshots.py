"""Checkpoints every k iterations: what was not written is made again from the log, to the same bytes, where it is needed."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_same_bytes, rewrite
from control import RUNS, write_control
from test_kill import kill_anywhere

from flows.cli.main import run_command
from flows.perform import restore
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.attempt import folder_of
from flows.store.store import Store, attempt_of
from schemas.artifacts import Dropped
from schemas.errors import DroppedError
from stages.ops.tensor_file import DTYPES, tensor_file

QUIET = ("--quiet", "--set", "tracking.enabled=false")


def train(folder, store, *more):
    return run_command(["train", str(folder), "--store", str(store), *QUIET, *more])


def weights(store, run, iteration):
    """Files of that iteration's checkpoint, by whether they are there."""
    state = open_run(Store(store), run).state(iteration)
    manifest = Store(store).manifest(state.artifacts["ppo"])
    return {entry.path: (Path(store) / attempt_of(manifest) / entry.path).is_file() for entry in manifest.files
            if entry.path.endswith(".safetensors")}


@pytest.fixture(scope="module")
def logged(trained, controlled, tmp_path_factory):
    """The runs of `trained` and of a control task, five iterations, with a snapshot every second one and the last."""
    store = tmp_path_factory.mktemp("logged")
    for folder in (trained[0], controlled[0] / "pendulum"):
        assert train(folder, store / "each", "--iterations", "5") == 0
        assert train(folder, store / "some", "--iterations", "5", "--set", "checkpoints.every=2") == 0
    return store


NAMES = ("tiny", "pendulum")


@pytest.mark.parametrize("name", NAMES)
def test_between_snapshots_digests_alone(logged, name):
    each, some = (open_run(Store(logged / kind), name) for kind in ("each", "some"))
    assert_same_bytes(each, some)
    for iteration in range(1, 6):
        assert set(weights(logged / "each", name, iteration).values()) == {True}
        assert set(weights(logged / "some", name, iteration).values()) == {iteration in (2, 4, 5)}
    assert verify(Store(logged / "some"), None)[1] == []
    with pytest.raises(DroppedError, match=r"was not written .*; baton restore RUN --iteration 3 makes it again"):
        some.store.folder(some.state(3).actor.artifact, "actor")
    assert some.store.manifest(some.state(3).actor.artifact).bytes < each.store.manifest(
        each.state(3).actor.artifact).bytes / 2


@pytest.mark.parametrize("name", NAMES)
def test_restored_from_the_snapshot_before(logged, tmp_path, capsys, name):
    store = tmp_path / "store"
    shutil.copytree(logged / "some", store)
    assert run_command(["restore", name, "--iteration", "3", "--store", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == [3]
    assert set(weights(store, name, 3).values()) == {True} and verify(Store(store), None)[1] == []
    assert run_command(["restore", name, "--iteration", "3", "--store", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == []
    assert run_command(["restore", name, "--iteration", "9", "--store", str(store)]) == 2
    assert "has no iteration 9; it has 0…5" in capsys.readouterr().err
    there = {path.name for path in (store / "artifacts/ppo").glob("*/attempts/*")}
    assert len(there) == 10  # of both runs, and no other attempt is left


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_whose_model_was_not_written(logged, tmp_path, name):
    """A rerun restores it first; a fork that begins there and finds all that follows has no need to."""
    store = tmp_path / "store"
    shutil.copytree(logged / "some", store)
    assert run_command(["stage", "rollout", name, "--iteration", "4", "--store", str(store)]) == 0
    assert set(weights(store, name, 3).values()) == {True} and set(weights(store, name, 1).values()) == {False}
    assert run_command(["fork", name, "--at", "1", "--run", "fork", "--store", str(store)]) == 0
    assert run_command(["train", "--run", "fork", "--store", str(store), "--quiet", "--iterations", "3"]) == 0
    assert set(weights(store, "fork", 1).values()) == {False}
    checkpoints = [open_run(Store(place), run).state(3).artifacts["ppo"]
                   for place, run in ((store, "fork"), (logged / "each", name))]
    assert checkpoints[0] == checkpoints[1]
    assert Store(store).manifest(checkpoints[0]).digests() == Store(logged / "each").manifest(checkpoints[1]).digests()
    assert run_command(["stage", "ppo", name, "--iteration", "1", "--store", str(store)]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_with_other_settings_is_restored_across_its_beginning(logged, tmp_path, name):
    """From before the fork: the optimizer goes on, whatever the learning rate was."""
    store = tmp_path / "store"
    shutil.copytree(logged / "some", store)
    assert run_command(["fork", name, "--at", "2", "--run", "fork", "--store", str(store), "--set",
                        "ppo.learning_rate=0.002"]) == 0
    assert run_command(["train", "--run", "fork", "--store", str(store), "--quiet", "--iterations", "5", "--set",
                        "checkpoints.every=10", "--set", "retention.keep_last=1", "--set", "retention.drop=actor",
                        "--set", "retention.keep_best=false", "--set", "tracking.enabled=false"]) == 0
    run = open_run(Store(store), "fork")
    for iteration in (1, 2):  # whole until now: the run that it was forked from keeps them
        for part in ("actor", "critic", "optimizer"):
            run.store.files.remove(f"{attempt_of(run.store.manifest(run.state(iteration).actor.artifact))}/{part}")
            put_dropped(run.store, run.state(iteration).actor.artifact, part)
    assert restore(run.store, run.state(4).actor) == [1, 2, 3, 4]
    run.store.folder(run.state(4).optimizer.artifact, "optimizer")
    assert verify(run.store, None)[1] == []


def put_dropped(store, ref, part):
    store.put(f"{folder_of(ref)}/dropped/{part}.json", Dropped(part=part, run="fork", created="2026-01-01T00:00:00+00:00"))


def test_a_log_that_is_not_whole(logged, tmp_path, capsys):
    """What is missing is named, with what makes it again."""
    store = tmp_path / "store"
    shutil.copytree(logged / "some", store)
    run = open_run(Store(store), "tiny")
    run.store.files.remove(f"artifacts/gae/{run.state(3).artifacts['gae'].identity}")
    assert run_command(["restore", "tiny", "--iteration", "3", "--store", str(store)]) == 1
    assert f"{run.state(3).artifacts['gae'].short} is not in {store}; baton stage gae RUN" in capsys.readouterr().err


def test_bytes_that_differ_here(logged, tmp_path, capsys):
    """The weights that an update gives here are not those of the manifest; another machine made it, with other threads."""
    store = tmp_path / "store"
    shutil.copytree(logged / "some", store)
    run = open_run(Store(store), "tiny")
    ref = run.state(3).artifacts["ppo"]

    def elsewhere(manifest):
        manifest["environment"]["device_name"] = "another processor"
        changed = next(file for file in manifest["files"] if file["path"] == "actor/model.safetensors")
        changed["digest"] = f"blake3:{'0' * 64}"

    rewrite(store / f"artifacts/ppo/{ref.identity}/manifest.json", elsewhere)
    assert run_command(["restore", "tiny", "--iteration", "3", "--store", str(store)]) == 1
    error = capsys.readouterr().err
    assert "ppo of iteration 3 gives other bytes here than were committed (actor/model.safetensors); what differs" in error
    assert "device another processor → " in error and error.count("\n") == 1
    assert set(weights(store, "tiny", 3).values()) == {False}


def test_every_zero(trained, tmp_path, capsys):
    assert train(trained[0], tmp_path, "--set", "checkpoints.every=0") == 2
    assert "checkpoints.every" in capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
def test_kill_9_anywhere_with_snapshots(controlled, tmp_path, name):
    """States whose weights were never written are gone on from."""
    folder = write_control(tmp_path / name, **RUNS[name] | {"checkpoints": {"every": 3}})
    kill_anywhere(folder, controlled[1], name, "ppo", tmp_path)


def test_retention_keeps_what_later_iterations_are_made_from(trained, tmp_path):
    """The newest snapshot stays until there is another; what has gone is restored from the one before it."""
    assert train(trained[0], tmp_path, "--iterations", "7", "--set", "checkpoints.every=3", "--set", "retention.keep_last=1",
                 "--set", "retention.drop=actor", "--set", "retention.keep_best=false") == 0
    there = {i: set(weights(tmp_path, "tiny", i).values()) for i in range(1, 8)}
    assert there == {i: {i == 7} for i in range(1, 8)}
    run = open_run(Store(tmp_path), "tiny")
    assert restore(run.store, run.state(4).actor) == [1, 2, 3, 4]


def test_a_file_of_tensors_is_safetensors_own():
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    tensors = {f"{dtype}.é\"{name}": (10 * torch.randn(3, 2)).to(dtype) for dtype in DTYPES for name in ("b", "a")}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    assert b"".join(tensor_file(tensors, {"format": "pt"})) == save(tensors, {"format": "pt"})
    transposed = torch.randn(4, 5).t()
    assert b"".join(tensor_file({"x": transposed})) == save({"x": transposed.contiguous()})
