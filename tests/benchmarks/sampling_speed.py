"""Tokens per second of Baton's sampling and of transformers' `generate`, in turns, 32 rows of 24 tokens, as JSON.

    python tests/benchmarks/sampling_speed.py MODEL ROUNDS
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from flows.language.model_folders import load_causal, load_tokenizer
from stages.ops.device import keep_freed_memory
from stages.ops.distribution import Distribution
from stages.ops.language_model import LanguageModel
from stages.ops.sampling import Stops, sample

ROWS, PROMPT, STEPS = 32, 16, 24


def main(folder: Path, rounds: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(2)
    module = load_causal(folder).eval()
    model, draw = LanguageModel(module, load_tokenizer(folder)), np.random.default_rng(0)
    prompts, uniforms = draw.integers(10, 10_000, (ROWS, PROMPT)), draw.random((ROWS, STEPS))
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, min_new_tokens=STEPS, max_new_tokens=STEPS,
                              pad_token_id=0, eos_token_id=0)
    ids = torch.from_numpy(prompts)
    ways = (lambda: sample(model, list(prompts), uniforms, Distribution(), Stops(frozenset())),
            lambda: module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config))
    seconds = [[], []]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for way, found in zip(ways, seconds, strict=True):
                began = time.perf_counter()
                way()
                found.append(time.perf_counter() - began)
    print(json.dumps([ROWS * STEPS / statistics.median(found[1:]) for found in seconds]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
