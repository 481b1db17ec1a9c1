"""An update by several processes: the numbers of one process, the same bytes again, and a rank that is lost."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import assert_same_bytes
from pool import language_example
from safetensors.numpy import load_file
from test_shards import forget_the_iteration

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store

FIXED = ("--set", "execution.threads=1", "--set", "tracking.enabled=false", "--set", "evaluate.every=0", "--quiet")
LORA = ("lora.rank=2", "ppo.ptx_coef=0.1", "data.pretraining=pretraining.jsonl", "ppo.recompute_old_logprobs=true",
        "ppo.target_kl=10")


def train(folder, store, *settings, iterations=1, code=0):
    more = [word for setting in settings for word in ("--set", setting)]
    assert run_command(["train", str(folder), "--store", str(store), "--iterations", str(iterations), *FIXED, *more]) == code
    return open_run(Store(str(store)), folder.name) if code == 0 else None


@pytest.fixture(scope="module", params=["full", "lora"])
def prepared(request, trained, tmp_path_factory):
    """The tiny example and a store with the first iteration of it, by one process; the settings that it was made with."""
    place, settings = tmp_path_factory.mktemp("prepared"), LORA if request.param == "lora" else ()
    folder = place / "tiny"
    if request.param == "lora":
        language_example(folder, iterations=1, seed=3)  # adapters are over a model that has learned something
    else:
        shutil.copytree(trained[0], folder)
    (folder / "pretraining.jsonl").write_text('{"text": "The soup was warm."}\n{"text": "A fine evening, and late."}\n')
    train(folder, place / "store", *settings)
    return folder, place / "store", settings


def weights(run, iteration=1):
    """File → tensors of the update's artifact."""
    ref = run.state(iteration).artifacts["ppo"]
    return {path: load_file(run.store.folder(ref, str(Path(path).parent)) / Path(path).name)
            for path in run.store.manifest(ref).digests() if path.endswith(".safetensors")}


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_update_by_ranks_is_that_of_one_process(prepared, tmp_path, ranks, capsys):
    folder, store, settings = prepared
    alone, again = open_run(Store(str(store)), "tiny"), tmp_path / "store"
    shutil.copytree(store, again)
    forget_the_iteration(again)
    run = train(folder, again, *settings, f"execution.ranks={ranks}", "execution.micro_batch_tokens=64")
    assert run.state(1).artifacts["gae"] == alone.state(1).artifacts["gae"]
    ours = {name: value for name, value in run.state(1).metrics.items() if name.startswith("ppo/")}
    theirs = {name: value for name, value in alone.state(1).metrics.items() if name.startswith("ppo/")}
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6) and ours["ppo/grad_norm_actor"] > 0
    before = weights(alone)
    assert any("actor" in path for path in before) and any("optimizer" in path for path in before)
    for path, tensors in weights(run).items():
        for name, values in tensors.items():
            np.testing.assert_allclose(values, before[path][name], rtol=1e-4, atol=1e-5, err_msg=f"{path} {name}")
    capsys.readouterr()
    assert run_command(["stage", "ppo", "tiny", "--iteration", "1", "--store", str(again)]) == 0
    assert "reproduced" in capsys.readouterr().out


def test_sft_and_reward_model_by_ranks(trained, tmp_path):
    """48 demonstrations and 24 pairs divide into the batches of 8, so that none is filled up."""
    alone, run = open_run(Store(str(trained[1])), "tiny"), train(trained[0], tmp_path / "store", "execution.ranks=2")
    for stage, role in (("sft", "actor"), ("reward_model", "reward_model")):
        stores = [(each.store, each.state(0).artifacts[stage]) for each in (run, alone)]
        ours, theirs = (store.manifest(ref).metrics for store, ref in stores)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        weights, expected = (load_file(store.folder(ref, role) / "model.safetensors") for store, ref in stores)
        for name, values in weights.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_was_not_kept_is_made_again_by_ranks(trained, tmp_path, capsys):
    whole = train(trained[0], tmp_path / "whole", "execution.ranks=2", iterations=3)
    between = train(trained[0], tmp_path / "between", "execution.ranks=2", "checkpoints.every=3", iterations=3)
    assert_same_bytes(between, whole)
    assert run_command(["restore", "tiny", "--iteration", "2", "--store", str(tmp_path / "between")]) == 0
    assert "by the updates 1 to 2" in capsys.readouterr().out
    assert between.store.holds_weights(between.state(2).actor.artifact)
    assert not verify(between.store, "tiny")[1]


def test_a_rank_that_is_killed(trained, tmp_path):
    """The update is made again, to the bytes of one in which none was killed."""
    settings = ("execution.ranks=2", "ppo.epochs=40")
    whole = train(trained[0], tmp_path / "whole", *settings)
    command = [sys.executable, "-m", "flows.cli.main", "train", str(trained[0]), "--store", str(tmp_path / "killed"),
               "--iterations", "1", *FIXED, *(word for setting in settings for word in ("--set", setting))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    victim = until(lambda: the_rank(process.pid, tmp_path / "killed"), process)
    victim.send_signal(signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert f"rank 1 of 2, process {victim.pid}, has ended, killed or out of memory; it is made again" in said
    assert_same_bytes(open_run(Store(str(tmp_path / "killed")), "tiny"), whole)


def the_rank(parent, store):
    """The process beside rank 0, once it is at work on the update."""
    attempts = list(store.glob("artifacts/gae/*/manifest.json"))
    children = [child for child in psutil.Process(parent).children() if "spawn_main" in " ".join(child.cmdline())]
    busy = [child for child in children if child.cpu_times().user > 3]
    return busy[0] if attempts and busy else None


def until(ready, process):
    deadline = time.monotonic() + 240
    while not (found := ready()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_loss_that_is_not_finite_in_one_of_them(trained, tmp_path, capsys):
    train(trained[0], tmp_path / "store", "execution.ranks=2", "ppo.learning_rate=1e30", code=1)
    error = capsys.readouterr().err
    assert "lower ppo.learning_rate=1e+30" in error and "nothing was committed" in error
    assert not list((tmp_path / "store").glob("artifacts/ppo/*/manifest.json"))


def test_a_batch_that_does_not_divide(trained, tmp_path, capsys):
    train(trained[0], tmp_path / "store", "execution.ranks=3", code=2)
    assert "execution.ranks=3: sft.batch_size=8 does not divide into as many" in capsys.readouterr().err


def test_ranks_that_cannot_be(controlled, tmp_path, capsys):
    place, _ = controlled
    folder = next(path for path in sorted(place.iterdir()) if (path / "config.yaml").is_file())
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set", "execution.ranks=2"]) == 2
    assert "execution.ranks=2: the networks of a control task are too small" in capsys.readouterr().err
