"""Reward-model training: a scalar r(prompt, response) that puts chosen above rejected responses.

loss = −log σ(r_chosen − r_rejected) + c·(r_chosen + r_rejected)², r read at the last token (Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, equation 1; the centring term after Eisenstein et al. 2023,
https://arxiv.org/abs/2312.09244). TRL's RewardTrainer does the work; https://huggingface.co/docs/trl/reward_trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import numpy as np

from schemas.language import RewardModelConfig
from schemas.metrics import RewardModelMetrics
from stages.ops.language_model import LanguageModel, sequence_scores
from stages.ops.prompts import render
from stages.ops.seeding import seeded

Pairs = list[Mapping[str, str]]


def reward_model(
    start: LanguageModel, pairs: Pairs, heldout_pairs: Pairs, config: RewardModelConfig, *, seed: int
) -> RewardModelMetrics:
    """Trains `start`, a sequence classifier with one label, in place. Pairs: `prompt`, `chosen` and `rejected` each."""
    from datasets import Dataset
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    from stages.ops.trainer import common_arguments, run  # datasets: not in every process that imports stages

    rows, heldout = (_rendered(start, some) for some in (pairs, heldout_pairs))
    with seeded(seed) as seed32, tempfile.TemporaryDirectory() as folder:
        arguments = common_arguments(config, seed32, len(rows), start.device.torch.type)
        trainer = RewardTrainer(
            model=start.module, train_dataset=Dataset.from_list(rows), processing_class=start.tokenizer,
            args=TRLConfig(output_dir=folder, center_rewards_coefficient=config.center_coef or None, **arguments))
        loss, steps = run(trainer, "reward_model", "chosen_ids")
    start.module.eval()
    margins = _score(start, heldout, "chosen") - _score(start, heldout, "rejected")
    return RewardModelMetrics(loss=loss, steps=steps, heldout_accuracy=float((margins > 0).mean()),
                              heldout_margin=float(margins.mean()))


def _rendered(model: LanguageModel, pairs: Pairs) -> Pairs:
    """The pairs with their prompts as a model is given them."""
    return [{"prompt": render(model.tokenizer, row["prompt"], model.chat_template), "chosen": row["chosen"],
             "rejected": row["rejected"]} for row in pairs]


def _score(model: LanguageModel, pairs: Pairs, which: str) -> np.ndarray:
    """(n,) scores of prompt + response + EOS."""
    texts = [row["prompt"] + row[which] + model.tokenizer.eos_token for row in pairs]
    return sequence_scores(model, model.tokenizer(texts)["input_ids"], "reward_model test")
