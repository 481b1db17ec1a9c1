"""Writes the inputs: lists of words to be reversed, 40 of them with the answer. The same files each time."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rewards import answer

HERE = Path(__file__).parent
NOUNS = """
apple arrow bag ball bell bird boat bone book bottle bowl box bread bridge brush bucket button cake candle car card
castle cat chair cheese clock cloud coat coin cow cup desk dog door dress drum duck egg eye feather fence fire fish flag
floor flower fork fox frog garden gate glass glove goat grape grass hammer hat hill honey horse house island key king
kite knife lamp leaf letter lion lock map milk moon mouse nail nest net nose nut ocean onion oven owl paint paper pear
pen pig pillow plate pond pot queen rabbit rain ring river road rock roof rope rose sail salt sand scarf sea seed sheep
ship shirt shoe snow soap sock song spoon star stone stove sun table tail tent tiger tower town train tree truck tub
turtle vase wall water wheel wind window wolf wood wool yard
"""
WORDS = NOUNS.split()
COUNTS = {"prompts": 400, "heldout_prompts": 100, "demonstrations": 40}


def main() -> None:
    """No list is in two of the files."""
    draw, seen = random.Random(0), set()
    for name, count in COUNTS.items():
        rows = []
        while len(rows) < count:
            words = tuple(draw.sample(WORDS, draw.randint(3, 6)))
            if words not in seen:
                seen.add(words)
                prompt = f"Words: {' '.join(words)}\nBackwards:"
                rows.append({"prompt": prompt} | ({"completion": f" {answer(prompt)}"} if name == "demonstrations" else {}))
        (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main()
