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
