"""Dynamic sampling: groups whose responses all have one score are dropped, others sampled in their place, and counted."""

import json

import numpy as np
import pytest
from brought import make_model, make_tokenizer, with_eos_often, write_brought
from conftest import assert_same_bytes
from test_kill import kill_anywhere

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.tables import Advantages, DroppedResponses, Rewards, Rollouts

HALF = '''
def half(responses, easy):
    """Every second prompt is answered right whatever the response is."""
    return [1.0 if e else float(len(response) % 2) for response, e in zip(responses, easy)]
'''


def write_case(folder, count=40, **sections):
    tokenizer = make_tokenizer()
    model = with_eos_often(make_model(tokenizer=tokenizer), tokenizer)
    rows = [{"prompt": f"{word} {i}", "easy": i % 2 == 0} for i in range(count) for word in ("it",)]
    return write_brought(
        folder, model, tokenizer, prompts="".join(json.dumps(row) + "\n" for row in rows).encode(), rewards_py=HALF,
        **{"iterations": 2, "data": {"heldout_prompts": "p.jsonl"}, "value": None,
           "gae": {"estimator": "grpo"}, "evaluate": {"every": 1}, "ppo": {"minibatches": 1},
           "reward": {"components": {"half": {"source": "rewards.py:half"}}},
           "rollout": {"batch_size": 24, "responses_per_prompt": 4, "resample_rounds": 4}} | sections)


@pytest.fixture(scope="module")
def resampled(tmp_path_factory, prefect_server):
    place = tmp_path_factory.mktemp("resample")
    folder = write_case(place / "case")
    assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return folder, place / "store"


def groups_of(rollouts, rewards):
    return {int(i): rewards.score[rollouts.prompt_id == i] for i in np.unique(rollouts.prompt_id)}


def test_the_batch_is_full_of_groups_with_spread_and_says_what_it_cost(resampled):
    run = open_run(Store(str(resampled[1])), "case")
    for iteration in (1, 2):
        made, metrics = run.state(iteration).artifacts, run.state(iteration).metrics
        first = run.store.table(made["rollout"], Rollouts)
        rollouts, rewards = (run.store.table(made["resample"], kind) for kind in (Rollouts, Rewards))
        assert len(rollouts) == 24 and rollouts.row_id.tolist() == list(range(24))
        groups = groups_of(rollouts, rewards)
        assert len(groups) == 6 and all(len(scores) == 4 and scores.std() > 0 for scores in groups.values())
        before = groups_of(first, run.store.table(made["reward"], Rewards))
        kept = [i for i, scores in before.items() if scores.std() > 0]
        assert 0 < len(kept) < 6 and set(kept) <= set(groups)
        for i in kept:  # as they were sampled
            assert [rollouts.response[row] for row in np.flatnonzero(rollouts.prompt_id == i)] == [
                first.response[row] for row in np.flatnonzero(first.prompt_id == i)]
        dropped = run.store.table(made["resample"], DroppedResponses)
        assert {int(i) for i in dropped.prompt_id[dropped.round == 1]} == {*before} - {*kept}
        assert not {*dropped.prompt_id.tolist()} & {*groups} and dropped.round.max() <= 5
        assert metrics["resample/responses"] == 24 + len(dropped) > 24 and metrics["resample/flat_groups"] == 0
        assert metrics["resample/dropped_groups"] == len(dropped) / 4 and 2 <= metrics["resample/rounds"] <= 5
        assert metrics["gae/equal_groups"] == 0
        advantages = run.store.table(made["gae"], Advantages)
        assert all(abs(row).max() > 0 for row in advantages.advantages)
        assert abs(metrics["ppo/ratio_min"] - 1) < 1e-5 > abs(metrics["ppo/ratio_max"] - 1)


def test_a_prompt_that_comes_twice_in_the_batch_is_two_groups(tmp_path, prefect_server):
    """Three prompts for six groups; what is flat among them is found by where it stands."""
    folder = write_case(tmp_path / "case", count=3, iterations=1)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--quiet"]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    rollouts = run.store.table(run.state(1).artifacts["resample"], Rollouts)
    rewards = run.store.table(run.state(1).artifacts["resample"], Rewards)
    flat = (rewards.score.reshape(-1, 4).std(1) == 0).sum()
    assert len(rollouts) == 24 and run.state(1).metrics["resample/flat_groups"] == flat >= 4
    assert (rollouts.prompt_id.reshape(-1, 4) == rollouts.prompt_id.reshape(-1, 4)[:, :1]).all()


def test_every_stage_again_and_kill_9_anywhere(resampled, tmp_path, capsys):
    for stage in ("rollout", "reward", "resample", "reference", "gae", "ppo"):
        assert run_command(["stage", stage, "case", "--iteration", "2", "--store", str(resampled[1]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "same", stage
    kill_anywhere(resampled[0], resampled[1], "case", "resample", tmp_path)


def test_warm_or_cold_the_same_bytes(resampled, tmp_path):
    for iteration in (1, 2):
        assert run_command(["train", str(resampled[0]), "--store", str(tmp_path / "store"), "--quiet", "--iterations",
                            str(iteration)]) == 0
    assert_same_bytes(open_run(Store(str(tmp_path / "store")), "case"), open_run(Store(str(resampled[1])), "case"))


def test_where_the_rounds_do_not_suffice_the_batch_stays_full_and_it_is_said(tmp_path, capsys, prefect_server):
    """Seven prompts, of which four are easy: three groups with spread at most."""
    folder = write_case(tmp_path / "case", count=7, iterations=1)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    metrics, made = run.state(1).metrics, run.state(1).artifacts
    rollouts = run.store.table(made["resample"], Rollouts)
    assert len(rollouts) == 24 and len(np.unique(rollouts.prompt_id)) == 6 and metrics["resample/flat_groups"] >= 3
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{metrics['resample/flat_groups']:.0f} of 6 groups have one score for all their responses, since" in said


def test_off_by_default_and_with_spread_everywhere_nothing_is_sampled(tmp_path, prefect_server):
    rewards = "def half(responses, easy):\n    return [float(i % 4) for i in range(len(responses))]\n"
    folder = write_case(tmp_path / "case", iterations=1, evaluate={"every": 0})
    (folder / "rewards.py").write_text(rewards)
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *store]) == 0
    assert run_command(["train", str(folder), "--run", "off", *store, "--set", "rollout.resample_rounds=0"]) == 0
    opened = Store(str(tmp_path / "store"))
    on, off = open_run(opened, "case").state(1), open_run(opened, "off").state(1)
    assert on.artifacts["rollout"] == off.artifacts["rollout"] and "resample" not in off.artifacts
    assert on.metrics["resample/responses"] == 24 and on.metrics["resample/rounds"] == 1
    one, other = (opened.table(state.artifacts[stage], Rollouts) for state, stage in ((on, "resample"), (off, "rollout")))
    assert one.response == other.response
    assert run_command(["stage", "resample", "off", "--iteration", "1", *store]) == 2


@pytest.mark.parametrize("setting, words", [
    ("rollout.responses_per_prompt=1", "rollout.responses_per_prompt is 1"),
    ("reward.normalize=scale", "reward.normalize=scale makes scores of all that was sampled"),
    ("reward.normalize_components=batch", "reward.normalize_components=batch makes scores of all that was sampled"),
])
def test_settings_that_contradict_it(tmp_path, capsys, setting, words):
    folder = write_case(tmp_path / "case")
    extra = ["--set", "gae.estimator=reinforce++"] if "per_prompt" in setting else []
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set", setting, *extra]) == 2
    assert words in capsys.readouterr().err
