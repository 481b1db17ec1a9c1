"""The table of numerics says what the code does: its lines are there, its defaults are the defaults, nothing is left out."""

import re
from pathlib import Path

import pytest
import yaml

from schemas.control import ControlConfig
from schemas.language import LanguageConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", TEXT)
LANGUAGE, CONTROL = TEXT.split("## Control tasks")
PARTS = {LanguageConfig: LANGUAGE, ControlConfig: CONTROL}
DEFAULTS = [(kind, *found) for kind, part in PARTS.items() for found in re.findall(r"`(\w+)\.(\w+)` = ([\w.+-]+)", part)]


@pytest.mark.parametrize("code, file, line", LINKS)
def test_the_line_holds_what_the_table_quotes(code, file, line):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    places = [number for number, text in enumerate(lines, 1) if code in text]
    assert int(line) in places, f"{file}: {code!r} is in lines {places}"


@pytest.mark.parametrize("config, section, key, value", DEFAULTS)
def test_the_default_is_the_default(config, section, key, value):
    kind = config.model_fields[section].annotation
    kinds = [kind, *getattr(kind, "__args__", ())]
    settings = next(k for k in kinds if hasattr(k, "model_fields"))
    assert settings.model_fields[key].default == (float(value) if "e-" in value else yaml.safe_load(value))


@pytest.mark.parametrize("config, sections", [
    (LanguageConfig, ("rollout", "reward", "kl", "gae", "ppo")), (ControlConfig, ("policy", "rollout", "reward"))])
def test_every_choice_is_in_the_table(config, sections):
    named = {(section, key) for section, key in re.findall(r"`(\w+)\.(\w+)[`: ]", PARTS[config])}
    for section in sections:
        settings = config.model_fields[section].annotation.model_fields
        assert {key for s, key in named if s == section} >= set(settings), section
