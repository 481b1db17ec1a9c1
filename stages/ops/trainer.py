"""What `sft` and `reward_model` share: settings under which TRL's trainers repeat bit for bit, a bar, a guard for NaN."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from schemas.errors import NonFiniteError
from schemas.language import RewardModelConfig, SFTConfig
from stages.ops import ranks
from stages.ops.device import bound_to_cores
from stages.ops.progress import progress_bar


@contextmanager
def accelerated() -> Iterator[None]:
    """Inside it accelerate, on which the trainers run, shares a batch among the ranks; it reads what they are from the
    environment, once in a process. A last batch of an epoch that is not full is then filled up from its beginning."""
    if ranks.size() == 1:
        yield
        return
    mine = {"RANK": ranks.rank(), "LOCAL_RANK": ranks.rank(), "WORLD_SIZE": ranks.size(), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 0, "OMP_NUM_THREADS": torch.get_num_threads()}  # it would set the threads too
    before = {name: os.environ.get(name) for name in mine}
    _forget_ranks()
    os.environ.update({name: str(value) for name, value in mine.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget_ranks()


def _forget_ranks() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def common_arguments(config: SFTConfig | RewardModelConfig, seed: int, rows: int, device: str) -> dict[str, Any]:
    """Arguments of both trainers: float32, no checkpoints, no reports, every step logged."""
    steps = max(1, round(config.epochs * rows / config.batch_size))
    return dict(
        max_steps=steps, per_device_train_batch_size=config.batch_size // ranks.size(), learning_rate=config.learning_rate,
        lr_scheduler_type="linear", warmup_steps=round(config.warmup_ratio * steps), seed=seed, data_seed=seed,
        bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=device == "cpu", dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu", save_strategy="no", eval_strategy="no", report_to=[], logging_steps=1,
        logging_nan_inf_filter=False, log_level_replica="passive", disable_tqdm=True, max_length=None,
    )


def run(
    trainer: Trainer, name: str, tokens: str, computing: Callable[[], AbstractContextManager]
) -> tuple[float, int]:
    """Trains; the mean loss of the last tenth of the steps, and the steps.

    `computing`: what its forward passes are inside of; `tokens`: the dataset's column of token ids, by which a batch's rows
    are found again. Raises `NonFiniteError` with the rows of the first loss that is not finite, or naming a weight that is
    not finite at the end.
    """
    progress = _Progress(name)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    _guard_loss(trainer, name, tokens, computing)
    with bound_to_cores():
        trainer.train()
    for weight, values in trainer.model.named_parameters():
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"{name}: the weight {weight} is not finite after the last step; lower the learning rate")
    trainer.model.config.use_cache = True  # switched off by the trainer, and would be saved so
    last = progress.losses[-max(1, len(progress.losses) // 10) :]
    return sum(last) / len(last), len(progress.losses)


def _guard_loss(trainer: Trainer, name: str, tokens: str, computing: Callable[[], AbstractContextManager]) -> None:
    """Has the trainer check each loss before its backward pass."""
    compute = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        batch = {tuple(row[mask.bool()].tolist()) for row, mask in zip(inputs["input_ids"], inputs["attention_mask"],
                                                                       strict=True)}
        with computing():
            out = compute(model, inputs, *args, **kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(loss):
            rows = [i for i, row in enumerate(trainer.train_dataset[tokens]) if tuple(row) in batch]
            raise NonFiniteError(f"{name}: the loss is {loss.item()} at step {trainer.state.global_step + 1}, in rows "
                                 f"{', '.join(map(str, rows))}; look at them, or lower the learning rate")
        return out

    trainer.compute_loss = compute_loss


class _Progress(TrainerCallback):
    """A bar with the loss."""

    def __init__(self, name: str) -> None:
        self.name, self.losses = name, []

    def on_train_begin(self, args, state, control, **_):
        self.bar = progress_bar(total=state.max_steps, desc=self.name)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.bar.update()
            self.bar.set_postfix(loss=f"{self.losses[-1]:.3f}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
