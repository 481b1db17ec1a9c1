"""Reward-model training: a scalar r(prompt, response) that puts chosen above rejected responses.

loss = −log σ(r_chosen − r_rejected) + c·(r_chosen + r_rejected)², r read at the last token (Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, equation 1; the centring term after Eisenstein et al. 2023,
https://arxiv.org/abs/2312.09244). TRL's RewardTrainer does the work; https://huggingface.co/docs/trl/reward_trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from schemas.language import RewardModelConfig
from schemas.metrics import RewardModelMetrics
from stages.ops.conversations import prompt_of
from stages.ops.language_model import LanguageModel, scores_at_last_token, sequence_scores
from stages.ops.prompts import completed
from stages.ops.seeding import seeded

Pairs = list[Mapping[str, Any]]


def reward_model(
    start: LanguageModel, pairs: Pairs, heldout_pairs: Pairs, config: RewardModelConfig, *, seed: int
) -> RewardModelMetrics:
    """Trains `start`, a sequence classifier with one label, in place. Pairs: a prompt, `chosen` and `rejected` each."""
    from datasets import Dataset
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    from stages.ops.trainer import accelerated, common_arguments, run  # datasets: not in every process that imports stages

    chosen, rejected = (_tokens(start, pairs, which) for which in ("chosen", "rejected"))
    rows = [{"chosen_ids": one, "rejected_ids": other} for one, other in zip(chosen, rejected, strict=True)]
    scores_at_last_token(start.module)
    with seeded(seed) as seed32, accelerated(), tempfile.TemporaryDirectory() as folder:
        arguments = common_arguments(config, seed32, len(rows), start.device.torch.type)
        trainer = RewardTrainer(
            model=start.module, train_dataset=Dataset.from_list(rows), processing_class=start.tokenizer,
            args=TRLConfig(output_dir=folder, center_rewards_coefficient=config.center_coef or None, **arguments))
        loss, steps = run(trainer, "reward_model", "chosen_ids", start.computing)
    start.module.eval()
    margins = np.subtract(*(sequence_scores(start, _tokens(start, heldout_pairs, which), "reward_model test")
                            for which in ("chosen", "rejected")))
    return RewardModelMetrics(loss=loss, steps=steps, heldout_accuracy=float((margins > 0).mean()),
                              heldout_margin=float(margins.mean()))


def _tokens(model: LanguageModel, pairs: Pairs, which: str) -> list[list[int]]:
    """Prompt, response and EOS of each pair, as tokens."""
    wholes, _ = completed(model.tokenizer, [prompt_of(row) for row in pairs], [row[which] for row in pairs],
                          model.chat_template)
    return [whole.tolist() for whole in wholes]
