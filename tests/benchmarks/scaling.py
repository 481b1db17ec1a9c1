"""What a stage costs, by the work that it does, and what several processes save: `make scaling`, half an hour.

GPT-2s of several sizes are trained here for some iterations. Seconds of each stage, the median of all iterations but the
first, are read from its manifests, and a line is fitted for each:

    seconds = a + b·u + c·F

F: floating point operations, 2·P a token forwards and 4·P backwards, of P parameters; u: what is done one after the other,
the sampled steps of `rollout`, the optimizer's steps times 16·P bytes in `ppo`. Errors are those on sizes that the fit has
not seen. Then the same stages by two processes of one thread beside one of them, and what the same sums give for large
models on GPUs, which were not measured. Writes the tables of docs/scaling.md; `--read-off` the last one alone.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
PAGE = ROOT / "docs" / "scaling.md"
PROMPT, EPOCHS, MINIBATCHES = 16, 2, 4
ITERATIONS = 4
STAGES = ("rollout", "reference", "reward", "value", "ppo")


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    batch: int
    response: int


FITTED = [Size(*each) for each in (
    (128, 2, 16, 16), (128, 2, 64, 48), (256, 4, 16, 48), (256, 4, 64, 16), (384, 6, 16, 16), (384, 6, 64, 48),
    (512, 8, 16, 48), (512, 8, 64, 16))]
UNSEEN = [Size(*each) for each in ((192, 3, 32, 32), (320, 5, 48, 24), (448, 6, 24, 40), (576, 8, 32, 24))]


def main() -> int:
    write("read-off", read_off())
    if sys.argv[1:] == ["--read-off"]:
        return 0
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        found = {size: measured(place / f"run{number}", size) for number, size in enumerate(FITTED + UNSEEN)}
        fits = {stage: fit([(size, found[size]) for size in FITTED], stage) for stage in STAGES}
        beside = spread(place, Size(384, 6, 64, 32))
    lines = ["| stage | seconds | GFLOP/s | error on sizes not seen: median, most |", "|---|---|---|---|"]
    for stage, line in fits.items():
        errors = [abs(line @ work(size, found[size], stage) / found[size][stage] - 1) for size in UNSEEN]
        terms = f"{line[0]:.3f} + {line[1]:.2e}·u + {line[2]:.2e}·F"
        rate = f"{1e-9 / line[2]:.0f}" if line[2] > 0 else ""
        lines.append(f"| `{stage}` | {terms} | {rate} | {statistics.median(errors):.0%}, {max(errors):.0%} |")
    write("costs", lines)
    lines = ["| stage | one process, s | two shards or ranks, s | faster by |", "|---|---|---|---|"]
    lines += [f"| `{stage}` | {one:.2f} | {two:.2f} | {one / two:.2f} |" for stage, (one, two) in beside.items()]
    write("beside", lines)
    return 0


def train(place: Path, size: Size, *settings: str) -> dict[str, Any]:
    """Stage → its seconds, the median of all iterations but the first; and `parameters`."""
    from models import example, saved

    from schemas.language import BaseModelConfig
    from stages.base_model import base_model

    rows = [json.loads(line) for line in (ROOT / "data/reviews/demonstrations.jsonl").read_text("utf-8").splitlines()]
    shape = BaseModelConfig(vocab_size=512, context_length=96, layers=size.layers, heads=4, width=size.width)
    made = base_model(rows, shape, seed=0)
    if not place.exists():
        model = saved(made.module, made.tokenizer, place / "model")
        example(place / "example", model, batch=size.batch, response=size.response, epochs=EPOCHS)
    store = place / f"store{len(list(place.glob('store*')))}"
    subprocess.run([sys.executable, "-m", "flows.cli.main", "train", place / "example", "--iterations", str(ITERATIONS),
                    "--store", store, "--quiet",
                    *(w for one in ("tracking.enabled=false", *settings) for w in ("--set", one))],
                   check=True, cwd=ROOT)
    from flows.runs.run import open_run
    from flows.store.store import Store
    from schemas.artifacts import call_of

    run = open_run(Store(str(store)), "example")
    found: dict[str, Any] = {"parameters": made.module.num_parameters()}
    for stage in STAGES:
        seconds = []
        for iteration in range(2, ITERATIONS + 1):
            manifest = run.store.manifest(run.state(iteration).artifacts[stage])
            seconds.append(manifest.seconds)
            if manifest.environment.execution["shards"] > 1 and stage != "ppo":
                parts = call_of(manifest, str(store)).shards()
                seconds[-1] += max(run.store.manifest(part.recipe.ref).seconds for part in parts)
        found[stage] = statistics.median(seconds)
    return found


def measured(place: Path, size: Size) -> dict[str, Any]:
    found = train(place, size)
    print(size, {stage: round(found[stage], 3) for stage in STAGES}, flush=True)
    return found


def work(size: Size, found: dict[str, Any], stage: str) -> np.ndarray:
    """1, u, F of a stage."""
    parameters, tokens = found["parameters"], size.batch * (PROMPT + size.response)
    match stage:
        case "rollout":
            return np.array([1, size.response, 2 * parameters * tokens])
        case "ppo":
            return np.array([1, EPOCHS * MINIBATCHES * 16 * 2 * parameters, 2 * 6 * parameters * tokens * EPOCHS])
    return np.array([1, 0, 2 * parameters * tokens])


def fit(sizes: list[tuple[Size, dict[str, Any]]], stage: str) -> np.ndarray:
    """a, b, c, none of them below 0, with the least relative errors."""
    seconds = np.array([found[stage] for _, found in sizes])
    rows = np.array([work(size, found, stage) for size, found in sizes])
    scale = np.maximum(rows.max(axis=0), 1)
    kept = [i for i in range(3) if rows[:, i].any()]
    while True:
        solved = np.zeros(3)
        solved[kept] = np.linalg.lstsq((rows / scale)[:, kept] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if (solved >= 0).all():
            return solved / scale
        kept.remove(int(solved.argmin()))


def spread(place: Path, size: Size) -> dict[str, tuple[float, float]]:
    """Stage → seconds by one process of one thread, and by two."""
    one = train(place / "beside", size, "execution.threads=1")
    two = train(place / "beside", size, "execution.threads=1", "execution.shards=2", "execution.runner=processes",
                "execution.workers=2", "execution.ranks=2")
    return {stage: (one[stage], two[stage]) for stage in STAGES}


# --- read off for what was not measured ---

FLOPS, FLOAT32, SHARE = 989e12, 67e12, 0.4  # of an H100 by its data sheet: bfloat16, dense; float32; what of it a pass gets
BANDWIDTH, LINKS, MEMORY = 3.35e12, 450e9, 80e9  # bytes a second of its memory, and to other GPUs of the machine; bytes
TO_CPU = 20e9  # bytes a second, of memory that is not pinned; assumed
OBJECTS = 1e9  # bytes a second that a machine writes to S3
A_MACHINE = 8  # GPUs
ROWS, ASKED, ANSWERED, STEPS = 1024, 256, 512, 4  # responses, tokens of a prompt and a response, an epoch's optimizer steps
AROUND, MICRO_BATCH = 0.1, 4096  # what of a model is not in its layers; tokens


@dataclass(frozen=True)
class Large:
    name: str
    parameters: float
    width: float  # bytes of a weight while it is read
    trained: float  # the share of the parameters that is trained
    fsdp: bool = False

    @property
    def memory(self) -> float:
        """Of a rank: what is read, once where adapters share it, and weights, gradients and moments of actor and critic;
        with `fsdp` shards of the latter, or, in rank 0 while it scores, the weights of three models."""
        trained = 2 * 16 * self.parameters * self.trained
        if self.fsdp:
            return max(3 * 4 * self.parameters, trained * (AROUND + (1 - AROUND) / A_MACHINE))
        return trained + (0 if self.trained == 1 else self.parameters * self.width)

    @property
    def checkpoint(self) -> float:
        return 2 * 12 * self.parameters * self.trained


LARGE = [Large("1B, all weights", 1e9, 4, 1), Large("6B, all weights, `fsdp`", 6e9, 4, 1, fsdp=True),
         Large("8B, all weights", 8e9, 4, 1), Large("8B, adapters", 8e9, 2, 0.005),
         Large("70B, adapters, nf4", 70e9, 0.5, 0.005)]


def read_off() -> list[str]:
    head = ("model", "GPUs", "`rollout`", "`reference`, `reward`, `value`", "`ppo`", "memory of a rank", "a checkpoint",
            "to S3")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    tokens = ROWS * (ASKED + ANSWERED)
    for model in LARGE:
        for gpus in (A_MACHINE, 32 * A_MACHINE):
            passed = 2 * model.parameters * tokens / (SHARE * (FLOAT32 if model.width == 4 else FLOPS))
            rollout = ANSWERED * model.parameters * model.width / BANDWIDTH + passed / gpus
            factor = 3 if model.trained == 1 else 2  # adapters need no gradients of the weights below them
            moved = 16 * 2 * model.parameters * model.trained
            update = 2 * factor * passed / A_MACHINE + STEPS * (moved / BANDWIDTH + moved / 2 / LINKS)
            if model.fsdp:  # layers come for both passes, gradients go; moments come from rank 0 and go back
                update += tokens / MICRO_BATCH / A_MACHINE * 3 * 2 * 4 * model.parameters / LINKS
                update += 2 * 2 * 8 * model.parameters / TO_CPU
            fits = f"{model.memory / 1e9:.0f} GB" + ("" if model.memory < MEMORY else " **does not fit**")
            lines.append(f"| {model.name} | {gpus} | {rollout:.1f} s | {3 * passed / gpus:.1f} s | {update:.1f} s | {fits} "
                         f"| {model.checkpoint / 1e9:.1f} GB | {model.checkpoint / OBJECTS:.0f} s |")
    return lines


def write(mark: str, lines: list[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(lines)
    print(table, flush=True)
    put = re.sub(f"(?s)(<!-- {mark} -->\n).*?(<!-- end -->)", lambda marks: marks[1] + table + "\n" + marks[2], text)
    PAGE.write_text(put, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
