"""Evaluation against a loop over rows and tokens: the KL's sign, wins and ties, scores and gold."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import log_softmax

from schemas.language import RewardConfig, RolloutConfig
from schemas.tables import Samples
from stages.evaluate import evaluate, metrics
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


def samples(model, reference, baseline=None, judge=JUDGE):
    return evaluate(ModelSampler(model), reference, PROMPTS, SCORERS, judge, baseline, CONFIG, REWARD, bias=1.5, seed=9)


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
