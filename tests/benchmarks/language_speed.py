"""Language models beside TRL 1.12, which has the last PPO trainer: seconds of an iteration, and what of it is no computing.

For Baton an iteration is the time from one state's commit to the next, everything included: tables, checkpoints and their
syncs, Prefect's flow and tasks, MLflow beside it. TRL saves nothing. Rounds alternate; what counts is the median of their
ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from models import REVIEWS, ROOT, example, gpt2, reviews_actor, smollm2
from rows import Row

PEERS = ROOT / ".peers" / "bin" / "python"
MAKE = {"gpt2": gpt2, "reviews": reviews_actor, "smollm2": smollm2}
CASES = {  # model, and what both sides are given
    "gpt2": ("gpt2", {"batch": 32, "response": 24, "epochs": 4}),
    "reviews": ("reviews", {"batch": 128, "response": 64, "epochs": 4, "prompts": REVIEWS / "prompts.jsonl"}),
    "smollm2": ("smollm2", {"batch": 16, "response": 24, "epochs": 1}),
}
SCRATCH = TemporaryDirectory()
TIMED = """
import json, sys, time
from flows.iterate import Session
import stages.ppo, stages.rollout, stages.reference, stages.reward, stages.value, stages.gae
spent, whole = [0.0], []
def timed(function):
    def call(*given, **more):
        began = time.perf_counter()
        try:
            return function(*given, **more)
        finally:
            spent[0] += time.perf_counter() - began
    return call
for name in ("ppo", "rollout", "reference", "reward", "value", "gae"):
    module = sys.modules[f"stages.{name}"]
    setattr(module, name, timed(getattr(module, name)))
iterate = Session._iterate
def seen(session, state):
    before, began = spent[0], time.perf_counter()
    after = iterate(session, state)
    whole.append((time.perf_counter() - began, spent[0] - before))
    return after
Session._iterate = seen
from flows.cli.main import run_command
code = run_command(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(whole))
sys.exit(code)
"""


@cache
def model_of(name: str) -> Path:
    """Its folder, made once."""
    return MAKE[name](Path(SCRATCH.name, name))


@cache
def example_of(case: str) -> Path:
    name, given = CASES[case]
    return example(Path(SCRATCH.name, f"{case}-example"), model_of(name), **given)


def baton(*arguments: object, code: str | None = None) -> None:
    command = ["-m", "flows.cli.main"] if code is None else ["-c", code]
    subprocess.run([sys.executable, *command, *map(str, arguments), "--quiet"], check=True, cwd=ROOT)


def ours(case: str, iterations: int, *settings: str) -> float:
    """Seconds of an iteration: the median, without the first and the last, which has an evaluation."""
    with TemporaryDirectory() as store:
        baton("train", example_of(case), "--run", "bench", "--iterations", iterations, "--store", store,
              *(f"--set={one}" for one in settings))
        written = [path.stat().st_mtime for path in sorted(Path(store).glob("runs/bench/iterations/*.json"))]
    return statistics.median(after - before for before, after in list(pairwise(written))[1:-1])


def theirs(case: str, iterations: int) -> float:
    name, given = CASES[case]
    more = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    out = subprocess.run([PEERS, Path(__file__).with_name("trl_peer.py"), model_of(name), *more, "--iterations",
                          str(iterations)], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return statistics.median(json.loads(out.splitlines()[-1])[1:])


def beside_trl(case: str, iterations: int, rounds: int, *settings: str) -> tuple[float, str]:
    """TRL's seconds over ours, and both."""
    found = []
    for _ in range(rounds):
        found.append((ours(case, iterations, *settings), theirs(case, iterations)))
    ratio = statistics.median(them / us for us, them in found)
    us, them = (statistics.median(side) for side in zip(*found, strict=True))
    return ratio, f"{us:.2f} s, TRL {them:.2f} s"


def rows(rounds: int) -> list[Row]:
    """Name → what measures it."""
    return [
        Row("gpt2", "GPT-2 of 1.1M, 32 × (16 + 24), 4 epochs of 4: TRL's seconds over ours", 2.0, ">=",
            lambda: beside_trl("gpt2", 24, rounds)),
        Row("reviews", "data/reviews' actor, 128 prompts, up to 64 tokens, natural ends: TRL's seconds over ours", 3.0, ">=",
            lambda: beside_trl("reviews", 10, rounds)),
        Row("smollm2", "SmolLM2-135M, 16 × (16 + 24), 1 epoch of 4, `checkpoints.every: 10`: TRL's seconds over ours", 1.4,
            ">=", lambda: beside_trl("smollm2", 5, rounds, "checkpoints.every=10")),
        Row("smollm2-each", "the same, a checkpoint every iteration", 1.1, ">=", lambda: beside_trl("smollm2", 5, rounds)),
        Row("outside", "share of such an iteration outside its stages' functions, `every: 10`", 0.05, "<=", outside),
        Row("sampling", "SmolLM2, 32 rows, 24 tokens: tokens/s over `transformers.generate`", 2.0, ">=",
            lambda: sampling(rounds)),
        Row("bytes", "bytes that 10 iterations of SmolLM2 write, `every: 10` over `every: 1`", 0.12, "<=", bytes_written),
        Row("busy", "a GPT-2 iteration beside a process that takes one of two cores, over one alone", 2.5, "<=",
            lambda: beside_another(rounds)),
    ]


def outside() -> tuple[float, str]:
    with TemporaryDirectory() as scratch:
        baton(Path(scratch, "times.json"), "train", example_of("smollm2"), "--run", "bench", "--iterations", 7, "--store",
              Path(scratch, "store"), "--set=checkpoints.every=10", code=TIMED)
        times = json.loads(Path(scratch, "times.json").read_text())[1:-1]
    shares = [1 - computing / whole for whole, computing in times]
    return statistics.median(shares), f"{statistics.median(whole for whole, _ in times):.2f} s an iteration"


def bytes_written() -> tuple[float, str]:
    found = []
    for every in (10, 1):
        with TemporaryDirectory() as store:
            baton("train", example_of("smollm2"), "--run", "bench", "--iterations", 10, "--store", store,
                  f"--set=checkpoints.every={every}")
            stages = ("rollout", "reference", "reward", "value", "gae", "ppo")
            found.append(sum(path.stat().st_size for stage in stages
                             for path in Path(store, "artifacts", stage).rglob("*") if path.is_file()))
    return found[0] / found[1], f"{found[0] / 1e9:.2f} GB, {found[1] / 1e9:.2f} GB"


def sampling(rounds: int) -> tuple[float, str]:
    code = Path(__file__).with_name("sampling_speed.py")
    out = subprocess.run([sys.executable, code, model_of("smollm2"), str(rounds)], check=True, text=True,
                         stdout=subprocess.PIPE, cwd=ROOT).stdout
    us, them = json.loads(out.splitlines()[-1])
    return us / them, f"{us:.0f} tokens/s, transformers {them:.0f}"


def beside_another(rounds: int) -> tuple[float, str]:
    found = []
    for _ in range(rounds):
        alone = ours("gpt2", 12)
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(1)
            found.append((alone, ours("gpt2", 8)))
        finally:
            other.kill()
    ratio = statistics.median(busy / alone for alone, busy in found)
    return ratio, ", ".join(f"{statistics.median(side):.2f} s" for side in zip(*found, strict=True))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
