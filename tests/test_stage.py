"""One stage again from saved artifacts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import rewrite

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.stage import StageName
from flows.store.attempt import folder_of
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.stages import STAGES as STAGES_OF

STAGES = [("base_model", 0), ("sft", 0), ("reward_model", 0), ("evaluate", 0), ("rollout", 2), ("reference", 2),
          ("reward", 2), ("value", 1), ("gae", 2), ("ppo", 1), ("ppo", 2), ("evaluate", 2)]


def answer(capsys, *arguments):
    """Exit code and JSON of a command."""
    capsys.readouterr()
    code = run_command([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_form_on_prefects_page_knows_every_stage():
    assert set(get_args(StageName)) == {name for stages in STAGES_OF.values() for name in stages}


@pytest.mark.parametrize("stage, iteration", STAGES)
def test_every_stage_gives_the_same_bytes_again(copied, stage, iteration, capsys):
    code, result = answer(capsys, "stage", stage, "tiny", "--iteration", iteration, "--store", copied[1])
    assert (code, result["verdict"], result["different"]) == (0, "same", [])
    assert result["recorded"] == result["artifact"]


@pytest.mark.parametrize("run, stage, iteration", [
    ("every_choice", "reward_bias", 0), ("every_choice", "evaluate", 0), ("every_choice", "rollout", 2),
    ("every_choice", "reward", 2), ("every_choice", "value", 2), ("every_choice", "gae", 2), ("every_choice", "ppo", 1),
    ("every_choice", "ppo", 2), ("every_choice", "evaluate", 2), ("no_critic", "rollout", 1), ("no_critic", "reward", 2),
    ("no_critic", "gae", 2), ("no_critic", "ppo", 2)])
def test_so_it_does_with_the_choices_that_are_off_by_default(variants, tmp_path, run, stage, iteration, capsys):
    store = shutil.copytree(variants[1], tmp_path / "store")
    code, result = answer(capsys, "stage", stage, run, "--iteration", iteration, "--store", store)
    assert (code, result["verdict"], result["different"]) == (0, "same", [])


def test_advantages_of_saved_rollouts_by_another_estimator(variants, tmp_path, capsys):
    store = shutil.copytree(variants[1], tmp_path / "store")
    rerun = ["stage", "gae", "no_critic", "--iteration", 2, "--store", store, "--set"]
    code, result = answer(capsys, *rerun, "gae.estimator=rloo")
    assert (code, result["verdict"], result["models_loaded"]) == (0, "new", 0)
    assert run_command([*map(str, rerun), "gae.estimator=gae", "--set", "value={}"]) == 2
    assert "has no stage 'value' in iteration 2; it has rollout, reference, reward, gae, ppo" in capsys.readouterr().err


@pytest.mark.parametrize("run, stage, settings, message", [
    ("tiny", "reward", ["reward.center_on_demonstrations=true"], "the run has no demonstrations scored with"),
    ("every_choice", "evaluate", ["reward.components.reward_model.weight=2"], "the run has no demonstrations scored"),
    ("tiny", "reward", ["reward.normalize=scale"], "reward.normalize: the run kept no running moments"),
    ("tiny", "gae", ["preset=classic"], "--set preset…: it belongs to the run as a whole"),
    ("tiny", "ppo", ["kl.placement=loss", "kl.estimator=k3"], "kl.placement: the recorded advantages were made"),
    ("every_choice", "reward", ["reward.center_on_demonstrations=false"], "reward.normalize: the run kept")])
def test_settings_that_a_rerun_cannot_follow(variants, run, stage, settings, message, capsys):
    options = [part for setting in settings for part in ("--set", setting)]
    assert run_command(["stage", stage, run, "--iteration", "2", "--store", str(variants[1]), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_update_without_the_critic_that_a_run_has(copied, capsys):
    code, result = answer(capsys, "stage", "ppo", "tiny", "--iteration", 2, "--store", copied[1], "--set",
                          "gae.estimator=reinforce++", "--set", "value=null")
    assert (code, result["verdict"]) == (0, "new")


def test_another_lambda_makes_a_new_artifact_and_leaves_the_run_alone(copied, capsys):
    store = copied[1]
    runs_before = {path: path.read_bytes() for path in (store / "runs").rglob("*.json")}
    code, result = answer(capsys, "stage", "gae", "tiny", "--iteration", 2, "--set", "gae.gae_lambda=0.5", "--store", store)
    assert (code, result["verdict"], result["models_loaded"]) == (0, "new", 0)
    assert result["artifact"] != result["recorded"]
    assert {path: path.read_bytes() for path in (store / "runs").rglob("*.json")} == runs_before
    assert Store(store).find(ArtifactRef.model_validate(dict(zip(("stage", "identity"), result["artifact"].split("/"),
                                                                  strict=True))))
    recorded, now = result["metrics"]["advantage_std"]
    assert recorded != now


def test_the_kl_coefficient_of_a_rerun_is_that_of_the_settings(copied, capsys):
    _, result = answer(capsys, "stage", "gae", "tiny", "--iteration", 1, "--set", "kl.coef=0.5", "--store", copied[1])
    assert result["metrics"]["kl_coef"] == [0.05, 0.5]


def test_a_checkpoint_is_reproduced_in_a_fresh_process(copied):
    """Nothing is warm there: actor, critic and optimizer come from storage."""
    out = subprocess.run([sys.executable, "-m", "flows.cli.main", "stage", "ppo", "tiny", "--iteration", "2", "--store",
                          str(copied[1]), "--json"], capture_output=True, text=True, env=os.environ, timeout=300)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["verdict"] == "same"


def test_other_bytes_are_reported_and_kept(copied, capsys):
    """A committed table that was made otherwise than its recipe says: the rerun differs and exits with 1."""
    ref = open_run(Store(copied[1]), "tiny").state(2).artifacts["value"]
    rewrite(copied[1] / folder_of(ref) / "manifest.json", lambda data: data["files"][0].update(digest="0" * 64))
    code, result = answer(capsys, "stage", "value", "tiny", "--iteration", 2, "--store", copied[1])
    assert (code, result["verdict"], result["different"]) == (1, "different", ["values.parquet"])


@pytest.mark.parametrize("arguments, message", [
    (["stage", "gae", "tiny", "--iteration", "9"], "run 'tiny' has no iteration 9; it has 0…2"),
    (["stage", "sft", "tiny", "--iteration", "1"], "has no stage 'sft' in iteration 1; it has rollout, reference"),
    (["stage", "evaluate", "tiny", "--iteration", "1"], "has no stage 'evaluate' in iteration 1"),
    (["stage", "gae", "other", "--iteration", "1"], "no run 'other' in"),
    (["stage", "gae", "tiny", "--iteration", "1", "--set", "gae.lambda=1"],
     "gae.lambda: unknown key; did you mean 'gae_lambda'?"),
    (["stage", "gae", "tiny", "--iteration", "1", "--set", "gae.gae_lambda=2"],
     "gae.gae_lambda: should be less than or equal to 1"),
    (["stage", "gae", "tiny", "--iteration", "1", "--set", "gae"], "--set gae: expected key=value"),
])
def test_what_cannot_be_rerun_is_said(trained, arguments, message, capsys):
    assert run_command([*arguments, "--store", str(trained[1])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_old_rollouts_with_a_new_reward_function(copied, tmp_path, monkeypatch, capsys):
    """The function is looked for below the current folder and imported; the run keeps its own."""
    (tmp_path / "short.py").write_text("def score(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    setting = "reward.components={short: {source: 'short.py:score'}}"
    code, result = answer(capsys, "stage", "reward", "tiny", "--iteration", 1, "--set", setting, "--store", copied[1])
    assert (code, result["verdict"], result["models_loaded"]) == (0, "new", 0)
    assert result["metrics"]["component_short"][1] < -1


@pytest.mark.parametrize("setting", ["data.prompts=x.jsonl", "base_model.layers=2"])
def test_other_inputs_belong_to_another_run(trained, setting, capsys):
    arguments = ["stage", "rollout", "tiny", "--iteration", "1", "--store", str(trained[1]), "--set", setting]
    assert run_command(arguments) == 2
    assert "make another run" in capsys.readouterr().err


def test_a_damaged_artifact_is_made_again_as_the_error_says(copied, capsys):
    import shutil

    store, run = Store(copied[1]), open_run(Store(copied[1]), "tiny")
    ref = run.state(2).artifacts["value"]
    path = Path(store.place(ref, "values.parquet"))
    path.write_bytes(b"")
    assert run_command(["stage", "gae", "tiny", "--iteration", "2", "--store", str(copied[1])]) == 1
    folder = Path(store.uri) / "artifacts" / "value" / ref.identity
    assert "values.parquet: size: expected" in capsys.readouterr().err
    assert run_command(["verify", "tiny", "--store", str(copied[1])]) == 1
    hint = f"remove {folder}, then baton stage value tiny --iteration 2 makes it again"
    assert hint in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(folder)
    assert run_command(["stage", "value", "tiny", "--iteration", "2", "--store", str(copied[1]), "--quiet"]) == 0
    assert run_command(["stage", "gae", "tiny", "--iteration", "2", "--store", str(copied[1]), "--quiet"]) == 0


def test_rollouts_are_scored_at_the_temperature_they_were_sampled_at(copied, capsys):
    code, result = answer(capsys, "stage", "reference", "tiny", "--iteration", 1, "--set", "rollout.temperature=0.5",
                          "--store", copied[1])
    assert (code, result["verdict"]) == (0, "same")
