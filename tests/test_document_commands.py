"""Commands that the documents show: each is one that there is, with options and settings that there are."""

import re
import shlex
import tomllib
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from flows.cli.command import baton
from flows.cli.main import run_command  # noqa: F401 - which brings the commands
from schemas.control import ControlConfig
from schemas.language import LanguageConfig

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"```\w*\n(.*?)```|^((?:    .+\n)+)", re.S | re.M)
SHOWN = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("data/*/README.md"))]


def in_blocks(page: Path) -> list[list[str]]:
    """The words of each line of a block that calls `baton`; what a shell does with them left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for block in FENCE.findall(text) for line in "".join(block).splitlines()]
    return [_words(line) for line in lines if line.startswith("baton ")]


def in_prose(page: Path) -> list[list[str]]:
    """Between backticks, where a command may be named without all that it takes."""
    return [_words(line) for line in re.findall(r"`(baton [^`\n]+)`", page.read_text(encoding="utf-8"))]


def _words(line: str) -> list[str]:
    return [word for word in shlex.split(re.sub(r"\s(#|> |\||&).*", "", line))[1:] if word != "…"]


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in SHOWN if in_blocks(page)])
def test_commands_are_those_that_there_are(page):
    for words in in_blocks(ROOT / page):
        context = baton.commands[words[0]].make_context(words[0], words[1:])
        for setting in context.params.get("settings", ()):
            assert "=" in setting and is_a_setting(setting.partition("=")[0].split(".")), words


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in SHOWN if in_prose(page)])
def test_commands_in_prose_are_those_that_there_are(page):
    for name, *words in in_prose(ROOT / page):
        options = baton.params if name.startswith("-") or name == "COMMAND" else baton.commands[name].params
        there = {form for option in options for form in option.opts} | {"--help", "-h"}
        assert {word.partition("=")[0] for word in [name, *words] if word.startswith("--")} <= there, words


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in SHOWN])
def test_targets_scripts_and_extras_are_those_that_there_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = "\n".join(["".join(block) for block in FENCE.findall(text)] + re.findall(r"`([^`\n]+)`", text))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:\$ )?\s*make ([a-z0-9-]+)", shown, re.M)) <= targets
    scripts = re.findall(r"\bpython ((?:docs|data|tests|flows)/\S+\.py)", shown)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for names in re.findall(r"baton-ppo\[([\w,-]+)\]", text) for name in names.split(",")} <= set(extras)


SECTIONS = LanguageConfig.model_fields.keys() | ControlConfig.model_fields.keys()
OTHERS = {"reward_model.ground_truth"}  # a column of verl's files
SETTING = re.compile(rf"`((?:{'|'.join(SECTIONS)})(?:\.\w+)+)[:=`]")


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in SHOWN if SETTING.search(page.read_text("utf-8"))])
def test_settings_in_prose_are_those_that_there_are(page):
    named = {name for name in SETTING.findall((ROOT / page).read_text(encoding="utf-8")) if not name.endswith(".py")}
    assert sorted(name for name in named - OTHERS if not is_a_setting(name.split("."))) == []


def is_a_setting(keys: list[str]) -> bool:
    return any(_is_below(config, keys) for config in (LanguageConfig, ControlConfig))


def _is_below(kind: object, keys: list[str]) -> bool:
    """Whether a value of that type has the keys, one below the other; a mapping has all."""
    if not keys:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return keys[0] in kind.model_fields and _is_below(kind.model_fields[keys[0]].annotation, keys[1:])
    if typing.get_origin(kind) in (dict, typing.get_origin(typing.Mapping)) or kind is dict:
        return True
    return any(_is_below(part, keys) for part in typing.get_args(kind))


@pytest.mark.parametrize("keys, there", [
    ("ppo.learning_rate", True), ("ppo.learning_rat", False), ("environment.id", True), ("reward.components.a.source", True),
    ("execution.shards", True), ("nothing", False), ("kl.coef.more", False),
])
def test_a_setting_is_found_or_not(keys, there):
    assert is_a_setting(keys.split(".")) is there
