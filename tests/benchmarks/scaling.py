"""What a stage costs, by the work that it does, and what several processes save: `make scaling`, a quarter of an hour.

GPT-2s of several sizes are trained here for two iterations. Seconds and bytes of each stage of the second are read from its
manifest, and a line is fitted for each:

    seconds = a + b·u + c·F

F: floating point operations, 2·P a token forwards and 4·P backwards, of P parameters; u: what is done one after the other,
the sampled steps of `rollout`, the optimizer's steps times 16·P bytes in `ppo`. Errors are those on sizes that the fit has
not seen. Then the same stages by two processes of one thread beside one of them. Writes the tables of docs/scaling.md.
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
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        found = {size: measured(place / f"run{number}", size) for number, size in enumerate(FITTED + UNSEEN)}
        fits = {stage: fit([(size, found[size]) for size in FITTED], stage) for stage in STAGES}
        beside = spread(place, Size(384, 6, 64, 32))
    lines = ["| stage | seconds | GFLOP/s | error on sizes not seen: median, most |", "|---|---|---|---|"]
    for stage, line in fits.items():
        errors = [abs(line @ work(size, found[size], stage) / found[size][stage]["seconds"] - 1) for size in UNSEEN]
        terms = f"{line[0]:.3f} + {line[1]:.2e}·u + {line[2]:.2e}·F"
        rate = f"{1e-9 / line[2]:.0f}" if line[2] > 0 else ""
        lines.append(f"| `{stage}` | {terms} | {rate} | {statistics.median(errors):.0%}, {max(errors):.0%} |")
    write("costs", lines)
    lines = ["| stage | one process, s | two shards or ranks, s | faster by |", "|---|---|---|---|"]
    lines += [f"| `{stage}` | {one:.2f} | {two:.2f} | {one / two:.2f} |" for stage, (one, two) in beside.items()]
    write("beside", lines)
    return 0


def train(place: Path, size: Size, *settings: str) -> dict[str, Any]:
    """Stage → what its manifest of the second iteration says, and `parameters`."""
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
    subprocess.run([sys.executable, "-m", "flows.cli.main", "train", place / "example", "--iterations", "2", "--store",
                    store, "--quiet", *(w for one in ("tracking.enabled=false", *settings) for w in ("--set", one))],
                   check=True, cwd=ROOT)
    from flows.runs.run import open_run
    from flows.store.store import Store
    from schemas.artifacts import call_of

    run = open_run(Store(str(store)), "example")
    found: dict[str, Any] = {"parameters": made.module.num_parameters()}
    for stage, ref in run.state(2).artifacts.items():
        manifest = run.store.manifest(ref)
        found[stage] = {"seconds": manifest.seconds, "bytes": manifest.bytes}
        if manifest.environment.execution["shards"] > 1 and stage in STAGES and stage != "ppo":
            shards = [run.store.manifest(call.recipe.ref).seconds for call in call_of(manifest, str(store)).shards()]
            found[stage]["seconds"] += max(shards)
    return found


def measured(place: Path, size: Size) -> dict[str, Any]:
    found = train(place, size)
    print(size, {stage: round(found[stage]["seconds"], 3) for stage in STAGES}, flush=True)
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
    seconds = np.array([found[stage]["seconds"] for _, found in sizes])
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
    return {stage: (one[stage]["seconds"], two[stage]["seconds"]) for stage in STAGES}


def write(mark: str, lines: list[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(lines)
    print(table, flush=True)
    put = re.sub(f"(?s)(<!-- {mark} -->\n).*?(<!-- end -->)", lambda marks: marks[1] + table + "\n" + marks[2], text)
    PAGE.write_text(put, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
