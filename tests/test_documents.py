"""Documents: links lead somewhere. Pages that teach: commands print what is quoted, both languages say the same."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(page.name for page in (ROOT / "docs" / "en").glob("*.md"))
DOCUMENTS = sorted(str(page.relative_to(ROOT)) for pattern in ("*.md", "docs/**/*.md", "data/*/README.md")
                   for page in ROOT.glob(pattern))
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def text_of(language: str, page: str) -> str:
    return (ROOT / "docs" / language / page).read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """As GitHub makes an anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def outline(text: str) -> list[tuple[str, int]]:
    """What a page consists of, in order: headings with their depth, formulas, tables with their rows, blocks of commands."""
    found = []
    for block in re.split(r"\n\s*\n", FENCE.sub("\n\n```\n\n", text)):
        block = block.strip()
        if heading := re.match(r"(#+) ", block):
            found.append(("heading", len(heading[1])))
        elif block.startswith("$$"):
            found.append(("formula", 1))
        elif block.startswith("|"):
            found.append(("table", block.count("\n")))
        elif block == "```":
            found.append(("commands", 1))
    return found


def test_there_are_the_same_pages_in_both_languages():
    chinese = sorted(page.name for page in (ROOT / "docs" / "zh").glob("*.md"))
    assert PAGES and chinese == PAGES


PAIRS = [(f"docs/en/{page}", f"docs/zh/{page}") for page in PAGES] + [("README.md", "README.zh.md")]


@pytest.mark.parametrize("pair", PAIRS)
def test_both_languages_say_the_same(pair):
    english, chinese = ((ROOT / page).read_text(encoding="utf-8").replace("README.zh.md", "README.md") for page in pair)
    assert outline(english) == outline(chinese)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    for pattern in (r"`([^`\n]+)`", r"\]\((?!#)([^)#]+)", r"<(https?://[^>]+)>", r"\d+(?:\.\d+)?"):
        found = [sorted(re.findall(pattern, prose_of(text))) for text in (english, chinese)]
        assert found[0] == found[1], pattern


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    place = ROOT / page
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", prose_of(place.read_text(encoding="utf-8"))):
        file = (place.parent / target).resolve() if target else place
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", prose_of(file.read_text(encoding="utf-8")), re.M)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


def commands() -> list[tuple[str, str]]:
    """Commands that a page shows with what they print."""
    blocks = [block for page in PAGES for _, block in FENCE.findall(text_of("en", page)) if block.startswith("$ ")]
    return [tuple(block[2:].split("\n", 1)) for block in blocks]


@pytest.mark.parametrize("command, expected", commands())
def test_a_command_prints_what_the_page_says(command, expected):
    program, *arguments = shlex.split(command)
    programs = {"python": [sys.executable], "baton": [sys.executable, "-m", "flows.cli.main"]}
    done = subprocess.run([*programs[program], *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == expected


@pytest.mark.parametrize("language", ["en", "zh"])
def test_exercises_are_those_of_the_page(language):
    script = [sys.executable, "docs/examples/exercises.py", *(["--zh"] if language == "zh" else [])]
    questions = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert questions.count("\n") == 5 and questions in text_of(language, "6-exercises.md")


@pytest.mark.parametrize("number, right, wrong, way", [
    (1, "1.5", "0.67", "not 0.67. The ratio is the new probability over the old one"), (2, "0", "-1.5", "it is flat"),
    (3, "1.5", "0", "the unclipped side"), (4, "0.125", "0.5", "0 + 0.5 · 0.25"),
    (5, "-0.05", "0.05", "−0.1 · (−1.0 + 1.5)"),
])
def test_an_answer_is_checked(number, right, wrong, way):
    """Against numbers worked by hand; a wrong one is told the way."""
    script = [sys.executable, "docs/examples/exercises.py", str(number)]
    assert subprocess.run([*script, right], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "right\n"
    refused = subprocess.run([*script, wrong], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and way in refused.stdout


@pytest.mark.parametrize("number, given", [("4", "0.13"), ("4", "1/8"), ("5", "−0.05")])
def test_an_answer_may_be_rounded_a_fraction_or_have_the_minus_of_the_page(number, given):
    script = [sys.executable, "docs/examples/exercises.py", number, given]
    assert subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "right\n"


def test_what_is_no_number_is_said():
    script = [sys.executable, "docs/examples/exercises.py", "1", "1,5"]
    refused = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "expected a number, such as -0.05 or 3/2, got '1,5'" in refused.stderr


def test_every_command_is_on_its_page():
    from flows.cli import main  # noqa: F401 - which brings them
    from flows.cli.command import baton

    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert baton.commands and [name for name in baton.commands if f"baton {name} " not in page] == []
