"""Pages that stand alone: one HTML file with its style, its script and its data, and nothing from a network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"


def page(template: str, script: str, data: dict[str, Any], **more: Any) -> str:
    """The page of a template; `data` is what its script reads. Text of either is text wherever it stands, never markup."""
    scripts = "".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", script))
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(
        data=data, json=Markup(as_json(data)), css=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup(scripts), **more)


def as_json(data: Any) -> str:
    """For a script element, which would end at `</script>`; numbers to five digits, what is no number as null."""
    text = json.dumps(_short(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace(
        "\u2029", "\\u2029")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
