"""Writes the example's files: sums of two numbers below 100, those of `heldout_prompts.jsonl` in no other file.

    python data/arithmetic/make_inputs.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
HELDOUT, DEMONSTRATIONS = 256, 3000


def files() -> dict[str, list[dict[str, object]]]:
    """Name → rows."""
    sums = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(sums)
    heldout, rest = sums[:HELDOUT], sums[HELDOUT:]
    return {
        "heldout_prompts.jsonl": [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in heldout],
        "prompts.jsonl": [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in rest],
        "demonstrations.jsonl": [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in rest[:DEMONSTRATIONS]]}


if __name__ == "__main__":
    for name, rows in files().items():
        (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
