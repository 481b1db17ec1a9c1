"""Evaluation against a loop over rows and tokens: the KL's sign, wins and ties, scores and gold."""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from brought import write_brought
from oracles import log_softmax

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.language import EvaluateConfig, RolloutConfig
from schemas.reward_settings import RewardConfig
from schemas.tables import Samples
from stages.evaluate import best_of, evaluate, interval, metrics, pass_at
from stages.ops.rewards import function_scorer
from stages.ops.sampling import ModelSampler

PROMPTS = ["The soup", "The film The Salt Road", "A night at Villa Rosa", "My copy", "Our", "The choir at Saint Agnes"]
CONFIG = RolloutConfig(max_new_tokens=9, temperature=0.7)
REWARD = RewardConfig(components={"length": {"source": "f.py:length", "weight": 2.0}})
SCORERS = {"length": function_scorer("f.py:length", lambda prompts, responses: [float(len(text)) for text in responses])}
JUDGE = function_scorer("gold", lambda prompts, responses: [float(text.count("e")) for text in responses])


@pytest.fixture(scope="module")
def moved(tiny_model):
    """The tiny model, with another output for some tokens: not the reference any more."""
    module = copy.deepcopy(tiny_model.module)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return replace(tiny_model, module=module)


def logprob_of(model, prompt, response, temperature):
    """Σ_t log π(token) of a response, one token after the other, no batch, no cache."""
    total, ids = 0.0, list(prompt)
    for token in response:
        with torch.no_grad():
            logits = model.module(torch.tensor([ids])).logits[0, -1].double() / temperature
        total += log_softmax(logits.tolist())[token]
        ids.append(int(token))
    return total


def samples(model, reference, baseline=None, judge=JUDGE, **more):
    return evaluate(ModelSampler(model), reference, PROMPTS, SCORERS, {"judge": judge} if judge else {}, baseline, CONFIG,
                    REWARD, bias=1.5, seed=9, **more)


def test_kl_scores_and_gold_by_a_loop(moved, tiny_model):
    found = samples(moved, tiny_model)
    sampled, *_ = ModelSampler(moved).sample(
        [np.array(row) for row in tiny_model.tokenizer(PROMPTS)["input_ids"]], CONFIG, seed=9, progress="test")
    for row, (prompt, response) in enumerate(zip(PROMPTS, sampled, strict=True)):
        ids = tiny_model.tokenizer(prompt)["input_ids"]
        ours, theirs = (logprob_of(model, ids, response, CONFIG.temperature) for model in (moved, tiny_model))
        assert math.isclose(found.kl[row], ours - theirs, rel_tol=1e-4, abs_tol=1e-4)
        assert found.response_length[row] == len(response)
        assert found.score[row] == 2 * len(found.response[row]) - 1.5 and found.gold[row] == found.response[row].count("e")
    assert abs(found.kl).min() > 1e-3 and found.kl.mean() > 0  # of the policy's own samples: a divergence
    assert metrics(found).kl == pytest.approx(found.kl.mean())


def test_the_reference_itself_has_no_kl_and_ties_with_itself(tiny_model):
    found = samples(tiny_model, tiny_model)
    np.testing.assert_allclose(found.kl, 0, atol=1e-4)
    assert metrics(found).win_rate == 0.5 and (found.win == 0.5).all()


def test_wins_are_of_those_above_the_baseline(moved, tiny_model):
    found = samples(moved, tiny_model)
    gold = found.gold + np.array([1, -1, 0, 2, -3, 0], np.float32)  # what the starting actor had: more, less or the same
    columns = {field: getattr(found, field) for field in Samples.__dataclass_fields__ if field != "file"}
    against = samples(moved, tiny_model, Samples(**columns | {"gold": gold}))
    assert against.win.tolist() == [0, 1, 0.5, 0, 1, 0.5] and metrics(against).win_rate == pytest.approx(3 / 6)


def test_without_a_judge_the_reward_is_gold(moved, tiny_model):
    found = samples(moved, tiny_model, judge=None)
    assert (found.gold == found.score).all()


# --- several samples ---

SEVERAL = EvaluateConfig(samples=4, greedy=True, correct=2.0, pass_at=(1, 2, 4), best_of=(1, 2, 4))


def test_several_samples_by_loops(moved, tiny_model):
    """pass@k and best of k over all subsets of k samples; greedy responses by the likeliest token, one after the other."""
    found = samples(moved, tiny_model, config=SEVERAL)
    drawn = [i for i in range(len(found)) if not found.greedy[i]]
    assert len(drawn) == 24 and len(found) == 30 and found.prompt_id.tolist() == [i // 4 for i in range(24)] + list(range(6))
    seen = metrics(found, SEVERAL)
    for k in (1, 2, 4):
        right, best = [], []
        for prompt in range(6):
            rows = [i for i in drawn if found.prompt_id[i] == prompt]
            for some in itertools.combinations(rows, k):
                right.append(any(found.gold[i] >= 2 for i in some))
                top = max(found.score[i] for i in some)
                best.append(np.mean([found.gold[i] for i in some if found.score[i] == top]))
        assert seen.pass_at[str(k)] == pytest.approx(np.mean(right))
        assert seen.best_of[str(k)] == pytest.approx(np.mean(best), abs=1e-5)
    assert 0 < seen.pass_at["1"] < seen.pass_at["4"] < 1 and seen.gold == pytest.approx(seen.best_of["1"])
    for row in range(24, 30):
        ids = tiny_model.tokenizer(PROMPTS[row - 24])["input_ids"]
        text = []
        for _ in range(found.response_length[row]):
            with torch.no_grad():
                text.append(int(moved.module(torch.tensor([ids + text])).logits[0, -1].argmax()))
        assert tiny_model.tokenizer.decode([i for i in text if i > 2]) == found.response[row]
    assert seen.greedy_gold == pytest.approx(found.gold[24:].mean()) and seen.gold == pytest.approx(found.gold[:24].mean())


def test_equal_scores_share_the_chance_to_be_the_best():
    assert best_of(np.array([1, 1, 0]), np.array([10.0, 20, 90]), np.zeros(3), 2) == pytest.approx((15 + 10 + 20) / 3)


def test_pass_at_k_by_hand():
    right, ids = np.array([1, 0, 0, 0, 0, 0], bool), np.array([0, 0, 0, 7, 7, 7])
    assert pass_at(right, ids, 1) == pytest.approx(1 / 6) and pass_at(right, ids, 2) == pytest.approx((2 / 3) / 2)


def test_the_interval_is_of_prompts():
    """16 prompts of 50 equal values: as wide as of the 16 means, not as of 800 values."""
    means = np.random.default_rng(0).normal(size=16)
    low, high = interval(np.repeat(means, 50), np.repeat(np.arange(16), 50))
    half = 1.96 * means.std() / 4
    assert means.mean() - low == pytest.approx(half, rel=0.2) and high - means.mean() == pytest.approx(half, rel=0.2)
    assert interval(means, np.arange(16)) == pytest.approx((low, high))


def test_wins_over_several_samples_are_means(moved, tiny_model):
    base = samples(tiny_model, tiny_model, config=SEVERAL)
    found = samples(moved, tiny_model, base, config=SEVERAL)
    for row in (0, 5, 23, 27):
        theirs = [i for i in range(30) if base.prompt_id[i] == found.prompt_id[row] and base.greedy[i] == found.greedy[row]]
        assert len(theirs) == (1 if found.greedy[row] else 4)
        expected = np.mean([1.0 if found.gold[row] > base.gold[i] else 0.5 if found.gold[row] == base.gold[i] else 0
                            for i in theirs])
        assert found.win[row] == pytest.approx(expected)


def test_several_judges_are_summed_by_weight_and_kept(moved, tiny_model):
    config = EvaluateConfig(judges={"e": {"source": "f.py:e", "weight": 2.0}, "len": {"source": "length"}})
    found = evaluate(ModelSampler(moved), tiny_model, PROMPTS, SCORERS, {"e": JUDGE, "len": SCORERS["length"]}, None, CONFIG,
                     REWARD, bias=1.5, seed=9, config=config)
    np.testing.assert_allclose(found.gold, 2 * found.judges["e"] + found.judges["len"])
    assert metrics(found, config).flat()["judge_e"] == pytest.approx(found.judges["e"].mean())


@pytest.mark.parametrize("setting, words", [
    ({"pass_at": [8]}, "pass_at: 8 of samples=1 responses"),
    ({"judge": "f.py:g", "judges": {"a": {"source": "length"}}}, "one of"),
    ({"against": "base"}, "expected run@iteration, such as base@10"),
])
def test_settings_that_mean_nothing(setting, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig.model_validate(setting)


# --- runs ---

def test_a_run_against_another_with_judges_of_all_kinds(tmp_path, capsys, prefect_server):
    folder = write_brought(tmp_path / "case", prompts=b"".join(
        json.dumps({"prompt": prompt, "answer": i}).encode() + b"\n" for i, prompt in enumerate(PROMPTS)), data={
        "heldout_prompts": "p.jsonl"}, evaluate={"samples": 2, "greedy": True, "pass_at": [1, 2], "best_of": [2], "judges": {
            "right": {"source": "numeric"}, "short": {"source": "length", "options": {"target": 4}, "weight": 0.1},
            "own": {"source": "rewards.py:score"}}})
    train = ["train", str(folder), "--store", str(tmp_path / "store")]
    assert run_command([*train, "--run", "base"]) == 0
    shown = capsys.readouterr().out
    assert "pass@2" in shown and "gold, best of 2" in shown and "gold, likeliest tokens" in shown and " to " in shown
    assert run_command([*train, "--run", "other", "--set", "evaluate.against=base@1", "--set", "seed=2"]) == 0
    store = Store(str(tmp_path / "store"))
    base, other = open_run(store, "base"), open_run(store, "other")
    assert other.state(0).baseline == other.state(1).baseline == base.state(1).artifacts["evaluate"]
    assert 0 < other.state(0).metrics["evaluate/win_rate"] < 1
    found = store.table(other.state(1).artifacts["evaluate"], Samples)
    assert sorted(found.judges) == ["own", "right", "short"] and len(found) == 18
    for iteration in ("0", "1"):
        assert run_command(["stage", "evaluate", "other", "--iteration", iteration, "--store", store.uri, "--quiet"]) == 0
    (folder / "h.jsonl").write_text("".join(json.dumps({"prompt": f"{i} it", "answer": 1}) + "\n" for i in range(6)))
    assert run_command([*train, "--run", "third", "--set", "evaluate.against=base@1", "--set",
                        "data.heldout_prompts=h.jsonl"]) != 0
    assert "evaluate.against: that run was evaluated on other prompts, from row 1 on" in capsys.readouterr().err
    assert run_command([*train, "--run", "fourth", "--set", "evaluate.against=nobody@1"]) == 2
    assert "no run 'nobody'" in capsys.readouterr().err


def test_what_wins_are_over_is_not_changed_without_a_word(tmp_path, capsys, prefect_server):
    folder = write_brought(tmp_path / "case")
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    for name in ("base", "run"):
        assert run_command(["train", str(folder), "--run", name, *store, "--set", f"seed={len(name)}"]) == 0
    assert run_command(["fork", "run", "--at", "1", "--run", "new", *store, "--set", "evaluate.against=base@1"]) == 2
    assert "evaluate.against: what wins are over was decided when the run was made" in capsys.readouterr().err
    call = ["stage", "evaluate", "run", "--iteration", "1", *store[:2], "--print-call", "--set"]
    assert run_command([*call, "evaluate.against=base@1"]) == 0
    theirs = open_run(Store(store[1]), "base").state(1).artifacts["evaluate"]
    assert json.loads(capsys.readouterr().out)["inputs"]["baseline"]["identity"] == theirs.identity
    assert run_command([*call, "evaluate.against=nobody@1"]) == 2
    assert run_command(["stage", "reward", "run", "--iteration", "1", *store, "--print-call", "--set",
                        'reward.components={s: {source: "http://127.0.0.1:9/x", columns: [nope]}}']) == 2
    assert "reads the column 'nope', and data.prompts has no such column" in capsys.readouterr().err
