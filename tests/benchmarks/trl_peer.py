"""The other side of `make bench`: TRL's last PPO trainer, by .peers/bin/python; prints seconds of each iteration as JSON.

Actor, reference, critic and reward model are copies of one model, trained in full, in float32. TRL saves nothing here: no
checkpoint, no log, no evaluation. `--prompts`: real ones with natural ends, and otherwise random tokens and a fixed length.
"""

import argparse
import json
import os
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """The time at each iteration's end."""

    def __init__(self):
        self.marks = []

    def on_train_begin(self, *_, **__):
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.marks.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompts")
    numbers = {"batch": 32, "prompt": 16, "response": 24, "epochs": 4, "minibatches": 4, "iterations": 6, "threads": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", disable_tqdm=True, num_sample_generations=0, learning_rate=1e-6, missing_eos_penalty=None,
        per_device_train_batch_size=given.batch // given.minibatches, gradient_accumulation_steps=given.minibatches,
        num_mini_batches=given.minibatches, num_ppo_epochs=given.epochs, response_length=given.response,
        total_episodes=given.batch * given.iterations, local_rollout_forward_batch_size=given.batch,
        stop_token="eos" if given.prompts else None, temperature=1.0)
    clock = Clock()
    causal, scalar = (
        lambda kind=kind, more=more: kind.from_pretrained(given.model, dtype=torch.float32, **more)
        for kind, more in ((AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 1})))
    PPOTrainer(args=config, processing_class=tokenizer, model=causal(), ref_model=causal(), reward_model=scalar(),
               value_model=scalar(), train_dataset=Dataset.from_dict({"input_ids": rows(given, tokenizer)}),
               callbacks=[clock]).train()
    print(json.dumps([after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]))


def rows(given, tokenizer):
    """Token ids of the prompts."""
    count = given.batch * given.iterations
    if not given.prompts:
        return torch.randint(10, len(tokenizer) - 10, (count, given.prompt)).tolist()
    with open(given.prompts, encoding="utf-8") as lines:
        there = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    return [there[i % len(there)] for i in range(count)]


if __name__ == "__main__":
    main()
