"""The embedded example: its files are what its grammar writes, and gold scores by hand."""

import json
from pathlib import Path

import pytest
from conftest import module_of

FOLDER = Path(__file__).parents[1] / "data" / "reviews"


@pytest.fixture(scope="module")
def grammar():
    return module_of(FOLDER / "grammar.py")


def test_the_files_are_what_the_grammar_writes(grammar):
    for file, rows in grammar.files().items():
        stored = [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
        assert stored == rows, file


@pytest.mark.parametrize("response, expected", [
    (" was superb. The sauce was bland.", (2 - 1) / 2),
    (" was superb.", 2 / 2),  # counted as two sentences
    (" was truly superb and fresh. I hated the bread. It came in a small blue bowl.", ((2 + 1) / 2 - 2 + 0) / 3),
    (" was superb. The sauce was bland. The sauce was bland.", (2 - 1 - 2) / 3),  # said twice
    (" was superb. The sauce was", (2 - 2) / 2),  # cut
    (" was superb. The plot was gripping.", (2 - 2) / 2),  # of another topic
    (" was superb. The sauce was Bland.", (2 - 2) / 2),  # a capital
    (" was sauce the.", -2 / 2),
    ("", -2 / 2),
])
def test_gold_by_hand(grammar, response, expected):
    (score,) = grammar.gold(["The fish stew at Mira's"], [response])
    assert score == pytest.approx(expected)


def test_gold_reads_whatever_a_model_writes(grammar):
    """Words and capitals at random, in any order: a number, never an error."""
    import random
    words = " ".join(row["completion"] for row in grammar.files()["demonstrations.jsonl"][:50]).split(" ")
    draw = random.Random(1)
    for _ in range(500):
        text = " ".join(draw.choice([str, str.upper, str.capitalize])(draw.choice(words)) for _ in range(12))
        (score,) = grammar.gold(["The fish stew at Mira's"], [text])
        assert -2 <= score <= 2


def test_every_demonstration_can_be_read(grammar):
    rows = [json.loads(line) for line in (FOLDER / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 4000 and len({row["completion"] for row in rows}) > 3500
    for row in rows:
        topic, sentences = grammar.topic_of(row["prompt"]), row["completion"].strip().split(".")[:-1]
        for i, sentence in enumerate(sentences):
            assert grammar.sentence_value(topic, sentence.strip(), first=i == 0) is not None, row


def test_chosen_is_better_and_held_out_subjects_are_new(grammar):
    def rows(role):
        return [json.loads(line) for line in (FOLDER / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()]

    for row in rows("pairs") + rows("heldout_pairs"):
        assert grammar.score(row["prompt"], row["chosen"]) > grammar.score(row["prompt"], row["rejected"])
    training = {row["prompt"] for role in ("prompts", "demonstrations", "pairs") for row in rows(role)}
    assert not training & {row["prompt"] for role in ("heldout_prompts", "heldout_pairs") for row in rows(role)}
