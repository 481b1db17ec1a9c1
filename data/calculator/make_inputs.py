"""Writes the example's files: products of two numbers of two digits, those of `heldout_prompts.jsonl` in no other file. A
demonstration asks the calculator, is told the product, and repeats it.

    python data/calculator/make_inputs.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
HELDOUT, DEMONSTRATIONS = 128, 2000


def files() -> dict[str, list[dict[str, object]]]:
    """Name → rows."""
    products = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(products)
    heldout, rest = products[:HELDOUT], products[HELDOUT:]
    return {
        "heldout_prompts.jsonl": [{"prompt": f"{a}*{b}=", "answer": a * b} for a, b in heldout],
        "prompts.jsonl": [{"prompt": f"{a}*{b}=", "answer": a * b} for a, b in rest[DEMONSTRATIONS:]],
        "demonstrations.jsonl": [{"prompt": f"{a}*{b}=", "completion": f"[{a}*{b}]{a * b};{a * b}"}
                                 for a, b in rest[:DEMONSTRATIONS]]}


if __name__ == "__main__":
    for name, rows in files().items():
        (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
