"""Supervised fine-tuning: the base model learns to continue prompts as the demonstrations do.

loss = −(1/n) Σ log π(token | before), over the n completion tokens and EOS; without `completion_only` over the prompt's too,
where n counts a row's first token as well, though none predicts it (transformers' own count). TRL's SFTTrainer does the
work; https://huggingface.co/docs/trl/sft_trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from schemas.language import SFTConfig
from schemas.metrics import SFTMetrics
from stages.ops.conversations import prompt_of
from stages.ops.language_model import LanguageModel
from stages.ops.prompts import completed
from stages.ops.seeding import seeded


def sft(
    base: LanguageModel, demonstrations: list[Mapping[str, Any]], config: SFTConfig, *, seed: int
) -> SFTMetrics:
    """Trains `base` in place. `demonstrations`: a prompt (`prompt_of`) and `completion` each. Raises `NonFiniteError`."""
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    from stages.ops.trainer import accelerated, common_arguments, run  # datasets: not in every process that imports stages

    wholes, cuts = completed(base.tokenizer, [prompt_of(row) for row in demonstrations],
                             [row["completion"] for row in demonstrations], base.chat_template)
    rows = Dataset.from_list([{"input_ids": whole.tolist(), "completion_mask": [0] * cut + [1] * (len(whole) - cut)}
                              for whole, cut in zip(wholes, cuts, strict=True)])
    with seeded(seed) as seed32, accelerated(), tempfile.TemporaryDirectory() as folder:
        arguments = common_arguments(config, seed32, len(rows), base.device.torch.type)
        trainer = SFTTrainer(
            model=base.module, train_dataset=rows, processing_class=base.tokenizer,
            args=TRLConfig(output_dir=folder, completion_only_loss=config.completion_only, **arguments))
        loss, steps = run(trainer, "sft", "input_ids", base.computing)
    return SFTMetrics(loss=loss, steps=steps)
