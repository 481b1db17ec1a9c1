"""What is done to a store as a whole: garbage, retention, removal, forks and what two runs differ in."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import rewrite
from control import write_control
from test_stage import answer

from flows.cli.main import run_command
from flows.runs.run import open_run, references
from flows.runs.verify import verify
from flows.store.attempt import folder_of
from flows.store.store import Store, attempt_of
from schemas.errors import DroppedError
from schemas.tables import Advantages


def baton(store, *arguments):
    return run_command([*map(str, arguments), "--store", str(store)])


def bytes_of(root):
    return {path.relative_to(root): path.read_bytes() for path in Path(root).rglob("*")
            if path.is_file() and path.name != "lease"}


@pytest.fixture(scope="module")
def five(tmp_path_factory, prefect_server):
    """A control run of five iterations: (its folder, its store)."""
    folder = write_control(tmp_path_factory.mktemp("five") / "small", iterations=5, rollout={"num_steps": 8},
                           policy={"hidden": [4]}, tracking={"enabled": False})
    store = folder.parent / "store"
    assert baton(store, "train", folder, "--quiet") == 0
    return folder, store


@pytest.fixture
def own(five, tmp_path):
    """The same in a store that a test may change."""
    shutil.copytree(five[1], tmp_path / "store")
    return five[0], tmp_path / "store"


# --- gc ---

def test_gc_removes_what_nothing_refers_to_and_nothing_else(own, capsys):
    """An artifact of no run, an attempt that was broken off, a record half written; a dry run first."""
    _, root = own
    before = bytes_of(root)
    assert baton(root, "stage", "gae", "small", "--iteration", "2", "--set", "gae.gae_lambda=0.5") == 0
    (other,) = {*Store(root).artifacts()} - {*references(open_run(Store(root), "small"))}
    broken = root / folder_of(other) / "attempts" / "broken"
    broken.mkdir()
    (broken / "half.parquet").write_bytes(b"x" * 100)
    (root / folder_of(references(open_run(Store(root), "small"))[0]) / "attempts" / "empty").mkdir()
    (root / f"runs/small/iterations/000006.json.{'a' * 32}.tmp").write_bytes(b"{")
    full = bytes_of(root)
    capsys.readouterr()

    code, said = answer(capsys, "gc", "--store", root)
    assert (code, said["found"]) == (0, []) and bytes_of(root) == full  # all of it is younger than a day
    code, said = answer(capsys, "gc", "--dry-run", "--older-than", "0", "--store", root)
    assert (code, said["removed"]) == (0, False) and bytes_of(root) == full
    assert sorted(one["kind"] for one in said["found"]) == ["artifact", "attempt", "unfinished"]
    code, again = answer(capsys, "gc", "--older-than", "0", "--store", root)
    assert (code, again["removed"], again["found"]) == (0, True, said["found"]) and bytes_of(root) == before
    assert verify(Store(root), None)[1] == [] and not list(root.rglob("empty"))


@pytest.mark.parametrize("command", [["gc"], ["gc", "--dry-run"], ["verify"]])
def test_a_store_that_is_not_there_is_no_clean_store(tmp_path, command, capsys):
    assert run_command([*command, "--store", str(tmp_path / "stroe")]) == 2
    assert f"store {tmp_path / 'stroe'}: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_gc_leaves_what_a_running_iteration_has_committed(own):
    """While a run is being worked on, what is younger than its last state stays, however old that is."""
    _, root = own
    store = Store(root)
    run = open_run(store, "small")
    last = root / "runs/small/iterations/000005.json"
    last.unlink()
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 10 * 86400,) * 2)
    for ref in (run.state(4).artifacts["ppo"],):
        os.utime(root / folder_of(ref))
    unsaved = {ref for ref in store.artifacts()} - {*references(open_run(store, "small"))}
    for ref in unsaved:
        for path in (root / folder_of(ref)).rglob("*"):
            os.utime(path, (time.time() - 9 * 86400,) * 2)
    with store.files.exclusive("runs/small/lease", b"somebody", lambda _: None):
        assert baton(root, "gc", "--quiet") == 0
        assert {*Store(root).artifacts()} >= unsaved and len(unsaved) == 4
        for ref in unsaved:  # and if they are old: a run that goes on may just have found them
            for path in (root / folder_of(ref)).rglob("*"):
                os.utime(path, (time.time() - 20 * 86400,) * 2)
        assert baton(root, "gc", "--quiet", "--older-than", "0") == 0
        assert {*Store(root).artifacts()} >= unsaved
        assert baton(root, "rm", "small") == 2
    assert baton(root, "gc", "--quiet") == 0
    assert not {*Store(root).artifacts()} & unsaved


def test_gc_removes_nothing_where_it_cannot_tell_what_is_needed(own, capsys):
    """A manifest that a run refers to is gone: its files are all there is of the artifact. A stray file is no run."""
    _, root = own
    (root / "runs" / "notes.txt").write_text("mine")
    (root / "mine.tmp").write_text("mine")
    (root / "artifacts" / "gae" / ("z" * 64)).mkdir()
    assert baton(root, "gc", "--older-than", "0") == 0 and (root / "mine.tmp").exists()
    ref = open_run(Store(root), "small").state(2).artifacts["rollout"]
    (root / folder_of(ref) / "manifest.json").unlink()
    before = bytes_of(root)
    assert baton(root, "gc", "--older-than", "0") == 1 and bytes_of(root) == before
    assert f"{ref.short} is not in" in capsys.readouterr().err
    assert baton(root, "rm", "notes.txt") == 2 and "no run 'notes.txt'" in capsys.readouterr().err
    assert baton(root, "verify") == 1


def test_rm_and_gc_leave_what_another_run_shares(own, capsys):
    folder, root = own
    assert baton(root, "fork", "small", "--at", "3", "--run", "other") == 0
    assert baton(root, "rm", "small") == 0
    before = {*references(open_run(Store(root), "other"))}
    assert baton(root, "gc", "--older-than", "0") == 0
    assert {*Store(root).artifacts()} == before and verify(Store(root), None)[1] == []
    assert baton(root, "train", "--run", "other", "--quiet") == 0
    assert baton(root, "rm", "other") == 0 and baton(root, "gc", "--older-than", "0") == 0
    assert Store(root).artifacts() == [] and baton(root, "train", folder, "--quiet") == 0
    assert baton(root, "rm", "nobody") == 2 and "runs there: small" in capsys.readouterr().err


# --- retention ---

def parts(root, run, iteration):
    ref = open_run(Store(root), run).state(iteration).artifacts["ppo"]
    return sorted(Store(root).files.names(attempt_of(Store(root).manifest(ref))))


ALL = ["actor", "critic", "optimizer"]


@pytest.mark.parametrize("drop, left", [("optimizer", ["actor", "critic"]), ("critic", ["actor"]), ("actor", [])])
def test_retention_keeps_the_last_and_every_so_many(five, tmp_path, drop, left, capsys):
    folder, root = five[0], tmp_path / "store"
    settings = [f"--set=retention.{one}" for one in ("keep_last=1", "keep_every=3", "keep_best=false", f"drop={drop}")]
    assert baton(root, "train", folder, "--quiet", *settings) == 0
    assert [parts(root, "small", i) for i in (1, 2, 3, 4, 5)] == [left, left, ALL, left, ALL]
    assert verify(Store(root), None)[1] == []
    mine, whole = open_run(Store(root), "small"), open_run(Store(five[1]), "small")
    assert [s.artifacts for s in mine.states()] == [s.artifacts for s in whole.states()]
    with pytest.raises(DroppedError, match="is not kept any more: retention of run 'small' dropped it"):
        mine.store.folder(mine.state(2).optimizer.artifact, "optimizer")
    assert baton(root, "restore", "small", "--iteration", "2") == 0 and parts(root, "small", 2) == ALL
    assert parts(root, "small", 1) == left and baton(root, "gc") == 0 and parts(root, "small", 2) == left
    assert baton(root, "fork", "small", "--at", "2", "--run", "x") == 0
    assert baton(root, "train", "--run", "x", "--quiet") == 0
    assert verify(Store(root), None)[1] == []


def test_what_is_kept_elsewhere_stays_and_an_interrupted_drop_is_finished(own, capsys):
    folder, root = own
    assert baton(root, "fork", "small", "--at", "2", "--run", "fork") == 0
    setting = ("--set=retention.keep_last=1", "--set=retention.keep_best=false")
    assert baton(root, "train", folder, "--quiet", "--iterations", "6", *setting) == 0
    assert [parts(root, "small", i) for i in range(1, 7)] == [ALL, ALL, *[["actor", "critic"]] * 3, ALL]
    store = Store(root)
    ref = open_run(store, "small").state(3).artifacts["ppo"]
    back = root / attempt_of(store.manifest(ref)) / "optimizer"
    back.mkdir()  # as if somebody had been killed between saying so and doing it
    (back / "adamw.safetensors").write_bytes(b"")
    assert baton(root, "train", folder, "--quiet", "--iterations", "7", *setting) == 0
    assert parts(root, "small", 3) == ["actor", "critic"] and verify(Store(root), None)[1] == []


def test_gc_holds_to_the_retention_a_run_was_made_with(five, tmp_path, capsys):
    folder, root = five[0], tmp_path / "store"
    made = ("--set=retention.keep_last=2", "--set=retention.keep_best=false")
    assert baton(root, "train", folder, "--quiet", *made) == 0
    assert baton(root, "train", folder, "--quiet", "--iterations", "7") == 0  # keeps all, in this call
    assert parts(root, "small", 5) == ALL
    code, said = answer(capsys, "gc", "--store", root)
    assert code == 0 and [one["kind"] for one in said["found"]] == ["optimizer"] * 2
    assert [parts(root, "small", i) for i in (5, 6, 7)] == [["actor", "critic"], ALL, ALL]


def test_the_best_checkpoint_so_far_is_kept(five, tmp_path, capsys):
    """While it is the best, in one process or in many; by gc too, and by the metric that is named."""
    folder, root = five[0], tmp_path / "store"
    setting = ("--set=retention.keep_last=1", "--set=tracking.best=rollout/value_std", "--set=retention.drop=actor")
    whole = open_run(Store(five[1]), "small")
    values = [state.metrics.get("rollout/value_std") for state in whole.states()]
    best = [max(range(1, i + 1), key=lambda j: (values[j], j)) for i in range(1, 6)]
    assert len(set(best)) > 1 and best[-1] != 5, values  # it moves, and is not the last
    for last in range(1, 6):
        assert baton(root, "train", folder, "--quiet", "--iterations", last, *setting) == 0
        run = open_run(Store(root), "small")
        assert run.state(last).best.iteration == best[last - 1] and run.state(last).best.value == values[best[last - 1]]
        assert [i for i in range(1, last + 1) if parts(root, "small", i) == ALL] == sorted({best[last - 1], last})
    assert baton(tmp_path / "at-once", "train", folder, "--quiet", *setting) == 0
    once = open_run(Store(tmp_path / "at-once"), "small")
    assert [state.best for state in once.states()] == [state.best for state in run.states()]
    assert baton(root, "gc", "--older-than", "0") == 0 and parts(root, "small", best[-1]) == ALL
    assert baton(root, "train", folder, "--quiet", "--iterations", "6", *setting[:1], "--set=retention.drop=actor") == 0
    assert open_run(Store(root), "small").state(6).best.metric == "evaluate/episode_return"  # another was asked for


def test_the_best_of_a_run_whose_states_do_not_say_it_is_kept(own):
    """As those of older formats."""
    folder, root = own
    for path in (root / "runs" / "small" / "iterations").iterdir():
        rewrite(path, lambda data: (data.pop("best"), data.update(format_version=3)))
    run = open_run(Store(root), "small")
    values = [state.metrics.get("rollout/value_std", -1) for state in run.states()]
    best = max(range(6), key=lambda i: (values[i], i))
    assert best not in (0, 5)
    setting = ("--set=retention.keep_last=1", "--set=tracking.best=rollout/value_std")
    assert baton(root, "train", folder, "--quiet", "--iterations", "6", *setting) == 0
    assert open_run(Store(root), "small").state(6).best.iteration == best
    assert [i for i in range(1, 7) if parts(root, "small", i) == ALL] == [best, 6]


def test_a_best_that_nothing_measures_is_refused(five, tmp_path, capsys):
    assert baton(tmp_path / "store", "train", five[0], "--set=tracking.best=evaluate/episode_retrun") == 2
    assert ("tracking.best='evaluate/episode_retrun': no stage of this run measures it; near it are "
            "evaluate/episode_return") in capsys.readouterr().err


# --- fork and diff ---

def test_a_fork_with_nothing_changed_makes_the_parents_checkpoints_again(own, capsys):
    """In a store that has nothing of the parent after the fork: all of it is computed, to the same bytes."""
    _, root = own
    parent = open_run(Store(root), "small")
    expected = {i: parent.store.manifest(parent.state(i).artifacts["ppo"]).digests() for i in (3, 4, 5)}
    assert baton(root, "fork", "small", "--at", "2", "--run", "again") == 0
    for iteration in (3, 4, 5):
        for ref in parent.state(iteration).artifacts.values():
            shutil.rmtree(root / folder_of(ref), ignore_errors=True)
    assert baton(root, "train", "--run", "again", "--quiet") == 0
    fork = open_run(Store(root), "again")
    assert fork.record.parent == "small@2"
    assert {i: fork.store.manifest(fork.state(i).artifacts["ppo"]).digests() for i in (3, 4, 5)} == expected
    capsys.readouterr()
    assert baton(root, "diff", "small", "again") == 0
    assert "the same bytes in all 6 states" in capsys.readouterr().out


@pytest.mark.parametrize("setting, stage, file, column, named", [
    ("gae.gae_lambda=0.5", "gae", "advantages.parquet", "raw_advantages", "gae_lambda: 0.95 → 0.5"),
    ("ppo.learning_rate=0.001", "ppo", "actor/model.safetensors", "head.bias", "learning_rate: 0.01 → 0.001"),
])
def test_diff_names_the_first_stage_and_column_that_part(own, capsys, setting, stage, file, column, named):
    _, root = own
    assert baton(root, "fork", "small", "--at", "2", "--run", "other", "--set", setting) == 0
    assert baton(root, "train", "--run", "other", "--quiet") == 0
    capsys.readouterr()
    code, said = answer(capsys, "diff", "small", "other", "--store", root)
    assert code == 0
    assert (said["iteration"], said["stage"], said["file"], said["column"]) == (3, stage, file, column)
    assert named in said["settings"] and said["inputs"] == [] and said["a"] != said["b"]
    if stage == "gae":
        tables = [Store(root).table(open_run(Store(root), name).state(3).artifacts["gae"], Advantages)
                  for name in ("small", "other")]
        a, b = (table.raw_advantages[said["row"]][said["place"]] for table in tables)
        assert (str(a), str(b)) == (said["a"], said["b"])
    assert baton(root, "diff", "small", "other") == 0
    shown = capsys.readouterr().out
    assert f"differ first in iteration 3, stage {stage}: {file}" in shown and f"setting {named}" in shown


def test_a_language_models_fork_takes_the_new_beta(copied, capsys):
    """β is in the state; and the first table that parts is that of the KL penalty."""
    _, root = copied
    assert baton(root, "fork", "tiny", "--at", "1", "--run", "strict", "--set", "kl.coef=0.5") == 0
    run = open_run(Store(root), "strict")
    assert [state.kl_coef for state in run.states()] == [0.05, 0.5]
    assert baton(root, "train", "--run", "strict", "--quiet") == 0
    code, said = answer(capsys, "diff", "tiny", "strict", "--store", root)
    assert (code, said["iteration"], said["stage"], said["column"]) == (0, 2, "gae", "rewards")
    assert "kl_coef: 0.05 → 0.5" in said["settings"]


def test_a_fork_may_do_without_the_critic(copied):
    settings = [f"--set={one}" for one in ("gae.estimator=reinforce++", "value=null")]
    assert baton(copied[1], "fork", "tiny", "--at", "1", "--run", "plain", *settings) == 0
    assert open_run(Store(copied[1]), "plain").state(1).critic is None
    assert baton(copied[1], "train", "--run", "plain", "--quiet") == 0
    assert "value" not in open_run(Store(copied[1]), "plain").last().artifacts


@pytest.mark.parametrize("arguments, message", [
    (["--at", "9", "--run", "x"], "run 'tiny' has no iteration 9; it has 0…2"),
    (["--at", "1", "--run", "tiny"], "run 'tiny' exists; choose another name with --run, or baton rm tiny"),
    (["--at", "1", "--run", "../x"], "run name '../x'"),
    (["--at", "1", "--run", "x", "--set", "base_model.layers=2"], "base_model…: it belongs to the run as a whole"),
    (["--at", "1", "--run", "x", "--set", "sft.epochs=2"], "sft…: it was decided before the first iteration"),
    (["--at", "1", "--run", "x", "--set", "evaluate.judge=null"], "wins are over what the starting actor got"),
    (["--at", "1", "--run", "x", "--set", "ppo.epoch=2"], "ppo.epoch: unknown key; did you mean 'epochs'?"),
    (["--at", "1", "--run", "x", "--set", "reward.normalize=scale"], "reward.normalize: the run kept no running moments"),
])
def test_what_cannot_be_forked_is_said_and_makes_nothing(trained, arguments, message, capsys):
    assert baton(trained[1], "fork", "tiny", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in (trained[1] / "runs").iterdir()] == ["tiny"]


def test_a_fork_that_was_interrupted_is_made_anew(own, capsys):
    """Its states are there and its record is not: nobody takes it for a run."""
    folder, root = own
    shutil.copytree(root / "runs/small/iterations", root / "runs/half/iterations")
    assert baton(root, "train", folder, "--run", "half") == 2
    assert "run 'half' is not whole" in capsys.readouterr().err
    assert baton(root, "fork", "small", "--at", "1", "--run", "half") == 0
    assert open_run(Store(root), "half").iterations() == [0, 1]


def test_a_run_goes_on_by_its_name_alone(own, capsys):
    _, root = own
    assert baton(root, "train", "--run", "small", "--iterations", "6", "--quiet") == 0
    assert open_run(Store(root), "small").last().iteration == 6
    assert baton(root, "train", "--run", "small", "--set", "gae.gamma=0.5") == 2
    assert "baton fork small --at I --run NEW --set" in capsys.readouterr().err
    assert baton(root, "train", "--run", "nobody") == 2 and "no run 'nobody'" in capsys.readouterr().err
    assert baton(root, "train") == 2 and "name a CONFIG" in capsys.readouterr().err
    assert json.loads((root / "runs/small/run.json").read_text())["config"]["iterations"] == 5


def test_gc_says_what_it_leaves_since_it_is_young(own, capsys):
    store = own[1]
    assert run_command(["rm", "small", "--store", str(store)]) == 0
    capsys.readouterr()
    assert run_command(["gc", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert "0 things, 0 bytes removed" in out and "are younger than 24 hours, or a run is at work: --older-than 0" in out
    assert run_command(["gc", "--older-than", "0", "--store", str(store)]) == 0
    assert "more" not in capsys.readouterr().out
