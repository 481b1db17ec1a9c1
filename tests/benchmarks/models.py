"""What the benchmarks train: a new GPT-2 of a million parameters, SmolLM2-135M, the actor of data/reviews."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
REVIEWS = ROOT / "data" / "reviews"
SHARED = {"reward_model": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-6}, "kl": {"coef": 0.05},
          "evaluate": {"every": 0}, "execution": {"threads": 2}}


def gpt2(place: Path) -> Path:
    """A folder with a new GPT-2 of 1.1 million parameters and a tokenizer of the reviews' words."""
    from schemas.language import BaseModelConfig
    from stages.base_model import base_model

    lines = (REVIEWS / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    model = base_model([json.loads(line) for line in lines],
                       BaseModelConfig(vocab_size=512, context_length=96, layers=3, heads=4, width=160), seed=0)
    return saved(model.module, model.tokenizer, place)


def smollm2(place: Path) -> Path:
    """SmolLM2-135M-Instruct, as `make smollm2` gets it."""
    from flows.language.model_folders import load_gguf

    subprocess.run([sys.executable, ROOT / "data/smollm2/get_model.py"], check=True, stdout=subprocess.DEVNULL)
    return saved(*load_gguf(ROOT / "data/smollm2/model.gguf"), place)


def reviews_actor(place: Path) -> Path:
    """The actor of data/reviews after its demonstrations, which ends its responses by itself."""
    store = place.parent / "reviews-store"
    subprocess.run([sys.executable, "-m", "flows.cli.main", "train", REVIEWS, "--iterations", "1", "--store", store,
                    "--quiet", "--set", "tracking.enabled=false"], check=True, cwd=ROOT)
    shutil.copytree(next(store.glob("artifacts/sft/*/attempts/*/actor")), place)
    return place


def saved(module: Any, tokenizer: Any, place: Path) -> Path:
    module.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def example(place: Path, model: Path, *, batch: int, response: int, epochs: int, prompts: Path | None = None) -> Path:
    """A run that begins with that model in every role. `prompts`: others than random words of 16 tokens each."""
    place.mkdir(parents=True)
    rows = _of_words(model) if prompts is None else [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": " good", "rejected": " bad"} for row in rows[:20]]
    files = {"prompts": rows, "heldout_prompts": rows[:4], "pairs": pairs[:16], "heldout_pairs": pairs[16:]}
    for name, written in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    sections = SHARED | {
        "seed": 1, "data": {name: f"{name}.jsonl" for name in files},
        "base_model": {"source": str(model)}, "rollout": {"batch_size": batch, "max_new_tokens": response},
        "ppo": {"epochs": epochs, "minibatches": 4, "learning_rate": 1e-6, "critic_learning_rate": 1e-6}}
    if prompts is None:  # a fixed length, as TRL has it without a stop token
        sections["rollout"]["min_new_tokens"] = response
    (place / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return place


def _of_words(model: Path) -> list[dict[str, str]]:
    """512 prompts that the model's tokenizer reads as 16 tokens."""
    from transformers import AutoTokenizer

    tokenizer, draw, rows = AutoTokenizer.from_pretrained(model), random.Random(0), []
    words = (REVIEWS / "demonstrations.jsonl").read_text(encoding="utf-8").replace('"', " ").split()
    while len(rows) < 512:
        text = tokenizer.decode(tokenizer(" ".join(draw.choices(words, k=24)))["input_ids"][:16])
        if len(tokenizer(text)["input_ids"]) == 16:
            rows.append({"prompt": text})
    return rows
