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
import torch
from brought import make_model, write_brought
from conftest import assert_same_bytes
from pool import language_example
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store
from stages.ops import ranks as of_ranks

FIXED = ("--set", "execution.threads=1", "--set", "tracking.enabled=false", "--set", "evaluate.every=0", "--quiet")
OPTIONS = ("ppo.ptx_coef=0.1", "data.pretraining=pretraining.jsonl", "ppo.recompute_old_logprobs=true", "ppo.target_kl=10",
           "ppo.critic_warmup=1")
SETTINGS = {"full": (), "options": OPTIONS, "lora": ("lora.rank=2", *OPTIONS)}
FSDP = "execution.fsdp=true"


def train(folder, store, *settings, iterations=1, code=0):
    more = [word for setting in settings for word in ("--set", setting)]
    assert run_command(["train", str(folder), "--store", str(store), "--iterations", str(iterations), *FIXED, *more]) == code
    return open_run(Store(str(store)), folder.name) if code == 0 else None


@pytest.fixture(scope="module")
def prepared(request, trained, tmp_path_factory):
    """The tiny example and a store with two iterations of it, by one process; the settings that it was made with."""
    place, settings = tmp_path_factory.mktemp("prepared"), SETTINGS[request.param]
    folder = place / "tiny"
    if request.param == "lora":
        language_example(folder, iterations=1, seed=3)  # adapters are over a model that has learned something
    else:
        shutil.copytree(trained[0], folder)
    (folder / "pretraining.jsonl").write_text('{"text": "The soup was warm."}\n{"text": "A fine evening, and late."}\n')
    train(folder, place / "store", *settings, iterations=2)
    return folder, place / "store", settings


def weights(run, iteration):
    """File → tensors of the update's artifact."""
    ref = run.state(iteration).artifacts["ppo"]
    return {path: load_file(run.store.folder(ref, str(Path(path).parent)) / Path(path).name)
            for path in run.store.manifest(ref).digests() if path.endswith(".safetensors")}


def test_micro_batches_are_dealt(monkeypatch):
    def dealt(rank, count):
        monkeypatch.setattr(of_ranks, "rank", lambda: rank)
        return of_ranks.dealt(count)

    monkeypatch.setattr(of_ranks, "size", lambda: 4)
    assert [dealt(rank, 5) for rank in range(4)] == [[(0, True), (4, True)], [(1, True)], [(2, True)], [(3, True)]]
    with of_ranks.in_step():
        assert [dealt(rank, 5) for rank in range(4)] == [
            [(0, True), (4, True)], [(1, True), (1, False)], [(2, True), (2, False)], [(3, True), (3, False)]]
        assert [dealt(rank, 1) for rank in range(4)] == [[(0, True)], [(0, False)], [(0, False)], [(0, False)]]
        assert dealt(2, 0) == []
    assert dealt(2, 1) == []


def forget_the_second_update(store):
    run = open_run(Store(str(store)), "tiny")
    shutil.rmtree(store / "artifacts" / "ppo" / run.state(2).artifacts["ppo"].identity)
    (store / "runs" / "tiny" / "iterations" / "000002.json").unlink()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("prepared", "more"), [("full", ()), ("lora", ()), ("full", (FSDP,)),
                                               ("options", (FSDP, "execution.gradient_checkpointing=true"))],
                         indirect=["prepared"])
def test_an_update_by_ranks_is_that_of_one_process(prepared, more, ranks, tmp_path, capsys):
    """The second one, which begins with moments."""
    folder, store, settings = prepared
    alone, again = open_run(Store(str(store)), "tiny"), tmp_path / "store"
    shutil.copytree(store, again)
    forget_the_second_update(again)
    run = train(folder, again, *settings, *more, f"execution.ranks={ranks}", "execution.micro_batch_tokens=64", iterations=2)
    assert run.state(2).artifacts["gae"] == alone.state(2).artifacts["gae"]
    ours = {name: value for name, value in run.state(2).metrics.items() if name.startswith("ppo/")}
    theirs = {name: value for name, value in alone.state(2).metrics.items() if name.startswith("ppo/")}
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6) and ours["ppo/grad_norm_actor"] > 0
    before, after = weights(alone, 2), weights(run, 2)
    assert before.keys() == after.keys()
    assert any("actor" in path for path in before) and any("optimizer" in path for path in before)
    for path, tensors in after.items():
        assert tensors.keys() == before[path].keys()
        for name, values in tensors.items():
            np.testing.assert_allclose(values, before[path][name], rtol=1e-4, atol=1e-5, err_msg=f"{path} {name}")
    if "lora.rank=2" not in settings:
        np.testing.assert_allclose(logits_in_transformers(run), logits_in_transformers(alone), rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert run_command(["stage", "ppo", "tiny", "--iteration", "2", "--store", str(again)]) == 0
    assert "reproduced" in capsys.readouterr().out


def logits_in_transformers(run):
    actor = run.last().actor
    model, said = AutoModelForCausalLM.from_pretrained(run.store.folder(actor.artifact, actor.folder),
                                                       output_loading_info=True)
    assert not any(said.values())
    with torch.inference_mode():
        return model.eval()(torch.arange(8)[None]).logits.numpy()


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


@pytest.mark.parametrize("more", [(), (FSDP, "ppo.critic_warmup=1")])
def test_what_was_not_kept_is_made_again_by_ranks(trained, more, tmp_path, capsys):
    whole = train(trained[0], tmp_path / "whole", "execution.ranks=2", *more, iterations=3)
    between = train(trained[0], tmp_path / "between", "execution.ranks=2", *more, "checkpoints.every=3", iterations=3)
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


@pytest.mark.parametrize("more", [(), (FSDP,)])
def test_a_loss_that_is_not_finite_in_one_of_them(trained, more, tmp_path, capsys):
    train(trained[0], tmp_path / "store", "execution.ranks=2", *more, "ppo.learning_rate=1e30", code=1)
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


def test_sharding_that_cannot_be(tmp_path, capsys):
    folder = language_example(tmp_path / "tiny", iterations=1, seed=3)
    train(folder, tmp_path / "store", FSDP, code=2)
    assert "execution.fsdp: one rank has all there is" in capsys.readouterr().err
    train(folder, tmp_path / "store", FSDP, "execution.ranks=2", "lora.rank=2", code=2)
    assert "execution.fsdp: what adapters are over stays whole in every rank" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "sizes", "why"), [
    ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "OpenAIGPTLMHeadModel does not say what its layers are"),
    ("zamba", {"num_hidden_layers": 12, "mamba_dt_rank": 4}, "ZambaForCausalLM has layers with weights in common")])
def test_layers_that_cannot_be_sharded(family, sizes, why, tmp_path, capsys):
    """Said before anything is sampled."""
    folder = write_brought(tmp_path / "case", make_model(family, **sizes))
    train(folder, tmp_path / "store", FSDP, "execution.ranks=2", code=2)
    assert f"execution.fsdp: {why}" in capsys.readouterr().err


def test_a_model_that_is_brought(tmp_path, prefect_server):
    """Of another family, whose head is not tied to its embeddings."""
    folder = write_brought(tmp_path / "case", value={"start": "actor"}, ppo={"epochs": 2, "minibatches": 1})
    alone, sharded = (train(folder, tmp_path / name, *more) for name, more in (
        ("alone", ()), ("sharded", (FSDP, "execution.ranks=2", "execution.micro_batch_tokens=64"))))
    assert sharded.state(1).artifacts["gae"] == alone.state(1).artifacts["gae"]
    np.testing.assert_allclose(logits_in_transformers(sharded), logits_in_transformers(alone), rtol=1e-4, atol=1e-5)
