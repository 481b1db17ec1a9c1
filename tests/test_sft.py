"""Supervised fine-tuning and reward-model training, by TRL's trainers on tiny models."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2ForSequenceClassification

from schemas.errors import NonFiniteError
from schemas.language import RewardModelConfig, SFTConfig
from stages.reward_model import reward_model
from stages.sft import sft

DATA = Path(__file__).parents[1] / "data" / "reviews"


def rows(role, count):
    """Of the shortest, so that they fit into the tiny context."""
    lines = [json.loads(line) for line in (DATA / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda row: sum(map(len, row.values())))[:count]


def fresh(model):
    return replace(model, module=copy.deepcopy(model.module))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def test_sft_learns_repeats_and_leaves_global_generators_alone(tiny_model):
    config, demonstrations = SFTConfig(epochs=12, batch_size=8, learning_rate=1e-2), rows("demonstrations", 16)
    one, two, short = (fresh(tiny_model) for _ in range(3))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = sft(one, demonstrations, config, seed=3)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert sft(two, demonstrations, config, seed=3) == first
    assert torch.equal(weights(one), weights(two))
    begun = sft(short, demonstrations, SFTConfig(epochs=0.5, batch_size=8, learning_rate=1e-2), seed=3)
    assert first.steps == 24 and first.loss < 0.8 * begun.loss
    assert one.module.config.use_cache


def test_a_loss_that_is_not_finite_stops_sft(tiny_model):
    broken = fresh(tiny_model)
    demonstrations = rows("demonstrations", 12)
    demonstrations[7] = {"prompt": "x" * 40, "completion": "y" * 10}
    with torch.no_grad():  # a position that no other row reaches
        broken.module.transformer.wpe.weight[45] = float("nan")
    with pytest.raises(NonFiniteError, match=r"sft: the loss is nan at step \d, in rows (\d+, ){0,3}7[,;]"):
        sft(broken, demonstrations, SFTConfig(epochs=1, batch_size=4), seed=1)


def test_a_reward_model_learns_to_order_pairs(tiny_model):
    config = tiny_model.module.config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = replace(tiny_model, module=GPT2ForSequenceClassification(config))
    pairs = rows("pairs", 24)
    result = reward_model(start, pairs, pairs, RewardModelConfig(epochs=15, batch_size=8, learning_rate=5e-3),
                          seed=2)
    assert result.steps == 45
    assert result.heldout_accuracy > 0.9 and result.heldout_margin > 0.5  # of the pairs it was trained on


def token_loss(model, row, completion_only):
    """Σ −log π of the tokens that count, and how many they are counted as: one row, one forward pass, no labels."""
    prompt = model.tokenizer(row["prompt"])["input_ids"]
    ids = [*model.tokenizer(row["prompt"] + row["completion"])["input_ids"], model.tokenizer.eos_token_id]
    with torch.no_grad():
        logprobs = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    counted = range(len(prompt) if completion_only else 1, len(ids))
    first = 0 if completion_only else 1  # no token predicts the first one, and transformers counts it all the same
    return -sum(float(logprobs[t - 1, ids[t]]) for t in counted), len(counted) + first


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_loss_is_over_the_tokens_that_the_setting_names(tiny_model, completion_only):
    """One step over all rows reports the loss before it: the mean over the completions' tokens, or over all."""
    demonstrations, model = rows("demonstrations", 6), fresh(tiny_model)
    sums = [token_loss(tiny_model, row, completion_only) for row in demonstrations]
    found = sft(model, demonstrations, SFTConfig(epochs=1, batch_size=6, completion_only=completion_only), seed=1)
    assert found.steps == 1
    assert found.loss == pytest.approx(sum(loss for loss, _ in sums) / sum(count for _, count in sums), rel=1e-5)


def scorer(tiny_model, seed=0):
    """An untrained reward model whose head is not 0."""
    config = copy.deepcopy(tiny_model.module.config)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = GPT2ForSequenceClassification(config).eval()
        torch.nn.init.normal_(module.score.weight)
    return replace(tiny_model, module=module)


def score(model, text):
    ids = [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]
    with torch.no_grad():
        return model.module(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_the_reward_models_loss_by_hand(tiny_model, coef):
    """One step over all pairs: −log σ(r_c − r_r) + c·(r_c + r_r)², mean over the pairs."""
    pairs, start = rows("pairs", 5), scorer(tiny_model)
    scores = [[score(start, pair["prompt"] + pair[which]) for which in ("chosen", "rejected")] for pair in pairs]
    expected = np.mean([np.log1p(np.exp(r - c)) + coef * (c + r) ** 2 for c, r in scores])
    found = reward_model(start, pairs, pairs, RewardModelConfig(epochs=1, batch_size=5, center_coef=coef), seed=1)
    assert found.steps == 1 and found.loss == pytest.approx(expected, rel=1e-4)


def test_heldout_accuracy_is_of_pairs_it_did_not_see(tiny_model):
    """A rule that holds in pairs and in held-out ones, of other prompts; then held-out pairs where it is the other way."""
    names = ["soup", "film", "view", "choir", "copy", "road", "night", "tea", "bread", "song", "park", "desk"]
    pairs = [{"prompt": f"The {name}", "chosen": " is fine", "rejected": " is cold"} for name in names]
    seen, unseen = pairs[:8], pairs[8:]
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in unseen[:3]] + unseen[3:]
    config = RewardModelConfig(epochs=25, batch_size=8, learning_rate=5e-3)
    for heldout, accuracy in ((unseen, 1.0), (turned, 0.25)):
        start = scorer(tiny_model)
        found = reward_model(start, seen, heldout, config, seed=2)
        margins = [score(start, pair["prompt"] + pair["chosen"]) - score(start, pair["prompt"] + pair["rejected"])
                   for pair in heldout]
        assert found.heldout_accuracy == np.mean([margin > 0 for margin in margins]) == accuracy
        assert found.heldout_margin == pytest.approx(np.mean(margins), rel=1e-4)
