"""What a run would have given with other settings, from what it has saved: `baton what-if` and `baton rescore`."""

import json
import re

import numpy as np
import pytest

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.what_if import agreement, grid_of, what_if
from schemas.errors import ConfigError
from schemas.settings import GAEConfig, KLConfig
from schemas.tables import Advantages, ReferenceLogprobs, Rewards, Rollouts, Values
from stages.gae import gae


def run_of(copied):
    return open_run(Store(copied[1]), "tiny")


def test_each_point_of_a_grid_is_that_stage_with_those_settings(copied):
    run = run_of(copied)
    before, states = run.state(2).artifacts, run.states()
    grid = {"gae.gae_lambda": ["0.5", "1"], "gae.gamma": ["0.9"]}
    found = list(what_if(run, "gae", 2, grid))
    assert [each.settings for each in found] == [(f"gae.gae_lambda={x}", "gae.gamma=0.9") for x in ("0.5", "1")]
    rollouts, reference, rewards, values = (run.store.table(before[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("reference", ReferenceLogprobs), ("reward", Rewards), ("value", Values)))
    for each, gae_lambda in zip(found, (0.5, 1.0), strict=True):
        config = GAEConfig.model_validate(run.config.gae.model_dump() | {"gae_lambda": gae_lambda, "gamma": 0.9})
        coef = run.state(1).kl_coef
        expected = gae(rollouts, reference, rewards, values, config, KLConfig(coef=coef), kl_coef=coef)
        np.testing.assert_array_equal(run.store.table(each.ref, Advantages).advantages.values, expected.advantages.values)
        assert each.how == "made"
    assert run_of(copied).states() == states
    assert [each.how for each in what_if(run_of(copied), "gae", 2, grid)] == ["found", "found"]
    (same,) = what_if(run, "gae", 2, {"gae.gae_lambda": [str(run.config.gae.gae_lambda)]})
    assert same.ref == before["gae"] and same.how == "found"


def test_the_command(copied, capsys):
    arguments = ["what-if", "tiny", "--iteration", "1", "--grid", "gae.gae_lambda=0.9,1", "--store", str(copied[1])]
    assert run_command(arguments) == 0
    out = capsys.readouterr().out
    assert "gae of iteration 1" in out and "as in the run" in out and "gae.gae_lambda=0.9" in out and "advantage_std" in out
    assert run_command([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [each["how"] for each in data["variants"]] == ["found", "found"] and data["stage"] == "gae"
    assert data["variants"][0]["metrics"]["advantage_std"] != data["variants"][1]["metrics"]["advantage_std"]


def test_one_value_is_held_against_the_run(copied, capsys):
    assert run_command(["what-if", "tiny", "--iteration", "2", "--grid", "gae.gamma=0.5", "--store", str(copied[1])]) == 0
    out = capsys.readouterr().out
    assert "advantage_std" in out and "no metric differs" not in out


def test_the_kl_penalty_is_a_setting_of_gae(copied, capsys):
    assert run_command(["what-if", "tiny", "--iteration", "2", "--grid", "kl.coef=0,0.1", "--store", str(copied[1])]) == 0
    assert "gae of iteration 2" in capsys.readouterr().out


def test_an_update_with_other_settings(copied, capsys):
    grid = ["--grid", "ppo.epochs=1,2", "--grid", "ppo.clip_range_low=0.1"]
    assert run_command(["what-if", "tiny", "--iteration", "2", *grid, "--store", str(copied[1]), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["variants"]
    assert two["metrics"]["steps"] == 2 * one["metrics"]["steps"]


@pytest.mark.parametrize("arguments, words", [
    (["--iteration", "2", "--grid", "gae.gae_lambda"], "expected KEY=VALUE,VALUE"),
    (["--iteration", "2", "--grid", "gae.gae_lambda=1,,2"], "expected KEY=VALUE,VALUE"),
    (["--iteration", "2", "--grid", "gae.nope=1"], "gae.nope: unknown key"),
    (["--iteration", "2", "--grid", "gae.gamma=1", "--grid", "ppo.epochs=1"], "gae, ppo is not one stage; name it"),
    (["--iteration", "2", "--grid", "gae.gamma=0.9,3"], "gae.gamma"),
    (["--iteration", "2", "--grid", "gae.gamma=1", "--grid", "gae.gamma=0.9"], "gae.gamma was named before"),
    (["--iteration", "2", "--grid", "ppo.epochs=1,2", "--stage", "gae"], "ppo.epochs changes nothing of stage 'gae'"),
    (["--iteration", "2", "--grid", "ppo.epochs=3", "--stage", "gae"], "ppo.epochs changes nothing of stage 'gae'"),
    (["--iteration", "2", "--grid", "gae.gamma=0.9,1", "--grid", "ppo.epochs=1,2", "--stage", "gae"],
     "ppo.epochs changes nothing of stage 'gae'"),
    (["--iteration", "9", "--grid", "gae.gamma=1"], "no iteration 9; it has 0…2"),
    (["--iteration", "0", "--grid", "gae.gamma=1"], "no stage 'gae' in iteration 0"),
])
def test_a_grid_that_cannot_be(copied, capsys, arguments, words):
    before = sorted((copied[1] / "artifacts").rglob("manifest.json"))
    assert run_command(["what-if", "tiny", *arguments, "--store", str(copied[1])]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert sorted((copied[1] / "artifacts").rglob("manifest.json")) == before


def test_a_value_that_the_run_has_already_is_no_mistake(copied, capsys):
    assert run_command(["what-if", "tiny", "--iteration", "2", "--grid", "gae.gamma=1,1.0", "--store", str(copied[1])]) == 0
    assert "gae.gamma=1.0" in capsys.readouterr().out


def test_values_are_split_at_commas():
    assert grid_of(["a.b=1, 2", "c.d=x"]) == {"a.b": ["1", "2"], "c.d": ["x"]}
    assert grid_of(["a.b={x: 1, y: [2, 3]}, {x: 2}", "c.d='a,b', c"]) == {
        "a.b": ["{x: 1, y: [2, 3]}", "{x: 2}"], "c.d": ["'a,b'", "c"]}
    assert grid_of(["a.b=it's, that's", "c.d=a), b"]) == {"a.b": ["it's", "that's"], "c.d": ["a)", "b"]}
    with pytest.raises(ConfigError, match="--grid 'a'"):
        grid_of(["a"])


# --- rescore ---

def test_how_far_two_rewards_agree():
    before, after = np.array([1.0, 2, 3, 4], np.float32), np.array([1.0, 3, 2, 2], np.float32)
    found = agreement(3, before, after, np.array([0, 0, 1, 1]))
    assert (found.iteration, found.responses, found.before, found.after) == (3, 4, 2.5, 2.0)
    assert found.correlation == pytest.approx(np.corrcoef(before, after)[0, 1])
    ranks = np.corrcoef([1, 2, 3, 4], [1, 4, 2.5, 2.5])[0, 1]  # by hand, equal ones share a rank
    assert found.rank_correlation == pytest.approx(ranks)
    assert found.same_order == 1.0  # of the pair (1, 2); the other is equal after
    flat = agreement(1, before, np.ones(4, np.float32), np.zeros(4))
    assert flat.correlation is flat.rank_correlation is flat.same_order is None


def test_old_responses_under_another_reward(copied, capsys):
    run, settings = run_of(copied), 'reward.components={"length": {"source": "length"}}'
    arguments = ["rescore", "tiny", "--set", settings, "--store", str(copied[1])]
    assert run_command([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for iteration, each in zip((1, 2), found, strict=True):
        rollouts = run.store.table(run.state(iteration).artifacts["rollout"], Rollouts)
        ours = run.store.table(run.state(iteration).artifacts["reward"], Rewards)
        assert each["iteration"] == iteration and each["responses"] == len(rollouts)
        assert each["before"] == pytest.approx(ours.score.mean()) and each["after"] > 0
    assert run_command([*arguments, "--iteration", "2"]) == 0
    out = capsys.readouterr().out
    assert "rank correlation" in out and len(re.findall("│ +2 │", out)) == 1


@pytest.mark.parametrize("run, arguments, words", [
    ("tiny", [], "name the other reward"),
    ("tiny", ["--set", "reward.components.nope.source=no/such.py:f"], "no/such.py"),
    ("tiny", ["--set", "reward.clip=2", "--iteration", "7"], "no iteration 7"),
])
def test_a_reward_that_cannot_be(copied, capsys, run, arguments, words):
    assert run_command(["rescore", run, *arguments, "--store", str(copied[1])]) == 2
    assert words in capsys.readouterr().err


def test_a_control_task_has_no_other_reward(controlled, capsys):
    assert run_command(["rescore", "cartpole", "--set", "reward.clip=1", "--store", str(controlled[1])]) == 2
    assert "whose rewards are its environment's" in capsys.readouterr().err
