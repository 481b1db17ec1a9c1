"""Writes prompts.jsonl and heldout_prompts.jsonl: requests about things that are seldom praised.

    python data/smollm2/make_prompts.py
"""

from __future__ import annotations

import json
from pathlib import Path

FORMS = ("Describe {} in one sentence.", "Write one sentence about {}.", "What is {} like? Answer in one sentence.",
         "Tell me in one sentence how you feel about {}.")
THINGS = (
    "a rainy Monday morning", "a broken umbrella", "a long queue at the post office", "a visit to the dentist",
    "a delayed train", "an empty fridge", "a traffic jam", "a lost key", "a cold cup of coffee", "a noisy neighbour",
    "a flat tyre", "a missed bus", "a burnt dinner", "a muddy football match", "a tax form", "a leaking roof",
    "an old sofa", "a winter without snow", "a long meeting", "a forgotten birthday", "a stubborn cough", "a dull lecture",
    "a crowded lift", "a torn coat",
)
HELD_OUT = ("a broken umbrella", "a delayed train", "a dull lecture", "a cold cup of coffee")  # things of no training prompt


def rows(things: tuple[str, ...]) -> str:
    return "".join(json.dumps({"prompt": form.format(thing)}) + "\n" for thing in things for form in FORMS)


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "prompts.jsonl").write_text(rows(tuple(thing for thing in THINGS if thing not in HELD_OUT)))
    (folder / "heldout_prompts.jsonl").write_text(rows(HELD_OUT))
