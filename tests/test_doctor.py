"""`baton doctor`: a run that was made to go wrong in one way raises that verdict and no other; a sound one raises none."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest
import yaml
from conftest import TINY, write_example

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views.doctor import CHECKS, LEAST, _entropy, examine
from stages.ops import sampling

REWARDS = '''
import random

calls, noise = 0, random.Random(0)

def constant(responses):
    return [0.5] * len(responses)

def of_prompt(prompts, responses):
    return [float(len(prompt) % 5) for prompt in prompts]

def fading(responses):
    """Its spread is gone after the first calls."""
    global calls
    calls += 1
    return [len(response) % 7 / (1 if calls <= 4 else 1000) for response in responses]

def length(response_tokens):
    return [float(len(tokens)) for tokens in response_tokens]

def small(responses):
    return [0.001 * (len(response) % 7) for response in responses]

def e(responses):
    return [10 * response.count("e") / max(1, len(response)) for response in responses]

def nearly_e(responses):
    return [score + noise.gauss(0, 0.2) for score in e(responses)]

def no_e(responses):
    return [-score for score in e(responses)]

def varied(responses):
    return [float(sum(map(ord, response)) % 11) for response in responses]
'''
STILL = {"ppo.learning_rate": 1e-6, "ppo.critic_learning_rate": 1e-6}  # so that nothing else happens
ONE_STEP = {"ppo.epochs": 1, "ppo.minibatches": 1}  # whose ratio is 1, so that nothing is clipped
FIXED = {"rollout.min_new_tokens": 10}  # all of one length
FREE = {"kl.coef": 0}
GROUPS = {"gae.estimator": "rloo", "rollout.responses_per_prompt": 4, "rollout.batch_size": 16}


def reward(name, **more):
    return {"reward.components": {name: {"source": f"rewards.py:{name}"} | more}}


BAD = {
    "component-never-varies": STILL | FIXED | GROUPS | {"reward.components": {
        "varied": {"source": "rewards.py:varied"}, "constant": {"source": "rewards.py:constant"}}},
    "groups-without-spread": STILL | FIXED | GROUPS | reward("of_prompt") | {
        "kl.placement": "loss", "kl.estimator": "k2"},
    "responses-at-the-limit": STILL | GROUPS | reward("varied") | {"rollout.max_new_tokens": 2},
    "reward-saturated": STILL | FIXED | GROUPS | reward("fading"),
    "reward-paid-for-length": FREE | GROUPS | ONE_STEP | reward("length") | {
        "rollout.max_new_tokens": 120, "rollout.stop": ["e", "o"], "ppo.learning_rate": 3e-2, "iterations": 8},
    "clip-fraction-high": FREE | FIXED | GROUPS | reward("varied") | {"ppo.learning_rate": 2e-2, "ppo.epochs": 4},
    "kl-runs-away": FIXED | GROUPS | ONE_STEP | reward("varied") | {"kl.coef": 1e-6, "ppo.learning_rate": 1e-1},
    "entropy-collapsed": FREE | FIXED | GROUPS | ONE_STEP | reward("nearly_e") | {
        "ppo.learning_rate": 1e-1, "iterations": 13},
    "critic-explains-nothing": STILL | FIXED | reward("small"),
    "gold-falls-while-reward-rises": FREE | FIXED | GROUPS | ONE_STEP | reward("e") | {
        "evaluate.judge": "rewards.py:no_e", "ppo.learning_rate": 3e-2, "evaluate.every": 3, "iterations": 9},
    "engine-and-update-apart": STILL | FIXED | GROUPS | reward("varied") | {"ppo.recompute_old_logprobs": True},
}


def off_by_a_fifth(sample):
    """An engine whose logprobs are not the model's."""

    def call(*given, **more):
        found = sample(*given, **more)
        return found._replace(logprobs=[row - 0.2 for row in found.logprobs])

    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prefect_server):
    """A function from settings to a run; all are in one store, so that what they have in common is made once."""
    folder = write_example(tmp_path_factory.mktemp("doctor") / "tiny")
    (folder / "rewards.py").write_text(REWARDS)

    def make(name, settings):
        config = json.loads(json.dumps(TINY))
        for key, value in ({"iterations": 2 * LEAST, "evaluate.every": 0} | settings).items():
            *path, last = key.split(".")
            section = config
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        store = folder.parent / "store"
        assert run_command(["train", str(folder), "--run", name, "--store", str(store), "--quiet"]) == 0
        return open_run(Store(store), name)

    return make


@pytest.mark.parametrize("name", CHECKS)
def test_a_run_that_goes_wrong_in_one_way(runs, name, monkeypatch):
    if name == "engine-and-update-apart":
        monkeypatch.setattr(sampling, "sample", off_by_a_fifth(sampling.sample))
    run = runs(name, BAD[name])
    found = examine(run, run.states())
    assert [verdict.name for verdict in found.verdicts] == [name], found
    (verdict,) = found.verdicts
    assert not verdict.reason[0].islower() and verdict.remedy and any(c.isdigit() for c in verdict.reason)
    assert name in found.checked


def test_a_sound_run_raises_nothing(runs):
    run = runs("sound", STILL | FIXED | GROUPS | reward("varied"))
    found = examine(run, run.states())
    assert found.verdicts == [] and len(found.checked) >= 6


@pytest.mark.parametrize("answers, raised", [(8, False), (1, True)])
def test_few_answers_that_come_again_are_no_collapse(answers, raised):
    """Sums have few: as long as the prompts of an iteration get different ones, the policy does not say one thing."""
    tables = {"first": [(i, p, 0, f"{i} {p}") for i in range(4) for p in range(8)],
              "last": [(i, p, 0, str(p % answers)) for i in range(4, 8) for p in range(8)]}

    def ask(query, states):
        connection = duckdb.connect()
        connection.execute("CREATE TABLE rollouts (iteration INT, prompt_id INT, row_id INT, response VARCHAR)")
        connection.executemany("INSERT INTO rollouts VALUES (?, ?, ?, ?)", tables[states])
        return connection.sql(query).fetchall()

    run = SimpleNamespace(config=SimpleNamespace(kind="language"))
    course = SimpleNamespace(run=run, first="first", last="last", ask=ask,
                             mean=lambda metric, states, why: {"first": 1.0, "last": 0.1}[states])
    assert bool(list(_entropy(course))) is raised


@pytest.mark.parametrize("golds, raised", [
    ({0: 0.0, 6: 0.3}, False), ({0: 0.0, 6: 0.15}, True), ({0: 0.0, 3: 0.3}, True), ({0: 0.0, 3: 0.9, 6: 0.3}, True)])
def test_kl_that_bought_what_the_judge_asks_for_is_spent_well(runs, golds, raised):
    """As of a task with one right answer, which takes a nat a token from a reference that knew it seldom."""
    run = runs("judged", BAD["kl-runs-away"] | {"evaluate.judge": "rewards.py:no_e", "evaluate.every": 3})

    def judged(state):
        metrics = {name: value for name, value in state.metrics.items() if not name.startswith("evaluate/gold")}
        if (gold := golds.get(state.iteration)) is not None:
            metrics |= {"evaluate/gold": gold, "evaluate/gold_low": gold - 0.1, "evaluate/gold_high": gold + 0.1,
                        "evaluate/score": -gold}  # with gold it falls, so that nothing is exploited
        return state.model_copy(update={"metrics": metrics})

    found = examine(run, [judged(state) for state in run.states()])
    assert ("kl-runs-away" in [verdict.name for verdict in found.verdicts]) is raised


def test_a_control_task_raises_nothing(controlled, tmp_path):
    config = ["train", str(controlled[0] / "cartpole"), "--run", "longer", "--store", str(tmp_path), "--quiet"]
    assert run_command([*config, "--set", "iterations=8"]) == 0
    run = open_run(Store(tmp_path), "longer")
    found = examine(run, run.states())
    assert found.verdicts == [] and {"clip-fraction-high", "critic-explains-nothing"} <= set(found.checked)


@pytest.mark.parametrize("entropies, returns, raised", [
    ((0.69, 0.01), (20.0, 9.5), True), ((0.69, 0.01), (20.0, 480.0), False), ((0.69, 0.3), (20.0, 9.5), False),
])
def test_a_policy_that_is_sure_of_nothing_better(controlled, tmp_path, entropies, returns, raised):
    """Pole upright or not: a sure policy is wrong only where its episodes are no better than those of an unsure one."""
    config = ["train", str(controlled[0] / "cartpole"), "--run", "sure", "--store", str(tmp_path), "--quiet"]
    assert run_command([*config, "--set", "iterations=6"]) == 0
    run = open_run(Store(tmp_path), "sure")
    states = [state.model_copy(update={"metrics": state.metrics | {
        "ppo/entropy": entropies[number > 3], "rollout/episode_return": returns[number > 3]}})
        for number, state in enumerate(run.states())]
    names = [verdict.name for verdict in examine(run, states).verdicts]
    assert names == (["entropy-collapsed"] if raised else [])


def test_returns_that_hardly_vary_are_nothing_to_explain(controlled, tmp_path):
    """As of a task that is solved, where a critic's small errors are large beside the returns' spread."""
    config = ["train", str(controlled[0] / "cartpole"), "--run", "solved", "--store", str(tmp_path), "--quiet"]
    assert run_command([*config, "--set", "iterations=6"]) == 0
    run = open_run(Store(tmp_path), "solved")

    def with_spread(spread):
        numbers = {"gae/explained_variance": -5.0, "gae/return_mean": 100.0, "gae/return_std": spread}
        return [state.model_copy(update={"metrics": state.metrics | numbers}) for state in run.states()]

    found = examine(run, with_spread(1.0))
    assert found.verdicts == [] and found.left_out["critic-explains-nothing"] == "the returns hardly vary, by 1 around 100"
    (verdict,) = examine(run, with_spread(60.0)).verdicts
    assert verdict.name == "critic-explains-nothing" and "rloo" not in verdict.remedy


def test_the_command(runs, capsys):
    run = runs("component-never-varies", BAD["component-never-varies"])
    assert run_command(["doctor", run.name, "--store", run.store.uri]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "component-never-varies, iterations 4 to 6" in out and "'constant' is 0.5 for every response" in out
    assert "What helps:" in out and "1 of" in out and "not checked: critic-explains-nothing, gae.estimator=rloo" in out
    assert run_command(["doctor", run.name, "--store", run.store.uri, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdicts"][0]["name"] == "component-never-varies" and "kl-runs-away" in data["checked"]


def test_a_run_that_is_too_short(trained, capsys):
    assert run_command(["doctor", "tiny", "--store", str(trained[1])]) == 0
    assert "nothing could be checked, it takes 6 iterations, there are 2" in capsys.readouterr().out


def test_every_check_has_a_bad_run():
    assert set(BAD) == set(CHECKS)


def test_the_page_has_every_verdict():
    page = (Path(__file__).parents[1] / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == list(CHECKS)
