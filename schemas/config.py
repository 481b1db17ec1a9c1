"""How settings are read: from a YAML file's mapping to a checked config, and what differs between two."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from schemas.control import ControlConfig
from schemas.errors import ConfigError
from schemas.language import LanguageConfig
from schemas.presets import merged
from schemas.reward_settings import ComponentConfig
from schemas.settings import RunConfig, Settings, later_settings


def parse_config(data: Any, where: str) -> RunConfig:
    """The config from what a YAML file holds, a control task's if it names an environment.

    Raises `ConfigError` with one line naming `where` and the key.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(data).__name__}")
    kind = ControlConfig if "environment" in data else LanguageConfig
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_line(error, kind)}") from None


def config_of_record(values: dict[str, Any], where: str) -> RunConfig:
    """The config of a run that is there: settings that it lacks, since they were added later, are as it was before."""
    kind = ControlConfig if "environment" in values else LanguageConfig
    return parse_config(merged(_before(kind, values), values), where)


def like_record(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config; settings that a run's lacks, since they were added later, are as it was before, if not written out."""
    before = {name: {key: value for key, value in section.items() if key not in getattr(config, name).model_fields_set}
              for name, section in _before(type(config), values).items()}
    return parse_config(merged(config.model_dump(mode="json"), before), "")


def _before(kind: type[RunConfig], values: dict[str, Any]) -> dict[str, Any]:
    """By section, what held before there were the settings that `values` lacks."""
    found = {}
    for name, field in kind.model_fields.items():
        classes = [part for part in (get_args(field.annotation) or (field.annotation,)) if isinstance(part, type)]
        section = next((part for part in classes if issubclass(part, Settings)), None)
        if section is not None and isinstance(there := values.get(name), dict):
            missing = {key: before for key, before in later_settings(section).items() if key not in there}
            found |= {name: missing} if missing else {}
    return found


def _first_line(error: ValidationError, kind: type[RunConfig]) -> str:
    """One finding: key, what was expected, what was found. An unknown key first, since it is why another is missing."""
    findings = error.errors(include_url=False)
    finding = next((f for f in findings if f["type"] == "extra_forbidden"), findings[0])
    key = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "extra_forbidden":
        return f"{key}: unknown key{_hint(finding['loc'], kind)}"
    if finding["type"] == "missing":
        return f"{key}: missing{_other_kind(key, kind)}"
    if finding["type"] == "value_error":
        reason = str(finding["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    message = finding["msg"].removeprefix("Input ").rstrip(".")
    return f"{key}: {message}, found {finding['input']!r}"


def _other_kind(key: str, kind: type[RunConfig]) -> str:
    """What else the config may be of."""
    if kind is LanguageConfig and key == "data":
        return ("; a language model's run needs its files there (data: {prompts: …, heldout_prompts: …}), a control task an "
                "environment instead (environment: {id: CartPole-v1})")
    return ""


def _hint(path: tuple, kind: type[RunConfig]) -> str:
    """What may be meant by an unknown key."""
    near = difflib.get_close_matches(str(path[-1]), _known_keys(path[:-1], kind), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    if kind is ControlConfig and path[-1] in _known_keys(path[:-1], LanguageConfig):
        return "; it is a language model's, and the section `environment` makes this a control task"
    if kind is LanguageConfig and path[-1] in _known_keys(path[:-1], ControlConfig):
        return "; it is a control task's, and there is no section `environment`"
    return ""


def _known_keys(path: tuple, kind: type[RunConfig]) -> list[str]:
    """The keys a section has; none where the path leads into a free mapping."""
    section: Any = kind
    for part in path:
        field = section.model_fields.get(part)
        kinds = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), ComponentConfig)
    return list(section.model_fields)


def apply_settings(data: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Puts each `a.b=value` into the nested mapping. Raises `ConfigError` on one that is not of that form."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        *sections, last = key.split(".")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting}: expected key=value, for example ppo.learning_rate=1e-5")
        place = data
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"--set {setting}: {section} is a value, not a section")
        place[last] = _value(value)
    return data


def _value(text: str) -> Any:
    """A setting's value: YAML, and numbers such as 1e-5, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except Exception:  # no YAML, or a tag that makes nothing of its value
        return text


def differences(stored: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: stored → other` for each setting in which two dumped configs differ."""
    lines = []
    for key in sorted({*stored, *other}):
        a, b, path = stored.get(key), other.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{path}.")
        elif a != b:
            lines.append(f"{path}: {a} → {b}")
    return lines
