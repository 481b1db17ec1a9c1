"""Stages and commands: `gae` over a million tokens, the memory of `ppo` with a large vocabulary, seconds of commands."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from rows import Row

ROOT = Path(__file__).parents[2]
TOKENS = 1_000_000
MEMORY = """
import copy, json, resource, sys
import numpy as np, torch
from transformers import GPT2Config, GPT2LMHeadModel
from flows.language.model_folders import scalar_over
from schemas.settings import PPOConfig
from schemas.tables import Advantages, Ragged, Rollouts, Values
from stages.ops.abilities import abilities
from stages.ops.device import keep_freed_memory
from stages.ops.distribution import Distribution
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ppo import ppo
sys.path.insert(0, "tests")
from brought import make_tokenizer
keep_freed_memory()
torch.set_num_threads(2)
V, P, R, B = 151_936, 16, 112, 64
module = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=P + R, n_embd=32, n_layer=1, n_head=2)).eval()
actor = LanguageModel(module, make_tokenizer(), micro_batch_tokens=4096, abilities=abilities(module))
critic = LanguageModel(copy.deepcopy(scalar_over(module)).eval(), actor.tokenizer, micro_batch_tokens=4096)
config, draw = PPOConfig(epochs=1, minibatches=2, learning_rate=1e-5), np.random.default_rng(0)
learner = LanguageModelLearner(actor, critic, config, Distribution())
ids = np.arange(B)
ragged = lambda length, kind, make: Ragged.from_rows([make(length).astype(kind) for _ in ids], kind)
tokens = lambda n: draw.integers(0, V, n)
normal = lambda n: draw.normal(size=n)
rollouts = Rollouts(
    row_id=ids, prompt_id=ids, prompt_tokens=ragged(P, np.int64, tokens), response_tokens=ragged(R, np.int64, tokens),
    logprobs=ragged(R, np.float32, lambda n: np.full(n, -11.9)), prompt=("",) * B, response=("",) * B,
    finish_reason=("eos",) * B)
values = Values(row_id=ids, values=ragged(R, np.float32, normal), bootstrap=np.zeros(B, np.float32))
of_token = ragged(R, np.float32, normal)
columns = ("kl", "rewards", "raw_advantages", "advantages", "returns")
advantages = Advantages(row_id=ids, **dict.fromkeys(columns, of_token))
for network, optimizer in learner.optimizers.items():  # its state, which a first step would make
    for p in learner.networks[network].module.parameters():
        moments = {name: torch.zeros_like(p) + 0 for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros(()), **moments}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
ppo(learner, rollouts, values, advantages, config, seed=0)
print(json.dumps((peak() - before) / 1e9))
"""


def rows(rounds: int) -> list[Row]:
    return [
        Row("gae", "`gae`, a million ragged response tokens, Parquet to Parquet: seconds", 0.5, "<=",
            lambda: gae(rounds)[0]),
        Row("gae-arithmetic", "its arithmetic over copying its arrays", 4.0, "<=", lambda: gae(rounds)[1]),
        Row("memory", "peak memory of `ppo`, V = 151,936, micro-batches of 4,096 tokens, over weights and optimizers: GB",
            1.0, "<=", memory),
        Row("stage", "`baton stage gae` on a saved run, no server: seconds", 3.0, "<=", lambda: commands(rounds)["stage"]),
        Row("finished", "`baton train` of a finished run: seconds", 2.0, "<=", lambda: commands(rounds)["finished"]),
        Row("one", "`baton train` of a tiny model, one iteration, from Enter to prompt: seconds", 10.0, "<=",
            lambda: commands(rounds)["one"]),
    ]


def memory() -> tuple[float, str]:
    out = subprocess.run([sys.executable, "-c", MEMORY], check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT).stdout
    return float(json.loads(out.splitlines()[-1])), "resident memory, a GPT-2 of 5M parameters"


@cache
def gae(rounds: int) -> tuple[tuple[float, str], tuple[float, str]]:
    from flows.runs.produce import StageOutput, write
    from flows.store.store import Store
    from schemas.artifacts import Recipe
    from schemas.settings import ExecutionConfig, GAEConfig, KLConfig
    from schemas.tables import ReferenceLogprobs, Rewards, Rollouts, Values
    from stages import gae as stage

    rollouts, reference, rewards, values = tables()
    whole, arithmetic, copies = [], [], []
    with TemporaryDirectory() as folder:
        def commit(name: str, *made: object, seed: int = 0) -> Recipe:
            recipe = Recipe(stage=name, version=1, config={"seed": seed}, inputs={})
            def make(attempt):
                for table in made:
                    attempt.table(table)
                return StageOutput()
            store = Store(folder)
            store.commit(write(store, recipe, ExecutionConfig(threads=1), make))
            return recipe

        refs = [commit(name, table).ref for name, table in (
            ("rollout", rollouts), ("reference", reference), ("reward", rewards), ("value", values))]
        for number in range(rounds):
            store, began = Store(folder), time.perf_counter()
            read = [store.table(*one) for one in zip(refs, (Rollouts, ReferenceLogprobs, Rewards, Values), strict=True)]
            computing = time.perf_counter()
            made = stage.gae(*read, GAEConfig(), KLConfig(coef=0.05), kl_coef=0.05)
            arithmetic.append(time.perf_counter() - computing)
            commit("gae", made, seed=number)
            whole.append(time.perf_counter() - began)
            arrays = [getattr(made, name).values for name in vars(made) if hasattr(getattr(made, name), "values")]
            arrays += [read[0].logprobs.values, read[1].logprobs.values, read[3].values.values]
            began = time.perf_counter()
            for array in arrays:
                array.copy()
            copies.append(time.perf_counter() - began)
    ratio = statistics.median(a / c for a, c in zip(arithmetic, copies, strict=True))
    return ((statistics.median(whole), f"arithmetic {statistics.median(arithmetic):.3f} s"),
            (ratio, f"copies {statistics.median(copies):.4f} s"))


def tables() -> tuple[object, ...]:
    """A million response tokens in rows of 1 to 200."""
    from schemas.tables import Ragged, ReferenceLogprobs, Rewards, Rollouts, Values

    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 201, 20_000)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), TOKENS)]
    b = len(lengths)
    ids, offsets = np.arange(b), np.concatenate([[0], lengths.cumsum()])
    def ragged(values: np.ndarray) -> Ragged:
        return Ragged(values=values, offsets=offsets)
    n = int(offsets[-1])
    prompts = Ragged.from_rows([np.zeros(1, np.int64)] * b, np.int64)
    rollouts = Rollouts(
        row_id=ids, prompt_id=ids, prompt_tokens=prompts, response_tokens=ragged(draw.integers(0, 1000, n)),
        logprobs=ragged(draw.normal(-2, 1, n).astype(np.float32)), prompt=("",) * b, response=("",) * b,
        finish_reason=("eos",) * b)
    reference = ReferenceLogprobs(row_id=ids, logprobs=ragged(draw.normal(-2, 1, n).astype(np.float32)))
    score = draw.normal(size=b).astype(np.float32)
    rewards = Rewards(row_id=ids, components={"a": score}, raw_score=score, score=score)
    values = Values(row_id=ids, values=ragged(draw.normal(size=n).astype(np.float32)), bootstrap=np.zeros(b, np.float32))
    return rollouts, reference, rewards, values


@cache
def commands(rounds: int) -> dict[str, tuple[float, str]]:
    """Medians of whole commands, from their start to their end, MLflow on, no server named."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_example

    named = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in named}
    found: dict[str, list[float]] = {"one": [], "finished": [], "stage": []}
    with TemporaryDirectory() as scratch:
        folder = write_example(Path(scratch, "tiny"))
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"iterations": 1, "tracking": {"enabled": True}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

        def run(name: str, *arguments: object) -> None:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "flows.cli.main", *map(str, arguments)], check=True, cwd=ROOT,
                           env=environment, stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - began)

        for number in range(rounds):
            store = Path(scratch, f"store{number}")
            run("one", "train", folder, "--store", store)
            run("finished", "train", folder, "--store", store)
            run("stage", "stage", "gae", "tiny", "--iteration", 1, "--store", store)
    return {name: (statistics.median(seconds), "") for name, seconds in found.items()}
