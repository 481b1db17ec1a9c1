"""Stages in shards: the same samples whatever their number, and one that is lost is made again alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.artifacts import Shard
from schemas.presets import merged
from schemas.tables import ReferenceLogprobs, Rewards, Rollouts, Samples, Values

FIXED = ("--set", "execution.threads=1", "--set", "tracking.enabled=false", "--iterations", "1", "--quiet")
TABLES = {"rollout": Rollouts, "reference": ReferenceLogprobs, "reward": Rewards, "value": Values,
          "evaluate": Samples}


def train(folder, store, *settings, code=0):
    more = [word for setting in settings for word in ("--set", setting)]
    assert run_command(["train", str(folder), "--store", str(store), *FIXED, *more]) == code
    return open_run(Store(str(store)), folder.name) if code == 0 else None


def tables(run):
    """Of the first iteration; of evaluations that of state 0, whose weights are the same bytes."""
    artifacts = run.state(1).artifacts | {"evaluate": run.state(0).artifacts["evaluate"]}
    return {stage: run.store.table(artifacts[stage], kind) for stage, kind in TABLES.items()}


def digests(run):
    return {stage: run.store.manifest(ref).digests() for stage, ref in run.state(1).artifacts.items()}


def shards_in(store, stage):
    """Index of each shard of a stage → its manifest's file."""
    found = {}
    for file in (Path(store) / "artifacts" / stage).glob("*/manifest.json"):
        if shard := json.loads(file.read_text())["recipe"]["config"].get("shard"):
            found[shard["index"]] = file
    return found


@pytest.fixture(scope="module")
def prepared(trained, tmp_path_factory):
    """A store with the tiny run's state 0, computed with one thread."""
    store = tmp_path_factory.mktemp("prepared") / "store"
    assert run_command(["train", str(trained[0]), "--store", str(store), *FIXED[:4], "--iterations", "1", "--quiet"]) == 0
    return trained[0], store


@pytest.fixture(scope="module")
def in_shards(prepared, tmp_path_factory):
    """Number of shards → the run that was made with as many."""
    folder, store = prepared
    runs = {1: open_run(Store(str(store)), "tiny")}
    for count in (2, 4):
        again = tmp_path_factory.mktemp(f"shards-{count}") / "store"
        shutil.copytree(store, again)
        forget_the_iteration(again)
        runs[count] = train(folder, again, f"execution.shards={count}")
    return runs


def forget_the_iteration(store):
    """Leaves what comes before the first iteration."""
    shutil.rmtree(store / "runs" / "tiny")
    for stage in (*TABLES, "gae", "ppo"):
        shutil.rmtree(store / "artifacts" / stage)  # the evaluation of state 0 too


@pytest.mark.parametrize("count", [2, 4])
def test_the_tables_do_not_depend_on_the_number_of_shards(in_shards, count):
    whole, cut = tables(in_shards[1]), tables(in_shards[count])
    assert np.array_equal(whole["rollout"].response_tokens.values, cut["rollout"].response_tokens.values)
    for name in ("response", "finish_reason"):
        assert getattr(whole["rollout"], name) == getattr(cut["rollout"], name)
    for stage, table in whole.items():
        for name, values in vars(table).items():
            other = getattr(cut[stage], name)
            if isinstance(values, np.ndarray):
                summed = table.response_length if (stage, name) == ("evaluate", "kl") else 1  # tokens' float32 logprobs
                assert np.allclose(values, other, atol=1e-6 * summed), (stage, name)
            elif hasattr(values, "offsets"):
                assert np.array_equal(values.offsets, other.offsets), (stage, name)
                assert np.allclose(values.values, other.values, atol=1e-6), (stage, name)
    before, after = (run.state(1).metrics for run in (in_shards[1], in_shards[count]))
    assert before.keys() == after.keys() and before == pytest.approx(after, abs=1e-4)


def test_each_shard_is_an_artifact_of_its_rows(in_shards):
    run = in_shards[4]
    whole = tables(run)["rollout"]
    for index, file in shards_in(run.store.uri, "rollout").items():
        ref = next(ref for ref in run.store.artifacts() if ref.identity == file.parent.name)
        part, rows = run.store.table(ref, Rollouts), Shard(index=index, of=4).rows(len(whole), 1)
        assert part.response == whole.response[rows] and list(part.row_id) == list(range(rows.start, rows.stop))
    assert sorted(shards_in(run.store.uri, "reward")) == [0, 1, 2, 3]


def test_a_stage_in_shards_is_made_again_to_the_same_bytes(in_shards, capsys):
    for stage in TABLES:
        assert run_command(["stage", stage, "tiny", "--iteration", "1", "--store", in_shards[4].store.uri]) == 0
        assert "reproduced" in capsys.readouterr().out


@pytest.fixture
def begun(prepared, tmp_path):
    """A store in which the first iteration is to be made."""
    store = tmp_path / "store"
    shutil.copytree(prepared[1], store)
    forget_the_iteration(store)
    return store


@pytest.mark.parametrize("runner", ["processes", "ray"])
def test_workers_give_the_bytes_of_one_process(in_shards, prepared, begun, runner, capsys):
    run = train(prepared[0], begun, "execution.shards=4", f"execution.runner={runner}", "execution.workers=2")
    assert digests(run) == digests(in_shards[4])
    capsys.readouterr()
    assert run_command(["show", "tiny", "--store", str(begun), "--json"]) == 0
    shards = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["shards"]}
    assert set(shards) == set(TABLES) and {row["shards"] for row in shards.values()} == {4}
    seconds = [json.loads(file.read_text())["seconds"] for _, file in sorted(shards_in(begun, "rollout").items())]
    row = shards["rollout"]
    assert row["slowest_seconds"] == max(seconds) and seconds[row["slowest"] - 1] == max(seconds)
    assert row["idle"] == pytest.approx(1 - np.mean(seconds) / max(seconds))


@pytest.fixture
def cluster():
    """A Ray cluster of two machines, each with room for one worker, as far as one machine can be two: its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield cluster
    cluster.shutdown()


KILLER = '''
import os, pathlib, signal, sys


def score(prompts, responses):
    """Kills the process of a shard the first time that one asks."""
    flag = pathlib.Path("{flag}")
    if os.getpid() != {driver} and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(response)) for response in responses]
'''


@pytest.mark.parametrize("runner", ["processes", "ray"])
def test_a_process_that_is_killed_costs_its_shard(prepared, tmp_path, monkeypatch, runner, request):
    """The others are not made again, and the result is that of a run in which none was killed."""
    monkeypatch.setattr("flows.orchestration.tasks.RETRY_DELAYS", (0, 0, 0))
    folder, results = shutil.copytree(prepared[0], tmp_path / "tiny"), []
    (folder / "killer.py").write_text(KILLER.format(flag=tmp_path / "flag", driver=os.getpid()))
    settings = ["reward.components={length: {source: 'killer.py:score'}}", "execution.shards=3",
                f"execution.runner={runner}"]
    settings += ["execution.workers=1"] if runner == "processes" else [
        f"execution.ray_address={request.getfixturevalue('cluster').address}"]
    for name in ("killed", "whole"):
        results.append(train(folder, tmp_path / name, *settings))
    assert digests(results[0]) == digests(results[1]) and (tmp_path / "flag").exists()
    assert sorted(shards_in(tmp_path / "killed", "reward")) == [0, 1, 2]
    attempts = [len(list(file.parent.glob("attempts/*"))) for _, file in sorted(
        shards_in(tmp_path / "killed", "rollout").items())]
    assert attempts == [1, 1, 1]  # what was committed was found


IN_EACH_STAGE = '''
import os, pathlib, signal
from flows.store.attempt import Attempt

seal, flags = Attempt.seal, pathlib.Path("{flags}")


def killed_once(attempt):
    """What is computed is lost: the process of the first shard of each stage dies before it is written."""
    flag = flags / attempt.ref.stage
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return seal(attempt)
    os.kill(os.getpid(), signal.SIGKILL)


if os.getpid() != {driver}:
    Attempt.seal = killed_once
'''


def test_a_process_is_killed_in_each_stage(in_shards, prepared, begun, tmp_path, monkeypatch):
    """The other shards are not made again, and all bytes are those of a run in which none was killed."""
    monkeypatch.setattr("flows.orchestration.tasks.RETRY_DELAYS", (0, 0, 0))
    (tmp_path / "flags").mkdir()
    (tmp_path / "site").mkdir()
    code = IN_EACH_STAGE.format(flags=tmp_path / "flags", driver=os.getpid())
    (tmp_path / "site" / "sitecustomize.py").write_text(code)  # every Python that is begun imports it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "site"), str(Path(__file__).parents[1]))))
    run = train(prepared[0], begun, "execution.shards=4", "execution.runner=processes", "execution.workers=2")
    assert {file.name for file in (tmp_path / "flags").iterdir()} == set(TABLES)
    assert digests(run) == digests(in_shards[4])
    for stage in TABLES:
        tries = sorted(len(list(file.parent.glob("attempts/*"))) for file in shards_in(begun, stage).values())
        assert tries == [1, 1, 1, 1], stage  # the killed one had written nothing


@pytest.mark.parametrize("address, words", [
    ("127.0.0.1:9", "execution.ray_address=127.0.0.1:9: no Ray cluster answers there (["),
    ("127.0.0.1:99999", "execution.ray_address=127.0.0.1:99999: no Ray cluster answers there ("),
    ("nowhere", "execution.ray_address='nowhere': expected HOST:PORT, as ray start --head prints it"),
])
def test_a_cluster_that_is_not_there(prepared, begun, capsys, address, words):
    train(prepared[0], begun, "execution.shards=2", "execution.runner=ray", f"execution.ray_address={address}", code=2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_ray_is_not_installed(prepared, begun, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    train(prepared[0], begun, "execution.shards=2", "execution.runner=ray", code=2)
    words = "execution.runner=ray: ray is not installed; pip install 'baton-ppo[ray]' here and on all machines of the"
    assert words in capsys.readouterr().err


SLEEPER = '''
import multiprocessing, os, pathlib, time


def score(prompts, responses):
    """Sleeps in the process of a shard, until the flag is gone."""
    flag = pathlib.Path("{flag}")
    while multiprocessing.parent_process() is not None and flag.exists():
        flag.write_text(str(os.getpid()))
        time.sleep(0.1)
    return [float(len(response)) for response in responses]
'''


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_ends_leaves_no_process(prepared, tmp_path, number, code):
    """However it ends; and the same command goes on."""
    folder, flag, store = shutil.copytree(prepared[0], tmp_path / "tiny"), tmp_path / "flag", tmp_path / "store"
    (folder / "sleeper.py").write_text(SLEEPER.format(flag=flag))
    settings = ("reward.components={length: {source: 'sleeper.py:score'}}", "execution.shards=2", "execution.workers=2",
                "execution.runner=processes")
    flag.touch()
    command = [sys.executable, "-m", "flows.cli.main", "train", str(folder), "--store", str(store), *FIXED,
               *(word for setting in settings for word in ("--set", setting))]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: flag.read_text(), process)
        worker = psutil.Process(int(flag.read_text()))
        process.send_signal(number)
        assert process.wait(60) == code
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    flag.unlink()
    run = train(folder, store, *settings)
    assert run.last().iteration == 1 and sorted(shards_in(store, "reward")) == [0, 1]


def until(ready, process):
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_what_was_made_elsewhere_is_made_again_here(prepared, begun, capsys):
    """Its settings are not those of the run: others read each iteration's weights, and the run keeps every third."""
    train(prepared[0], begun, "checkpoints.every=3", "execution.shards=2")
    again = ("execution.shards=2", "execution.runner=processes", "checkpoints.every=1")
    assert run_command(["train", str(prepared[0]), "--store", str(begun), *FIXED[:4], "--iterations", "2", "--quiet",
                        *(word for setting in again for word in ("--set", setting))]) == 0
    capsys.readouterr()
    for stage in ("value", "gae"):
        assert run_command(["stage", stage, "tiny", "--iteration", "2", "--store", str(begun)]) == 0
        assert "reproduced" in capsys.readouterr().out


def test_another_placement_takes_the_place_of_the_one_before():
    placed = {"execution": {"placement": {"rollout": "gpu"}, "threads": 1}}
    assert merged(placed, {"execution": {"placement": {}}}) == {"execution": {"placement": {}, "threads": 1}}
    assert merged(placed, {"execution": {"placement": {"ppo": "cpu"}}})["execution"]["placement"] == {"ppo": "cpu"}


def test_rows_are_cut_evenly_and_groups_stay_together():
    shards = [Shard(index=i, of=3) for i in range(3)]
    assert [each.rows(10) for each in shards] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert [each.rows(12, 4) for each in shards] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert [each.rows(8, 4) for each in shards] == [slice(0, 0), slice(0, 4), slice(4, 8)]


@pytest.mark.parametrize("setting, words", [
    ("execution.shards=99", "execution.shards=99: a batch has 8 prompts"),
    ("execution.shards=7", "execution.shards=7: there are 6 held-out prompts to be evaluated; take at most as many"),
    ("execution.runner=slurm", "execution.runner: should be 'inline', 'processes', 'ray' or 'prefect', found"),
    (["execution.runner=processes", "checkpoints.every=5"], "checkpoints.every=5 does not write them; set it to 1"),
    (["execution.placement={ppo: gpu}", "checkpoints.every=5"], "execution.placement: other processes read each"),
    ("execution.placement={gea: gpu}", "execution.placement: no stage gea; there are base_model, sft, "),
])
def test_what_cannot_be_sharded(trained, tmp_path, capsys, setting, words):
    train(trained[0], tmp_path / "store", *([setting] if isinstance(setting, str) else setting), code=2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
