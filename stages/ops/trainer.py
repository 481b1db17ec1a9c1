"""What `sft` and `reward_model` share: the settings under which TRL's trainers repeat bit for bit, and a progress bar."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from schemas.config import RewardModelConfig, SFTConfig
from schemas.errors import NonFiniteError


def common_arguments(config: SFTConfig | RewardModelConfig, seed: int, rows: int, device: str) -> dict[str, Any]:
    """Arguments of both trainers: float32, no dropout of rows, no checkpoints, no reports, every step logged."""
    steps = max(1, round(config.epochs * rows / config.batch_size))
    return dict(
        max_steps=steps, per_device_train_batch_size=config.batch_size, learning_rate=config.learning_rate,
        lr_scheduler_type="linear", warmup_steps=round(config.warmup_ratio * steps), seed=seed, data_seed=seed,
        bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=device == "cpu", dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu", save_strategy="no", eval_strategy="no", report_to=[], logging_steps=1,
        logging_nan_inf_filter=False, disable_tqdm=True, max_length=None,
    )


class _Progress(TrainerCallback):
    """A bar with the loss; a loss that is not finite ends the training."""

    def __init__(self, name: str) -> None:
        self.name, self.losses = name, []

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False, disable=None)

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not abs(loss) < float("inf"):
            raise NonFiniteError(f"{self.name}: the loss is {loss} at step {state.global_step}; lower the learning rate "
                                 f"or look at the rows of that step")
        self.losses.append(loss)
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def run(trainer: Trainer, name: str) -> tuple[float, int]:
    """Trains; the mean loss of the last tenth of the steps, and the steps. Raises `NonFiniteError`."""
    progress = _Progress(name)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    trainer.train()
    trainer.model.config.use_cache = True  # switched off by the trainer, and would be saved so
    last = progress.losses[-max(1, len(progress.losses) // 10) :]
    return sum(last) / len(last), len(progress.losses)
